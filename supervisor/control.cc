// The control RPC (schema/control.capnp) and what it shows of the supervisor.
#include <errno.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <string>
#include <utility>

#include "common/log.h"
#include "glog/logging.h"
#include "supervisor/rpc.h"
#include "supervisor/supervisor.h"

// Generated server bases have a protected life cycle (kj::Own) and no virtual destructor.
#pragma GCC diagnostic ignored "-Wnon-virtual-dtor"

namespace holdfast::supervisor {
namespace {

constexpr unsigned kMaxMountsPerPage = 200;
constexpr unsigned kMaxLedgers = 250;  // one descriptor each; 253 fit into one message

class ControlServer final : public schema::Control::Server {
 public:
  explicit ControlServer(Supervisor* supervisor) : supervisor_(*supervisor) {}

  kj::Promise<void> status(StatusContext context) override {
    supervisor_.FillStatus(context.getResults().initStatus());
    return kj::READY_NOW;
  }

  kj::Promise<void> upgrade(UpgradeContext context) override {
    auto params = context.getParams();
    return supervisor_.Upgrade(params.getPath().cStr(), params.getForce()).then([this, context](bool changed) mutable {
      auto results = context.getResults();
      results.setChanged(changed);
      supervisor_.FillSwap(results.initSwap());
    });
  }

  kj::Promise<void> mounts(MountsContext context) override {
    auto params = context.getParams();
    unsigned limit = params.getLimit() == 0 ? kMaxMountsPerPage : std::min(params.getLimit(), kMaxMountsPerPage);
    bool more = false;
    auto page = supervisor_.vault().Page(params.getAfter(), limit, &more);
    auto results = context.getResults();
    results.setMore(more);
    auto entries = results.initEntries(static_cast<unsigned>(page.size()));
    for (unsigned i = 0; i < page.size(); ++i) FillMountEntry(*page[i], false, entries[i]);
    return kj::READY_NOW;
  }

  kj::Promise<void> ledgers(LedgersContext context) override {
    bool more = false;
    auto page = supervisor_.ledgers().Page(0, 0, kMaxLedgers, &more);
    auto out = context.getResults().initLedgers(static_cast<unsigned>(page.size()));
    for (unsigned i = 0; i < page.size(); ++i) FillLedger(*page[i], false, out[i]);
    return kj::READY_NOW;
  }

  kj::Promise<void> workerAdmin(WorkerAdminContext context) override {
    KJ_IF_MAYBE(admin, supervisor_.RunningAdmin()) {
      context.getResults().setAdmin(kj::mv(*admin));
      return kj::READY_NOW;
    }
    KJ_FAIL_REQUIRE("no worker runs");
  }

  kj::Promise<void> shutdown(ShutdownContext) override {
    std::string why = supervisor_.WhyInUse();
    KJ_REQUIRE(why.empty(), why);
    supervisor_.Stop("holdfastctl");
    return kj::READY_NOW;
  }

 private:
  Supervisor& supervisor_;
};

// One accepted connection, alive until the peer hangs up.
struct ControlConnection {
  kj::Own<kj::AsyncCapabilityStream> stream;
  capnp::TwoPartyClient rpc;
  ControlConnection(kj::Own<kj::AsyncCapabilityStream> s, Supervisor* supervisor)
      : stream(kj::mv(s)),
        rpc(*stream, 0, schema::Control::Client(kj::heap<ControlServer>(supervisor)), capnp::rpc::twoparty::Side::SERVER) {}
};

bool PeerIsRoot(kj::AsyncIoStream& stream) {
  ucred peer{};
  kj::uint size = sizeof(peer);
  stream.getsockopt(SOL_SOCKET, SO_PEERCRED, &peer, &size);
  if (size == sizeof(peer) && peer.uid == 0) return true;
  LOG(WARNING) << "event=control_refused uid=" << peer.uid << " pid=" << peer.pid;
  return false;
}

class ControlListener final : private kj::TaskSet::ErrorHandler {
 public:
  ControlListener(Supervisor* supervisor, kj::ConnectionReceiver* listener)
      : supervisor_(supervisor), listener_(*listener), connections_(*this) {}

  kj::Promise<void> Loop() {
    return listener_.accept().then([this](kj::Own<kj::AsyncIoStream>&& stream) {
      if (PeerIsRoot(*stream)) {
        auto connection = kj::heap<ControlConnection>(stream.downcast<kj::AsyncCapabilityStream>(), supervisor_);
        auto ended = connection->rpc.onDisconnect();
        connections_.add(ended.attach(kj::mv(connection)));
      }
      return Loop();
    });
  }

 private:
  void taskFailed(kj::Exception&& exception) override {
    LOG(WARNING) << "event=control_connection error=" << LogValue(exception.getDescription().cStr());
  }

  Supervisor* const supervisor_;
  kj::ConnectionReceiver& listener_;
  kj::TaskSet connections_;
};

}  // namespace

kj::Promise<void> ServeControl(Supervisor* supervisor, kj::ConnectionReceiver* listener) {
  auto server = kj::heap<ControlListener>(supervisor, listener);
  auto loop = server->Loop();
  return loop.attach(kj::mv(server));
}

const char* Supervisor::Role(const WorkerProcess& worker) const {
  if (worker.killed || worker.disconnected) return "dying";
  if (worker.retired) return "retiring";
  if (worker.generation == state_.successor) return state_.owner == 0 ? "starting" : "candidate";
  if (worker.generation != state_.owner) return "dying";
  bool parked = state_.phase == Phase::kServing || state_.phase == Phase::kYielding || state_.phase == Phase::kAwaitingExit ||
                state_.phase == Phase::kCommitting;
  return parked ? "parked" : "owner";
}

void Supervisor::FillStatus(schema::Status::Builder status) const {
  status.setSupervisorBuild(kBuild);
  status.setSupervisorPid(static_cast<uint32_t>(getpid()));
  status.setStartedWallNanos(started_wall_nanos_);
  status.setPhase(PhaseName(state_.phase));
  status.setCrashes(crashes_);
  status.setSwaps(swaps_);
  status.setRequestsCarriedOverTotal(carried_over_total_);
  status.setStateDir(options_.state_dir.c_str());
  FillSwap(status.initLastSwap());
  uint64_t detached = 0;
  uint64_t live = 0;
  for (const Mount* mount : vault_.All()) {
    detached += mount->state == MountState::kDetached ? 1 : 0;
    live += mount->state == MountState::kLive ? 1 : 0;
  }
  status.setMountsLive(live);
  status.setMountsDetached(detached);

  std::vector<std::string> warnings = warnings_;
  auto workers = status.initWorkers(static_cast<unsigned>(workers_.size()));
  unsigned i = 0;
  for (const auto& [generation, worker] : workers_) {
    auto out = workers[i++];
    out.setGeneration(generation);
    out.setPid(static_cast<uint32_t>(worker->pid));
    out.setRole(Role(*worker));
    out.setBuild(worker->build.c_str());
    out.setExecutable(worker->executable->sha256.c_str());
    out.setStartedWallNanos(worker->started_wall_nanos);
    if (Ledger* ledger = ledgers_.Find(generation)) {
      out.setRequestsReceived(ledger->received());
      out.setRequestsAnswered(ledger->answered());
    }
    uint64_t dead_for = worker->dead_since_boot_nanos == 0 ? 0 : clock_->BootNanos() - worker->dead_since_boot_nanos;
    if (dead_for > kUnkillableSeconds * 1'000'000'000) {
      warnings.push_back("worker generation " + std::to_string(generation) + " (pid " + std::to_string(worker->pid) +
                         ") was killed and does not exit; snapshot calls wait for it, reads do not");
    }
  }
  if (state_.phase == Phase::kNoMetadata) {
    warnings.push_back("the worker serves reads but cannot open its metadata; see its log");
  }
  auto list = status.initWarnings(static_cast<unsigned>(warnings.size()));
  for (unsigned w = 0; w < warnings.size(); ++w) list.set(w, warnings[w].c_str());
}

void Supervisor::FillSwap(schema::SwapStatus::Builder out) const {
  out.setKind(swap_.kind.c_str());
  out.setResult(swap_.result.c_str());
  out.setFinishedWallNanos(swap_.finished_wall_nanos);
  out.setPauseNanos(swap_.pause_nanos);
  out.setRequestsCarriedOver(swap_.carried_over);
  out.setFromBuild(swap_.from_build.c_str());
  out.setToBuild(swap_.to_build.c_str());
}

kj::Maybe<capnp::Capability::Client> Supervisor::RunningAdmin() {
  for (Generation generation : {state_.owner, state_.successor}) {
    WorkerProcess* worker = Find(generation);
    if (worker == nullptr || worker->disconnected) continue;
    KJ_IF_MAYBE(admin, worker->admin) { return *admin; }
  }
  return nullptr;
}

}  // namespace holdfast::supervisor
