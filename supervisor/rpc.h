// The Cap'n Proto servers: they translate, and decide nothing.
#pragma once

#include <capnp/capability.h>
#include <kj/async-io.h>

#include "schema/handover.capnp.h"
#include "supervisor/ledger_store.h"
#include "supervisor/vault.h"

namespace holdfast::supervisor {

class Supervisor;

// The bootstrap of a worker's connection.
capnp::Capability::Client MakeSupervisorServer(Supervisor* supervisor, uint64_t generation);

// Accepts holdfastctl's connections for ever; peers that are not root are turned away.
kj::Promise<void> ServeControl(Supervisor* supervisor, kj::ConnectionReceiver* listener);

// A capability that carries `fd` and keeps it open.
schema::Descriptor::Client MakeDescriptor(SharedFd fd);
void FillPipes(const Ledger& ledger, capnp::List<schema::PipePair>::Builder out);

// `device` is left out when `with_device` is false.
void FillMountEntry(const Mount& mount, bool with_device, schema::MountEntry::Builder out);
void FillLedger(const Ledger& ledger, bool with_pipes, schema::OldLedger::Builder out);

}  // namespace holdfast::supervisor
