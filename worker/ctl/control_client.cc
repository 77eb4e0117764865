#include "worker/ctl/control_client.h"

#include <capnp/message.h>
#include <capnp/rpc-twoparty.h>
#include <capnp/serialize.h>
#include <kj/async-io.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "schema/admin.capnp.h"
#include "schema/control.capnp.h"
#include "schema/mount_blob.capnp.h"

namespace holdfast::ctl {
namespace {

constexpr uint32_t kMaxFdsPerMessage = 253;
constexpr uint32_t kMountsPerPage = 200;
constexpr int kReplySeconds = 30;  // of everything but an upgrade
constexpr int kStatsSeconds = 2;   // a hung worker must not keep status waiting

std::string TextOf(capnp::Text::Reader text) { return std::string(text.cStr(), text.size()); }

absl::Status FromException(const kj::Exception& exception) {
  std::string message = exception.getDescription().cStr();
  // What the other side threw arrives behind this prefix.
  static constexpr std::string_view kPrefix = "remote exception: ";
  if (message.rfind(kPrefix, 0) == 0) message.erase(0, kPrefix.size());
  if (exception.getType() == kj::Exception::Type::DISCONNECTED) {
    return Unavailable("the supervisor closed the connection: " + message);
  }
  return FailedPrecondition(message);
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
    return Unavailable("no supervisor at " + path + ": " + strerror(errno));
  }
  return fd;
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

// A blob of a build that this holdfastctl does not understand leaves the fields empty.
void ReadBlob(capnp::Data::Reader data, MountInfo* mount) {
  if (data.size() == 0 || data.size() % sizeof(capnp::word) != 0) return;
  auto words = kj::heapArray<capnp::word>(data.size() / sizeof(capnp::word));
  memcpy(words.begin(), data.begin(), data.size());
  try {
    capnp::FlatArrayMessageReader message(words);
    auto blob = message.getRoot<schema::MountBlob>();
    mount->layer_digest = TextOf(blob.getLayerDigest());
    mount->image = TextOf(blob.getImageRef());
    mount->index_digest = TextOf(blob.getIndexDigest());
    mount->snapshot_id = blob.getSnapshotId();
  } catch (const kj::Exception&) {
    *mount = MountInfo{mount->mount_id, mount->state, mount->path, {}, {}, {}, 0};
  }
}

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
          ReadBlob(entry.getBlob(), &mount);
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

  absl::StatusOr<UpgradeResult> Upgrade(const std::string& worker_path, bool force) override {
    return Guard([&] {
      auto request = control_.upgradeRequest();
      request.setPath(worker_path.c_str());
      request.setForce(force);
      auto response = request.send().wait(io_.waitScope);
      return UpgradeResult{ToSwap(response.getSwap()), response.getChanged()};
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
          kj::throwFatalException(kj::Exception(kj::Exception::Type::FAILED, __FILE__, __LINE__,
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
    return std::unique_ptr<ControlClient>(new ClientImpl(std::move(socket)));
  } catch (const kj::Exception& exception) {
    return FromException(exception);
  }
}

}  // namespace holdfast::ctl
