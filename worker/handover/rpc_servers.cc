#include "worker/handover/rpc_servers.h"

#include <kj/async.h>
#include <kj/debug.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace holdfast::handover {
namespace {

using Urgency = SerialExecutor::Urgency;

// Posts `function` to the executor; the promise (of the calling loop) gets its result. An unrun task rejects
// it.
template <typename T, typename Function>
kj::Promise<T> RunOn(SerialExecutor* executor, Function function, Urgency urgency = Urgency::kOrdinary) {
  auto pair = kj::newPromiseAndCrossThreadFulfiller<T>();
  auto fulfiller = std::make_shared<kj::Own<kj::CrossThreadPromiseFulfiller<T>>>(kj::mv(pair.fulfiller));
  executor->Post(
      [fulfiller, function = std::move(function)] {
        const kj::CrossThreadPromiseFulfiller<T>& target = **fulfiller;
        target.fulfill(function());
      },
      urgency);
  return kj::mv(pair.promise);
}

template <typename T>
T ValueOrThrow(absl::StatusOr<T> value) {
  if (!value.ok()) kj::throwFatalException(ToException(value.status()));
  return *std::move(value);
}

class WorkerServer final : public schema::Worker::Server {
 public:
  WorkerServer(SerialExecutor* executor, SerialExecutor* slow, const Callbacks* callbacks)
      : executor_(executor), slow_(slow), callbacks_(callbacks) {}

 protected:
  kj::Promise<void> serve(ServeContext context) override {
    // The parameters are kept to the end: to let go of a descriptor is a message, and reads wait.
    auto params = context.getParams();
    auto order = std::make_shared<ServeOrder>();
    order->trial = params.getTrial();
    kj::Vector<kj::Promise<void>> taken;
    if (params.hasTouched()) taken.add(TakeFd(params.getTouched(), &order->touched));
    if (params.hasTakeover() && !params.getTakeover().getMoreLedgers()) {
      Takeover& takeover = order->takeover.emplace();
      takeover.last_mount = params.getTakeover().getLastMount();
      taken.add(TakeLedgers(params.getTakeover().getLedgers(), &takeover.ledgers));
    }
    return kj::joinPromises(taken.releaseAsArray()).then([this, order] {
      auto serve = [callbacks = callbacks_, order] {
        return callbacks->actions.load()->Serve(std::move(*order));
      };
      return RunStatus(executor_, serve, Urgency::kReadsWait);
    });
  }
  kj::Promise<void> takeMetadata(TakeMetadataContext) override { return Run(&WorkerActions::TakeMetadata); }
  kj::Promise<void> park(ParkContext) override { return Run(&WorkerActions::Park, Urgency::kReadsWait); }
  kj::Promise<void> resume(ResumeContext) override {
    return Run(&WorkerActions::Resume, Urgency::kReadsWait);
  }
  kj::Promise<void> yieldMetadata(YieldMetadataContext) override {
    return Run(&WorkerActions::YieldMetadata);
  }
  kj::Promise<void> retire(RetireContext) override { return Run(&WorkerActions::Retire); }

  kj::Promise<void> ownerExited(OwnerExitedContext context) override {
    uint64_t generation = context.getParams().getGeneration();
    return RunStatus(executor_, [callbacks = callbacks_, generation] {
      return callbacks->actions.load()->OwnerExited(generation);
    });
  }

  kj::Promise<void> mountsGone(MountsGoneContext context) override {
    std::vector<uint64_t> ids;
    for (uint64_t id : context.getParams().getMountIds()) ids.push_back(id);
    return RunStatus(executor_, [callbacks = callbacks_, ids] {
      callbacks->actions.load()->MountsGone(ids);
      return absl::OkStatus();
    });
  }

  kj::Promise<void> ping(PingContext context) override {
    WorkerActions* actions = callbacks_->actions;
    if (actions == nullptr) return kj::READY_NOW;
    const Health health = actions->Ping();
    auto results = context.getResults();
    results.setLoopAgeNanos(health.loop_age_nanos);
    results.setLoop(health.loop.c_str());
    auto held = results.initHeldBack(static_cast<uint32_t>(health.held_back.size()));
    for (uint32_t i = 0; i < held.size(); ++i) held.set(i, health.held_back[i]);
    return kj::READY_NOW;
  }

  kj::Promise<void> swapAhead(SwapAheadContext context) override {
    if (WorkerActions* actions = callbacks_->actions) actions->SwapAhead(context.getParams().getOver());
    return kj::READY_NOW;
  }

  kj::Promise<void> prepare(PrepareContext) override { return Run(&WorkerActions::Prepare); }
  kj::Promise<void> endTrial(EndTrialContext) override { return Run(&WorkerActions::EndTrial); }

  kj::Promise<void> samples(SamplesContext context) override {
    const uint32_t limit = context.getParams().getLimit();
    return RunOn<absl::StatusOr<SampleSet>>(
               executor_,
               [callbacks = callbacks_, limit] { return callbacks->actions.load()->Samples(limit); })
        .then([context](absl::StatusOr<SampleSet> sampled) mutable {
          const SampleSet set = ValueOrThrow(std::move(sampled));
          auto requests = context.getResults().initRequests(static_cast<uint32_t>(set.requests.size()));
          for (uint32_t i = 0; i < requests.size(); ++i) {
            requests[i].setMountId(set.requests[i].mount_id);
            requests[i].setRequest(Bytes(set.requests[i].request));
            requests[i].setReplyDigest(Bytes(set.requests[i].reply_digest));
          }
          auto files = context.getResults().initFiles(static_cast<uint32_t>(set.files.size()));
          for (uint32_t i = 0; i < files.size(); ++i) {
            files[i].setMountId(set.files[i].mount_id);
            files[i].setKind(static_cast<schema::SampleKind>(set.files[i].kind));
            files[i].setPath(Bytes(set.files[i].path));
            files[i].setOffset(set.files[i].offset);
            files[i].setLength(set.files[i].length);
            files[i].setDigest(Bytes(set.files[i].digest));
          }
        });
  }

  kj::Promise<void> replay(ReplayContext context) override {
    std::vector<SampleRequest> requests;
    for (auto request : context.getParams().getRequests()) {
      requests.push_back(
          {request.getMountId(), String(request.getRequest()), String(request.getReplyDigest())});
    }
    return RunOn<absl::StatusOr<ReplayResult>>(executor_,
                                               [callbacks = callbacks_, requests = std::move(requests)] {
                                                 return callbacks->actions.load()->Replay(requests);
                                               })
        .then([context](absl::StatusOr<ReplayResult> replayed) mutable {
          const ReplayResult result = ValueOrThrow(std::move(replayed));
          auto different = context.getResults().initDifferent(static_cast<uint32_t>(result.different.size()));
          for (uint32_t i = 0; i < different.size(); ++i) different.set(i, result.different[i]);
          context.getResults().setSkipped(result.skipped);
        });
  }

  kj::Promise<void> addMounts(AddMountsContext context) override {
    auto list = context.getParams().getEntries();
    auto entries = std::make_shared<std::vector<MountEntry>>(list.size());
    kj::Vector<kj::Promise<void>> taken;
    for (uint32_t i = 0; i < list.size(); ++i) {
      FillInfo(list[i], &(*entries)[i]);
      taken.add(TakeFd(list[i].getDevice(), &(*entries)[i].device));
    }
    return kj::joinPromises(taken.releaseAsArray()).then([this, entries] {
      return RunStatus(executor_, [callbacks = callbacks_, entries] {
        return callbacks->actions.load()->AddMounts(std::move(*entries));
      });
    });
  }

  kj::Promise<void> distrust(DistrustContext context) override {
    auto params = context.getParams();
    const uint64_t generation = params.getGeneration();
    const std::string vault_id = HexOf(params.getVaultId());
    auto touched = std::make_shared<UniqueFd>();
    kj::Promise<void> taken = kj::READY_NOW;
    if (params.hasTouched()) taken = TakeFd(params.getTouched(), touched.get());
    return taken.then([this, generation, vault_id, touched] {
      return RunStatus(slow_, [callbacks = callbacks_, generation, vault_id, touched] {
        return callbacks->actions.load()->Distrust(generation, std::move(*touched), vault_id);
      });
    });
  }

  kj::Promise<void> heldMounts(HeldMountsContext context) override {
    const uint64_t after = context.getParams().getAfter();
    return RunOn<absl::StatusOr<Page<HeldMount>>>(
               executor_,
               [callbacks = callbacks_, after] { return callbacks->actions.load()->HeldMounts(after); })
        .then([context](absl::StatusOr<Page<HeldMount>> held) mutable {
          Page<HeldMount> page = ValueOrThrow(std::move(held));
          auto list = context.getResults().initMounts(static_cast<uint32_t>(page.elements.size()));
          for (uint32_t i = 0; i < list.size(); ++i) {
            list[i].setMountId(page.elements[i].mount_id);
            list[i].setDevice(MakeDescriptor(std::move(page.elements[i].device)));
          }
          context.getResults().setMore(page.more);
        });
  }

  kj::Promise<void> heldLedgers(HeldLedgersContext context) override {
    const uint64_t after = context.getParams().getAfter();
    return RunOn<absl::StatusOr<Page<OldLedger>>>(
               executor_,
               [callbacks = callbacks_, after] { return callbacks->actions.load()->HeldLedgers(after); })
        .then([context](absl::StatusOr<Page<OldLedger>> held) mutable {
          Page<OldLedger> page = ValueOrThrow(std::move(held));
          auto list = context.getResults().initLedgers(static_cast<uint32_t>(page.elements.size()));
          for (uint32_t i = 0; i < list.size(); ++i) {
            OldLedger& ledger = page.elements[i];
            list[i].setGeneration(ledger.generation);
            list[i].setOwnerExited(ledger.owner_exited);
            list[i].setOwnerHung(ledger.owner_hung);
            list[i].setLedger(MakeDescriptor(std::move(ledger.memory)));
            auto pipes = list[i].initRequestPipes(static_cast<uint32_t>(ledger.pipes.size()));
            for (uint32_t k = 0; k < pipes.size(); ++k) {
              pipes[k].setReadEnd(MakeDescriptor(std::move(ledger.pipes[k].read_end)));
              pipes[k].setWriteEnd(MakeDescriptor(std::move(ledger.pipes[k].write_end)));
            }
          }
          context.getResults().setMore(page.more);
        });
  }

  kj::Promise<void> heldListener(HeldListenerContext context) override {
    return RunOn<absl::StatusOr<UniqueFd>>(
               executor_, [callbacks = callbacks_] { return callbacks->actions.load()->HeldListener(); })
        .then([context](absl::StatusOr<UniqueFd> held) mutable {
          context.getResults().setSnapshotListener(MakeDescriptor(ValueOrThrow(std::move(held))));
        });
  }

 private:
  kj::Promise<void> Run(absl::Status (WorkerActions::*method)(), Urgency urgency = Urgency::kOrdinary) {
    auto call = [callbacks = callbacks_, method] { return (callbacks->actions.load()->*method)(); };
    return RunStatus(executor_, call, urgency);
  }
  static kj::Promise<void> RunStatus(SerialExecutor* executor, std::function<absl::Status()> function,
                                     Urgency urgency = Urgency::kOrdinary) {
    return RunOn<absl::Status>(executor, std::move(function), urgency).then([](const absl::Status& status) {
      if (!status.ok()) kj::throwFatalException(ToException(status));
    });
  }

  SerialExecutor* const executor_;
  SerialExecutor* const slow_;
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

  kj::Promise<void> mountPrivate(MountPrivateContext context) override {
    const std::string name = TextOf(context.getParams().getName());
    const std::string blob = String(context.getParams().getBlob());
    return RunOn<absl::StatusOr<std::string>>(
               executor_, [c = callbacks_, name, blob] { return c->admin.load()->MountPrivate(name, blob); })
        .then([context](absl::StatusOr<std::string> path) mutable {
          context.getResults().setPath(ValueOrThrow(std::move(path)).c_str());
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

schema::Worker::Client MakeWorkerServer(SerialExecutor* executor, SerialExecutor* slow,
                                        const Callbacks* callbacks) {
  return kj::heap<WorkerServer>(executor, slow, callbacks);
}

schema::WorkerAdmin::Client MakeAdminServer(SerialExecutor* executor, const Callbacks* callbacks) {
  return kj::heap<AdminServer>(executor, callbacks);
}

std::string TextOf(capnp::Text::Reader text) { return std::string(text.cStr(), text.size()); }

std::string HexOf(capnp::Data::Reader data) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string hex;
  for (kj::byte byte : data) {
    hex += kDigits[byte >> 4];
    hex += kDigits[byte & 15];
  }
  return hex;
}

kj::Promise<void> TakeFd(schema::Descriptor::Client descriptor, UniqueFd* out) {
  auto promise = descriptor.getFd();
  return promise.then([out, keep = kj::mv(descriptor)](kj::Maybe<int> fd) mutable {
    KJ_IF_MAYBE (number, fd) {
      absl::StatusOr<UniqueFd> copy = DupFd(*number);
      if (!copy.ok()) kj::throwFatalException(ToException(copy.status()));
      *out = std::move(*copy);
    }
  });
}

void TakePipes(capnp::List<schema::PipePair>::Reader from, std::vector<PipePair>* out,
               kj::Vector<kj::Promise<void>>* promises) {
  out->resize(from.size());
  for (uint32_t i = 0; i < from.size(); ++i) {
    promises->add(TakeFd(from[i].getReadEnd(), &(*out)[i].read_end));
    promises->add(TakeFd(from[i].getWriteEnd(), &(*out)[i].write_end));
  }
}

kj::Promise<void> TakeLedgers(capnp::List<schema::OldLedger>::Reader from, std::vector<OldLedger>* out) {
  out->resize(from.size());
  kj::Vector<kj::Promise<void>> promises;
  for (uint32_t i = 0; i < from.size(); ++i) {
    OldLedger& ledger = (*out)[i];
    ledger.generation = from[i].getGeneration();
    ledger.owner_exited = from[i].getOwnerExited();
    ledger.owner_hung = from[i].getOwnerHung();
    promises.add(TakeFd(from[i].getLedger(), &ledger.memory));
    TakePipes(from[i].getRequestPipes(), &ledger.pipes, &promises);
  }
  return kj::joinPromises(promises.releaseAsArray());
}

void FillInfo(schema::MountEntry::Reader from, MountEntry* to) {
  to->mount_id = from.getMountId();
  to->state = static_cast<MountState>(from.getState());
  to->path = TextOf(from.getPath());
  to->init_request = String(from.getInitRequest());
  to->init_reply = String(from.getInitReply());
  to->blob = String(from.getBlob());
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
