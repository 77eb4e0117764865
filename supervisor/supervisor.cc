#include "supervisor/supervisor.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <utility>

#include "absl/strings/escaping.h"
#include "common/log.h"
#include "common/sealed_memory.h"
#include "common/urgency.h"
#include "glog/logging.h"
#include "schema/touched.h"
#include "supervisor/rpc.h"

namespace holdfast::supervisor {
namespace {

constexpr unsigned kMaxIncomingFds = 16;
constexpr uint64_t kMountingPollMillis = 5, kMountingMillis = 10'000;
constexpr uint64_t kDistrustSeconds = 180;
constexpr uint64_t kLateMillis = 500;
constexpr uint64_t kUrgentMillis = 6'000;  // above a worker's own limit

constexpr uint64_t kNeeded = schema::CAP_SERVE_READS | schema::CAP_METADATA_HANDOVER;
constexpr uint64_t kVerifiable = schema::CAP_PREPARE | schema::CAP_TRIAL;
constexpr uint64_t kOurs = kNeeded | kVerifiable | schema::CAP_HEALTH | schema::CAP_REATTACH;

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
  const State old = std::exchange(state_, std::move(result.state));
  if (state_.upgrade && !old.upgrade) swap_.BeginAsked(running_build_, state_.successor);
  AdoptRunningBinary(swap_.unfinished() == "rollback");
  SaveMachine();
  if (old.phase != state_.phase) {
    PassFault(faults_, "supervisor.phase." + std::string(PhaseName(state_.phase))).IgnoreError();
  }
  // Now, and not when the next worker is waited for.
  if (old.phase != state_.phase && state_.phase == Phase::kRunning) {
    generations_.Reserve().IgnoreError();
    probation_ends_boot_nanos_ =
        clock_->BootNanos() + (options_.limits.stable_ms + options_.limits.probation_ms) * 1'000'000;
  }
  // A spare may take over in the phase in which the candidate died.
  bool moved = old.phase != state_.phase || old.successor != state_.successor;
  if (swap_.asked() && moved) swap_.NotePhase(old.phase, state_.phase, state_.upgrade);
  for (const Action& action : result.actions) Do(action);
  SaveMachine();  // what the actions counted
}

// A dead worker is replaced by the binary that served last.
void Supervisor::AdoptRunningBinary(bool rollback) {
  WorkerProcess* owner = Find(state_.owner);
  if (owner == nullptr) return;
  running_build_ = owner->build;
  bool another = owner->executable->sha256 != running_->sha256;
  bool rolled_back = another && rollback;
  if (another) previous_ = state_.reverted || rolled_back ? nullptr : running_;
  bool left_last_good = rolled_back && last_good_ != nullptr && !RunsUnproven();
  running_ = owner->executable;
  if (left_last_good) SetLastGood(running_);  // what was left shall not be brought back
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
    case ActionType::kKillFailed:
      return GiveUp(action.generation, action.reason);
    case ActionType::kKillHung:
      return KillHung(action.generation, {.what = action.reason});
    case ActionType::kTimer:
      return ArmTimer(action.milliseconds);
    case ActionType::kStopTimer:
      return void(machine_timer_ = nullptr);
    case ActionType::kExit:
      return stopped_->fulfill();
    case ActionType::kProven:
      return SetLastGood(running_);
    case ActionType::kReverted:
      reverted_ = "build " + running_->sha256 + " (" + running_build_ + ") did not survive its probation (" +
                  last_death_.reason + "); " + last_good_->sha256 + " was brought back";
      LOG(ERROR) << "event=reverted reason=" << LogValue(reverted_);
      running_ = last_good_;  // also if it should die before it owns anything
      previous_ = nullptr;
      return;
    case ActionType::kDataFault:
      reverted_ += "; it died too (" + last_death_.reason +
                   "), so the builds are not to blame: it was killed from outside, or a layer is damaged; "
                   "the log says";
      LOG(ERROR) << "event=data_fault reason=" << LogValue(last_death_.reason);
      return;
    case ActionType::kSwapDone:
      // The first build that ever ran here: nothing else could be brought back.
      if (last_good_ == nullptr) SetLastGood(running_);
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

void Supervisor::SpawnWorker(Generation generation, Binary binary) {
  bool upgrade = binary == Binary::kCandidate;
  auto worker = std::make_unique<WorkerProcess>();
  worker->generation = generation;
  bool last_good = binary == Binary::kLastGood && last_good_ != nullptr;
  worker->executable = upgrade ? candidate_ : last_good ? last_good_ : running_;
  worker->started_wall_nanos = clock_->WallNanos();
  absl::Status status = [&]() -> absl::Status {
    HF_RETURN_IF_ERROR(ledgers_.Create(generation).status());
    worker->token = absl::BytesToHexString(RandomBytes(32));
    bool urgent = state_.owner == 0 && generation == state_.successor;
    ProcessSpec spec{.program = worker->executable->file.get(),
                     .argv = {"holdfast-worker"},
                     .environment = {"HOLDFAST_TOKEN=" + worker->token},
                     .urgent = urgent};
    spec.argv.insert(spec.argv.end(), options_.worker_args.begin(), options_.worker_args.end());
    HF_ASSIGN_OR_RETURN(ConnectedProcess child, StartConnected(std::move(spec)));
    worker->pid = child.process.pid;
    // It ends by itself, but for builds that know nothing of it, and those that come to nothing.
    auto too_long = [process = worker.get()] {
      if (!process->exited) EndUrgencyOf(process->pid);
    };
    if (urgent) worker->urgency_limit = StartTimer(kUrgentMillis, too_long);
    if (generation == state_.spare) {
      worker->spare_limit =
          StartTimer(options_.limits.register_ms + options_.limits.prepare_ms, [this, generation] {
            if (generation == state_.spare && !state_.spare_ready)
              GiveUp(generation, "it does not get ready");
          });
    }
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
    NoteReason(worker.get(), std::string(FromAbsl(status.message())));
    ledgers_.OwnerExited(generation);
    return Dispatch({.type = EventType::kExited, .generation = generation, .reason = worker->death});
  }
  LOG(INFO) << "event=spawned generation=" << generation << " pid=" << worker->pid
            << " executable=" << worker->executable->sha256 << " candidate=" << upgrade;
  workers_[generation] = std::move(worker);
  tasks_.add(SaveLivingWorkers());
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

// Answers may still come from a worker that is known to be dead, or is about to be killed as hung.
bool Supervisor::IsLost(Generation generation) {
  WorkerProcess* worker = Find(generation);
  return worker == nullptr || worker->disconnected || !worker->hung.empty();
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
  if (call == Call::kPark) swap_.ReadsStopped(clock_->BootNanos());
  if (call == Call::kServe) swap_.CarriesOver(ledgers_.CountUnanswered(generation));
  if (call == Call::kRetire) {
    worker->retired = true;
    SaveWorker(*worker);
    tasks_.add(SaveLivingWorkers());
    LimitRetirement(worker);
  }
  if (worker->client == nullptr) return;
  auto failed = [this, generation, call](kj::Exception&& exception) {
    // A broken connection is a death, and told as one.
    if (exception.getType() == kj::Exception::Type::DISCONNECTED || IsLost(generation)) return;
    std::string why = Describe(exception);
    LOG(WARNING) << "event=call_failed generation=" << generation << " call=" << CallName(call)
                 << " error=" << LogValue(why);
    if (call == Call::kServe) NoteReason(Find(generation), "serve failed: " + why);
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

void Supervisor::LimitRetirement(WorkerProcess* worker) {
  auto too_long = [this, generation = worker->generation] { KillWorker(generation); };
  worker->retirement_limit = StartTimer(options_.limits.retired_ms, too_long);
}

kj::Promise<void> Supervisor::SendCall(WorkerProcess* worker, const Action& action) {
  schema::Worker::Client client = KJ_ASSERT_NONNULL(worker->client);
  auto note = [this](std::string&& detail) { swap_.Detail(detail); };
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
      touched_ = nullptr;  // it is nobody's any more: whom a rollback leaves may have touched all
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

void Supervisor::OnCallDone(Generation generation, Call call) {
  if (IsLost(generation)) return;
  if (call == Call::kServe || call == Call::kResume) {
    swap_.ReadsTakenOver(generation, call == Call::kServe);
    Find(generation)->reading = true;
  }
  // Until then it is watched. Not when it was told to resume meanwhile.
  if (call == Call::kPark && state_.phase == Phase::kParking) Find(generation)->reading = false;
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
  PassFault(faults_, "supervisor.before_kill").IgnoreError();
  if (worker->dead_since_boot_nanos == 0) worker->dead_since_boot_nanos = clock_->BootNanos();
  syscall(SYS_pidfd_send_signal, worker->pidfd.get(), SIGKILL, nullptr, 0);
  LOG(INFO) << "event=killed generation=" << generation << " pid=" << worker->pid;
  if (worker->reading) swap_.ReadsStopped(clock_->BootNanos());
}

kj::Promise<void> Supervisor::StartTimer(uint64_t milliseconds, std::function<void()> due) {
  return timer_.afterDelay(milliseconds * kj::MILLISECONDS).then(std::move(due)).eagerlyEvaluate(nullptr);
}

void Supervisor::ArmTimer(uint64_t milliseconds) {
  uint64_t late = clock_->BootNanos() + milliseconds * 1'000'000 + kNanosPerSecond;
  machine_timer_ = StartTimer(milliseconds, [this, late] {
    tasks_.add(kj::mv(machine_timer_));  // lives on until we return: what follows may arm the next one
    // It was us who slept, or the machine: what came meanwhile is to be heard first.
    if (clock_->BootNanos() > late) return ArmTimer(kLateMillis);
    Dispatch({.type = EventType::kTimer});
  });
}

void Supervisor::NoteDeath(WorkerProcess* worker, const std::string& reason) {
  if (worker->dead_since_boot_nanos != 0) return;
  worker->dead_since_boot_nanos = clock_->BootNanos();
  bool successor_reads = state_.phase >= Phase::kServing && state_.phase <= Phase::kCommitting;
  bool reading = worker->generation == (successor_reads ? state_.successor : state_.owner);
  if (reading) swap_.ReadsStopped(worker->dead_since_boot_nanos);
  // In a swap it is the swap's affair.
  if (reading && !worker->retired && !swap_.begun())
    swap_.Begin(worker->hung.empty() ? "crash" : "hang", running_build_);
  if (worker->retired) return;
  if (NoteReason(worker, worker->hung.empty() ? reason : worker->hung)) {
    ++crashes_;
    if (!worker->hung.empty()) ++hangs_;
  }
  if (worker->generation == state_.owner) swap_.Detail("the running worker is lost: " + worker->death);
  LOG(ERROR) << "event=worker_died generation=" << worker->generation << " pid=" << worker->pid
             << " reason=" << LogValue(worker->death) << " phase=" << PhaseName(state_.phase);
}

// False: it is a candidate or a spare, whose end is not told as a death.
bool Supervisor::NoteReason(WorkerProcess* worker, const std::string& reason) {
  worker->death = reason;
  bool candidate = state_.upgrade && worker->generation == state_.successor;
  if (candidate || worker->generation == state_.spare) return false;
  last_death_ = {worker->generation, reason, clock_->WallNanos()};
  return true;
}

void Supervisor::GiveUp(Generation generation, const std::string& reason) {
  WorkerProcess* worker = Find(generation);
  if (worker == nullptr) return;
  worker->disconnected = true;
  NoteDeath(worker, reason);
  KillWorker(generation);
  Dispatch({.type = EventType::kDied, .generation = generation, .reason = reason});
}

void Supervisor::OnDisconnected(Generation generation, std::string how) {
  WorkerProcess* worker = Find(generation);
  if (worker == nullptr || worker->disconnected) return;
  worker->disconnected = true;
  if (worker->retired) return;  // it may need its time to exit
  // Before our own kill: somebody else's, or the kernel's for lack of memory.
  if (std::string by = EndingReason(worker->pid); !by.empty()) how = by;
  // Nobody waits for a candidate that serves nobody: its exit tells more, or else the limit of its step
  // comes.
  bool idle = state_.owner != 0 && generation == state_.successor && state_.phase < Phase::kParking;
  if (!idle) return GiveUp(generation, how);
  NoteDeath(worker, how);
  KillWorker(generation);
}

void Supervisor::OnExit(Generation generation) {
  WorkerProcess* worker = Find(generation);
  std::string how = ReapReason(worker->pidfd.get());
  worker->exited = true;
  NoteDeath(worker, how);
  // Our own signals tell nothing, nor does the end of what is no child of ours.
  bool ours = !worker->hung.empty() || (worker->killed && how.rfind("signal 9 ", 0) == 0);
  if (worker->death.empty() || (!ours && how != "unknown")) worker->death = how;
  if (last_death_.generation == generation) last_death_.reason = worker->death;
  LOG(INFO) << "event=exited generation=" << generation << " pid=" << worker->pid << " how=" << LogValue(how);
  ledgers_.OwnerExited(generation);
  journal_.ForgetWorker(generation);
  // Not in this callback: it belongs to what is destroyed.
  tasks_.add(kj::evalLater([this, generation] { workers_.erase(generation); }));
  Dispatch({.type = EventType::kExited, .generation = generation, .reason = worker->death});
  tasks_.add(SaveLivingWorkers());
}

WorkerProcess* Supervisor::Find(Generation generation) {
  auto it = workers_.find(generation);
  return it == workers_.end() ? nullptr : it->second.get();
}

void Supervisor::FinishSwap(const std::string& result) {
  verifier_ = nullptr;
  WorkerProcess* owner = Find(state_.owner);
  swap_.Finish(result, owner == nullptr ? "" : owner->build);
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
    if (IsLost(generation)) return;
    Dispatch({.type = EventType::kRegistered, .generation = generation, .verifiable = verifiable});
    tasks_.add(SaveLivingWorkers());
  }));
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

}  // namespace holdfast::supervisor
