#include "worker/handover/rpc_servers.h"

#include <kj/async.h>
#include <kj/debug.h>

#include <memory>
#include <utility>

namespace holdfast::handover {
namespace {

// Posts `function` to the executor; the promise (of the calling loop) gets its result. An unrun task rejects
// it.
template <typename T, typename Function>
kj::Promise<T> RunOn(SerialExecutor* executor, Function function) {
  auto pair = kj::newPromiseAndCrossThreadFulfiller<T>();
  auto fulfiller = std::make_shared<kj::Own<kj::CrossThreadPromiseFulfiller<T>>>(kj::mv(pair.fulfiller));
  executor->Post([fulfiller, function = std::move(function)] {
    const kj::CrossThreadPromiseFulfiller<T>& target = **fulfiller;
    target.fulfill(function());
  });
  return kj::mv(pair.promise);
}

class WorkerServer final : public schema::Worker::Server {
 public:
  WorkerServer(SerialExecutor* executor, const Callbacks* callbacks)
      : executor_(executor), callbacks_(callbacks) {}

 protected:
  kj::Promise<void> serve(ServeContext) override { return Run(&WorkerActions::Serve); }
  kj::Promise<void> takeMetadata(TakeMetadataContext) override { return Run(&WorkerActions::TakeMetadata); }
  kj::Promise<void> park(ParkContext) override { return Run(&WorkerActions::Park); }
  kj::Promise<void> resume(ResumeContext) override { return Run(&WorkerActions::Resume); }
  kj::Promise<void> yieldMetadata(YieldMetadataContext) override {
    return Run(&WorkerActions::YieldMetadata);
  }
  kj::Promise<void> retire(RetireContext) override { return Run(&WorkerActions::Retire); }

  kj::Promise<void> ownerExited(OwnerExitedContext context) override {
    uint64_t generation = context.getParams().getGeneration();
    return RunStatus(
        [callbacks = callbacks_, generation] { return callbacks->actions.load()->OwnerExited(generation); });
  }

  kj::Promise<void> mountsGone(MountsGoneContext context) override {
    std::vector<uint64_t> ids;
    for (uint64_t id : context.getParams().getMountIds()) ids.push_back(id);
    return RunStatus([callbacks = callbacks_, ids] {
      callbacks->actions.load()->MountsGone(ids);
      return absl::OkStatus();
    });
  }

  kj::Promise<void> ping(PingContext context) override {
    WorkerActions* actions = callbacks_->actions;
    context.getResults().setLoopAgeNanos(actions == nullptr ? 0 : actions->PingLoopAgeNanos());
    return kj::READY_NOW;
  }

 private:
  kj::Promise<void> Run(absl::Status (WorkerActions::*method)()) {
    return RunStatus([callbacks = callbacks_, method] { return (callbacks->actions.load()->*method)(); });
  }
  kj::Promise<void> RunStatus(std::function<absl::Status()> function) {
    return RunOn<absl::Status>(executor_, std::move(function)).then([](absl::Status status) {
      if (!status.ok()) kj::throwFatalException(ToException(status));
    });
  }

  SerialExecutor* const executor_;
  const Callbacks* const callbacks_;
};

class AdminServer final : public schema::WorkerAdmin::Server {
 public:
  AdminServer(SerialExecutor* executor, const Callbacks* callbacks)
      : executor_(executor), callbacks_(callbacks) {}

 protected:
  kj::Promise<void> layers(LayersContext context) override {
    return RunOn<std::vector<LayerInfo>>(executor_, [c = callbacks_] { return c->admin.load()->Layers(); })
        .then([context](std::vector<LayerInfo> layers) mutable {
          auto list = context.getResults().initLayers(static_cast<uint32_t>(layers.size()));
          for (uint32_t i = 0; i < list.size(); ++i) Fill(layers[i], list[i]);
        });
  }

  kj::Promise<void> snapshots(SnapshotsContext context) override {
    return RunOn<std::vector<SnapshotInfo>>(executor_,
                                            [c = callbacks_] { return c->admin.load()->Snapshots(); })
        .then([context](std::vector<SnapshotInfo> snapshots) mutable {
          auto list = context.getResults().initSnapshots(static_cast<uint32_t>(snapshots.size()));
          for (uint32_t i = 0; i < list.size(); ++i) Fill(snapshots[i], list[i]);
        });
  }

  kj::Promise<void> stats(StatsContext context) override {
    return RunOn<WorkerStats>(executor_, [c = callbacks_] { return c->admin.load()->Stats(); })
        .then([context](WorkerStats stats) mutable {
          auto fetch = context.getResults().initFetch();
          fetch.setRequests(stats.fetch_requests);
          fetch.setBytes(stats.fetch_bytes);
          fetch.setFailures(stats.fetch_failures);
          fetch.setRetries(stats.fetch_retries);
          fetch.setInFlight(stats.fetch_in_flight);
          auto cache = context.getResults().initCache();
          cache.setBytes(stats.cache_bytes);
          cache.setLimitBytes(stats.cache_limit_bytes);
          cache.setEvictedBytes(stats.cache_evicted_bytes);
          cache.setDamagedChunks(stats.cache_damaged_chunks);
          cache.setUnstoredBytes(stats.cache_unstored_bytes);
        });
  }

  kj::Promise<void> trace(TraceContext context) override {
    uint32_t limit = context.getParams().getLimit();
    return RunOn<std::vector<TraceEvent>>(executor_,
                                          [c = callbacks_, limit] { return c->admin.load()->Trace(limit); })
        .then([context](std::vector<TraceEvent> events) mutable {
          auto list = context.getResults().initEvents(static_cast<uint32_t>(events.size()));
          for (uint32_t i = 0; i < list.size(); ++i) {
            list[i].setWallNanos(events[i].wall_nanos);
            list[i].setDurationNanos(events[i].duration_nanos);
            list[i].setEvent(events[i].event.c_str());
            list[i].setDetail(events[i].detail.c_str());
          }
        });
  }

 private:
  static void Fill(const LayerInfo& layer, schema::LayerInfo::Builder out) {
    out.setDigest(layer.digest.c_str());
    out.setImage(layer.image.c_str());
    out.setCompressedBytes(layer.compressed_bytes);
    out.setContentBytes(layer.content_bytes);
    out.setCachedBytes(layer.cached_bytes);
    out.setMounts(layer.mounts);
    out.setLastAccessWallNanos(layer.last_access_wall_nanos);
    out.setFetchedBytes(layer.fetched_bytes);
    out.setTouchedBytes(layer.touched_bytes);
    out.setIndexDigest(layer.index_digest.c_str());
    out.setFiles(layer.files);
    auto folders = out.initFolders(static_cast<unsigned>(layer.folders.size()));
    for (unsigned i = 0; i < folders.size(); ++i) folders.set(i, layer.folders[i].c_str());
  }
  static void Fill(const SnapshotInfo& snapshot, schema::SnapshotInfo::Builder out) {
    out.setKey(snapshot.key.c_str());
    out.setParent(snapshot.parent.c_str());
    out.setKind(snapshot.kind.c_str());
    out.setId(snapshot.id);
    out.setLazyDigest(snapshot.lazy_digest.c_str());
    out.setCreatedWallNanos(snapshot.created_wall_nanos);
    out.setImage(snapshot.image.c_str());
  }

  SerialExecutor* const executor_;
  const Callbacks* const callbacks_;
};

}  // namespace

schema::Worker::Client MakeWorkerServer(SerialExecutor* executor, const Callbacks* callbacks) {
  return kj::heap<WorkerServer>(executor, callbacks);
}

schema::WorkerAdmin::Client MakeAdminServer(SerialExecutor* executor, const Callbacks* callbacks) {
  return kj::heap<AdminServer>(executor, callbacks);
}

kj::Exception ToException(const absl::Status& status) {
  kj::Exception::Type type = kj::Exception::Type::FAILED;
  if (status.code() == absl::StatusCode::kUnavailable) type = kj::Exception::Type::OVERLOADED;
  if (status.code() == absl::StatusCode::kUnimplemented) type = kj::Exception::Type::UNIMPLEMENTED;
  const std::string message(FromAbsl(status.message()));
  return kj::Exception(type, __FILE__, __LINE__, kj::heapString(message.data(), message.size()));
}

absl::Status FromException(const kj::Exception& exception) {
  const std::string message = exception.getDescription().cStr();
  switch (exception.getType()) {
    case kj::Exception::Type::DISCONNECTED:
      return Unavailable("supervisor: " + message);
    case kj::Exception::Type::OVERLOADED:
      return Unavailable(message);
    case kj::Exception::Type::UNIMPLEMENTED:
      return Unimplemented(message);
    case kj::Exception::Type::FAILED:
      break;
  }
  return Internal(message);
}

}  // namespace holdfast::handover
