#include "supervisor/handover_machine.h"

#include <algorithm>
#include <array>
#include <utility>

namespace holdfast::supervisor {
namespace {

constexpr char kNotTakenBack[] = "; what it had answered could not be taken back: ";
constexpr std::array<uint64_t, 6> kBackoffMillis = {0, 0, 0, 50, 200, 1'000};

// One run of Step: the state being changed and the actions collected so far.
class Stepper {
 public:
  Stepper(const State& state, const Limits& limits) : s_(state), limits_(limits) {}

  StepResult Run(const Event& event) {
    if (event.type == EventType::kStart && s_.phase == Phase::kIdle) SpawnSuccessor(Binary::kRunning);
    if (event.type == EventType::kRegistered) OnRegistered(event);
    if (event.type == EventType::kDied) OnDied(event.generation, event.reason);
    if (event.type == EventType::kExited) OnExited(event.generation, event.reason);
    if (event.type == EventType::kReplied) OnReplied(event.generation, event.call);
    if (event.type == EventType::kFailed) OnFailed(event.generation, event.call, event.reason);
    if (event.type == EventType::kTimer) OnTimer();
    if (event.type == EventType::kUpgrade) OnUpgrade(event.proven, event.rollback);
    if (event.type == EventType::kStop) OnStop();
    DistrustIfDue();
    return {std::move(s_), std::move(actions_)};
  }

 private:
  using Type = ActionType;
  void Do(Type type, Generation generation) { actions_.push_back({.type = type, .generation = generation}); }
  void Fail(Type type, const std::string& reason) { actions_.push_back({.type = type, .reason = reason}); }
  void Timer(uint64_t milliseconds) {
    actions_.push_back({.type = Type::kTimer, .milliseconds = milliseconds});
  }
  void Invoke(Generation generation, Call call) {
    actions_.push_back({.type = Type::kCall, .generation = generation, .call = call});
  }
  // A phase that waits for the answer to a call: whose, and what follows.
  struct Wait {
    Phase phase;
    Call call;
    Generation State::*of;
    void (Stepper::*answered)();
  };
  static const std::array<Wait, 10> kWaits;
  const Wait* CurrentWait() const {
    auto wait =
        std::find_if(kWaits.begin(), kWaits.end(), [this](const Wait& w) { return w.phase == s_.phase; });
    return wait == kWaits.end() ? nullptr : wait;
  }
  // The answer that the phase waits for; else null.
  const Wait* Awaited(Generation generation, Call call) const {
    const Wait* wait = CurrentWait();
    bool awaited = wait != nullptr && wait->call == call && generation != 0 && generation == s_.*wait->of;
    return awaited ? wait : nullptr;
  }
  void Enter(Phase phase, uint64_t limit) {
    EnterTimed(phase, limit);
    Invoke(s_.*CurrentWait()->of, CurrentWait()->call);
  }
  void EnterQuiet(Phase phase) {
    s_.phase = phase;
    Do(Type::kStopTimer, 0);
  }

  void EnterTimed(Phase phase, uint64_t milliseconds) {
    s_.phase = phase;
    Timer(milliseconds);
  }

  bool OthersMayHold(Generation generation) const {
    return std::any_of(s_.holders.begin(), s_.holders.end(), [&](Generation g) { return g != generation; });
  }

  void SpawnSuccessor(Binary binary) {
    s_.phase = Phase::kStarting;
    s_.successor = s_.next_generation++;
    s_.upgrade = binary == Binary::kCandidate;
    Timer(Patience(limits_.register_ms));
    actions_.push_back({.type = Type::kSpawn, .generation = s_.successor, .binary = binary});
  }

  // Of a worker that is not prepared. Reads wait for the first one after a crash, which a sound machine
  // starts in milliseconds; a slow machine gets there with the next one.
  uint64_t Patience(uint64_t limit) const {
    bool first = s_.owner == 0 && !s_.upgrade && s_.quick_deaths == 1;
    return first ? std::min(limit, limits_.first_ms) : limit;
  }

  // No worker is left: the spare takes over, or the running binary is started again.
  void Restart() {
    s_.owner = s_.successor = s_.trial = s_.distrusting = 0;
    s_.upgrade = false;
    uint64_t wait = BackoffMillis(s_.quick_deaths++);
    Binary binary = Binary::kRunning;
    if (s_.reverted) Do(Type::kDataFault, 0);
    if (s_.probation && (++s_.probation_deaths >= kProbationDeaths || s_.spare_ready)) {
      s_.probation = false;
      s_.reverted = true;
      binary = Binary::kLastGood;
      Do(Type::kReverted, 0);
    } else {
      s_.reverted = false;  // told once
    }
    if (s_.spare_ready) {
      s_.successor = std::exchange(s_.spare, 0);
      s_.spare_ready = false;
      return Enter(Phase::kServing, limits_.prepared_serve_ms);
    }
    if (wait == 0 || binary == Binary::kLastGood) return SpawnSuccessor(binary);
    EnterTimed(Phase::kBackoff, wait);
  }

  void OnRegistered(const Event& event) {
    Generation generation = event.generation;
    if (generation == 0) return;
    if (generation == s_.spare) {
      if (event.verifiable) return Invoke(generation, Call::kPrepare);
      s_.spare_ready = true;
      return;
    }
    if (s_.phase != Phase::kStarting || generation != s_.successor) return;
    if (s_.owner == 0) return BeginServing();
    if (event.verifiable) {
      s_.trial = generation;
      return Enter(Phase::kPreparing, limits_.prepare_ms);
    }
    BeginParking();
  }
  void BeginRehearsing() { Enter(Phase::kRehearsing, limits_.rehearse_ms); }
  void BeginParking() { Enter(Phase::kParking, limits_.park_ms); }
  void BeginServing() {
    // An owner that is there can resume.
    bool soon = s_.trial != 0 || s_.owner != 0;
    uint64_t limit = soon ? limits_.prepared_serve_ms : Patience(limits_.serve_ms);
    Enter(Phase::kServing, limit);
  }

  void AfterServing() {
    if (s_.trial != 0) return Enter(Phase::kProbing, limits_.probe_ms);
    AfterProbing();
  }
  void AfterProbing() {
    if (s_.owner == 0 || s_.holders.count(s_.owner) == 0) return CommitIfFree();
    Enter(Phase::kYielding, limits_.yield_ms);
  }
  void CommitIfFree() {
    if (OthersMayHold(s_.successor)) return EnterQuiet(Phase::kAwaitingExit);
    s_.holders.insert(s_.successor);
    Enter(Phase::kCommitting, limits_.take_ms);
  }
  void Committed() {
    if (s_.owner != 0) Invoke(s_.owner, Call::kRetire);
    SuccessorOwns();
    EnterRunning();
    // After a failed upgrade, what became of that is told when the candidate's answers are taken back.
    if (s_.tainted == 0) Do(Type::kSwapDone, s_.owner);
  }
  void SuccessorOwns() {
    s_.owner = std::exchange(s_.successor, 0);
    if (Generation left = std::exchange(s_.leaving, 0)) Taint(left, true);  // it was parked, or is dead
    if (std::exchange(s_.trial, 0) != 0) Invoke(s_.owner, Call::kEndTrial);
    if (!std::exchange(s_.upgrade, false)) return;
    s_.probation = !s_.candidate_proven;
    s_.probation_deaths = 0;
    s_.reverted = false;
  }
  void EnterRunning() {
    s_.stable = false;
    EnterTimed(Phase::kRunning, limits_.stable_ms);
  }
  // It has run for stable_ms, or for its probation, or it is time for a spare again.
  void RunningOn() {
    s_.quick_deaths = 0;
    if (s_.stable && s_.probation) {
      s_.probation = false;
      Do(Type::kProven, s_.owner);
      DropSpare();  // of the build before
    } else if (s_.stable) {
      s_.reverted = false;
    }
    if (limits_.spare && s_.spare == 0) {
      s_.spare = s_.next_generation++;
      s_.spare_ready = false;
      actions_.push_back({.type = Type::kSpawn, .generation = s_.spare, .binary = Binary::kLastGood});
    }
    s_.stable = true;
    if (s_.probation || s_.reverted) return Timer(limits_.probation_ms);
  }

  // The owner, which serves reads, (again) needs the metadata.
  void Reclaim() {
    if (OthersMayHold(s_.owner)) return EnterQuiet(Phase::kReclaimWait);
    s_.holders.insert(s_.owner);
    Enter(Phase::kReclaiming, limits_.take_ms);
  }
  void AfterResuming() {
    if (s_.holders.count(s_.owner) == 0) return Reclaim();
    EnterRunning();
  }

  // The successor is of no use. With no owner alive it is a crash.
  void SuccessorLost(const std::string& reason) {
    bool parked = s_.phase >= Phase::kParking;
    SwapLost(reason);
    s_.successor = 0;
    if (s_.owner == 0) return Restart();
    if (parked) return Enter(Phase::kResuming, limits_.resume_ms);
    AfterResuming();
  }
  // The upgrade under way, if one is, failed.
  void SwapLost(const std::string& reason) {
    bool served = s_.trial != 0 && s_.phase >= Phase::kServing;
    if (served) {
      Taint(s_.trial, false);
      s_.failure = reason;
    } else if (s_.upgrade) {
      Fail(Type::kSwapFailed, reason);
    }
    s_.trial = s_.leaving = 0;
    s_.upgrade = false;
  }
  void Taint(Generation generation, bool exited) {
    s_.tainted = generation;
    s_.tainted_exited = exited;
    s_.distrust_deaths = 0;
  }

  // As soon as the tainted candidate is gone for good and somebody serves: it can answer nothing any more, so
  // what it answered can be taken back.
  void DistrustIfDue() {
    bool serves =
        s_.phase == Phase::kRunning || (s_.phase >= Phase::kReclaimWait && s_.phase <= Phase::kNoMetadata);
    if (s_.tainted == 0 || !s_.tainted_exited || !serves || s_.distrusting == s_.owner) return;
    s_.distrusting = s_.owner;
    if (s_.distrust_deaths >= kDistrustDeaths)
      return Distrusted(s_.owner, kNotTakenBack + std::string("workers die over it"));
    if (s_.spare != 0) {  // it knows the vault id of before
      DropSpare();
      WantSpareAgain();
    }
    actions_.push_back(
        {.type = Type::kCall, .generation = s_.owner, .subject = s_.tainted, .call = Call::kDistrust});
  }
  void Distrusted(Generation generation, const std::string& trouble) {
    if (generation == 0 || generation != s_.distrusting) return;
    // Without a failure to tell, it was an earlier supervisor's upgrade, and the swap of its end went well.
    if (s_.failure.empty() && trouble.empty())
      Do(Type::kSwapDone, s_.owner);
    else
      Fail(Type::kSwapFailed, (s_.failure.empty() ? "the swap is done" : s_.failure) + trouble);
    s_.tainted = s_.distrusting = 0;
    s_.failure.clear();
  }
  void DropSpare() {
    if (s_.spare != 0) Do(Type::kKill, s_.spare);
    SpareGone();
  }
  void SpareGone() {
    s_.spare = 0;
    s_.spare_ready = false;
  }
  void SpareLost() {
    SpareGone();
    WantSpareAgain();
  }
  void WantSpareAgain() {
    // Else it comes when the timer has told that the build is proven.
    if (s_.phase == Phase::kRunning && s_.stable && !s_.probation && !s_.reverted)
      Timer(limits_.spare_retry_ms);
  }

  void OnDied(Generation generation, const std::string& reason) {
    if (generation == 0 || (s_.phase >= Phase::kStopYielding && generation != s_.owner)) return;
    if (generation == s_.spare) return SpareLost();
    if (generation == s_.successor) return SuccessorLost("the new worker died: " + reason);
    if (generation == s_.owner) OwnerDied();
  }

  void OwnerDied() {
    if (s_.distrusting == s_.owner) {  // its successor shall do it
      s_.distrusting = 0;
      ++s_.distrust_deaths;
    }
    if (s_.phase >= Phase::kStopRetiring) return;
    if (s_.phase == Phase::kStopYielding) return EnterTimed(Phase::kStopKilling, limits_.stop_kill_ms);
    if (s_.phase >= Phase::kStarting && s_.phase < Phase::kParking) {  // the candidate has proved nothing yet
      Do(Type::kKill, s_.successor);
      SwapLost("the running worker died while the new one started");
    }
    if (s_.phase < Phase::kParking || s_.phase > Phase::kCommitting) return Restart();
    s_.owner = 0;  // the successor goes on
    if (s_.phase == Phase::kParking) return BeginServing();
    if (s_.phase == Phase::kYielding) return CommitIfFree();
  }

  void OnExited(Generation generation, const std::string& reason) {
    if (generation == 0) return;
    OnDied(generation, reason);
    s_.holders.erase(generation);
    if (generation == s_.tainted) s_.tainted_exited = true;
    TellReader(generation);
    if (s_.phase == Phase::kAwaitingExit) return CommitIfFree();
    if (s_.phase == Phase::kReclaimWait) return Reclaim();
    bool stopping = s_.phase == Phase::kStopRetiring || s_.phase == Phase::kStopKilling;
    if (stopping && (generation == s_.owner || generation == s_.successor)) Stopped();
  }

  // Whoever reads now walks the dead worker's ledger once more; others learn of it from oldLedgers() later.
  void TellReader(Generation exited) {
    if (s_.phase == Phase::kParking || s_.phase >= Phase::kStopYielding) return;
    bool successor_reads = s_.phase >= Phase::kServing && s_.phase <= Phase::kCommitting;
    Generation reader = successor_reads ? s_.successor : s_.owner;
    if (reader == 0 || reader == exited) return;
    actions_.push_back({.type = Type::kTellExited, .generation = reader, .subject = exited});
  }

  void OnReplied(Generation generation, Call call) {
    if (call == Call::kDistrust) return Distrusted(generation, "");
    if (call == Call::kPrepare && generation != 0 && generation == s_.spare) s_.spare_ready = true;
    // Also after its time limit, in a rolled-back swap: the owner then has to take the metadata back.
    bool yielded = call == Call::kYield && generation == s_.owner && s_.phase != Phase::kReclaiming;
    if (yielded) s_.holders.erase(generation);
    if (yielded && s_.phase == Phase::kRunning) return Reclaim();
    if (const Wait* wait = Awaited(generation, call)) (this->*wait->answered)();
  }

  void OnFailed(Generation generation, Call call, const std::string& reason) {
    if (call == Call::kDistrust) return Distrusted(generation, kNotTakenBack + reason);
    if (call == Call::kPrepare && generation != 0 && generation == s_.spare) {
      DropSpare();
      return WantSpareAgain();
    }
    if (Awaited(generation, call) == nullptr) return;
    if (s_.phase == Phase::kReclaiming) return WithoutMetadata();
    std::string why = std::string(CallName(call)) + " failed: " + reason;
    if (s_.phase != Phase::kCommitting || s_.owner != 0 || s_.trial != 0) return StepFailed(why);
    // No other build would get further: reads go on without the metadata, which is tried again and again.
    if (s_.tainted == 0 || s_.upgrade) Fail(Type::kSwapFailed, why);
    SuccessorOwns();
    WithoutMetadata();
  }
  void WithoutMetadata() {
    s_.holders.erase(s_.owner);
    EnterTimed(Phase::kNoMetadata, limits_.metadata_retry_ms);
  }

  // The step under way came to nothing: back to the owner, or to a fresh worker.
  void StepFailed(const std::string& reason) {
    if (s_.phase == Phase::kStopYielding) return RetireOwner();
    // An owner that cannot do its part in a swap would keep every better build from taking over.
    if (CurrentWait()->of == &State::owner) return Kill(Type::kKillFailed, s_.owner, reason);
    Do(Type::kKill, s_.successor);
    SuccessorLost(reason);
  }

  void OnTimer() {
    if (s_.phase == Phase::kBackoff) return SpawnSuccessor(Binary::kRunning);
    if (s_.phase == Phase::kRunning) return RunningOn();
    if (s_.phase == Phase::kNoMetadata) return Reclaim();
    if (s_.phase == Phase::kStopKilling) return Stopped();
    if (s_.phase == Phase::kStopRetiring) {
      Do(Type::kKill, s_.owner);
      return EnterTimed(Phase::kStopKilling, limits_.stop_kill_ms);
    }
    std::string why = std::string("it took too long (phase ") + PhaseName(s_.phase) + ")";
    // What was late may be the verifier.
    if (s_.phase == Phase::kRehearsing || s_.phase == Phase::kProbing) return StepFailed(why);
    if (s_.phase == Phase::kStopYielding) return RetireOwner();
    if (s_.phase == Phase::kStarting) return Kill(Type::kKillHung, s_.successor, why);
    if (const Wait* wait = CurrentWait()) Kill(Type::kKillHung, s_.*wait->of, why);
  }
  // The phase stays until the death is told.
  void Kill(Type how, Generation generation, const std::string& reason) {
    actions_.push_back({.type = how, .generation = generation, .reason = reason});
  }

  void OnUpgrade(bool proven, bool rollback) {
    if (s_.tainted != 0) return Fail(Type::kRefused, "what an earlier worker did is still being taken back");
    // Also while the running binary does not start: the candidate may be the cure.
    if (s_.phase != Phase::kRunning && s_.phase != Phase::kNoMetadata && s_.phase != Phase::kBackoff) {
      return Fail(Type::kRefused, std::string("a worker is being replaced or started already (phase ") +
                                      PhaseName(s_.phase) + ")");
    }
    s_.candidate_proven = proven;
    if (rollback) s_.leaving = s_.owner != 0 ? s_.owner : s_.next_generation - 1;
    SpawnSuccessor(Binary::kCandidate);
  }

  void OnStop() {
    if (s_.phase >= Phase::kStopYielding) return;
    DropSpare();
    if (s_.tainted != 0)
      Fail(Type::kSwapFailed, s_.failure.empty() ? "the supervisor is shutting down" : s_.failure);
    s_.tainted = 0;
    if (s_.successor != 0) {
      Do(Type::kKill, s_.successor);
      if (s_.upgrade) Fail(Type::kSwapFailed, "the supervisor is shutting down");
      s_.trial = 0;
      s_.upgrade = false;
    }
    if (s_.owner != 0) {
      s_.successor = 0;
      if (s_.holders.count(s_.owner) == 0) return RetireOwner();
      return Enter(Phase::kStopYielding, limits_.yield_ms);
    }
    if (s_.successor == 0) return Stopped();
    EnterTimed(Phase::kStopKilling, limits_.stop_kill_ms);
  }
  void RetireOwner() {
    EnterTimed(Phase::kStopRetiring, limits_.stop_retire_ms);
    Invoke(s_.owner, Call::kRetire);
  }
  void Stopped() {
    EnterQuiet(Phase::kStopped);
    Do(Type::kExit, 0);
  }

  State s_;
  const Limits& limits_;
  std::vector<Action> actions_;
};

const std::array<Stepper::Wait, 10> Stepper::kWaits = {
    {{Phase::kPreparing, Call::kPrepare, &State::successor, &Stepper::BeginRehearsing},
     {Phase::kRehearsing, Call::kRehearse, &State::successor, &Stepper::BeginParking},
     {Phase::kParking, Call::kPark, &State::owner, &Stepper::BeginServing},
     {Phase::kServing, Call::kServe, &State::successor, &Stepper::AfterServing},
     {Phase::kProbing, Call::kProbe, &State::successor, &Stepper::AfterProbing},
     {Phase::kYielding, Call::kYield, &State::owner, &Stepper::CommitIfFree},
     {Phase::kCommitting, Call::kTake, &State::successor, &Stepper::Committed},
     {Phase::kResuming, Call::kResume, &State::owner, &Stepper::AfterResuming},
     {Phase::kReclaiming, Call::kTake, &State::owner, &Stepper::EnterRunning},
     {Phase::kStopYielding, Call::kYield, &State::owner, &Stepper::RetireOwner}}};

}  // namespace

StepResult Step(const State& state, const Event& event, const Limits& limits) {
  return Stepper(state, limits).Run(event);
}

uint64_t BackoffMillis(uint32_t quick_deaths) {
  return kBackoffMillis[std::min<size_t>(quick_deaths, kBackoffMillis.size() - 1)];
}

const char* PhaseName(Phase phase) {
  static constexpr std::array<const char*, kPhaseCount> kNames = {
      "idle",        "backoff",       "starting",      "preparing",    "rehearsing",
      "parking",     "serving",       "probing",       "yielding",     "awaiting-exit",
      "committing",  "running",       "resuming",      "reclaim-wait", "reclaiming",
      "no-metadata", "stop-yielding", "stop-retiring", "stop-killing", "stopped"};
  return kNames[static_cast<size_t>(phase)];
}

const char* CallName(Call call) {
  static constexpr std::array<const char*, kCallCount> kNames = {
      "serve",   "park",     "resume", "yieldMetadata", "takeMetadata", "retire",
      "prepare", "rehearse", "probe",  "endTrial",      "distrust"};
  return kNames[static_cast<size_t>(call)];
}

}  // namespace holdfast::supervisor
