// Between Cap'n Proto's types and ours.
#pragma once

#include <capnp/capability.h>
#include <kj/async-io.h>
#include <kj/exception.h>

#include <memory>
#include <string>

#include "common/status.h"
#include "schema/control.capnp.h"
#include "schema/handover.capnp.h"
#include "supervisor/vault.h"

namespace holdfast::supervisor {

class Supervisor;

std::string String(capnp::Data::Reader data);
kj::ArrayPtr<const kj::byte> Bytes(const std::string& text);

// For callers to read: nothing but the reason.
kj::Exception Failed(const std::string& reason);
[[noreturn]] void Throw(const absl::Status& status);
std::string Describe(const kj::Exception& exception);

// A capability that carries `fd` and keeps it open.
schema::Descriptor::Client MakeDescriptor(SharedFd fd);
void FillPipes(const Ledger& ledger, capnp::List<schema::PipePair>::Builder out);
void FillMountEntry(const Mount& mount, bool with_device, schema::MountEntry::Builder out);

// The bootstrap of a worker's connection.
capnp::Capability::Client MakeSupervisorServer(Supervisor* supervisor, uint64_t generation);
// Accepts holdfastctl's connections for ever; peers that are not root are turned away.
kj::Promise<void> ServeControl(Supervisor* supervisor, kj::ConnectionReceiver* listener);

}  // namespace holdfast::supervisor
