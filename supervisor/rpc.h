// The objects that workers, verifiers and holdfastctl call.
#pragma once

#include <capnp/capability.h>
#include <kj/async-io.h>

#include <memory>
#include <string>

#include "schema/control.capnp.h"
#include "schema/handover.capnp.h"
#include "schema/rpc.h"
#include "schema/verifier.capnp.h"
#include "supervisor/vault.h"

namespace holdfast::supervisor {

class Supervisor;

void FillPipes(const Ledger& ledger, capnp::List<schema::PipePair>::Builder out);
void FillMountEntry(const Mount& mount, bool with_device, schema::MountEntry::Builder out);
void FillTakeover(const Vault& vault, const LedgerStore& ledgers, uint64_t worker,
                  schema::Takeover::Builder out);

// What a verifier sees.
schema::MountView::Client MakeMountView(Vault* vault);
// The bootstrap of a worker's connection.
capnp::Capability::Client MakeSupervisorServer(Supervisor* supervisor, uint64_t generation);
// Accepts holdfastctl's connections for ever; peers that are not root are turned away.
kj::Promise<void> ServeControl(Supervisor* supervisor, kj::ConnectionReceiver* listener, kj::Timer* timer);

}  // namespace holdfast::supervisor
