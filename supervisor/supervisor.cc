#include "supervisor/supervisor.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <filesystem>
#include <utility>

#include "absl/strings/escaping.h"
#include "common/log.h"
#include "common/sealed_memory.h"
#include "common/unhurried.h"
#include "common/urgency.h"
#include "glog/logging.h"
#include "schema/touched.h"
#include "supervisor/rpc.h"

namespace holdfast::supervisor {
namespace {

constexpr unsigned kMaxIncomingFds = 16;
constexpr uint64_t kMountingPollMillis = 5, kMountingMillis = 10'000;
constexpr uint64_t kGonePollMillis = 1'000;
constexpr uint64_t kDistrustSeconds = 180;
constexpr char kCanaryFolder[] = "/supervisor/canary";  // in the state folder
constexpr uint64_t kUrgentMillis = 6'000;               // above a worker's own limit
constexpr uint64_t kSelfTestMillis = 5'500;             // above the verifier's own limit
constexpr int kStoreMillis = 1'000;  // a busy service manager delays a mount this long, not longer

constexpr uint64_t kNeeded = schema::CAP_SERVE_READS | schema::CAP_METADATA_HANDOVER;
constexpr uint64_t kVerifiable = schema::CAP_PREPARE | schema::CAP_TRIAL;
constexpr uint64_t kOurs = kNeeded | kVerifiable | schema::CAP_HEALTH | schema::CAP_REATTACH;

// Steps of a swap as people see them.
const std::map<Phase, const char*> kSteps = {
    {Phase::kStarting, "start"}, {Phase::kPreparing, "prepare"},       {Phase::kRehearsing, "rehearse"},
    {Phase::kParking, "park"},   {Phase::kServing, "serve"},           {Phase::kProbing, "probe"},
    {Phase::kYielding, "yield"}, {Phase::kAwaitingExit, "await-exit"}, {Phase::kCommitting, "commit"}};

absl::StatusOr<SharedFd> MakeTouched() {
  HF_ASSIGN_OR_RETURN(UniqueFd memory, MakeSealedMemory("holdfast-touched", HF_TOUCHED_TOTAL_SIZE));
  hf_touched_header header{};
  header.magic = HF_TOUCHED_MAGIC;
  header.version = HF_TOUCHED_VERSION;
  header.header_size = sizeof(header);
  header.entry_stride = sizeof(hf_touched_entry);
  header.capacity = HF_TOUCHED_ENTRIES;
  HF_RETURN_IF_ERROR(PwriteFull(memory.get(), &header, sizeof(header), 0));
  return std::make_shared<UniqueFd>(std::move(memory));
}

}  // namespace

Supervisor::Supervisor(const Options& options, Resources resources, kj::AsyncIoContext* io)
    : options_(options),
      io_(io),
      timer_(io->provider->getTimer()),
      state_dir_(std::move(resources.state_dir)),
      snapshot_listener_(std::move(resources.snapshot_listener)),
      warnings_(std::move(resources.warnings)),
      vault_id_(RandomBytes(16)),
      started_wall_nanos_(clock_->WallNanos()),
      store_(resources.store),
      faults_(resources.faults),
      journal_(store_),
      takeover_(std::make_unique<Takeover>()),
      vault_(std::move(resources.mount_ids), &journal_),
      ledgers_(&journal_),
      generations_(std::move(resources.generations)),
      running_(std::move(resources.executable)),
      last_good_(std::move(resources.last_good)),
      verifiers_(io, options_.verifier, [this] { RemoveCanaries(); }),
      tasks_(*this) {
  state_.probation = RunsUnproven();
  takeover_->fds = std::move(resources.fds);
  takeover_->living = std::move(resources.living);
  for (const auto& [name, fds] : takeover_->fds) takeover_->kept.insert(name);
}

void Supervisor::taskFailed(kj::Exception&& exception) {
  LOG(ERROR) << "event=task_failed error=" << LogValue(Describe(exception));
}

void Supervisor::Ignore(kj::Promise<void> promise) {
  tasks_.add(promise.catch_([](kj::Exception&&) {}));
}

kj::Promise<void> Supervisor::Run() {
  auto pair = kj::newPromiseAndFulfiller<void>();
  stopped_ = kj::mv(pair.fulfiller);
  auto recovered = [this] {
    tasks_.add(WatchMounts());
    if (options_.hang_limit_ms != 0) tasks_.add(WatchWorker());
  };
  tasks_.add(Recover().then(kj::mv(recovered),
                            [this](kj::Exception&& exception) { stopped_->reject(kj::mv(exception)); }));
  return kj::mv(pair.promise);
}

// Actions may bring events about (a spawn that fails): those wait until the actions before them are done.
void Supervisor::Dispatch(Event event) {
  events_.push_back(std::move(event));
  if (dispatching_) return;
  dispatching_ = true;
  for (; !events_.empty(); events_.pop_front()) Apply(Event(events_.front()));
  dispatching_ = false;
}

void Supervisor::Apply(const Event& event) {
  if (state_.next_generation == 0) {
    auto next = generations_.Next(last_generation_);
    // A full disk must not stop a worker from being replaced: the number is new in this process's life.
    if (!next.ok()) LOG(ERROR) << "event=generation_file error=" << LogValue(next.status().ToString());
    state_.next_generation = last_generation_ = next.ok() ? *next : last_generation_ + 1;
  }
  StepResult result = Step(state_, event, options_.limits);
  if (result.state.phase != state_.phase) {
    LOG(INFO) << "event=phase from=" << PhaseName(state_.phase) << " to=" << PhaseName(result.state.phase)
              << " owner=" << result.state.owner << " successor=" << result.state.successor;
  }
  if (result.state.next_generation != state_.next_generation)
    result.state.next_generation = 0;  // it is spent
  Phase before = std::exchange(state_, std::move(result.state)).phase;
  AdoptRunningBinary();
  SaveMachine();
  if (before != state_.phase) {
    PassFault(faults_, "supervisor.phase." + std::string(PhaseName(state_.phase))).IgnoreError();
  }
  // Now, and not when the next worker is waited for.
  if (before != state_.phase && state_.phase == Phase::kRunning) generations_.Reserve().IgnoreError();
  if (upgrade_busy_ && before != state_.phase) NotePhase(before, state_.phase);
  for (const Action& action : result.actions) Do(action);
  SaveMachine();  // what the actions counted
}

// A dead worker is replaced by the binary that served last.
void Supervisor::AdoptRunningBinary() {
  WorkerProcess* owner = Find(state_.owner);
  if (owner == nullptr) return;
  running_build_ = owner->build;
  // Nobody shall roll back to a build that did not survive its probation.
  if (owner->executable->sha256 != running_->sha256) previous_ = state_.reverted ? nullptr : running_;
  running_ = owner->executable;
}

void Supervisor::Do(const Action& action) {
  switch (action.type) {
    case ActionType::kSpawn:
      return SpawnWorker(action.generation, action.binary);
    case ActionType::kCall:
      return CallWorker(action);
    case ActionType::kTellExited:
      return TellExited(action.generation, action.subject);
    case ActionType::kKill:
      return KillWorker(action.generation);
    case ActionType::kKillHung:
      return KillHung(action.generation, {.what = action.reason});
    case ActionType::kTimer:
      return ArmTimer(action.milliseconds);
    case ActionType::kStopTimer:
      return void(++timer_token_);
    case ActionType::kExit:
      return stopped_->fulfill();
    case ActionType::kProven:
      return SetLastGood(running_);
    case ActionType::kReverted:
      reverted_ = "build " + running_->sha256 + " (" + running_build_ + ") did not survive its probation (" +
                  action.reason + "); " + last_good_->sha256 + " was brought back";
      LOG(ERROR) << "event=reverted reason=" << LogValue(reverted_);
      running_ = last_good_;  // also if it should die before it owns anything
      previous_ = nullptr;
      return;
    case ActionType::kDataFault:
      reverted_ += "; it died too (" + action.reason +
                   "), so the builds are not to blame: look for damaged layers in the worker's log";
      LOG(ERROR) << "event=data_fault reason=" << LogValue(action.reason);
      return;
    case ActionType::kSwapDone:
      // The first build that ever ran here: nothing else could be brought back.
      if (last_good_ == nullptr) SetLastGood(running_);
      if (state_.probation && !state_.stable)
        probation_ends_boot_nanos_ =
            clock_->BootNanos() + (options_.limits.stable_ms + options_.limits.probation_ms) * 1'000'000;
      FinishSwap("done");
      break;
    case ActionType::kSwapFailed:
      FinishSwap("failed: " + action.reason);
      break;
    case ActionType::kRefused:
      break;
  }
  KJ_IF_MAYBE (waiter, upgrade_waiter_) {
    if (action.type == ActionType::kSwapDone) (*waiter)->fulfill();
    if (action.type != ActionType::kSwapDone) (*waiter)->reject(Failed(action.reason));
    upgrade_waiter_ = nullptr;
  }
}

// The steps of an upgrade follow the machine's phases.
void Supervisor::NotePhase(Phase from, Phase to) {
  bool begins = to == Phase::kStarting && state_.upgrade;
  bool forward = begins || (to > from && (to <= Phase::kCommitting || from == Phase::kCommitting) &&
                            to <= Phase::kRunning);
  // After the step that failed there are no more, also where the owner is replaced after that.
  forward = forward && !step_failed_;
  step_failed_ = !forward;
  EndStep(forward);
  if (auto step = kSteps.find(to); forward && step != kSteps.end()) BeginStep(step->second);
  // Whoever watches would wake up and take the processor from the workers, for which reads wait.
  if (to != Phase::kParking && to != Phase::kServing) TellProgress();
}

void Supervisor::BeginStep(const std::string& name) {
  steps_.push_back({.name = name, .begun_boot_nanos = clock_->BootNanos()});
  progress_due_.push_back({steps_.back(), false});
}

void Supervisor::EndStep(bool ok) {
  if (steps_.empty() || steps_.back().nanos != 0) return;
  steps_.back().nanos = clock_->BootNanos() - steps_.back().begun_boot_nanos;
  if (!ok) return;
  const SwapStep& step = steps_.back();
  LOG(INFO) << "event=step name=" << step.name << " ns=" << step.nanos << " detail=" << LogValue(step.detail);
  progress_due_.push_back({step, true});
}

void Supervisor::TellProgress() {
  for (const auto& [step, done] : std::exchange(progress_due_, {})) {
    KJ_IF_MAYBE (progress, progress_) {
      auto request = progress->stepRequest();
      FillStep(step, request.initStep());
      request.setDone(done);
      Ignore(request.send().ignoreResult());  // who asked may be gone
    }
  }
}

void Supervisor::SetLastGood(std::shared_ptr<const Executable> executable) {
  last_good_ = std::move(executable);
  reverted_.clear();
  LOG(INFO) << "event=last_good executable=" << last_good_->sha256;
  // On a thread: the disk may be slow. Lost, it costs the next boot a build to fall back to.
  auto written =
      Offload<absl::Status>([path = options_.state_dir + "/" + kLastGoodFile, text = last_good_->sha256] {
        return WriteFileAtomic(path, text + "\n");
      });
  tasks_.add(written.then([](kj::Own<absl::Status>&& status) {
    LOG_IF(ERROR, !status->ok()) << "event=last_good_not_kept error=" << LogValue(status->ToString());
  }));
}

void Supervisor::BeginSwap(const std::string& kind) {
  swap_ = Swap{};
  swap_.kind = kind;
  swap_.result = "running";
  swap_.from_build = running_build_;
}

void Supervisor::SpawnWorker(Generation generation, Binary binary) {
  bool upgrade = binary == Binary::kCandidate;
  if (upgrade) BeginSwap(swap_kind_);
  auto worker = std::make_unique<WorkerProcess>();
  worker->generation = generation;
  bool last_good = binary == Binary::kLastGood && last_good_ != nullptr;
  worker->executable = upgrade ? candidate_ : last_good ? last_good_ : running_;
  worker->started_wall_nanos = clock_->WallNanos();
  absl::Status status = [&]() -> absl::Status {
    HF_RETURN_IF_ERROR(ledgers_.Create(generation).status());
    worker->token = absl::BytesToHexString(RandomBytes(32));
    bool urgent = state_.owner == 0 && generation == state_.successor;
    HF_ASSIGN_OR_RETURN(WorkerChild child,
                        Spawn(*worker->executable, options_.worker_args, worker->token, urgent));
    worker->pid = child.process.pid;
    if (urgent) LimitUrgency(generation);
    worker->pidfd = std::move(child.process.pidfd);
    worker->start_ticks = ProcessStartTicks(worker->pid).value_or(0);
    // Before it is given anything: it cannot register before we are back on the loop.
    SaveWorker(*worker);
    StoreWorker(*worker);
    Connect(worker.get(), std::move(child.socket));
    return absl::OkStatus();
  }();
  if (!status.ok()) {
    LOG(ERROR) << "event=spawn_failed generation=" << generation << " error=" << LogValue(status.ToString());
    ledgers_.OwnerExited(generation);
    return Dispatch({.type = EventType::kExited, .generation = generation, .reason = status.ToString()});
  }
  LOG(INFO) << "event=spawned generation=" << generation << " pid=" << worker->pid
            << " executable=" << worker->executable->sha256 << " candidate=" << upgrade;
  workers_[generation] = std::move(worker);
  tasks_.add(SaveLivingWorkers());
}

// It ends by itself, but for builds that know nothing of it, and those that come to nothing.
void Supervisor::LimitUrgency(Generation generation) {
  tasks_.add(timer_.afterDelay(kUrgentMillis * kj::MILLISECONDS).then([this, generation] {
    WorkerProcess* worker = Find(generation);
    if (worker != nullptr && !worker->exited) EndUrgencyOf(worker->pid);
  }));
}

void Supervisor::Connect(WorkerProcess* worker, UniqueFd socket) {
  Generation generation = worker->generation;
  using Flags = kj::LowLevelAsyncIoProvider::Flags;
  worker->stream = io_->lowLevelProvider->wrapUnixSocketFd(socket.Release(),
                                                           Flags::TAKE_OWNERSHIP | Flags::ALREADY_CLOEXEC);
  worker->connection = kj::heap<capnp::TwoPartyClient>(*worker->stream, kMaxIncomingFds,
                                                       MakeSupervisorServer(this, generation),
                                                       capnp::rpc::twoparty::Side::SERVER);
  WatchExit(worker);
  auto ended = worker->connection->onDisconnect().catch_([](kj::Exception&&) {});
  tasks_.add(ended.then([this, generation] { OnDisconnected(generation); }));
}

void Supervisor::WatchExit(WorkerProcess* worker) {
  worker->exit_observer = kj::heap<kj::UnixEventPort::FdObserver>(
      io_->unixEventPort, worker->pidfd.get(), kj::UnixEventPort::FdObserver::OBSERVE_READ);
  Generation generation = worker->generation;
  tasks_.add(worker->exit_observer->whenBecomesReadable().then([this, generation] { OnExit(generation); }));
}

// All threads end with the process, but the last one has to give back memory and descriptors, which takes
// milliseconds; only then does the connection end. Kernels before 6.9 cannot tell of a thread.
void Supervisor::WatchThread(WorkerProcess* worker, pid_t thread) {
  if (syscall(SYS_tgkill, worker->pid, thread, 0) != 0) return;
  worker->thread.Reset(static_cast<int>(syscall(SYS_pidfd_open, thread, O_EXCL)));  // PIDFD_THREAD
  if (!worker->thread.valid()) return;
  worker->thread_observer = kj::heap<kj::UnixEventPort::FdObserver>(
      io_->unixEventPort, worker->thread.get(), kj::UnixEventPort::FdObserver::OBSERVE_READ);
  Generation generation = worker->generation;
  tasks_.add(worker->thread_observer->whenBecomesReadable().then(
      [this, generation] { OnDisconnected(generation, "its threads ended"); }));
}

// Answers may still come from a worker that is known to be dead.
bool Supervisor::IsLost(Generation generation) {
  WorkerProcess* worker = Find(generation);
  return worker == nullptr || worker->disconnected;
}

void Supervisor::CallWorker(const Action& action, uint64_t waited_ms) {
  Generation generation = action.generation;
  Call call = action.call;
  WorkerProcess* worker = Find(generation);
  if (worker == nullptr) return;
  if (call == Call::kTake && vault_.Count(MountState::kMounting) != 0 && waited_ms < kMountingMillis) {
    // What a dead predecessor was mounting must be in the vault when its successor looks; a mount(2) that
    // does not return must not keep everybody from the metadata.
    tasks_.add(timer_.afterDelay(kMountingPollMillis * kj::MILLISECONDS).then([this, action, waited_ms] {
      bool wanted = state_.phase == Phase::kCommitting || state_.phase == Phase::kReclaiming;
      if (wanted && state_.holders.count(action.generation) != 0)
        CallWorker(action, waited_ms + kMountingPollMillis);
    }));
    return;
  }
  if (call == Call::kPark) {
    worker->reading = false;
    reads_stopped_boot_nanos_ = clock_->BootNanos();
  }
  if (call == Call::kServe) swap_.carried_over = ledgers_.CountUnanswered(generation);
  if (call == Call::kRetire) {
    worker->retired = true;
    SaveWorker(*worker);
    LimitRetirement(generation);
  }
  if (worker->client == nullptr) return;
  auto failed = [this, generation, call](kj::Exception&& exception) {
    // A broken connection is a death, and told as one.
    if (exception.getType() == kj::Exception::Type::DISCONNECTED || IsLost(generation)) return;
    std::string why = Describe(exception);
    LOG(WARNING) << "event=call_failed generation=" << generation << " call=" << CallName(call)
                 << " error=" << LogValue(why);
    Dispatch({.type = EventType::kFailed, .generation = generation, .call = call, .reason = why});
  };
  ++worker->calls;
  auto over = kj::defer([this, generation] {
    if (WorkerProcess* called = Find(generation)) --called->calls;
  });
  tasks_.add(SendCall(worker, action)
                 .attach(kj::mv(over))
                 .then([this, generation, call] { OnCallDone(generation, call); }, kj::mv(failed)));
}

void Supervisor::LimitRetirement(Generation generation) {
  auto too_long = [this, generation] { KillWorker(generation); };  // nothing if it exited
  tasks_.add(timer_.afterDelay(options_.limits.retired_ms * kj::MILLISECONDS).then(kj::mv(too_long)));
}

kj::Promise<void> Supervisor::SendCall(WorkerProcess* worker, const Action& action) {
  schema::Worker::Client client = KJ_ASSERT_NONNULL(worker->client);
  auto note = [this](std::string&& detail) {
    if (!steps_.empty()) steps_.back().detail = std::move(detail);
  };
  switch (action.call) {
    case Call::kServe:
      return Serve(worker);
    case Call::kPark:
      return client.parkRequest().send().ignoreResult();
    case Call::kResume:
      return client.resumeRequest().send().ignoreResult();
    case Call::kYield:
      return client.yieldMetadataRequest().send().ignoreResult();
    case Call::kTake:
      return client.takeMetadataRequest().send().ignoreResult();
    case Call::kRetire:
      return client.retireRequest().send().ignoreResult();
    case Call::kPrepare:
      return client.prepareRequest().send().ignoreResult();
    case Call::kEndTrial:
      return client.endTrialRequest().send().ignoreResult();
    case Call::kRehearse:
      return kj::evalNow([&] { return Rehearse(client); }).then(kj::mv(note));
    case Call::kProbe:
      return kj::evalNow([&] { return ProbeLive(worker->generation); }).then(kj::mv(note));
    case Call::kDistrust: {
      // Content that the candidate stored is under the old id, and so is verified before its next use.
      vault_id_ = RandomBytes(16);
      if ((worker->capabilities & schema::CAP_TRIAL) == 0) return Failed("this build cannot");
      auto request = client.distrustRequest();
      request.setGeneration(action.subject);
      if (touched_ != nullptr) request.setTouched(MakeDescriptor(std::exchange(touched_, nullptr)));
      request.setVaultId(Bytes(vault_id_));
      // The kernel waits for pages that are just being read, at most as long as a read may wait for a
      // registry.
      return timer_.timeoutAfter(kDistrustSeconds * kj::SECONDS, request.send().ignoreResult());
    }
  }
  KJ_UNREACHABLE;
}

kj::Promise<void> Supervisor::Serve(WorkerProcess* worker) {
  auto request = KJ_ASSERT_NONNULL(worker->client).serveRequest();
  if (state_.trial == worker->generation) {
    auto touched = MakeTouched();
    if (!touched.ok()) return Failed(std::string(FromAbsl(touched.status().message())));
    touched_ = *std::move(touched);
    request.setTrial(true);
    request.setTouched(MakeDescriptor(touched_));
  }
  FillTakeover(vault_, ledgers_, worker->generation, request.initTakeover());
  return request.send().ignoreResult();
}

// A verifier's summary. The end of a worker is told as its death; that of the verifier is a failure.
template <typename Results>
kj::Promise<std::string> Supervisor::Judged(capnp::RemotePromise<Results> verdict) {
  auto summary = [](auto&& results) { return std::string(results.getSummary().cStr()); };
  return verdict.then(kj::mv(summary), [this](kj::Exception&& exception) -> std::string {
    auto lives = [this](Generation generation) {
      WorkerProcess* worker = Find(generation);
      return worker != nullptr && worker->dead_since_boot_nanos == 0;
    };
    bool disconnected = exception.getType() == kj::Exception::Type::DISCONNECTED;
    if (disconnected && lives(state_.successor) && (state_.owner == 0 || lives(state_.owner)))
      kj::throwFatalException(Failed("the verifier died: " + Describe(exception)));
    kj::throwFatalException(kj::mv(exception));
  });
}

kj::Promise<std::string> Supervisor::Rehearse(schema::Worker::Client candidate) {
  WorkerProcess* owner = Find(state_.owner);
  if (owner == nullptr || owner->client == nullptr) return Failed("the running worker is gone");
  verifier_ = verifiers_.Begin();
  auto request = KJ_ASSERT_NONNULL(verifier_)->client().rehearseRequest();
  request.setOwner(KJ_ASSERT_NONNULL(owner->client));
  request.setCandidate(kj::mv(candidate));
  request.setMounts(MakeMountView(&vault_));
  request.setCanaryFolder((options_.state_dir + kCanaryFolder).c_str());
  return Judged(request.send());
}

kj::Promise<std::string> Supervisor::ProbeLive(Generation generation) {
  auto request = KJ_REQUIRE_NONNULL(verifier_, "nothing was rehearsed")->client().probeLiveRequest();
  request.setGeneration(generation);
  return Judged(request.send());
}

// What a verifier that is gone has left; those of the next swap are made long after this.
void Supervisor::RemoveCanaries() {
  if (verifier_ != nullptr) return;
  auto removed = Offload<int>([folder = options_.state_dir + kCanaryFolder] {
    RemoveStaleMounts(folder).status().IgnoreError();
    std::error_code none;
    for (const auto& entry : std::filesystem::directory_iterator(folder, none)) rmdir(entry.path().c_str());
    return 0;
  });
  tasks_.add(removed.ignoreResult());
}

void Supervisor::OnCallDone(Generation generation, Call call) {
  if (IsLost(generation)) return;
  if (call == Call::kServe || call == Call::kResume) {
    // A rollback is a second pause of the same swap.
    if (reads_stopped_boot_nanos_ != 0) {
      swap_.pause_nanos += clock_->BootNanos() - std::exchange(reads_stopped_boot_nanos_, 0);
      if (call == Call::kServe) carried_over_total_ += swap_.carried_over;
      LOG(INFO) << "event=reads_taken_over generation=" << generation << " pause_ns=" << swap_.pause_nanos
                << " requests_carried_over=" << swap_.carried_over;
    }
    if (WorkerProcess* worker = Find(generation)) worker->reading = true;
  }
  // Parked: it writes there no more. The owner, which retires at the end, was never parked.
  if (call == Call::kRetire && generation != state_.owner) ledgers_.OwnerExited(generation);
  Dispatch({.type = EventType::kReplied, .generation = generation, .call = call});
}

void Supervisor::TellExited(Generation generation, Generation exited) {
  WorkerProcess* worker = Find(generation);
  if (worker == nullptr) return;
  KJ_IF_MAYBE (client, worker->client) {
    auto request = client->ownerExitedRequest();
    request.setGeneration(exited);
    Ignore(request.send().ignoreResult());
  }
}

void Supervisor::KillWorker(Generation generation) {
  WorkerProcess* worker = Find(generation);
  if (worker == nullptr || worker->killed || worker->exited) return;
  worker->killed = true;
  SaveWorker(*worker);
  if (worker->dead_since_boot_nanos == 0) worker->dead_since_boot_nanos = clock_->BootNanos();
  syscall(SYS_pidfd_send_signal, worker->pidfd.get(), SIGKILL, nullptr, 0);
  LOG(INFO) << "event=killed generation=" << generation << " pid=" << worker->pid;
  if (worker->reading && reads_stopped_boot_nanos_ == 0) reads_stopped_boot_nanos_ = clock_->BootNanos();
}

void Supervisor::ArmTimer(uint64_t milliseconds) {
  uint64_t token = ++timer_token_;
  tasks_.add(timer_.afterDelay(milliseconds * kj::MILLISECONDS).then([this, token] {
    if (token == timer_token_) Dispatch({.type = EventType::kTimer});
  }));
}

void Supervisor::NoteDeath(WorkerProcess* worker, const std::string& reason) {
  if (worker->dead_since_boot_nanos != 0) return;
  worker->dead_since_boot_nanos = clock_->BootNanos();
  bool successor_reads = state_.phase >= Phase::kServing && state_.phase <= Phase::kCommitting;
  bool reading = worker->generation == (successor_reads ? state_.successor : state_.owner);
  if (reading && reads_stopped_boot_nanos_ == 0) reads_stopped_boot_nanos_ = worker->dead_since_boot_nanos;
  // In a swap it is the swap's affair.
  if (reading && !worker->retired && !upgrade_busy_) BeginSwap(worker->hung.empty() ? "crash" : "hang");
  if (worker->retired) return;
  bool candidate = state_.upgrade && worker->generation == state_.successor;
  if (!candidate && worker->generation != state_.spare) {
    ++crashes_;
    if (!worker->hung.empty()) ++hangs_;
  }
  LOG(ERROR) << "event=worker_died generation=" << worker->generation << " pid=" << worker->pid
             << " reason=" << LogValue(worker->hung.empty() ? reason : worker->hung)
             << " phase=" << PhaseName(state_.phase);
}

void Supervisor::OnDisconnected(Generation generation, const char* how) {
  WorkerProcess* worker = Find(generation);
  if (worker == nullptr || worker->disconnected) return;
  worker->disconnected = true;
  if (worker->retired) return;  // it may need its time to exit
  NoteDeath(worker, how);
  KillWorker(generation);
  Dispatch({.type = EventType::kDied, .generation = generation, .reason = how});
}

void Supervisor::OnExit(Generation generation) {
  WorkerProcess* worker = Find(generation);
  std::string reason = ReapReason(worker->pidfd.get());
  worker->exited = true;
  NoteDeath(worker, reason);
  LOG(INFO) << "event=exited generation=" << generation << " pid=" << worker->pid
            << " how=" << LogValue(reason);
  ledgers_.OwnerExited(generation);
  journal_.ForgetWorker(generation);
  // Not in this callback: it belongs to what is destroyed.
  tasks_.add(kj::evalLater([this, generation] { workers_.erase(generation); }));
  Dispatch({.type = EventType::kExited, .generation = generation, .reason = reason});
  tasks_.add(SaveLivingWorkers());
}

WorkerProcess* Supervisor::Find(Generation generation) {
  auto it = workers_.find(generation);
  return it == workers_.end() ? nullptr : it->second.get();
}

void Supervisor::FinishSwap(const std::string& result) {
  verifier_ = nullptr;
  if (swap_.kind == "none" || swap_.result != "running") return;
  swap_.result = result;
  swap_.finished_wall_nanos = clock_->WallNanos();
  if (WorkerProcess* owner = Find(state_.owner)) swap_.to_build = owner->build;
  if (upgrade_busy_) {
    EndStep(result == "done");
    swap_.steps = steps_;
    if (result != "done" && !steps_.empty()) swap_.steps.back().detail = result;
  }
  if (result == "done") ++swaps_;
  LOG(INFO) << "event=swap kind=" << swap_.kind << " result=" << LogValue(result) << " owner=" << state_.owner
            << " pause_ns=" << swap_.pause_nanos << " requests_carried_over=" << swap_.carried_over;
}

void Supervisor::Register(Generation generation, schema::Hello::Reader hello,
                          schema::Worker::Client worker_client, capnp::Capability::Client admin,
                          schema::Welcome::Builder welcome) {
  WorkerProcess* worker = Find(generation);
  KJ_REQUIRE(worker != nullptr, "this worker is not known any more");
  KJ_REQUIRE(worker->client == nullptr, "registered already");
  auto token = hello.getToken().asChars();
  KJ_REQUIRE(std::string(token.begin(), token.size()) == worker->token, "wrong token");
  uint64_t common = hello.getCapabilities() & kOurs;
  KJ_REQUIRE((common & kNeeded) == kNeeded,
             "this supervisor needs the capabilities serveReads and metadataHandover");
  Ledger* ledger = ledgers_.Find(generation);
  worker->client = kj::mv(worker_client);
  worker->admin = kj::mv(admin);
  worker->build = hello.getBuild().cStr();
  worker->capabilities = common;
  WatchThread(worker, static_cast<pid_t>(hello.getThread()));
  SaveWorker(*worker);
  if (SharedFd state = journal_.ReadOnlyState()) welcome.setState(MakeDescriptor(std::move(state)));
  welcome.setControlSocket(options_.control_socket.c_str());
  welcome.setCapabilities(common);
  welcome.setGeneration(generation);
  welcome.setVaultId(kj::arrayPtr(reinterpret_cast<const kj::byte*>(vault_id_.data()), vault_id_.size()));
  welcome.setLedger(MakeDescriptor(ledger->memory()));
  FillPipes(*ledger, welcome.initRequestPipes(static_cast<unsigned>(ledger->pipes().size())));
  welcome.setSnapshotListener(MakeDescriptor(snapshot_listener_));
  welcome.setStateDir(options_.state_dir.c_str());
  welcome.setRuntimeDir(options_.runtime_dir.c_str());
  LOG(INFO) << "event=registered generation=" << generation << " pid=" << worker->pid
            << " build=" << LogValue(worker->build);
  // After the welcome is on its way.
  WorkerProcess* owner = Find(state_.owner);
  if (owner != nullptr) common &= owner->capabilities;
  bool verifiable = (common & kVerifiable) == kVerifiable;
  tasks_.add(kj::evalLast([this, generation, verifiable] {
    Dispatch({.type = EventType::kRegistered, .generation = generation, .verifiable = verifiable});
    tasks_.add(SaveLivingWorkers());
  }));
}

kj::Promise<bool> Supervisor::Upgrade(std::string path, bool force,
                                      kj::Maybe<schema::Progress::Client> progress) {
  ClaimSwap(kj::mv(progress));
  auto free = kj::defer([this] { upgrade_busy_ = false; });
  if (path.empty()) path = options_.worker;
  BeginStep("copy");
  TellProgress();
  using Copy = absl::StatusOr<std::shared_ptr<const Executable>>;
  std::vector<std::string> keep = {running_->sha256};
  for (const auto& executable : {previous_, last_good_}) {
    if (executable != nullptr) keep.push_back(executable->sha256);
  }
  auto copied = Offload<Copy>([path, keep, state_dir = options_.state_dir] {
    ExecutableStore copies = WorkerCopies(state_dir);
    copies.Keep(keep);
    Unhurried unhurried;
    return copies.Add(path, &unhurried);
  });
  auto swapped = copied.then([this, force, path](kj::Own<Copy>&& copy) -> kj::Promise<bool> {
    if (!copy->ok()) Throw(Annotate(copy->status(), "worker " + path));
    if ((**copy)->sha256 == running_->sha256 && !force) return false;
    return SwapTo(**copy, "upgrade");
  });
  return Keep(swapped.attach(kj::mv(free)));
}

kj::Promise<bool> Supervisor::Rollback(kj::Maybe<schema::Progress::Client> progress) {
  ClaimSwap(kj::mv(progress));
  auto free = kj::defer([this] { upgrade_busy_ = false; });
  auto target = RollbackTarget();
  if (target == nullptr) Throw(FailedPrecondition("no other build is kept here to roll back to"));
  return Keep(SwapTo(std::move(target), "rollback").attach(kj::mv(free)));
}

void Supervisor::ClaimSwap(kj::Maybe<schema::Progress::Client> progress) {
  if (upgrade_busy_) Throw(Unavailable("another swap is under way already"));
  if (takeover_ != nullptr)
    Throw(Unavailable("the supervisor is still taking over from the one before; try again in some seconds"));
  if (stopping_) Throw(Unavailable("the supervisor is shutting down"));
  upgrade_busy_ = true;
  steps_.clear();
  step_failed_ = false;
  progress_due_.clear();
  progress_ = kj::mv(progress);
}

kj::Promise<bool> Supervisor::SwapTo(std::shared_ptr<const Executable> executable, const std::string& kind) {
  candidate_ = std::move(executable);
  swap_kind_ = kind;
  EndStep(true);
  auto pair = kj::newPromiseAndFulfiller<void>();
  upgrade_waiter_ = kj::mv(pair.fulfiller);
  bool proven = last_good_ != nullptr && candidate_->sha256 == last_good_->sha256;
  Dispatch({.type = EventType::kUpgrade, .proven = proven});
  return pair.promise.then([] { return true; });
}

std::shared_ptr<const Executable> Supervisor::RollbackTarget() const {
  if (previous_ != nullptr) return previous_;
  return RunsUnproven() ? last_good_ : nullptr;
}

kj::Promise<RollbackReadiness> Supervisor::CheckRollback() {
  auto target = RollbackTarget();
  // With none, what matters is that the build which is started after a crash still starts.
  if (target == nullptr) target = running_;
  auto tested = kj::evalNow([&] {
    auto task = verifiers_.Begin();
    auto request = task->client().selfTestRequest();
    auto program = DupFd(target->file.get());
    if (!program.ok()) Throw(program.status());
    request.setExecutable(MakeDescriptor(std::move(*program)));
    using Results = capnp::Response<schema::Verifier::SelfTestResults>;
    auto result = request.send().then([target](Results&& results) {
      return RollbackReadiness{results.getPassed(), target->sha256, results.getOutput().cStr()};
    });
    return timer_.timeoutAfter(kSelfTestMillis * kj::MILLISECONDS, result.attach(kj::mv(task)));
  });
  return tested.catch_([target](kj::Exception&& exception) {
    return RollbackReadiness{false, target->sha256, Describe(exception)};
  });
}

void Supervisor::Stop(const std::string& reason) {
  if (stopping_) return;
  stopping_ = true;
  LOG(INFO) << "event=stopping reason=" << LogValue(reason);
  auto unmounted = UnmountAll().exclusiveJoin(timer_.afterDelay(kStopUnmountSeconds * kj::SECONDS));
  tasks_.add(unmounted.then([this] { Dispatch({.type = EventType::kStop}); }));
}

void Supervisor::KillRemaining() {
  for (auto& [generation, worker] : workers_) {
    if (worker->exited) continue;
    KillWorker(generation);
    pollfd exit{.fd = worker->pidfd.get(), .events = POLLIN, .revents = 0};
    if (poll(&exit, 1, 1'000) == 1) ReapReason(worker->pidfd.get());
  }
}

void Supervisor::RequireOwner(Generation caller) const {
  KJ_REQUIRE(state_.holders.count(caller) != 0, "only the owner of the metadata may mount and unmount");
  KJ_REQUIRE(!stopping_, "the supervisor is shutting down");
}

kj::Promise<const Mount*> Supervisor::MountLayer(Generation caller, std::string path, InitOptions options,
                                                 std::string blob) {
  RequireOwner(caller);
  auto opened = OpenFuseDevice();
  if (!opened.ok()) Throw(opened.status());
  auto device = std::make_shared<UniqueFd>(std::move(*opened));
  auto id = vault_.Allocate(path, std::move(blob), caller, device);
  if (!id.ok()) Throw(id.status());
  using Result = absl::StatusOr<FuseInit>;
  auto mounted = Offload<Result>([this, name = FdName(FdKind::kMount, *id), device, path, options] {
    store_->Push(name, {device});
    if (!store_->Flush(kStoreMillis)) LOG(WARNING) << "event=fd_store_slow name=" << name;
    PassFault(faults_, "supervisor.before_mount").IgnoreError();
    auto result = MountFuse(device->get(), state_dir_.get(), options_.state_dir, path, options);
    PassFault(faults_, "supervisor.after_mount").IgnoreError();
    return result;
  });
  return Keep(mounted.then([this, id = *id](kj::Own<Result>&& r) { return FinishMount(id, std::move(*r)); }));
}

kj::Promise<const Mount*> Supervisor::MountPrivate(const std::string& name, InitOptions options,
                                                   std::string blob) {
  if (!options_.drill)
    Throw(FailedPrecondition("only the private instance of a drill mounts for holdfastctl"));
  bool plain = !name.empty() && name.find_first_not_of("0123456789") == std::string::npos;
  if (!plain) Throw(InvalidArgument("'" + name + "' is no number"));
  Generation owner = state_.owner;
  WorkerProcess* worker = Find(owner);
  bool able = worker != nullptr && (worker->capabilities & schema::CAP_TRIAL) != 0;
  if (!able) Throw(FailedPrecondition("the running worker does not take private mounts"));
  std::string path = options_.state_dir + "/drill/" + name;
  absl::Status made = MakeDirs(path);
  if (!made.ok()) Throw(made);
  return MountLayer(owner, path, options, std::move(blob)).then([this, owner](const Mount* mount) {
    WorkerProcess* server = Find(owner);
    if (server == nullptr) Throw(Unavailable("the worker died meanwhile"));
    auto request = KJ_ASSERT_NONNULL(server->client).addMountsRequest();
    FillMountEntry(*mount, true, request.initEntries(1)[0]);
    return request.send().ignoreResult().then([this, id = mount->id]() -> const Mount* {
      const Mount* served = vault_.Find(id);
      if (served == nullptr) Throw(NotFound("the mount was removed meanwhile"));
      return served;
    });
  });
}

const Mount* Supervisor::FinishMount(uint64_t id, absl::StatusOr<FuseInit> result) {
  Mount* mount = vault_.Find(id);
  LOG(INFO) << "event=mount mount=" << id << " path=" << LogValue(mount->path)
            << " generation=" << mount->caller << " result=" << LogValue(result.status().ToString());
  if (!result.ok()) {
    vault_.Forget(id);
    Throw(result.status());
  }
  mount->state = MountState::kLive;
  mount->init_request = std::move(result->request);
  mount->init_reply = std::move(result->reply);
  vault_.Save(*mount);
  return mount;
}

kj::Promise<MountState> Supervisor::UnmountLayer(Generation caller, uint64_t mount_id) {
  RequireOwner(caller);
  Mount* mount = vault_.Find(mount_id);
  KJ_REQUIRE(mount != nullptr, "no such mount", mount_id);
  KJ_REQUIRE(mount->state != MountState::kMounting, "still being mounted", mount_id);
  // Not again: the path may be another mount's by now.
  if (mount->state == MountState::kDetached) return MountState::kDetached;
  mount->unmounting = true;
  vault_.Save(*mount);
  using Result = absl::StatusOr<bool>;
  auto unmounted = Offload<Result>([this, path = mount->path, device = mount->device] {
    PassFault(faults_, "supervisor.before_unmount").IgnoreError();
    auto result = UnmountFuse(path, device->get());
    PassFault(faults_, "supervisor.after_unmount").IgnoreError();
    return result;
  });
  return Keep(
      unmounted.then([this, mount_id](kj::Own<Result>&& gone) { return FinishUnmount(mount_id, *gone); }));
}

MountState Supervisor::FinishUnmount(uint64_t id, const absl::StatusOr<bool>& gone) {
  Mount* mount = vault_.Find(id);
  if (mount == nullptr) return MountState::kGone;
  mount->unmounting = false;
  if (gone.ok() && !*gone) mount->state = MountState::kDetached;
  if (!gone.ok() || !*gone) vault_.Save(*mount);
  if (!gone.ok()) Throw(gone.status());
  LOG(INFO) << "event=unmount mount=" << id << " path=" << LogValue(mount->path) << " in_use=" << !*gone;
  if (!*gone) return MountState::kDetached;
  vault_.Forget(id);
  NotifyGone({id});
  return MountState::kGone;
}

// By polling: a /dev/fuse descriptor in an epoll would wake us for every request (handover-pitfalls 12).
kj::Promise<void> Supervisor::WatchMounts() {
  return timer_.afterDelay(kGonePollMillis * kj::MILLISECONDS).then([this] {
    NotifyGone(vault_.TakeGone());
    return WatchMounts();
  });
}

void Supervisor::NotifyGone(const std::vector<uint64_t>& ids) {
  if (ids.empty()) return;
  for (uint64_t id : ids) LOG(INFO) << "event=mount_gone mount=" << id;
  for (auto& [generation, worker] : workers_) {
    KJ_IF_MAYBE (client, worker->client) {
      auto request = client->mountsGoneRequest();
      auto list = request.initMountIds(static_cast<unsigned>(ids.size()));
      for (unsigned i = 0; i < ids.size(); ++i) list.set(i, ids[i]);
      Ignore(request.send().ignoreResult());  // a dying worker need not know
    }
  }
}

kj::Promise<void> Supervisor::UnmountAll() {
  std::map<uint64_t, Mount> mounts = vault_.all();
  auto unmounted = Offload<int>([mounts = std::move(mounts)] {
    for (const auto& [id, mount] : mounts) {
      if (mount.state == MountState::kLive)
        UnmountFuse(mount.path, mount.device->get()).status().IgnoreError();
    }
    return 0;
  });
  return unmounted.then([this](kj::Own<int>&&) {
    NotifyGone(vault_.TakeGone());
    for (const auto& [id, mount] : vault_.all()) {
      LOG(WARNING) << "event=mount_lost mount=" << id << " path=" << LogValue(mount.path)
                   << " note=\"still in use; it ends with the last process that serves it\"";
    }
  });
}

}  // namespace holdfast::supervisor
