// Internal to worker/handover (the one header here with Cap'n Proto types): the objects that the supervisor
// and holdfastctl call. They live on the event loop's thread and hand every call to a SerialExecutor.
#pragma once

#include <atomic>

#include "schema/admin.capnp.h"
#include "schema/handover.capnp.h"
#include "worker/handover/serial_executor.h"
#include "worker/handover/supervisor_link.h"

namespace holdfast::handover {

// Set by SupervisorLink::Start before the executors open.
struct Callbacks {
  std::atomic<WorkerActions*> actions{nullptr};
  std::atomic<AdminActions*> admin{nullptr};
};

schema::Worker::Client MakeWorkerServer(SerialExecutor* executor, const Callbacks* callbacks);
schema::WorkerAdmin::Client MakeAdminServer(SerialExecutor* executor, const Callbacks* callbacks);

// A status as the exception that Cap'n Proto carries to the caller, and back.
kj::Exception ToException(const absl::Status& status);
absl::Status FromException(const kj::Exception& exception);

}  // namespace holdfast::handover
