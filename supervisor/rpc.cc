// The Cap'n Proto servers, and what `status` shows.
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
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

constexpr unsigned kMountsPerPage = 200;
constexpr size_t kAnyMounts = 3;              // that a verifier may look at when it knows none
constexpr unsigned kLedgersPerPage = 7;       // 33 descriptors each; 253 fit into one message
constexpr unsigned kLedgersForControl = 250;  // without the pipes
constexpr uint64_t kAcceptPauseMillis = 200;

static_assert(static_cast<int>(schema::MountState::GONE) == static_cast<int>(MountState::kGone));
schema::MountState Convert(MountState state) { return static_cast<schema::MountState>(state); }

InitOptions Convert(schema::InitOptions::Reader in) {
  return {in.getFlags(),         in.getMaxBackground(), in.getCongestionThreshold(), in.getMaxPages(),
          in.getMaxStackDepth(), in.getReadAheadKib(),  in.getMaxReadahead()};
}

void FillLedger(const Ledger& ledger, bool with_pipes, schema::OldLedger::Builder out) {
  out.setGeneration(ledger.generation());
  out.setLedger(MakeDescriptor(ledger.memory()));
  out.setOwnerExited(ledger.owner_exited);
  out.setOwnerHung(ledger.owner_hung);
  if (with_pipes) FillPipes(ledger, out.initRequestPipes(static_cast<unsigned>(ledger.pipes().size())));
}

template <typename Results>
void FillLedgers(const std::vector<Ledger*>& page, bool with_pipes, Results results) {
  auto out = results.initLedgers(static_cast<unsigned>(page.size()));
  for (unsigned i = 0; i < page.size(); ++i) FillLedger(*page[i], with_pipes, out[i]);
}

// A page of the vault, for a worker (with descriptors) or for holdfastctl.
template <typename Params, typename Results>
void FillPage(const Vault& vault, Params params, bool with_devices, Results results) {
  unsigned limit = params.getLimit() == 0 ? kMountsPerPage : std::min(params.getLimit(), kMountsPerPage);
  bool more = false;
  auto page = vault.Page(params.getAfter(), limit, &more);
  results.setMore(more);
  auto entries = results.initEntries(static_cast<unsigned>(page.size()));
  for (unsigned i = 0; i < page.size(); ++i) FillMountEntry(*page[i], with_devices, entries[i]);
}

class SupervisorServer final : public schema::Supervisor::Server {
 public:
  SupervisorServer(Supervisor* supervisor, uint64_t generation)
      : supervisor_(*supervisor), generation_(generation) {}

  kj::Promise<void> register_(RegisterContext context) override {
    auto params = context.getParams();
    supervisor_.Register(generation_, params.getHello(), params.getWorker(), params.getAdmin(),
                         context.getResults().initWelcome());
    return kj::READY_NOW;
  }

  kj::Promise<void> mount(MountContext context) override {
    auto params = context.getParams();
    return supervisor_
        .MountLayer(generation_, params.getPath().cStr(), Convert(params.getOptions()),
                    String(params.getBlob()))
        .then([context](const Mount* mount) mutable {
          FillMountEntry(*mount, true, context.getResults().initEntry());
        });
  }

  kj::Promise<void> setBlob(SetBlobContext context) override {
    auto params = context.getParams();
    Mount* mount = supervisor_.vault().Find(params.getMountId());
    KJ_REQUIRE(mount != nullptr, "no such mount", params.getMountId());
    mount->blob = String(params.getBlob());
    supervisor_.vault().Save(*mount);
    return kj::READY_NOW;
  }

  kj::Promise<void> unmount(UnmountContext context) override {
    return supervisor_.UnmountLayer(generation_, context.getParams().getMountId())
        .then([context](MountState state) mutable { context.getResults().setState(Convert(state)); });
  }

  kj::Promise<void> mounts(MountsContext context) override {
    FillPage(supervisor_.vault(), context.getParams(), true, context.getResults());
    return kj::READY_NOW;
  }

  kj::Promise<void> oldLedgers(OldLedgersContext context) override {
    bool more = false;
    uint64_t after = context.getParams().getAfter();
    FillLedgers(supervisor_.ledgers().Page(after, generation_, kLedgersPerPage, &more), true,
                context.getResults());
    context.getResults().setMore(more);
    return kj::READY_NOW;
  }

  kj::Promise<void> drained(DrainedContext context) override {
    supervisor_.ledgers().Drained(context.getParams().getGeneration());
    return kj::READY_NOW;
  }

 private:
  Supervisor& supervisor_;
  const uint64_t generation_;
};

class MountViewServer final : public schema::MountView::Server {
 public:
  explicit MountViewServer(Vault* vault) : vault_(*vault) {}

  kj::Promise<void> live(LiveContext context) override {
    std::vector<const Mount*> mounts;
    for (uint64_t id : context.getParams().getMountIds()) {
      const Mount* mount = vault_.Find(id);
      if (mount != nullptr && mount->state == MountState::kLive) mounts.push_back(mount);
    }
    if (context.getParams().getMountIds().size() == 0) {
      for (const auto& [id, mount] : vault_.all()) {
        if (mount.state == MountState::kLive && mounts.size() < kAnyMounts) mounts.push_back(&mount);
      }
    }
    auto entries = context.getResults().initEntries(static_cast<unsigned>(mounts.size()));
    for (unsigned i = 0; i < mounts.size(); ++i) FillMountEntry(*mounts[i], false, entries[i]);
    return kj::READY_NOW;
  }

  kj::Promise<void> newMountId(NewMountIdContext context) override {
    context.getResults().setMountId(OrThrow(vault_.NextId()));
    return kj::READY_NOW;
  }

 private:
  Vault& vault_;
};

template <typename Params>
kj::Maybe<schema::Progress::Client> ProgressOf(Params params) {
  if (!params.hasProgress()) return nullptr;
  return params.getProgress();
}

class ControlServer final : public schema::Control::Server {
 public:
  // *worker: set to the generation of the worker whose connection this becomes.
  ControlServer(Supervisor* supervisor, std::shared_ptr<uint64_t> worker)
      : supervisor_(*supervisor), worker_(std::move(worker)) {}

  kj::Promise<void> status(StatusContext context) override {
    supervisor_.FillStatus(context.getResults().initStatus());
    return kj::READY_NOW;
  }

  kj::Promise<void> upgrade(UpgradeContext context) override {
    auto params = context.getParams();
    return supervisor_.Upgrade(params.getPath().cStr(), params.getForce(), ProgressOf(params))
        .then([this, context](bool changed) mutable {
          auto results = context.getResults();
          results.setChanged(changed);
          supervisor_.swap().FillLast(results.initSwap());
        });
  }

  kj::Promise<void> rollback(RollbackContext context) override {
    return supervisor_.Rollback(ProgressOf(context.getParams())).then([this, context](bool) mutable {
      supervisor_.swap().FillLast(context.getResults().initSwap());
    });
  }

  kj::Promise<void> checkRollback(CheckRollbackContext context) override {
    return supervisor_.CheckRollback().then([context](RollbackReadiness readiness) mutable {
      auto results = context.getResults();
      results.setReady(readiness.ready);
      results.setExecutable(readiness.executable.c_str());
      results.setReason(readiness.reason.c_str());
    });
  }

  kj::Promise<void> mounts(MountsContext context) override {
    FillPage(supervisor_.vault(), context.getParams(), false, context.getResults());
    return kj::READY_NOW;
  }

  kj::Promise<void> ledgers(LedgersContext context) override {
    bool more = false;
    FillLedgers(supervisor_.ledgers().Page(0, 0, kLedgersForControl, &more), false, context.getResults());
    return kj::READY_NOW;
  }

  kj::Promise<void> workerAdmin(WorkerAdminContext context) override {
    KJ_IF_MAYBE (admin, supervisor_.RunningAdmin()) {
      context.getResults().setAdmin(kj::mv(*admin));
      return kj::READY_NOW;
    }
    KJ_FAIL_REQUIRE("no worker runs");
  }

  kj::Promise<void> reattach(ReattachContext context) override {
    KJ_REQUIRE(context.getParams().hasState(), "a worker brings the state that it was given");
    auto state = context.getParams().getState();
    auto fd = state.getFd();
    return fd.then([this, context, state = kj::mv(state)](kj::Maybe<int> file) mutable {
      auto params = context.getParams();
      supervisor_.Reattach(params.getGeneration(), params.getHello(), params.getWorker(), params.getAdmin(),
                           file.orDefault(-1), params.getHoldsMetadata());
      *worker_ = params.getGeneration();
      auto results = context.getResults();
      results.setSupervisor(MakeSupervisorServer(&supervisor_, *worker_).castAs<schema::Supervisor>());
      results.setVaultId(Bytes(supervisor_.vault_id()));
    });
  }

 private:
  Supervisor& supervisor_;
  const std::shared_ptr<uint64_t> worker_;
};

bool PeerIsRoot(kj::AsyncIoStream& stream) {
  ucred peer{};
  kj::uint size = sizeof(peer);
  stream.getsockopt(SOL_SOCKET, SO_PEERCRED, &peer, &size);
  if (size == sizeof(peer) && peer.uid == 0) return true;
  LOG(WARNING) << "event=control_refused uid=" << peer.uid << " pid=" << peer.pid;
  return false;
}

// One client of the control socket: holdfastctl, or a worker that outlived its supervisor. It may send and
// receive as many descriptors a message as the kernel allows.
kj::Promise<void> ServeClient(Supervisor* supervisor, kj::Own<kj::AsyncCapabilityStream> stream) {
  constexpr unsigned kMaxFds = 253;
  auto worker = std::make_shared<uint64_t>(0);
  schema::Control::Client control = kj::heap<ControlServer>(supervisor, worker);
  auto connection =
      kj::heap<capnp::TwoPartyClient>(*stream, kMaxFds, kj::mv(control), capnp::rpc::twoparty::Side::SERVER);
  auto ended = connection->onDisconnect().catch_([](kj::Exception&&) {}).then([supervisor, worker] {
    if (*worker != 0) supervisor->ConnectionLost(*worker);
  });
  return ended.attach(kj::mv(connection)).attach(kj::mv(stream));
}

class Clients final : private kj::TaskSet::ErrorHandler {
 public:
  Clients(Supervisor* supervisor, kj::Timer* timer)
      : supervisor_(supervisor), timer_(*timer), tasks_(*this) {}

  kj::Promise<void> Accept(kj::ConnectionReceiver& listener) {
    auto accepted = listener.accept().then([this](kj::Own<kj::AsyncIoStream>&& stream) {
      if (PeerIsRoot(*stream)) {
        tasks_.add(ServeClient(supervisor_, stream.downcast<kj::AsyncCapabilityStream>()));
      }
    });
    // No descriptor is left, say. Whoever is waiting to be accepted goes on waiting.
    auto later = [this](kj::Exception&& exception) {
      LOG(ERROR) << "event=accept_failed error=" << LogValue(exception.getDescription().cStr());
      return timer_.afterDelay(kAcceptPauseMillis * kj::MILLISECONDS);
    };
    return accepted.catch_(kj::mv(later)).then([this, &listener] { return Accept(listener); });
  }

 private:
  void taskFailed(kj::Exception&& exception) override {
    LOG(ERROR) << "event=client_failed error=" << LogValue(exception.getDescription().cStr());
  }
  Supervisor* const supervisor_;
  kj::Timer& timer_;
  kj::TaskSet tasks_;
};

}  // namespace

void FillMountEntry(const Mount& mount, bool with_device, schema::MountEntry::Builder out) {
  out.setMountId(mount.id);
  out.setState(Convert(mount.state));
  out.setPath(mount.path.c_str());
  if (with_device) out.setDevice(MakeDescriptor(mount.device));
  out.setInitRequest(Bytes(mount.init_request));
  out.setInitReply(Bytes(mount.init_reply));
  out.setBlob(Bytes(mount.blob));
}

capnp::Capability::Client MakeSupervisorServer(Supervisor* supervisor, uint64_t generation) {
  return schema::Supervisor::Client(kj::heap<SupervisorServer>(supervisor, generation));
}

schema::MountView::Client MakeMountView(Vault* vault) { return kj::heap<MountViewServer>(vault); }

void FillPipes(const Ledger& ledger, capnp::List<schema::PipePair>::Builder out) {
  for (unsigned i = 0; i < out.size(); ++i) {
    out[i].setReadEnd(MakeDescriptor(ledger.pipes()[i].read_end));
    out[i].setWriteEnd(MakeDescriptor(ledger.pipes()[i].write_end));
  }
}

void FillTakeover(const Vault& vault, const LedgerStore& ledgers, uint64_t worker,
                  schema::Takeover::Builder out) {
  bool more = false;
  const std::vector<Ledger*> page = ledgers.Page(0, worker, kLedgersPerPage, &more);
  out.setMoreLedgers(more);
  if (!more) FillLedgers(page, true, out);
  for (const auto& [id, mount] : vault.all()) {
    if (mount.state != MountState::kMounting) out.setLastMount(id);
  }
}

kj::Promise<void> ServeControl(Supervisor* supervisor, kj::ConnectionReceiver* listener, kj::Timer* timer) {
  auto clients = kj::heap<Clients>(supervisor, timer);
  auto loop = clients->Accept(*listener);
  return loop.attach(kj::mv(clients));
}

const char* Supervisor::Role(const WorkerProcess& worker) const {
  if (worker.killed || worker.disconnected) return "dying";
  if (worker.retired) return "retiring";
  if (worker.generation == state_.spare) return "spare";
  if (worker.generation == state_.successor) return state_.owner == 0 ? "starting" : "candidate";
  if (worker.generation != state_.owner) return "dying";
  return state_.phase >= Phase::kServing && state_.phase <= Phase::kCommitting ? "parked" : "owner";
}

void Supervisor::FillStatus(schema::Status::Builder status) const {
  status.setSupervisorBuild(kBuild);
  status.setSupervisorPid(static_cast<uint32_t>(getpid()));
  status.setStartedWallNanos(started_wall_nanos_);
  status.setPhase(PhaseName(state_.phase));
  status.setCrashes(crashes_);
  status.setHangs(hangs_);
  status.setLastDeath(last_death_.reason.c_str());
  status.setLastDeathWallNanos(last_death_.wall_nanos);
  status.setSwaps(swap_.swaps());
  status.setRequestsCarriedOverTotal(swap_.carried_over());
  status.setStateDir(options_.state_dir.c_str());
  status.setLastGood(last_good_ == nullptr ? "" : last_good_->sha256.c_str());
  status.setSpareState(!options_.limits.spare ? "off"
                       : state_.spare == 0    ? "none"
                       : state_.spare_ready   ? "ready"
                                              : "starting");
  if (state_.probation && probation_ends_boot_nanos_ > clock_->BootNanos())
    status.setProbationSeconds(1 + (probation_ends_boot_nanos_ - clock_->BootNanos()) / kNanosPerSecond);
  swap_.FillInProgress(status);
  status.setSupervisorRestarts(restarts_);
  status.setStateSource(state_source_.c_str());
  status.setFdStore(store_->enabled());
  swap_.FillLast(status.initLastSwap());
  status.setMountsLive(vault_.Count(MountState::kLive));
  status.setMountsDetached(vault_.Count(MountState::kDetached));
  std::vector<std::string> warnings = warnings_;
  if (auto warning = store_->Warning()) warnings.push_back(*warning);
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
    uint64_t limit = worker->dead_since_boot_nanos + kUnkillableSeconds * kNanosPerSecond;
    if (worker->dead_since_boot_nanos != 0 && clock_->BootNanos() > limit) {
      warnings.push_back("worker pid " + std::to_string(worker->pid) +
                         " was killed and does not exit; snapshot calls wait for it, reads do not");
    }
  }
  if (state_.phase == Phase::kNoMetadata) {
    warnings.push_back("the worker serves reads but cannot open its metadata; see its log");
  }
  if (!reverted_.empty()) warnings.push_back(reverted_);
  auto list = status.initWarnings(static_cast<unsigned>(warnings.size()));
  for (unsigned w = 0; w < warnings.size(); ++w) list.set(w, warnings[w].c_str());
}

kj::Maybe<capnp::Capability::Client> Supervisor::RunningAdmin() {
  for (Generation generation : {state_.owner, state_.successor}) {
    WorkerProcess* worker = Find(generation);
    if (worker != nullptr && worker->admin != nullptr && !worker->disconnected) return worker->admin;
  }
  return nullptr;
}

}  // namespace holdfast::supervisor
