#include "supervisor/handover_machine.h"

#include <algorithm>
#include <array>
#include <utility>

namespace holdfast::supervisor {
namespace {

constexpr std::array<uint64_t, 5> kBackoffMillis = {0, 50, 200, 1'000, 5'000};

// One run of Step: the state being changed and the actions collected so far.
class Stepper {
 public:
  Stepper(const State& state, const Limits& limits) : s_(state), limits_(limits) {}

  StepResult Run(const Event& event) {
    switch (event.type) {
      case EventType::kStart:
        if (s_.phase == Phase::kIdle) SpawnSuccessor(Binary::kRunning);
        break;
      case EventType::kRegistered:
        if (s_.phase == Phase::kStarting && event.generation == s_.successor) OnRegistered();
        break;
      case EventType::kDied:
        OnDied(event.generation, event.reason);
        break;
      case EventType::kExited:
        OnExited(event.generation, event.reason);
        break;
      case EventType::kReplied:
        OnReplied(event.generation, event.call);
        break;
      case EventType::kFailed:
        OnFailed(event.generation, event.call, event.reason);
        break;
      case EventType::kTimer:
        OnTimer();
        break;
      case EventType::kUpgrade:
        OnUpgrade();
        break;
      case EventType::kStop:
        OnStop();
        break;
    }
    return {std::move(s_), std::move(actions_)};
  }

 private:
  void Do(ActionType type, Generation generation) {
    Action action;
    action.type = type;
    action.generation = generation;
    actions_.push_back(action);
  }
  void Fail(ActionType type, std::string reason) {
    Do(type, 0);
    actions_.back().reason = std::move(reason);
  }
  void Timer(uint64_t milliseconds) {
    Do(ActionType::kTimer, 0);
    actions_.back().milliseconds = milliseconds;
  }
  void Invoke(Generation generation, Call call) {
    Do(ActionType::kCall, generation);
    actions_.back().call = call;
  }
  void Enter(Phase phase, Generation generation, Call call, uint64_t limit) {
    s_.phase = phase;
    Timer(limit);
    Invoke(generation, call);
  }
  void EnterQuiet(Phase phase) {
    s_.phase = phase;
    Do(ActionType::kStopTimer, 0);
  }

  bool OthersMayHold(Generation generation) const {
    return std::any_of(s_.holders.begin(), s_.holders.end(), [&](Generation g) { return g != generation; });
  }

  void SpawnSuccessor(Binary binary) {
    s_.phase = Phase::kStarting;
    s_.successor = s_.next_generation++;
    s_.upgrade = binary == Binary::kCandidate;
    Timer(limits_.register_ms);
    Do(ActionType::kSpawn, s_.successor);
    actions_.back().binary = binary;
  }

  // No worker is left: the running binary is started again.
  void Restart() {
    s_.owner = s_.successor = 0;
    s_.upgrade = false;
    uint64_t wait = BackoffMillis(s_.quick_deaths);
    ++s_.quick_deaths;
    if (wait == 0) {
      SpawnSuccessor(Binary::kRunning);
    } else {
      s_.phase = Phase::kBackoff;
      Timer(wait);
    }
  }

  void OnRegistered() {
    if (s_.owner != 0) {
      Enter(Phase::kParking, s_.owner, Call::kPark, limits_.park_ms);
    } else {
      BeginServing();
    }
  }
  void BeginServing() { Enter(Phase::kServing, s_.successor, Call::kServe, limits_.serve_ms); }

  // The successor serves reads.
  void AfterServing() {
    if (s_.owner != 0 && s_.holders.count(s_.owner) != 0) {
      Enter(Phase::kYielding, s_.owner, Call::kYield, limits_.yield_ms);
    } else {
      CommitIfFree();
    }
  }
  void CommitIfFree() {
    if (OthersMayHold(s_.successor)) return EnterQuiet(Phase::kAwaitingExit);
    s_.holders.insert(s_.successor);
    Enter(Phase::kCommitting, s_.successor, Call::kTake, limits_.take_ms);
  }
  void Committed() {
    if (s_.owner != 0) Invoke(s_.owner, Call::kRetire);
    s_.owner = std::exchange(s_.successor, 0);
    s_.upgrade = false;
    EnterRunning();
    Do(ActionType::kSwapDone, s_.owner);
  }
  void EnterRunning() {
    s_.phase = Phase::kRunning;
    Timer(limits_.stable_ms);
  }

  // The owner, which serves reads, (again) needs the metadata.
  void Reclaim() {
    if (OthersMayHold(s_.owner)) return EnterQuiet(Phase::kReclaimWait);
    s_.holders.insert(s_.owner);
    Enter(Phase::kReclaiming, s_.owner, Call::kTake, limits_.take_ms);
  }
  void AfterResuming() {
    if (s_.holders.count(s_.owner) != 0) {
      EnterRunning();
    } else {
      Reclaim();
    }
  }

  // The successor is of no use; `parked`: the owner was told to park. With no owner alive it is a crash.
  void SuccessorLost(const std::string& reason, bool parked) {
    if (s_.upgrade) Fail(ActionType::kSwapFailed, reason);
    s_.successor = 0;
    s_.upgrade = false;
    if (s_.owner == 0) return Restart();
    if (parked) return Enter(Phase::kResuming, s_.owner, Call::kResume, limits_.resume_ms);
    AfterResuming();
  }
  void KillSuccessor(const std::string& reason) {
    Do(ActionType::kKill, s_.successor);
    SuccessorLost(reason, s_.phase != Phase::kStarting);
  }
  void KillOwner() {
    Do(ActionType::kKill, s_.owner);
    Restart();
  }

  void OnDied(Generation generation, const std::string& reason) {
    if (generation == 0 || (s_.phase >= Phase::kStopYielding && generation != s_.owner)) return;
    if (generation == s_.successor) return SuccessorLost("the new worker died: " + reason, s_.phase != Phase::kStarting);
    if (generation == s_.owner) OwnerDied();
  }

  void OwnerDied() {
    switch (s_.phase) {
      case Phase::kStarting:  // the candidate is not even up: the running binary is back sooner
        Do(ActionType::kKill, s_.successor);
        if (s_.upgrade) Fail(ActionType::kSwapFailed, "the running worker died while the new one started");
        return Restart();
      case Phase::kParking:
        s_.owner = 0;
        return BeginServing();
      case Phase::kServing:
      case Phase::kCommitting:
        s_.owner = 0;
        return;
      case Phase::kYielding:
        s_.owner = 0;
        return CommitIfFree();
      case Phase::kRunning:
      case Phase::kResuming:
      case Phase::kReclaimWait:
      case Phase::kReclaiming:
      case Phase::kNoMetadata:
        return Restart();
      case Phase::kStopYielding:
        s_.phase = Phase::kStopKilling;
        return Timer(limits_.stop_kill_ms);
      case Phase::kAwaitingExit:  // the owner, if any, has yielded
        s_.owner = 0;
        return;
      case Phase::kIdle:
      case Phase::kBackoff:
      case Phase::kStopRetiring:
      case Phase::kStopKilling:
      case Phase::kStopped:
        return;
    }
  }

  void OnExited(Generation generation, const std::string& reason) {
    if (generation == 0) return;
    OnDied(generation, reason);
    s_.holders.erase(generation);
    TellServing(generation);
    switch (s_.phase) {
      case Phase::kAwaitingExit:
        return CommitIfFree();
      case Phase::kReclaimWait:
        return Reclaim();
      case Phase::kStopRetiring:
      case Phase::kStopKilling:
        if (generation == s_.owner || generation == s_.successor) Stopped();
        return;
      default:
        return;
    }
  }

  // Whoever reads now walks the dead worker's ledger once more. A worker that is parked or has not begun learns it from
  // oldLedgers() when it is told to read.
  void TellServing(Generation exited) {
    Generation reader = 0;
    switch (s_.phase) {
      case Phase::kServing:
      case Phase::kYielding:
      case Phase::kAwaitingExit:
      case Phase::kCommitting:
        reader = s_.successor;
        break;
      case Phase::kStarting:
      case Phase::kRunning:
      case Phase::kResuming:
      case Phase::kReclaimWait:
      case Phase::kReclaiming:
      case Phase::kNoMetadata:
        reader = s_.owner;
        break;
      default:
        break;
    }
    if (reader == 0 || reader == exited) return;
    Do(ActionType::kTellExited, reader);
    actions_.back().subject = exited;
  }

  void OnReplied(Generation generation, Call call) {
    if (generation == 0) return;
    bool from_owner = generation == s_.owner;
    bool from_successor = generation == s_.successor;
    if (call == Call::kYield && from_owner) return OnYielded();
    if (s_.phase == Phase::kParking && from_owner && call == Call::kPark) return BeginServing();
    if (s_.phase == Phase::kServing && from_successor && call == Call::kServe) return AfterServing();
    if (s_.phase == Phase::kCommitting && from_successor && call == Call::kTake) return Committed();
    if (s_.phase == Phase::kResuming && from_owner && call == Call::kResume) return AfterResuming();
    if (s_.phase == Phase::kReclaiming && from_owner && call == Call::kTake) return EnterRunning();
  }

  // Also when the answer comes after its time limit, in a rolled-back swap: the owner then has to take the metadata back.
  void OnYielded() {
    switch (s_.phase) {
      case Phase::kYielding:
        s_.holders.erase(s_.owner);
        return CommitIfFree();
      case Phase::kStopYielding:
        s_.holders.erase(s_.owner);
        return RetireOwner();
      case Phase::kStarting:
      case Phase::kParking:
      case Phase::kServing:
      case Phase::kResuming:
      case Phase::kReclaimWait:
        s_.holders.erase(s_.owner);
        return;
      case Phase::kRunning:
        s_.holders.erase(s_.owner);
        return Reclaim();
      default:
        return;
    }
  }

  void OnFailed(Generation generation, Call call, const std::string& reason) {
    if (generation == 0) return;
    bool from_owner = generation == s_.owner;
    bool from_successor = generation == s_.successor;
    std::string why = std::string(CallName(call)) + " failed: " + reason;
    if (s_.phase == Phase::kParking && from_owner && call == Call::kPark) return KillSuccessor("the running worker's " + why);
    if (s_.phase == Phase::kYielding && from_owner && call == Call::kYield) {
      return KillSuccessor("the running worker's " + why);
    }
    if (s_.phase == Phase::kServing && from_successor && call == Call::kServe) return KillSuccessor("the new worker's " + why);
    if (s_.phase == Phase::kCommitting && from_successor && call == Call::kTake) return CommitFailed("the new worker's " + why);
    if (s_.phase == Phase::kResuming && from_owner && call == Call::kResume) return KillOwner();
    if (s_.phase == Phase::kReclaiming && from_owner && call == Call::kTake) return WithoutMetadata();
    if (s_.phase == Phase::kStopYielding && from_owner && call == Call::kYield) return RetireOwner();
  }

  // With nobody to go back to, reads go on without the metadata, which is tried again and again.
  void CommitFailed(const std::string& reason) {
    if (s_.owner != 0) return KillSuccessor(reason);
    Fail(ActionType::kSwapFailed, reason);
    s_.owner = std::exchange(s_.successor, 0);
    s_.upgrade = false;
    WithoutMetadata();
  }
  void WithoutMetadata() {
    s_.phase = Phase::kNoMetadata;
    s_.holders.erase(s_.owner);
    Timer(limits_.metadata_retry_ms);
  }

  void OnTimer() {
    switch (s_.phase) {
      case Phase::kBackoff:
        return SpawnSuccessor(Binary::kRunning);
      case Phase::kStarting:
        return KillSuccessor("the new worker did not register in time");
      case Phase::kParking:
        return KillSuccessor("the running worker did not park in time");
      case Phase::kServing:
        return KillSuccessor("the new worker did not take over the mounts in time");
      case Phase::kYielding:
        return KillSuccessor("the running worker did not give up the metadata in time");
      case Phase::kCommitting:
        return KillSuccessor("the new worker did not take the metadata in time");
      case Phase::kRunning:
        s_.quick_deaths = 0;
        return;
      case Phase::kResuming:
      case Phase::kReclaiming:
        return KillOwner();
      case Phase::kNoMetadata:
        return Reclaim();
      case Phase::kStopYielding:
        return RetireOwner();
      case Phase::kStopRetiring:
        Do(ActionType::kKill, s_.owner);
        s_.phase = Phase::kStopKilling;
        return Timer(limits_.stop_kill_ms);
      case Phase::kStopKilling:
        return Stopped();
      case Phase::kIdle:
      case Phase::kAwaitingExit:
      case Phase::kReclaimWait:
      case Phase::kStopped:
        return;
    }
  }

  void OnUpgrade() {
    if (s_.phase == Phase::kRunning || s_.phase == Phase::kNoMetadata) return SpawnSuccessor(Binary::kCandidate);
    Fail(ActionType::kRefused, std::string("a worker is being replaced or started already (phase ") + PhaseName(s_.phase) + ")");
  }

  void OnStop() {
    if (s_.phase >= Phase::kStopYielding) return;
    if (s_.successor != 0) {
      Do(ActionType::kKill, s_.successor);
      if (s_.upgrade) Fail(ActionType::kSwapFailed, "the supervisor is shutting down");
      s_.upgrade = false;
    }
    if (s_.owner != 0) {
      s_.successor = 0;
      if (s_.holders.count(s_.owner) == 0) return RetireOwner();
      return Enter(Phase::kStopYielding, s_.owner, Call::kYield, limits_.yield_ms);
    }
    if (s_.successor == 0) return Stopped();
    s_.phase = Phase::kStopKilling;
    Timer(limits_.stop_kill_ms);
  }
  void RetireOwner() { Enter(Phase::kStopRetiring, s_.owner, Call::kRetire, limits_.stop_retire_ms); }
  void Stopped() {
    EnterQuiet(Phase::kStopped);
    Do(ActionType::kExit, 0);
  }

  State s_;
  const Limits& limits_;
  std::vector<Action> actions_;
};

}  // namespace

StepResult Step(const State& state, const Event& event, const Limits& limits) {
  return Stepper(state, limits).Run(event);
}

uint64_t BackoffMillis(uint32_t quick_deaths) {
  return kBackoffMillis[std::min<size_t>(quick_deaths, kBackoffMillis.size() - 1)];
}

const char* PhaseName(Phase phase) {
  static constexpr std::array<const char*, kPhaseCount> kNames = {
      "idle",     "backoff",  "starting",     "parking",    "serving",     "yielding",      "awaiting-exit", "committing", "running",
      "resuming", "reclaim-wait", "reclaiming", "no-metadata", "stop-yielding", "stop-retiring", "stop-killing", "stopped"};
  return kNames[static_cast<size_t>(phase)];
}

const char* CallName(Call call) {
  static constexpr std::array<const char*, 6> kNames = {"serve", "park", "resume", "yieldMetadata", "takeMetadata", "retire"};
  return kNames[static_cast<size_t>(call)];
}

}  // namespace holdfast::supervisor
