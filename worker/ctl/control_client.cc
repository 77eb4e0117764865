#include "worker/ctl/control_client.h"

#include <capnp/message.h>
#include <capnp/rpc-twoparty.h>
#include <capnp/serialize.h>
#include <kj/async-io.h>
#include <linux/fuse.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "schema/admin.capnp.h"
#include "schema/control.capnp.h"
#include "schema/mount_blob.capnp.h"

// Generated server bases have a protected life cycle (kj::Own) and no virtual destructor.
#pragma GCC diagnostic ignored "-Wnon-virtual-dtor"

namespace holdfast::ctl {
namespace {

constexpr uint32_t kMaxFdsPerMessage = 253;
constexpr uint32_t kMountsPerPage = 200;
constexpr int kReplySeconds = 30;                      // of everything but an upgrade
constexpr int kStatsSeconds = 2;                       // a hung worker must not keep status waiting
constexpr int kRollbackCheckSeconds = 6;               // the supervisor allows the self-test 5
constexpr char kNoImage[] = "127.0.0.1:9/drill:none";  // of a private mount: nobody listens there

std::string TextOf(capnp::Text::Reader text) { return std::string(text.cStr(), text.size()); }

absl::Status FromException(const kj::Exception& exception) {
  std::string message = exception.getDescription().cStr();
  // What the other side threw arrives behind this prefix.
  static constexpr std::string_view kPrefix = "remote exception: ";
  const bool remote = message.rfind(kPrefix, 0) == 0;
  if (remote) message.erase(0, kPrefix.size());
  if (exception.getType() == kj::Exception::Type::DISCONNECTED) {
    // The supervisor passes on what a worker answers, and that it does no more.
    return Unavailable(remote
                           ? "the worker died over its answer, or was replaced; try again (" + message + ")"
                           : "the supervisor closed the connection: " + message);
  }
  if (exception.getType() == kj::Exception::Type::UNIMPLEMENTED) {
    return Unimplemented("the supervisor is older than this command: " + message);
  }
  if (exception.getType() == kj::Exception::Type::OVERLOADED) return DeadlineExceeded(message);
  return FailedPrecondition(message);
}

// The socket's mode keeps others out, and where that was changed the supervisor hangs up on them.
absl::Status NotRoot(const std::string& path) {
  return PermissionDenied("the supervisor at " + path + " answers only root, and this is user " +
                          std::to_string(geteuid()));
}

absl::StatusOr<UniqueFd> ConnectUnix(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) return InvalidArgument("socket path too long: " + path);
  memcpy(address.sun_path, path.c_str(), path.size() + 1);
  UniqueFd fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!fd.valid()) return ErrnoStatus(errno, "socket");
  if (connect(fd.get(), static_cast<const sockaddr*>(static_cast<const void*>(&address)), sizeof address) !=
      0) {
    if (errno == EACCES && geteuid() != 0) return NotRoot(path);
    return Unavailable("no supervisor at " + path + ": " + strerror(errno));
  }
  return fd;
}

SwapStep ToStep(schema::SwapStep::Reader from) {
  return {TextOf(from.getName()), from.getNanos(), TextOf(from.getDetail())};
}

SwapStatus ToSwap(schema::SwapStatus::Reader from) {
  SwapStatus to;
  to.kind = TextOf(from.getKind());
  to.result = TextOf(from.getResult());
  to.from_build = TextOf(from.getFromBuild());
  to.to_build = TextOf(from.getToBuild());
  to.finished_wall_nanos = from.getFinishedWallNanos();
  to.pause_nanos = from.getPauseNanos();
  to.requests_carried_over = from.getRequestsCarriedOver();
  for (auto step : from.getSteps()) to.steps.push_back(ToStep(step));
  return to;
}

SupervisorStatus ToStatus(schema::Status::Reader from) {
  SupervisorStatus to;
  to.build = TextOf(from.getSupervisorBuild());
  to.phase = TextOf(from.getPhase());
  to.state_dir = TextOf(from.getStateDir());
  to.pid = from.getSupervisorPid();
  to.started_wall_nanos = from.getStartedWallNanos();
  to.mounts_live = from.getMountsLive();
  to.mounts_detached = from.getMountsDetached();
  to.crashes = from.getCrashes();
  to.carried_over_total = from.getRequestsCarriedOverTotal();
  to.swaps = from.getSwaps();
  to.last_swap = ToSwap(from.getLastSwap());
  for (auto warning : from.getWarnings()) to.warnings.push_back(TextOf(warning));
  for (auto worker : from.getWorkers()) {
    to.workers.push_back({worker.getGeneration(), worker.getPid(), TextOf(worker.getRole()),
                          TextOf(worker.getBuild()), TextOf(worker.getExecutable()),
                          worker.getStartedWallNanos(), worker.getRequestsReceived(),
                          worker.getRequestsAnswered()});
  }
  to.hangs = from.getHangs();
  to.probation_seconds = from.getProbationSeconds();
  to.supervisor_restarts = from.getSupervisorRestarts();
  to.last_good = TextOf(from.getLastGood());
  to.spare = TextOf(from.getSpareState());
  to.state_source = TextOf(from.getStateSource());
  to.fd_store = from.getFdStore();
  to.last_death = TextOf(from.getLastDeath());
  to.last_death_wall_nanos = from.getLastDeathWallNanos();
  for (auto step : from.getInProgress()) to.in_progress.push_back(ToStep(step));
  return to;
}

const char* StateName(schema::MountState state) {
  switch (state) {
    case schema::MountState::MOUNTING:
      return "mounting";
    case schema::MountState::LIVE:
      return "live";
    case schema::MountState::DETACHED:
      return "detached";
    case schema::MountState::GONE:
      return "gone";
  }
  return "unknown";
}

std::string BytesOf(capnp::Data::Reader data) {
  auto chars = data.asChars();
  return std::string(chars.begin(), chars.size());
}

kj::ArrayPtr<const kj::byte> ToBytes(const std::string& text) {
  return kj::StringPtr(text.c_str(), text.size()).asBytes();
}

// Aligned, as Cap'n Proto wants it.
kj::Array<capnp::word> ToWords(const std::string& bytes) {
  auto words = kj::heapArray<capnp::word>(bytes.size() / sizeof(capnp::word));
  memcpy(words.begin(), bytes.data(), words.asBytes().size());
  return words;
}

// A blob of a build that this holdfastctl does not understand leaves the fields empty.
void ReadBlob(MountInfo* mount) {
  if (mount->blob.empty() || mount->blob.size() % sizeof(capnp::word) != 0) return;
  auto words = ToWords(mount->blob);
  try {
    capnp::FlatArrayMessageReader message(words);
    auto blob = message.getRoot<schema::MountBlob>();
    mount->layer_digest = TextOf(blob.getLayerDigest());
    mount->image = TextOf(blob.getImageRef());
    mount->index_digest = TextOf(blob.getIndexDigest());
    mount->snapshot_id = blob.getSnapshotId();
  } catch (const kj::Exception&) {
    mount->layer_digest.clear();
    mount->image.clear();
    mount->index_digest.clear();
    mount->snapshot_id = 0;
  }
}

// The same blob but for the image; fields of newer builds stay as they are.
std::string BlobWithoutImage(const std::string& blob) {
  auto words = ToWords(blob);
  capnp::FlatArrayMessageReader reader(words);
  capnp::MallocMessageBuilder builder;
  builder.setRoot(reader.getRoot<schema::MountBlob>());
  builder.getRoot<schema::MountBlob>().setImageRef(kNoImage);
  auto flat = capnp::messageToFlatArray(builder);
  auto chars = flat.asChars();
  return std::string(chars.begin(), chars.size());
}

class ProgressServer final : public schema::Progress::Server {
 public:
  explicit ProgressServer(const OnStep& on_step) : on_step_(on_step) {}

  kj::Promise<void> step(StepContext context) override {
    on_step_(ToStep(context.getParams().getStep()), context.getParams().getDone());
    return kj::READY_NOW;
  }

 private:
  const OnStep on_step_;
};

kj::Promise<void> TakeFd(schema::Descriptor::Client descriptor, UniqueFd* out) {
  auto promise = descriptor.getFd();
  return promise.then([out, keep = kj::mv(descriptor)](kj::Maybe<int> fd) mutable {
    KJ_IF_MAYBE (number, fd) {
      absl::StatusOr<UniqueFd> copy = DupFd(*number);
      if (copy.ok()) *out = std::move(*copy);
    }
  });
}

class ClientImpl final : public ControlClient {
 public:
  explicit ClientImpl(UniqueFd socket)
      : io_(kj::setupAsyncIo()),
        stream_(io_.lowLevelProvider->wrapUnixSocketFd(socket.Release(),
                                                       kj::LowLevelAsyncIoProvider::TAKE_OWNERSHIP)),
        network_(*stream_, kMaxFdsPerMessage, capnp::rpc::twoparty::Side::CLIENT),
        rpc_(capnp::makeRpcClient(network_)),
        control_(Bootstrap()) {}
  ~ClientImpl() noexcept override = default;

  absl::StatusOr<SupervisorStatus> Status() override {
    return Guard([&] { return ToStatus(Wait(control_.statusRequest().send()).getStatus()); });
  }

  absl::StatusOr<std::vector<MountInfo>> Mounts() override {
    return Guard([&] {
      std::vector<MountInfo> all;
      bool more = true;
      while (more) {
        auto request = control_.mountsRequest();
        request.setAfter(all.empty() ? 0 : all.back().mount_id);
        request.setLimit(kMountsPerPage);
        auto response = Wait(request.send());
        more = response.getMore() && response.getEntries().size() > 0;
        for (auto entry : response.getEntries()) {
          MountInfo mount;
          mount.mount_id = entry.getMountId();
          mount.state = StateName(entry.getState());
          mount.path = TextOf(entry.getPath());
          mount.blob = BytesOf(entry.getBlob());
          mount.init_reply = BytesOf(entry.getInitReply());
          ReadBlob(&mount);
          all.push_back(std::move(mount));
        }
      }
      return all;
    });
  }

  absl::StatusOr<std::vector<LedgerFd>> Ledgers() override {
    return Guard([&] {
      auto response = Wait(control_.ledgersRequest().send());
      std::vector<LedgerFd> ledgers;
      for (auto entry : response.getLedgers()) {
        LedgerFd ledger;
        ledger.generation = entry.getGeneration();
        ledger.owner_exited = entry.getOwnerExited();
        TakeFd(entry.getLedger(), &ledger.memory).wait(io_.waitScope);
        ledgers.push_back(std::move(ledger));
      }
      return ledgers;
    });
  }

  absl::StatusOr<std::vector<LayerInfo>> Layers() override {
    return Guard([&] {
      auto response = Wait(Admin().layersRequest().send());
      std::vector<LayerInfo> layers;
      for (auto from : response.getLayers()) {
        LayerInfo to;
        to.digest = TextOf(from.getDigest());
        to.image = TextOf(from.getImage());
        to.index_digest = TextOf(from.getIndexDigest());
        to.compressed_bytes = from.getCompressedBytes();
        to.content_bytes = from.getContentBytes();
        to.cached_bytes = from.getCachedBytes();
        to.fetched_bytes = from.getFetchedBytes();
        to.touched_bytes = from.getTouchedBytes();
        to.files = from.getFiles();
        to.mounts = from.getMounts();
        to.last_access_wall_nanos = from.getLastAccessWallNanos();
        for (auto folder : from.getFolders()) to.folders.push_back(TextOf(folder));
        layers.push_back(std::move(to));
      }
      return layers;
    });
  }

  absl::StatusOr<std::vector<SnapshotInfo>> Snapshots() override {
    return Guard([&] {
      auto response = Wait(Admin().snapshotsRequest().send());
      std::vector<SnapshotInfo> snapshots;
      for (auto from : response.getSnapshots()) {
        snapshots.push_back({TextOf(from.getKey()), TextOf(from.getParent()), TextOf(from.getKind()),
                             TextOf(from.getLazyDigest()), TextOf(from.getImage()), from.getId(),
                             from.getCreatedWallNanos()});
      }
      return snapshots;
    });
  }

  absl::StatusOr<WorkerStats> Stats() override {
    return Guard([&] {
      auto response = Wait(Admin().statsRequest().send(), kStatsSeconds);
      WorkerStats stats;
      auto fetch = response.getFetch();
      stats.fetch_requests = fetch.getRequests();
      stats.fetch_bytes = fetch.getBytes();
      stats.fetch_failures = fetch.getFailures();
      stats.fetch_retries = fetch.getRetries();
      stats.fetch_in_flight = fetch.getInFlight();
      auto cache = response.getCache();
      stats.cache_bytes = cache.getBytes();
      stats.cache_limit_bytes = cache.getLimitBytes();
      stats.cache_evicted_bytes = cache.getEvictedBytes();
      stats.cache_damaged_chunks = cache.getDamagedChunks();
      stats.cache_unstored_bytes = cache.getUnstoredBytes();
      return stats;
    });
  }

  absl::StatusOr<std::vector<TraceEntry>> Trace(uint32_t limit) override {
    return Guard([&] {
      auto request = Admin().traceRequest();
      request.setLimit(limit);
      auto response = Wait(request.send());
      std::vector<TraceEntry> events;
      for (auto from : response.getEvents()) {
        events.push_back({from.getWallNanos(), from.getDurationNanos(), TextOf(from.getEvent()),
                          TextOf(from.getDetail())});
      }
      return events;
    });
  }

  absl::StatusOr<UpgradeResult> Upgrade(const std::string& worker_path, bool force,
                                        const OnStep& on_step) override {
    return Guard([&] {
      auto request = control_.upgradeRequest();
      request.setPath(worker_path.c_str());
      request.setForce(force);
      if (on_step) request.setProgress(kj::heap<ProgressServer>(on_step));
      auto response = request.send().wait(io_.waitScope);
      return UpgradeResult{ToSwap(response.getSwap()), response.getChanged()};
    });
  }

  absl::StatusOr<SwapStatus> Rollback(const OnStep& on_step) override {
    return Guard([&] {
      auto request = control_.rollbackRequest();
      if (on_step) request.setProgress(kj::heap<ProgressServer>(on_step));
      return ToSwap(request.send().wait(io_.waitScope).getSwap());
    });
  }

  absl::StatusOr<RollbackCheck> CheckRollback() override {
    return Guard([&] {
      auto response = Wait(control_.checkRollbackRequest().send(), kRollbackCheckSeconds);
      return RollbackCheck{response.getReady(), TextOf(response.getExecutable()),
                           TextOf(response.getReason())};
    });
  }

  absl::StatusOr<std::string> MountPrivate(const std::string& name, const MountInfo& like) override {
    return Guard([&] {
      const std::string blob = BlobWithoutImage(like.blob);
      auto request = Admin().mountPrivateRequest();
      request.setName(name.c_str());
      request.setBlob(ToBytes(blob));
      return TextOf(Wait(request.send()).getPath());
    });
  }

 private:
  schema::Control::Client Bootstrap() {
    capnp::MallocMessageBuilder message(8);
    auto vat = message.getRoot<capnp::rpc::twoparty::VatId>();
    vat.setSide(capnp::rpc::twoparty::Side::SERVER);
    return rpc_.bootstrap(vat).castAs<schema::Control>();
  }

  schema::WorkerAdmin::Client Admin() {
    return Wait(control_.workerAdminRequest().send()).getAdmin().castAs<schema::WorkerAdmin>();
  }

  template <typename T>
  capnp::Response<T> Wait(capnp::RemotePromise<T>&& promise, int seconds = kReplySeconds) {
    auto timeout =
        io_.provider->getTimer().afterDelay(seconds * kj::SECONDS).then([seconds]() -> capnp::Response<T> {
          // The type marks it as ours.
          kj::throwFatalException(kj::Exception(kj::Exception::Type::OVERLOADED, __FILE__, __LINE__,
                                                kj::str("no answer within ", seconds, " s")));
          KJ_UNREACHABLE;
        });
    return kj::Promise<capnp::Response<T>>(kj::mv(promise))
        .exclusiveJoin(kj::mv(timeout))
        .wait(io_.waitScope);
  }

  template <typename Function>
  auto Guard(Function&& function) -> absl::StatusOr<decltype(function())> {
    try {
      return function();
    } catch (const kj::Exception& exception) {
      return FromException(exception);
    }
  }

  kj::AsyncIoContext io_;
  kj::Own<kj::AsyncCapabilityStream> stream_;
  capnp::TwoPartyVatNetwork network_;
  capnp::RpcSystem<capnp::rpc::twoparty::VatId> rpc_;
  schema::Control::Client control_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<ControlClient>> ControlClient::Connect(const std::string& socket_path) {
  HF_ASSIGN_OR_RETURN(UniqueFd socket, ConnectUnix(socket_path));
  try {
    std::unique_ptr<ControlClient> client(new ClientImpl(std::move(socket)));
    if (geteuid() != 0 && absl::IsUnavailable(client->Status().status())) return NotRoot(socket_path);
    return client;
  } catch (const kj::Exception& exception) {
    return FromException(exception);
  }
}

}  // namespace holdfast::ctl
