#include "supervisor/recovery.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <sstream>
#include <utility>

#include "common/log.h"
#include "common/process.h"
#include "common/unix_socket.h"
#include "glog/logging.h"
#include "supervisor/rpc.h"
#include "supervisor/supervisor.h"

namespace holdfast::supervisor {
namespace {

constexpr uint64_t kWaitStepMillis = 2;
constexpr uint64_t kFetchMillis = 5'000;
constexpr uint64_t kAskMillis = 2'000;        // where no descriptor is missing
constexpr uint64_t kCandidateMillis = 1'000;  // of it
constexpr size_t kLivingWorkersBytes = 4'096;
constexpr uint64_t kFetchPauseMillis = 200;
constexpr int kFetchTries = 12;
constexpr uint64_t kUnmountMillis = 10'000;
constexpr uint64_t kNanosPerMilli = 1'000'000;

std::string BootId() { return ReadFile("/proc/sys/kernel/random/boot_id").value_or("unknown\n"); }

bool HasFailed(int device) {
  pollfd state{.fd = device, .events = 0, .revents = 0};
  return poll(&state, 1, 0) == 1 && (state.revents & (POLLERR | POLLNVAL)) != 0;
}

UniqueFd TakeOne(StoredFds* fds, const std::string& name) {
  auto it = fds->find(name);
  if (it == fds->end() || it->second.empty()) return UniqueFd();
  UniqueFd fd = std::move(it->second.front());
  fds->erase(it);
  return fd;
}

}  // namespace

std::string WorkersPath(const std::string& state_dir) { return state_dir + "/supervisor/workers"; }

absl::Status WriteLivingWorkers(const std::string& path, const std::vector<LivingWorker>& workers) {
  std::ostringstream text;
  text << BootId();
  for (const LivingWorker& worker : workers) {
    text << worker.pid << " " << worker.start_ticks << " " << worker.generation << "\n";
  }
  // In place and always as long: it must not fail because the disk is full. One write, so that whoever kills
  // us leaves the old text or the new one.
  std::string page = text.str();
  page.resize(std::max(page.size(), kLivingWorkersBytes), '\n');
  HF_RETURN_IF_ERROR(MakeDirs(std::filesystem::path(path).parent_path()));
  HF_ASSIGN_OR_RETURN(UniqueFd file, OpenFile(path, O_WRONLY | O_CREAT));
  return PwriteFull(file.get(), page.data(), page.size(), 0);
}

std::vector<LivingWorker> ReadLivingWorkers(const std::string& path) {
  std::istringstream text(ReadFile(path).value_or(""));
  std::string boot;
  std::vector<LivingWorker> living;
  if (!std::getline(text, boot) || boot + "\n" != BootId()) return living;
  LivingWorker worker;
  while (text >> worker.pid >> worker.start_ticks >> worker.generation) {
    if (OpenIfAlive(worker.pid, worker.start_ticks).valid()) living.push_back(worker);
  }
  return living;
}

UniqueFd OpenIfAlive(pid_t pid, uint64_t start_ticks) {
  // In this order: what the pidfd names is what the start time was read of, if it still runs after that.
  auto pidfd = OpenPidfd(pid);
  if (!pidfd.ok() || ProcessStartTicks(pid).value_or(0) != start_ticks || HasExited(pidfd->get())) return {};
  return std::move(*pidfd);
}

uint64_t ChooseOwner(const SavedState& state, const std::set<uint64_t>& alive) {
  auto fit = [&](uint64_t generation) {
    auto it = state.workers.find(generation);
    return it != state.workers.end() && alive.count(generation) != 0 && !it->second->getKilled() &&
           !it->second->getRetired() && (it->second->getCapabilities() & schema::CAP_REATTACH) != 0;
  };
  uint64_t owner = state.machine->getOwner(), successor = state.machine->getSuccessor();
  std::set<uint64_t> holders;
  for (uint64_t generation : state.machine->getHolders()) holders.insert(generation);
  // The commit was under way: the old worker has yielded.
  if (holders.count(owner) == 0 && holders.count(successor) != 0 && fit(successor)) return successor;
  return fit(owner) ? owner : 0;
}

bool HasAllDescriptors(const SavedState& state, const StoredFds& fds) {
  auto has = [&](FdKind kind, uint64_t number) { return fds.count(FdName(kind, number)) != 0; };
  return fds.count(kSnapshotFd) != 0 &&
         std::all_of(state.mounts.begin(), state.mounts.end(),
                     [&](const auto& entry) {
                       return entry.second.state == MountState::kMounting || has(FdKind::kMount, entry.first);
                     }) &&
         std::all_of(state.ledgers.begin(), state.ledgers.end(), [&](const auto& entry) {
           return has(FdKind::kLedger, entry.first) && has(FdKind::kPipes, entry.first);
         });
}

RestoredMounts RestoreMounts(const SavedState& state, uint64_t owner,
                             const std::optional<std::set<uint64_t>>& held, StoredFds* fds) {
  RestoredMounts result;
  for (const auto& [id, saved] : state.mounts) {
    UniqueFd device = TakeOne(fds, FdName(FdKind::kMount, id));
    bool untold = held && saved.caller == owner && held->count(id) == 0;
    bool unknown = saved.state == MountState::kMounting || untold;
    if (unknown || !IsFuseDevice(device.get()) || HasFailed(device.get())) {
      result.lost.push_back(id);
      continue;
    }
    Mount mount = saved;
    // umount(2) is done again by whoever clears the paths; what uses it keeps it alive.
    if (std::exchange(mount.unmounting, false)) mount.state = MountState::kDetached;
    if (mount.state == MountState::kLive) result.paths.insert(mount.path);
    mount.device = std::make_shared<UniqueFd>(std::move(device));
    result.served.push_back(std::move(mount));
  }
  return result;
}

// From here on: the taking over. One pass of Recover(), while the control socket is served already.

kj::Promise<void> Supervisor::Recover() {
  UniqueFd state = TakeOne(&takeover_->fds, kStateFd);
  if (state.valid()) {
    auto map = DurableMap::Open(state.get());
    auto saved = map.ok() ? DecodeState(*map) : map.status();
    if (saved.ok()) AdoptState(std::move(*map), *std::move(saved), "fd store", 0);
    if (!saved.ok()) StateUnusable(saved.status());
  }
  return WaitForWorker(clock_->BootNanos() + kReattachMillis * kNanosPerMilli)
      .then([this] { return FetchDescriptors(); })
      .then([this] { return RestoreVault(); })
      .then([this] { EndTakeover(); });
}

void Supervisor::StateUnusable(const absl::Status& why) {
  LOG(ERROR) << "event=state_unusable error=" << LogValue(why.ToString());
  warnings_.push_back("the state of the earlier supervisor could not be read: its mounts were given up");
  store_->Remove(kStateFd);
  takeover_->kept.erase(kStateFd);
}

void Supervisor::AdoptState(DurableMap map, SavedState state, const char* source, Generation bringer) {
  takeover_->state = std::move(state);
  takeover_->adopted = true;
  takeover_->source = bringer;
  state_source_ = source;
  journal_.Use(std::move(map));
  const schema::SavedMachine::Reader saved = *takeover_->state.machine;
  vault_id_ = String(saved.getVaultId());
  restarts_ = saved.getRestarts() + 1;
  crashes_ = saved.getCrashes();
  hangs_ = saved.getHangs();
  swap_.Restore(saved.getSwaps(), saved.getCarriedOver());
  running_build_ = saved.getRunningBuild().cStr();
  auto running = KeptExecutable(saved.getRunning().cStr());
  auto previous = KeptExecutable(saved.getPrevious().cStr());
  if (running != nullptr) running_ = std::move(running);
  if (previous != nullptr) previous_ = std::move(previous);
  AdoptWorkers();
  LOG(INFO) << "event=state_adopted source=" << LogValue(source) << " phase=" << saved.getPhase().cStr()
            << " mounts=" << takeover_->state.mounts.size() << " owner=" << takeover_->owner;
}

// Opening one means reading all of it.
std::shared_ptr<const Executable> Supervisor::KeptExecutable(const std::string& sha256) const {
  for (const auto& known : {running_, last_good_, previous_}) {
    if (known != nullptr && known->sha256 == sha256) return known;
  }
  return WorkerCopies(options_.state_dir).Open(sha256);
}

// Those that still run become ours to watch.
void Supervisor::AdoptWorkers() {
  std::set<Generation> alive;
  for (const auto& [generation, saved] : takeover_->state.workers) {
    last_generation_ = std::max(last_generation_, generation);
    auto worker = std::make_unique<WorkerProcess>();
    worker->pidfd = TakeOne(&takeover_->fds, FdName(FdKind::kWorker, generation));
    if (!worker->pidfd.valid())
      worker->pidfd = OpenIfAlive(static_cast<pid_t>(saved->getPid()), saved->getStartTicks());
    if (!worker->pidfd.valid() || HasExited(worker->pidfd.get())) {
      journal_.ForgetWorker(generation);
      continue;
    }
    alive.insert(generation);
    worker->generation = generation;
    worker->executable = KeptExecutable(saved->getExecutable().cStr());
    if (worker->executable == nullptr) worker->executable = running_;
    worker->token = saved->getToken().cStr();
    worker->pid = static_cast<pid_t>(saved->getPid());
    worker->start_ticks = saved->getStartTicks();
    worker->build = saved->getBuild().cStr();
    worker->capabilities = saved->getCapabilities();
    worker->started_wall_nanos = saved->getStartedWallNanos();
    worker->retired = saved->getRetired();  // not `killed`: the record comes before the signal
    if (worker->retired) LimitRetirement(worker.get());
    WatchExit(worker.get());
    workers_[generation] = std::move(worker);
  }
  takeover_->owner = ChooseOwner(takeover_->state, alive);
  for (Generation generation : takeover_->state.machine->getHolders()) {
    if (alive.count(generation) != 0) state_.holders.insert(generation);
  }
  // What a candidate has read and not answered is in its ledger only, of which nobody else has the
  // descriptors.
  const Generation trial = takeover_->state.machine->getTrialGeneration();
  const bool stored = takeover_->fds.count(FdName(FdKind::kLedger, trial)) != 0;
  if (trial != takeover_->owner && alive.count(trial) != 0 && !stored) {
    const schema::SavedWorker::Reader candidate = *takeover_->state.workers.at(trial);
    const bool comes = (candidate.getCapabilities() & schema::CAP_REATTACH) != 0;
    if (comes && !candidate.getKilled() && !candidate.getRetired()) takeover_->candidate = trial;
  }
  KillOthers({takeover_->source, takeover_->candidate});
}

// Whoever is not to go on ends: at once, so that its exit is proven early. One that retires ends by itself.
void Supervisor::KillOthers(const std::set<Generation>& spared) {
  for (const auto& [generation, worker] : workers_) {
    if (generation != takeover_->owner && spared.count(generation) == 0 && !worker->retired)
      KillWorker(generation);
  }
}

bool Supervisor::WaitsForWorker() {
  if (!takeover_->adopted) {
    return std::any_of(takeover_->living.begin(), takeover_->living.end(), [](const LivingWorker& living) {
      return OpenIfAlive(living.pid, living.start_ticks).valid();
    });
  }
  auto awaited = [this](Generation generation) {
    WorkerProcess* worker = Find(generation);
    return worker != nullptr && !worker->exited && worker->client == nullptr;
  };
  return awaited(takeover_->owner) || awaited(takeover_->candidate);
}

kj::Promise<void> Supervisor::WaitForWorker(uint64_t deadline_boot_nanos) {
  if (!WaitsForWorker() || clock_->BootNanos() >= deadline_boot_nanos) return kj::READY_NOW;
  return timer_.afterDelay(kWaitStepMillis * kj::MILLISECONDS).then([this, deadline_boot_nanos] {
    return WaitForWorker(deadline_boot_nanos);
  });
}

// A supervisor without a state takes the one that this worker brings, if that knows the worker by its token.
absl::Status Supervisor::AdoptBroughtState(Generation generation, pid_t pid, const std::string& token,
                                           int state) {
  bool listed = std::any_of(
      takeover_->living.begin(), takeover_->living.end(),
      [&](const LivingWorker& living) { return living.generation == generation && living.pid == pid; });
  if (!listed) return PermissionDenied("this worker is not known");
  HF_ASSIGN_OR_RETURN(DurableMap map, DurableMap::Open(state));
  HF_ASSIGN_OR_RETURN(SavedState saved, DecodeState(map));
  auto it = saved.workers.find(generation);
  if (it == saved.workers.end() || token != it->second->getToken().cStr())
    return PermissionDenied("wrong token");
  AdoptState(std::move(map), std::move(saved), "worker", generation);
  return absl::OkStatus();
}

void Supervisor::Reattach(Generation generation, schema::Hello::Reader hello,
                          schema::Worker::Client worker_client, capnp::Capability::Client admin, int state,
                          bool holds_metadata) {
  auto chars = hello.getToken().asChars();
  std::string token(chars.begin(), chars.size());
  absl::Status status;
  if (takeover_ != nullptr && !takeover_->adopted) {
    status = AdoptBroughtState(generation, static_cast<pid_t>(hello.getPid()), token, state);
  }
  WorkerProcess* worker = Find(generation);
  if (status.ok() && (takeover_ == nullptr || worker == nullptr))
    status = NotFound("this worker is not known");
  if (status.ok() && worker->token != token) status = PermissionDenied("wrong token");
  if (status.ok() && worker->client != nullptr) status = AlreadyExists("it is connected already");
  if (status.ok() && (worker->killed || worker->retired)) status = Unavailable("it is to end");
  if (!status.ok()) {
    LOG(WARNING) << "event=reattach_refused generation=" << generation << " pid=" << hello.getPid()
                 << " reason=" << LogValue(status.ToString());
    Throw(status);
  }
  worker->client = kj::mv(worker_client);
  worker->admin = kj::mv(admin);
  WatchThread(worker, static_cast<pid_t>(hello.getThread()));
  if (generation == takeover_->owner) takeover_->holds_metadata = holds_metadata;
  LOG(INFO) << "event=reattached generation=" << generation << " pid=" << worker->pid
            << " holds_metadata=" << holds_metadata;
}

// What the service manager did not keep, the worker has.
kj::Promise<void> Supervisor::FetchDescriptors() {
  WorkerProcess* worker = Find(takeover_->owner);
  bool goes_on = worker != nullptr && worker->client != nullptr;
  if (!goes_on) worker = Find(takeover_->source);
  if (worker == nullptr) return kj::READY_NOW;
  KJ_IF_MAYBE (client, worker->client) {
    auto held = std::make_shared<std::set<uint64_t>>();
    auto fetched = FetchMounts(*client, 0, held).then([this, held, goes_on] {
      if (goes_on) takeover_->held = std::move(*held);
    });
    const bool complete = HasAllDescriptors(takeover_->state, takeover_->fds);
    if (!complete) {
      auto listener = client->heldListenerRequest().send().then([this](auto&& response) {
        auto descriptor = response.getSnapshotListener();
        return TakeFd(kj::mv(descriptor), kSnapshotFd).attach(kj::mv(response));
      });
      listener = listener.catch_([](kj::Exception&&) {});  // it closes its own when it has to
      // One after the other: both hold the owner's.
      auto ledgers = FetchLedgers(*client, 0).then([this] { return FetchCandidatesLedger(); });
      fetched = kj::joinPromises(kj::arr(kj::mv(fetched), kj::mv(ledgers), kj::mv(listener)));
    }
    // A mount whose device did not arrive is given up, so it is worth trying again: what has arrived is
    // skipped, and the worker reads on meanwhile. Not where nothing is missing: it may hang, and is then to
    // be found out by how it resumes.
    auto failed = [this, complete](kj::Exception&& exception) -> kj::Promise<void> {
      LOG(ERROR) << "event=descriptors_not_fetched error=" << LogValue(Describe(exception));
      WorkerProcess* owner = Find(takeover_->owner);
      bool again = !complete && owner != nullptr && owner->client != nullptr && !owner->exited &&
                   !owner->killed && ++takeover_->fetch_failures < kFetchTries;
      if (!again) return kj::READY_NOW;
      return timer_.afterDelay(kFetchPauseMillis * kj::MILLISECONDS).then([this] {
        return FetchDescriptors();
      });
    };
    return timer_.timeoutAfter((complete ? kAskMillis : kFetchMillis) * kj::MILLISECONDS, kj::mv(fetched))
        .catch_(kj::mv(failed));
  }
  return kj::READY_NOW;
}

kj::Promise<void> Supervisor::TakeFd(schema::Descriptor::Client descriptor, std::string name) {
  auto fd = descriptor.getFd();
  // The capability owns the descriptor until it is duplicated.
  return fd.then([this, name, descriptor = kj::mv(descriptor)](kj::Maybe<int> maybe) {
    KJ_IF_MAYBE (number, maybe) {
      takeover_->fds[name].push_back(OrThrow(DupFd(*number)));
    }
  });
}

kj::Promise<void> Supervisor::FetchMounts(schema::Worker::Client worker, uint64_t after,
                                          std::shared_ptr<std::set<uint64_t>> held) {
  auto request = worker.heldMountsRequest();
  request.setAfter(after);
  return request.send().then([this, worker, after, held](auto&& page) mutable -> kj::Promise<void> {
    kj::Vector<kj::Promise<void>> taken;
    uint64_t last = after;
    for (auto mount : page.getMounts()) {
      last = std::max(last, mount.getMountId());
      held->insert(mount.getMountId());
      std::string name = FdName(FdKind::kMount, mount.getMountId());
      if (takeover_->fds.count(name) == 0) taken.add(TakeFd(mount.getDevice(), name));
    }
    bool more = page.getMore() && last > after;
    return kj::joinPromises(taken.releaseAsArray())
        .attach(kj::mv(page))
        .then([this, worker, more, last, held]() mutable -> kj::Promise<void> {
          if (!more) return kj::READY_NOW;
          return FetchMounts(worker, last, held);
        });
  });
}

kj::Promise<void> Supervisor::FetchLedgers(schema::Worker::Client worker, uint64_t after) {
  auto request = worker.heldLedgersRequest();
  request.setAfter(after);
  return request.send().then([this, worker, after](auto&& page) mutable -> kj::Promise<void> {
    kj::Vector<kj::Promise<void>> taken;
    uint64_t last = after;
    for (auto ledger : page.getLedgers()) {
      last = std::max(last, ledger.getGeneration());
      std::string memory = FdName(FdKind::kLedger, last), pipes = FdName(FdKind::kPipes, last);
      if (takeover_->fds.count(memory) != 0 && takeover_->fds.count(pipes) != 0) continue;
      for (const std::string& name : {memory, pipes}) {  // half of it is no ledger: stored anew, too
        takeover_->fds.erase(name);
        takeover_->kept.erase(name);
        store_->Remove(name);
      }
      taken.add(TakeFd(ledger.getLedger(), memory));
      for (auto pipe : ledger.getRequestPipes()) {
        taken.add(TakeFd(pipe.getReadEnd(), pipes));
        taken.add(TakeFd(pipe.getWriteEnd(), pipes));
      }
    }
    bool more = page.getMore() && last > after;
    return kj::joinPromises(taken.releaseAsArray())
        .attach(kj::mv(page))
        .then([this, worker, more, last]() mutable -> kj::Promise<void> {
          if (!more) return kj::READY_NOW;
          return FetchLedgers(worker, last);
        });
  });
}

// The owner's descriptors do not wait for a candidate that is silent, or dies.
kj::Promise<void> Supervisor::FetchCandidatesLedger() {
  WorkerProcess* candidate = Find(takeover_->candidate);
  if (candidate == nullptr) return kj::READY_NOW;
  KJ_IF_MAYBE (client, candidate->client) {
    auto failed = [](kj::Exception&& exception) {
      LOG(ERROR) << "event=candidates_ledger_not_fetched error=" << LogValue(Describe(exception));
    };
    return timer_.timeoutAfter(kCandidateMillis * kj::MILLISECONDS, FetchLedgers(*client, 0))
        .catch_(kj::mv(failed));
  }
  return kj::READY_NOW;
}

kj::Promise<void> Supervisor::RestoreVault() {
  RestoredMounts restored =
      RestoreMounts(takeover_->state, takeover_->owner, takeover_->held, &takeover_->fds);
  for (uint64_t id : restored.lost) {
    LOG(WARNING) << "event=mount_not_restored mount=" << id
                 << " path=" << LogValue(takeover_->state.mounts[id].path);
    journal_.ForgetMount(id);
  }
  for (Mount& mount : restored.served) vault_.Restore(std::move(mount));
  using Result = absl::StatusOr<size_t>;
  auto cleared = Offload<Result>([state_dir = options_.state_dir, keep = std::move(restored.paths)] {
    return RemoveStaleMounts(state_dir, keep);
  });
  auto logged = cleared.then([this](kj::Own<Result>&& count) {
    if (!count->ok()) LOG(ERROR) << "event=stale_mounts error=" << LogValue(count->status().ToString());
    if (count->ok() && **count != 0) LOG(WARNING) << "event=stale_mounts_removed count=" << **count;
    for (const auto& [id, mount] : vault_.all()) vault_.Save(mount);  // unmounted ones are detached now
  });
  // A kernel that takes its time must not keep containers from reading.
  return logged.exclusiveJoin(timer_.afterDelay(kUnmountMillis * kj::MILLISECONDS));
}

void Supervisor::RestoreLedgers() {
  for (const auto& [generation, saved] : takeover_->state.ledgers) {
    last_generation_ = std::max(last_generation_, generation);
    std::vector<uint64_t> inodes;
    for (uint64_t inode : saved->getPipeInodes()) inodes.push_back(inode);
    auto pipes = takeover_->fds.extract(FdName(FdKind::kPipes, generation));
    auto ledger =
        Ledger::Restore(generation, TakeOne(&takeover_->fds, FdName(FdKind::kLedger, generation)), inodes,
                        pipes.empty() ? std::vector<UniqueFd>() : std::move(pipes.mapped()));
    if (!ledger.ok()) {
      LOG(ERROR) << "event=ledger_not_restored generation=" << generation
                 << " error=" << LogValue(ledger.status().ToString());
      journal_.ForgetLedger(generation);
      continue;
    }
    WorkerProcess* owner = Find(generation);
    (*ledger)->owner_exited = saved->getOwnerExited() || owner == nullptr || owner->exited;
    (*ledger)->owner_hung = saved->getOwnerHung();
    ledgers_.Restore(std::move(*ledger));
  }
}

absl::Status Supervisor::OpenSnapshotListener() {
  if (snapshot_listener_ != nullptr) return absl::OkStatus();
  UniqueFd kept = TakeOne(&takeover_->fds, kSnapshotFd);
  if (!IsListeningOn(kept.get(), options_.snapshotter_socket)) {
    store_->Remove(kSnapshotFd);
    takeover_->kept.erase(kSnapshotFd);
    // Its holder, if there still is one, accepts no more: it was told, or does not answer.
    unlink(options_.snapshotter_socket.c_str());
    HF_ASSIGN_OR_RETURN(kept, ListenUnix(options_.snapshotter_socket));
  }
  snapshot_listener_ = std::make_shared<UniqueFd>(std::move(kept));
  return absl::OkStatus();
}

void Supervisor::EndTakeover() {
  RestoreLedgers();
  absl::Status listening = OpenSnapshotListener();
  if (!listening.ok()) return stopped_->reject(Failed(std::string(FromAbsl(listening.message()))));
  WorkerProcess* owner = Find(takeover_->owner);
  bool resumes = owner != nullptr && owner->client != nullptr && !owner->exited && !owner->killed;
  if (!resumes) takeover_->owner = 0;
  KillOthers({});
  PassFault(faults_, "supervisor.takeover").IgnoreError();
  if (!journal_.active()) StartFresh();
  std::unique_ptr<Takeover> takeover = std::move(takeover_);  // from now on the journal is written
  PushAll(*takeover);
  tasks_.add(SaveLivingWorkers());
  schema::SavedMachine::Reader saved;  // where nothing was: nobody
  if (takeover->adopted) saved = *takeover->state.machine;
  const Generation trial = saved.getTrialGeneration(), candidate = saved.getSwapGeneration();
  const std::string asked = saved.getSwapKind().cStr();
  if (trial != 0 && (!resumes || trial != owner->generation)) {
    WorkerProcess* tried = Find(trial);
    state_.tainted = trial;
    state_.tainted_exited = tried == nullptr || tried->exited;
  }
  if (!resumes) {
    state_.probation = RunsUnproven();
    if (takeover->adopted) swap_.Begin("supervisor", running_build_);
    if (!asked.empty() && saved.getOwner() != candidate)
      warnings_.push_back("the " + asked + " that was under way when the supervisor ended has failed");
    if (vault_.Count(MountState::kLive) + vault_.Count(MountState::kDetached) != 0) {
      swap_.ReadsStopped(clock_->BootNanos());
    }
    return Dispatch({.type = EventType::kStart});
  }
  state_.phase = Phase::kResuming;
  state_.owner = owner->generation;
  owner->reading = true;  // also if it was parked: its supervisor was gone
  if (takeover->holds_metadata) state_.holders.insert(owner->generation);
  if (!takeover->holds_metadata) state_.holders.erase(owner->generation);
  const bool went_on = candidate == owner->generation;
  const bool rolled_back = went_on && asked == "rollback";
  if (!asked.empty()) swap_.Begin(asked, running_build_);
  AdoptRunningBinary(rolled_back);
  state_.probation = RunsUnproven();
  if (!asked.empty())
    FinishSwap(went_on ? "done" : "failed: the supervisor ended in it");  // who asked was not told
  if (rolled_back) {
    if (state_.tainted == 0) state_.tainted = candidate - 1;
    state_.tainted_exited = true;  // it was parked, and is killed
  }
  SaveMachine();
  PassFault(faults_, "supervisor.phase." + std::string(PhaseName(state_.phase))).IgnoreError();
  ArmTimer(options_.limits.resume_ms);
  CallWorker({.type = ActionType::kCall, .generation = owner->generation, .call = Call::kResume});
}

void Supervisor::StartFresh() {
  auto map = DurableMap::Create("holdfast-state");
  if (map.ok()) journal_.Use(std::move(*map));
  if (!map.ok()) LOG(ERROR) << "event=no_state error=" << LogValue(map.status().ToString());
  for (const LivingWorker& worker : takeover_->living) {
    if (!OpenIfAlive(worker.pid, worker.start_ticks).valid()) continue;
    warnings_.push_back(
        "worker pid " + std::to_string(worker.pid) +
        " of an earlier supervisor did not come back; it may still serve what containers use. If the "
        "phase stays no-metadata it hangs: end it (kill -9)");
  }
}

// What the service manager has already is not sent again; what nobody asked for is dropped.
void Supervisor::PushAll(const Takeover& takeover) {
  for (const auto& [name, fds] : takeover.fds) store_->Remove(name);
  auto missing = [&](const std::string& name) { return takeover.kept.count(name) == 0; };
  if (missing(kStateFd)) journal_.PushState();
  if (missing(kSnapshotFd)) store_->Push(kSnapshotFd, {snapshot_listener_});
  for (const auto& [id, mount] : vault_.all()) {
    std::string name = FdName(FdKind::kMount, id);
    if (missing(name)) store_->Push(name, {mount.device});
  }
  for (const Ledger* ledger : ledgers_.all()) {
    if (missing(FdName(FdKind::kLedger, ledger->generation()))) StateJournal::PushLedger(*ledger, store_);
  }
  for (const auto& [generation, worker] : workers_) {
    if (missing(FdName(FdKind::kWorker, generation))) StoreWorker(*worker);
  }
}

void Supervisor::StoreWorker(const WorkerProcess& worker) {
  auto pidfd = DupFd(worker.pidfd.get());
  if (!pidfd.ok()) return;
  store_->Push(FdName(FdKind::kWorker, worker.generation), {std::make_shared<UniqueFd>(std::move(*pidfd))});
}

void Supervisor::SaveMachine() {
  if (takeover_ != nullptr) return;  // what is saved is still the truth
  bool answers = state_.trial != 0 && state_.phase >= Phase::kServing;
  capnp::MallocMessageBuilder record;
  auto out = record.initRoot<schema::SavedMachine>();
  out.setPhase(PhaseName(state_.phase));
  out.setOwner(state_.owner);
  out.setSuccessor(state_.successor);
  auto holders = out.initHolders(static_cast<unsigned>(state_.holders.size()));
  unsigned i = 0;
  for (Generation generation : state_.holders) holders.set(i++, generation);
  out.setRunning(running_->sha256.c_str());
  if (previous_ != nullptr) out.setPrevious(previous_->sha256.c_str());
  if (last_good_ != nullptr) out.setLastGood(last_good_->sha256.c_str());
  out.setTrialGeneration(answers ? state_.trial : state_.tainted);
  out.setProbation(state_.probation);
  out.setVaultId(Bytes(vault_id_));
  out.setRestarts(restarts_);
  out.setCrashes(crashes_);
  out.setHangs(hangs_);
  out.setSwaps(swap_.swaps());
  out.setCarriedOver(swap_.carried_over());
  out.setRunningBuild(running_build_.c_str());
  out.setSwapKind(swap_.unfinished().c_str());
  out.setSwapGeneration(swap_.candidate());
  journal_.SaveMachine(&record);
}

void Supervisor::SaveWorker(const WorkerProcess& worker) {
  capnp::MallocMessageBuilder record;
  auto out = record.initRoot<schema::SavedWorker>();
  out.setGeneration(worker.generation);
  out.setPid(static_cast<uint32_t>(worker.pid));
  out.setStartTicks(worker.start_ticks);
  out.setToken(worker.token.c_str());
  out.setExecutable(worker.executable->sha256.c_str());
  out.setBuild(worker.build.c_str());
  out.setCapabilities(worker.capabilities);
  out.setStartedWallNanos(worker.started_wall_nanos);
  out.setKilled(worker.killed);
  out.setRetired(worker.retired);
  journal_.SaveWorker(worker.generation, &record);
}

// One write after the other, on a thread: a disk takes milliseconds, in which a new worker waits for us.
kj::Promise<void> Supervisor::SaveLivingWorkers() {
  if (takeover_ != nullptr) return kj::READY_NOW;  // it ends with this
  auto write = [this] {
    return Offload<absl::Status>([path = WorkersPath(options_.state_dir), living = LivingWorkers()] {
      return WriteLivingWorkers(path, living);
    });
  };
  auto told = [](kj::Own<absl::Status>&& status) {
    LOG_IF(ERROR, !status->ok()) << "event=workers_file error=" << LogValue(status->ToString());
  };
  auto saved = living_saved_.then(kj::mv(write)).then(kj::mv(told)).fork();
  living_saved_ = saved.addBranch();
  return saved.addBranch();
}

std::vector<LivingWorker> Supervisor::LivingWorkers() const {
  std::vector<LivingWorker> living;
  for (const auto& [generation, worker] : workers_) {
    // One that has not registered yet may serve before we can write again.
    bool comes_back = worker->client == nullptr || (worker->capabilities & schema::CAP_REATTACH) != 0;
    if (comes_back && !worker->exited && !worker->killed && !worker->retired) {
      living.push_back({generation, worker->start_ticks, worker->pid});
    }
  }
  return living;
}

}  // namespace holdfast::supervisor
