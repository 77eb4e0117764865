// Internal to worker/handover (the one header here with Cap'n Proto types): the objects that the supervisor
// and holdfastctl call. They live on the event loop's thread and hand every call to a SerialExecutor.
#pragma once

#include <kj/vector.h>

#include <atomic>
#include <string>
#include <vector>

#include "schema/admin.capnp.h"
#include "schema/handover.capnp.h"
#include "schema/rpc.h"
#include "worker/handover/serial_executor.h"
#include "worker/handover/supervisor_link.h"

namespace holdfast::handover {

// Set by SupervisorLink::Start before the executors open.
struct Callbacks {
  std::atomic<WorkerActions*> actions{nullptr};
  std::atomic<AdminActions*> admin{nullptr};
};

// `executor` carries out everything but Distrust, for which there is `slow`.
schema::Worker::Client MakeWorkerServer(SerialExecutor* executor, SerialExecutor* slow,
                                        const Callbacks* callbacks);
schema::WorkerAdmin::Client MakeAdminServer(SerialExecutor* executor, const Callbacks* callbacks);

std::string TextOf(capnp::Text::Reader text);
// A vault id: 16 bytes on the wire, 32 hex digits for the rest of the worker.
std::string HexOf(capnp::Data::Reader data);
// Dups the descriptor that a capability carries into *out; invalid when it carries none.
kj::Promise<void> TakeFd(schema::Descriptor::Client descriptor, UniqueFd* out);
// All of a page. `from` must stay until the promise has resolved.
kj::Promise<void> TakeLedgers(capnp::List<schema::OldLedger>::Reader from, std::vector<OldLedger>* out);
void TakePipes(capnp::List<schema::PipePair>::Reader from, std::vector<PipePair>* out,
               kj::Vector<kj::Promise<void>>* promises);
// The entry without its descriptor.
void FillInfo(schema::MountEntry::Reader from, MountEntry* to);

// A status as the exception that Cap'n Proto carries to the caller, and back.
kj::Exception ToException(const absl::Status& status);
absl::Status FromException(const kj::Exception& exception);

}  // namespace holdfast::handover
