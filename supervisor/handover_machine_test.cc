#include "supervisor/handover_machine.h"

#include <algorithm>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "gtest/gtest.h"

namespace holdfast::supervisor {
namespace {

constexpr Generation kOld = 7;
constexpr Generation kNew = 8;
constexpr Generation kDead = 5;  // dead, exit not proven, may hold the metadata
constexpr Generation kStranger = 3;
constexpr Generation kSpare = 6;

// A run of the machine with the actions of the last step in words.
class Machine {
 public:
  explicit Machine(State state = {}, Limits limits = {}) : state_(std::move(state)), limits_(limits) {}

  Machine& On(EventType type, Generation generation = 0, Call call = Call::kServe) {
    return On(Event{.type = type, .generation = generation, .call = call, .reason = "why"});
  }
  Machine& On(const Event& event) {
    StepResult result = Step(state_, event, limits_);
    state_ = std::move(result.state);
    actions_.clear();
    for (const Action& action : result.actions) actions_.push_back(Words(action));
    return *this;
  }
  bool Did(const std::string& action) const {
    return std::find(actions_.begin(), actions_.end(), action) != actions_.end();
  }
  const std::vector<std::string>& actions() const { return actions_; }
  const State& state() const { return state_; }
  Phase phase() const { return state_.phase; }

 private:
  static std::string Words(const Action& action) {
    std::string who = " " + std::to_string(action.generation);
    switch (action.type) {
      case ActionType::kSpawn:
        return (action.binary == Binary::kCandidate  ? "spawn candidate"
                : action.binary == Binary::kLastGood ? "spawn last-good"
                                                     : "spawn") +
               who;
      case ActionType::kCall:
        return std::string(CallName(action.call)) + who +
               (action.call == Call::kDistrust ? " of " + std::to_string(action.subject) : "");
      case ActionType::kTellExited:
        return "exited " + std::to_string(action.subject) + " to" + who;
      case ActionType::kKill:
        return "kill" + who;
      case ActionType::kKillFailed:
        return "kill failed" + who;
      case ActionType::kKillHung:
        return "kill hung" + who;
      case ActionType::kTimer:
        return "timer " + std::to_string(action.milliseconds);
      case ActionType::kStopTimer:
        return "no timer";
      case ActionType::kSwapDone:
        return "done" + who;
      case ActionType::kSwapFailed:
        return "failed";
      case ActionType::kRefused:
        return "refused";
      case ActionType::kProven:
        return "proven" + who;
      case ActionType::kReverted:
        return "reverted";
      case ActionType::kDataFault:
        return "data fault";
      case ActionType::kExit:
        return "exit";
    }
    return "";
  }

  State state_;
  Limits limits_;
  std::vector<std::string> actions_;
};

Limits WithSpare() {
  Limits limits;
  limits.spare = true;
  return limits;
}

// A plausible state in each phase; in an upgrade where the phase can be one.
State In(Phase phase) {
  State s;
  s.phase = phase;
  s.next_generation = 9;
  auto swap = [&](std::set<Generation> holders) {
    s.owner = kOld;
    s.successor = kNew;
    s.upgrade = true;
    s.holders = std::move(holders);
  };
  auto alone = [&](std::set<Generation> holders) {
    s.owner = kOld;
    s.holders = std::move(holders);
  };
  switch (phase) {
    case Phase::kIdle:
    case Phase::kBackoff:
    case Phase::kStopped:
      break;
    case Phase::kStarting:
      swap({kOld});
      break;
    case Phase::kPreparing:
    case Phase::kRehearsing:
    case Phase::kParking:
    case Phase::kServing:
    case Phase::kProbing:
    case Phase::kYielding:
      swap({kOld});
      s.trial = kNew;
      break;
    case Phase::kAwaitingExit:
      swap({kDead});
      s.trial = kNew;
      break;
    case Phase::kCommitting:
      swap({kNew});
      s.trial = kNew;
      break;
    case Phase::kRunning:
    case Phase::kResuming:
    case Phase::kReclaiming:
    case Phase::kStopYielding:
      alone({kOld});
      break;
    case Phase::kReclaimWait:
      alone({kDead});
      break;
    case Phase::kNoMetadata:
    case Phase::kStopRetiring:
    case Phase::kStopKilling:
      alone({});
      break;
  }
  return s;
}

std::vector<Event> AllEvents() {
  std::vector<Event> events;
  for (EventType type : {EventType::kStart, EventType::kTimer, EventType::kUpgrade, EventType::kStop}) {
    events.push_back({.type = type});
  }
  events.push_back({.type = EventType::kRegistered, .generation = kNew, .verifiable = true});
  for (Generation who : {Generation{0}, kOld, kNew, kDead, kSpare, kStranger}) {
    for (EventType type : {EventType::kRegistered, EventType::kDied, EventType::kExited}) {
      events.push_back({.type = type, .generation = who});
    }
    for (int c = 0; c < kCallCount; ++c) {
      auto call = static_cast<Call>(c);
      events.push_back({.type = EventType::kReplied, .generation = who, .call = call});
      events.push_back({.type = EventType::kFailed, .generation = who, .call = call});
    }
  }
  return events;
}

bool HasTimer(const std::vector<Action>& actions) {
  return std::any_of(actions.begin(), actions.end(),
                     [](const Action& a) { return a.type == ActionType::kTimer; });
}

// What must hold after every step, whatever the state and the event.
void CheckInvariants(const State& before, const Event& event, const StepResult& result) {
  const State& after = result.state;
  for (const Action& action : result.actions) {
    if (action.type == ActionType::kCall && action.call == Call::kTake) {
      // The rule that protects the metadata.
      EXPECT_EQ(after.holders, std::set<Generation>{action.generation})
          << "granted while another may hold it";
    }
    if (action.type == ActionType::kTellExited) {
      EXPECT_NE(action.generation, action.subject);
    }
    if (action.type == ActionType::kExit) {
      EXPECT_EQ(after.phase, Phase::kStopped);
    }
    if (action.type == ActionType::kCall || action.type == ActionType::kKill ||
        action.type == ActionType::kKillFailed || action.type == ActionType::kKillHung ||
        action.type == ActionType::kSpawn) {
      EXPECT_NE(action.generation, 0u);
    }
  }
  for (Generation holder : before.holders) {
    bool proven = event.type == EventType::kExited && event.generation == holder;
    bool yielded =
        event.type == EventType::kReplied && event.call == Call::kYield && event.generation == holder;
    bool refused =
        event.type == EventType::kFailed && event.call == Call::kTake && event.generation == holder;
    if (after.holders.count(holder) == 0) {
      EXPECT_TRUE(proven || yielded || refused) << "dropped without proof";
    }
  }
  if (before.phase >= Phase::kStopYielding) {
    EXPECT_GE(after.phase, before.phase) << "a stop is never undone";
  }
  // Whoever asked for an upgrade is told how it ended, once, and never before what a failed candidate did is
  // taken back.
  bool was_asked = before.upgrade || before.tainted != 0, is_asked = after.upgrade || after.tainted != 0;
  auto told = std::count_if(result.actions.begin(), result.actions.end(), [](const Action& a) {
    return a.type == ActionType::kSwapDone || a.type == ActionType::kSwapFailed;
  });
  if (was_asked && !is_asked) {
    EXPECT_EQ(told, 1);
  }
  if (before.tainted != 0 && after.tainted != 0) {
    EXPECT_EQ(told, 0);
  }
  if (after.trial != 0) {
    EXPECT_EQ(after.trial, after.successor);
  }
  // Only a candidate that was compared with the owner, and probed, gets the metadata of a verifiable swap.
  for (const Action& action : result.actions) {
    if (action.type != ActionType::kCall) continue;
    if (action.call == Call::kPark && after.trial != 0) {
      EXPECT_EQ(before.phase, Phase::kRehearsing);
    }
    if (action.call == Call::kDistrust) {
      EXPECT_TRUE(before.tainted_exited ||
                  (event.type == EventType::kExited && event.generation == action.subject));
      EXPECT_EQ(action.generation, after.owner);
    }
  }
  EXPECT_TRUE(after.spare == 0 || (after.spare != after.owner && after.spare != after.successor));
  // Every phase that waits for a worker's answer has a limit.
  static const std::set<Phase> kUnlimited = {Phase::kIdle, Phase::kAwaitingExit, Phase::kReclaimWait,
                                             Phase::kStopped};
  if (after.phase != before.phase && kUnlimited.count(after.phase) == 0) {
    EXPECT_TRUE(HasTimer(result.actions));
  }
  // Whose limit passed is given up, or its death is on the way: nothing else would come.
  static const std::set<Phase> kLimited = {
      Phase::kStarting, Phase::kPreparing, Phase::kRehearsing, Phase::kParking,    Phase::kServing,
      Phase::kProbing,  Phase::kYielding,  Phase::kCommitting, Phase::kReclaiming, Phase::kResuming};
  if (event.type == EventType::kTimer && kLimited.count(before.phase) != 0) {
    bool dies = std::any_of(result.actions.begin(), result.actions.end(), [&](const Action& action) {
      return action.type == ActionType::kKillHung &&
             (action.generation == before.owner || action.generation == before.successor);
    });
    EXPECT_TRUE(dies || after.phase != before.phase);
  }
  // Somebody serves, or is on the way, unless we stop.
  if (after.phase < Phase::kStopYielding && after.phase != Phase::kIdle && after.phase != Phase::kBackoff) {
    EXPECT_TRUE(after.owner != 0 || after.successor != 0);
  }
  EXPECT_TRUE(after.owner == 0 || after.owner != after.successor);
}

TEST(HandoverMachineTest, EveryEventInEveryPhaseKeepsTheInvariants) {
  for (int p = 0; p < kPhaseCount; ++p) {
    auto phase = static_cast<Phase>(p);
    // Also without an owner: the same phases after a crash; and with a spare, a tainted candidate, a
    // probation.
    for (int variant = 0; variant < 6; ++variant) {
      State before = In(phase);
      bool crash = variant == 1, swapping = before.successor != 0;
      bool needs_owner = phase == Phase::kPreparing || phase == Phase::kRehearsing ||
                         phase == Phase::kParking || phase == Phase::kYielding;
      if (crash && (!swapping || needs_owner)) continue;
      if (crash) {
        before.owner = before.trial = 0;
        before.upgrade = false;
      }
      if (variant == 2 || variant == 3) {
        before.spare = kSpare;
        before.spare_ready = variant == 3;
      }
      if (variant == 4 && !swapping) {
        before.tainted = kDead;
        before.failure = "why";
      }
      before.probation = variant == 3 || variant == 5;
      before.stable = variant == 5;
      for (const Event& event : AllEvents()) {
        SCOPED_TRACE(std::string(PhaseName(phase)) + " event " +
                     std::to_string(static_cast<int>(event.type)) + " of " +
                     std::to_string(event.generation) + " call " + CallName(event.call) + " variant " +
                     std::to_string(variant));
        CheckInvariants(before, event, Step(before, event, WithSpare()));
      }
    }
  }
}

TEST(HandoverMachineTest, EventsOfWorkersThatPlayNoPartChangeNothing) {
  for (int p = 0; p < kPhaseCount; ++p) {
    State before = In(static_cast<Phase>(p));
    for (const Event& event : AllEvents()) {
      if (event.generation != kStranger) continue;
      StepResult result = Step(before, event, Limits());
      EXPECT_EQ(result.state.phase, before.phase);
      EXPECT_EQ(result.state.owner, before.owner);
      EXPECT_EQ(result.state.successor, before.successor);
    }
  }
}

// The table of README.md.
TEST(HandoverMachineTest, TheTable) {
  struct Row {
    Phase phase;
    EventType event;
    Generation who;
    Call call;
    Phase next;
    std::vector<std::string> must;
  };
  using E = EventType;
  using P = Phase;
  const std::vector<Row> rows = {
      {P::kIdle, E::kStart, 0, {}, P::kStarting, {"spawn 9"}},
      {P::kBackoff, E::kTimer, 0, {}, P::kStarting, {"spawn 9"}},
      {P::kRunning, E::kUpgrade, 0, {}, P::kStarting, {"spawn candidate 9"}},
      {P::kNoMetadata, E::kUpgrade, 0, {}, P::kStarting, {"spawn candidate 9"}},
      {P::kBackoff, E::kUpgrade, 0, {}, P::kStarting, {"spawn candidate 9"}},
      {P::kStarting, E::kUpgrade, 0, {}, P::kStarting, {"refused"}},
      {P::kCommitting, E::kUpgrade, 0, {}, P::kCommitting, {"refused"}},
      // A planned swap, step by step.
      {P::kStarting, E::kRegistered, kNew, {}, P::kParking, {"park 7"}},  // an older build: unproven
      {P::kPreparing, E::kReplied, kNew, Call::kPrepare, P::kRehearsing, {"rehearse 8"}},
      {P::kRehearsing, E::kReplied, kNew, Call::kRehearse, P::kParking, {"park 7"}},
      {P::kParking, E::kReplied, kOld, Call::kPark, P::kServing, {"serve 8"}},
      {P::kServing, E::kReplied, kNew, Call::kServe, P::kProbing, {"probe 8"}},
      {P::kProbing, E::kReplied, kNew, Call::kProbe, P::kYielding, {"yieldMetadata 7"}},
      {P::kYielding, E::kReplied, kOld, Call::kYield, P::kCommitting, {"takeMetadata 8"}},
      {P::kCommitting, E::kReplied, kNew, Call::kTake, P::kRunning, {"retire 7", "endTrial 8", "done 8"}},
      // The new worker dies, fails or hangs.
      {P::kStarting, E::kDied, kNew, {}, P::kRunning, {"failed"}},
      {P::kStarting, E::kTimer, 0, {}, P::kStarting, {"kill hung 8"}},
      {P::kPreparing, E::kDied, kNew, {}, P::kRunning, {"failed"}},
      {P::kPreparing, E::kFailed, kNew, Call::kPrepare, P::kRunning, {"kill 8", "failed"}},
      {P::kPreparing, E::kTimer, 0, {}, P::kPreparing, {"kill hung 8"}},
      {P::kRehearsing, E::kDied, kNew, {}, P::kRunning, {"failed"}},
      {P::kRehearsing, E::kFailed, kNew, Call::kRehearse, P::kRunning, {"kill 8", "failed"}},
      {P::kRehearsing, E::kTimer, 0, {}, P::kRunning, {"kill 8", "failed"}},
      {P::kParking, E::kDied, kNew, {}, P::kResuming, {"failed", "resume 7"}},
      // Once it has served, its failure is told only when what it did is taken back.
      {P::kServing, E::kDied, kNew, {}, P::kResuming, {"resume 7"}},
      {P::kServing, E::kFailed, kNew, Call::kServe, P::kResuming, {"kill 8", "resume 7"}},
      {P::kServing, E::kTimer, 0, {}, P::kServing, {"kill hung 8"}},
      {P::kProbing, E::kDied, kNew, {}, P::kResuming, {"resume 7"}},
      {P::kProbing, E::kFailed, kNew, Call::kProbe, P::kResuming, {"kill 8", "resume 7"}},
      {P::kProbing, E::kTimer, 0, {}, P::kResuming, {"kill 8", "resume 7"}},
      {P::kYielding, E::kDied, kNew, {}, P::kResuming, {"resume 7"}},
      {P::kAwaitingExit, E::kDied, kNew, {}, P::kResuming, {"resume 7"}},
      {P::kCommitting, E::kDied, kNew, {}, P::kResuming, {"resume 7"}},
      {P::kCommitting, E::kFailed, kNew, Call::kTake, P::kResuming, {"kill 8", "resume 7"}},
      {P::kCommitting, E::kTimer, 0, {}, P::kCommitting, {"kill hung 8"}},
      // The running worker dies, fails or hangs during the swap.
      {P::kStarting, E::kDied, kOld, {}, P::kStarting, {"kill 8", "failed", "spawn 9"}},
      {P::kPreparing, E::kDied, kOld, {}, P::kStarting, {"kill 8", "failed", "spawn 9"}},
      {P::kRehearsing, E::kDied, kOld, {}, P::kStarting, {"kill 8", "failed", "spawn 9"}},
      {P::kProbing, E::kDied, kOld, {}, P::kProbing, {}},
      {P::kParking, E::kDied, kOld, {}, P::kServing, {"serve 8"}},
      {P::kParking, E::kFailed, kOld, Call::kPark, P::kParking, {"kill failed 7"}},
      {P::kParking, E::kTimer, 0, {}, P::kParking, {"kill hung 7"}},
      {P::kServing, E::kDied, kOld, {}, P::kServing, {}},
      {P::kYielding, E::kDied, kOld, {}, P::kAwaitingExit, {}},
      {P::kYielding, E::kExited, kOld, {}, P::kCommitting, {"takeMetadata 8"}},
      {P::kYielding, E::kFailed, kOld, Call::kYield, P::kYielding, {"kill failed 7"}},
      {P::kYielding, E::kTimer, 0, {}, P::kYielding, {"kill hung 7"}},
      {P::kCommitting, E::kDied, kOld, {}, P::kCommitting, {}},
      // Waiting for the proof.
      {P::kAwaitingExit, E::kExited, kDead, {}, P::kCommitting, {"exited 5 to 8", "takeMetadata 8"}},
      {P::kAwaitingExit, E::kTimer, 0, {}, P::kAwaitingExit, {}},
      {P::kReclaimWait, E::kExited, kDead, {}, P::kReclaiming, {"exited 5 to 7", "takeMetadata 7"}},
      {P::kReclaimWait, E::kTimer, 0, {}, P::kReclaimWait, {}},
      // After a rollback.
      {P::kResuming, E::kReplied, kOld, Call::kResume, P::kRunning, {}},
      {P::kResuming, E::kFailed, kOld, Call::kResume, P::kResuming, {"kill failed 7"}},
      {P::kResuming, E::kTimer, 0, {}, P::kResuming, {"kill hung 7"}},
      {P::kReclaiming, E::kReplied, kOld, Call::kTake, P::kRunning, {}},
      {P::kReclaiming, E::kFailed, kOld, Call::kTake, P::kNoMetadata, {}},
      {P::kReclaiming, E::kTimer, 0, {}, P::kReclaiming, {"kill hung 7"}},
      {P::kNoMetadata, E::kTimer, 0, {}, P::kReclaiming, {"takeMetadata 7"}},
      {P::kRunning, E::kReplied, kOld, Call::kYield, P::kReclaiming, {"takeMetadata 7"}},
      // Deaths outside a swap.
      {P::kRunning, E::kDied, kOld, {}, P::kStarting, {"spawn 9"}},
      {P::kNoMetadata, E::kDied, kOld, {}, P::kStarting, {"spawn 9"}},
      {P::kReclaimWait, E::kDied, kOld, {}, P::kStarting, {"spawn 9"}},
      {P::kReclaiming, E::kDied, kOld, {}, P::kStarting, {"spawn 9"}},
      {P::kResuming, E::kDied, kOld, {}, P::kStarting, {"spawn 9"}},
      {P::kRunning, E::kExited, kDead, {}, P::kRunning, {"exited 5 to 7"}},
      // Stopping.
      {P::kIdle, E::kStop, 0, {}, P::kStopped, {"exit"}},
      {P::kBackoff, E::kStop, 0, {}, P::kStopped, {"exit"}},
      {P::kRunning, E::kStop, 0, {}, P::kStopYielding, {"yieldMetadata 7"}},
      {P::kNoMetadata, E::kStop, 0, {}, P::kStopRetiring, {"retire 7"}},
      {P::kServing, E::kStop, 0, {}, P::kStopYielding, {"kill 8", "failed", "yieldMetadata 7"}},
      {P::kCommitting, E::kStop, 0, {}, P::kStopRetiring, {"kill 8", "failed", "retire 7"}},
      {P::kStopYielding, E::kReplied, kOld, Call::kYield, P::kStopRetiring, {"retire 7"}},
      {P::kStopYielding, E::kFailed, kOld, Call::kYield, P::kStopRetiring, {"retire 7"}},
      {P::kStopYielding, E::kTimer, 0, {}, P::kStopRetiring, {"retire 7"}},
      {P::kStopYielding, E::kDied, kOld, {}, P::kStopKilling, {}},
      {P::kStopYielding, E::kExited, kOld, {}, P::kStopped, {"exit"}},
      {P::kStopRetiring, E::kExited, kOld, {}, P::kStopped, {"exit"}},
      {P::kStopRetiring, E::kTimer, 0, {}, P::kStopKilling, {"kill 7"}},
      {P::kStopKilling, E::kExited, kOld, {}, P::kStopped, {"exit"}},
      {P::kStopKilling, E::kTimer, 0, {}, P::kStopped, {"exit"}},
  };
  for (const Row& row : rows) {
    SCOPED_TRACE(std::string(PhaseName(row.phase)) + " event " + std::to_string(static_cast<int>(row.event)) +
                 " of " + std::to_string(row.who) + " call " + CallName(row.call));
    Machine machine(In(row.phase));
    machine.On(row.event, row.who, row.call);
    EXPECT_EQ(std::string(PhaseName(machine.phase())), PhaseName(row.next));
    for (const std::string& action : row.must) {
      EXPECT_TRUE(machine.Did(action))
          << action << " missing in: " << ::testing::PrintToString(machine.actions());
    }
  }
}

TEST(HandoverMachineTest, ReadsAreTakenOverBeforeTheDeadWorkerIsReapedButTheMetadataIsNot) {
  Machine m(In(Phase::kRunning));
  m.On(EventType::kDied, kOld);
  EXPECT_TRUE(m.Did("spawn 9"));
  m.On(EventType::kRegistered, 9);
  EXPECT_TRUE(m.Did("serve 9"));
  m.On(EventType::kReplied, 9, Call::kServe);
  EXPECT_EQ(m.phase(), Phase::kAwaitingExit);
  m.On(EventType::kExited, kOld);
  EXPECT_TRUE(m.Did("takeMetadata 9"));
  EXPECT_TRUE(m.Did("exited 7 to 9"));
  m.On(EventType::kReplied, 9, Call::kTake);
  EXPECT_EQ(m.phase(), Phase::kRunning);
  EXPECT_EQ(m.state().owner, 9u);
  EXPECT_TRUE(m.Did("done 9"));
}

TEST(HandoverMachineTest, ARollbackAfterTheYieldGivesTheMetadataBackOnlyWhenTheNewWorkerIsProvenDead) {
  Machine m(In(Phase::kCommitting));
  m.On(EventType::kFailed, kNew, Call::kTake);
  EXPECT_TRUE(m.Did("kill 8"));
  m.On(EventType::kReplied, kOld, Call::kResume);
  EXPECT_EQ(m.phase(), Phase::kReclaimWait);
  m.On(EventType::kExited, kNew);
  EXPECT_TRUE(m.Did("takeMetadata 7"));
  EXPECT_TRUE(m.Did("distrust 7 of 8"));
  m.On(EventType::kReplied, kOld, Call::kTake);
  EXPECT_EQ(m.phase(), Phase::kRunning);
  m.On(EventType::kReplied, kOld, Call::kDistrust);
  EXPECT_TRUE(m.Did("failed"));
}

TEST(HandoverMachineTest, WhatACandidateOnTrialDidIsTakenBackAfterItsProvenExitAndBeforeTheFailureIsTold) {
  Machine m(In(Phase::kProbing));
  m.On(EventType::kFailed, kNew, Call::kProbe);
  m.On(EventType::kReplied, kOld, Call::kResume);
  EXPECT_EQ(m.phase(), Phase::kRunning);
  EXPECT_TRUE(m.Did("timer 1000")) << "reads do not wait for the proof";
  EXPECT_FALSE(m.Did("distrust 7 of 8"));
  m.On(EventType::kUpgrade);
  EXPECT_TRUE(m.Did("refused"));
  m.On(EventType::kExited, kNew);
  EXPECT_TRUE(m.Did("distrust 7 of 8"));
  EXPECT_FALSE(m.Did("failed"));
  m.On(EventType::kReplied, kOld, Call::kDistrust);
  EXPECT_TRUE(m.Did("failed"));
  m.On(EventType::kUpgrade);
  EXPECT_TRUE(m.Did("spawn candidate 9"));
}

TEST(HandoverMachineTest, AWorkerThatDiesWhileItTakesBackIsReplacedByOneThatDoesIt) {
  Machine m(In(Phase::kProbing));
  m.On(EventType::kDied, kNew).On(EventType::kExited, kNew).On(EventType::kReplied, kOld, Call::kResume);
  EXPECT_TRUE(m.Did("distrust 7 of 8"));
  m.On(EventType::kDied, kOld).On(EventType::kExited, kOld);
  EXPECT_FALSE(m.Did("failed"));
  m.On(EventType::kRegistered, 9)
      .On(EventType::kReplied, 9, Call::kServe)
      .On(EventType::kReplied, 9, Call::kTake);
  EXPECT_TRUE(m.Did("distrust 9 of 8"));
  m.On(EventType::kReplied, kOld, Call::kDistrust);
  EXPECT_FALSE(m.Did("failed")) << "an answer of the dead";
  m.On(EventType::kFailed, 9, Call::kDistrust);
  EXPECT_TRUE(m.Did("failed")) << "also when it could not";
}

TEST(HandoverMachineTest, AVerifiableCandidateIsComparedBeforeTheOwnerParks) {
  Machine m(In(Phase::kStarting));
  m.On(Event{.type = EventType::kRegistered, .generation = kNew, .verifiable = true});
  EXPECT_EQ(m.phase(), Phase::kPreparing);
  EXPECT_TRUE(m.Did("prepare 8"));
  EXPECT_FALSE(m.Did("park 7"));
}

TEST(HandoverMachineTest, AnOwnerThatHangsInASwapCostsTheCandidateNothing) {
  Machine parking(In(Phase::kParking));
  parking.On(EventType::kTimer);
  EXPECT_EQ(parking.actions(), std::vector<std::string>{"kill hung 7"}) << "the phase waits for its death";
  parking.On(EventType::kDied, kOld);
  EXPECT_EQ(parking.actions(), (std::vector<std::string>{"timer 3000", "serve 8"}));
  EXPECT_EQ(parking.state().trial, kNew) << "it is probed all the same";
  parking.On(EventType::kReplied, kNew, Call::kServe).On(EventType::kReplied, kNew, Call::kProbe);
  EXPECT_EQ(parking.phase(), Phase::kAwaitingExit);
  parking.On(EventType::kExited, kOld).On(EventType::kReplied, kNew, Call::kTake);
  EXPECT_TRUE(parking.Did("done 8"));

  Machine yielding(In(Phase::kYielding));
  yielding.On(EventType::kTimer).On(EventType::kDied, kOld);
  EXPECT_EQ(yielding.phase(), Phase::kAwaitingExit) << "the limit proves nothing: the metadata waits";
  yielding.On(EventType::kExited, kOld);
  EXPECT_TRUE(yielding.Did("takeMetadata 8"));
}

TEST(HandoverMachineTest, AnOwnerThatCannotDoItsPartInASwapCountsAsDead) {
  Machine parking(In(Phase::kParking));
  parking.On(EventType::kFailed, kOld, Call::kPark);
  EXPECT_EQ(parking.actions(), std::vector<std::string>{"kill failed 7"});
  parking.On(EventType::kDied, kOld);
  EXPECT_EQ(parking.actions(), (std::vector<std::string>{"timer 3000", "serve 8"}));
  EXPECT_EQ(parking.state().trial, kNew) << "the candidate is probed all the same";

  Machine yielding(In(Phase::kYielding));
  yielding.On(EventType::kFailed, kOld, Call::kYield).On(EventType::kDied, kOld);
  EXPECT_EQ(yielding.phase(), Phase::kAwaitingExit) << "it may still hold the metadata";
  yielding.On(EventType::kExited, kOld).On(EventType::kReplied, kNew, Call::kTake);
  EXPECT_TRUE(yielding.Did("done 8"));

  Machine resuming(In(Phase::kResuming));
  resuming.On(EventType::kFailed, kOld, Call::kResume).On(EventType::kDied, kOld);
  EXPECT_TRUE(resuming.Did("spawn 9"));
}

TEST(HandoverMachineTest, ACandidateThatCannotTakeTheMetadataIsLeftAlsoWhenTheOldWorkerIsDead) {
  Machine m(In(Phase::kCommitting));
  m.On(EventType::kDied, kOld).On(EventType::kFailed, kNew, Call::kTake);
  EXPECT_TRUE(m.Did("kill 8"));
  EXPECT_TRUE(m.Did("spawn 9")) << "the build that ran";
  EXPECT_EQ(m.state().tainted, kNew) << "what it answered is taken back";
}

TEST(HandoverMachineTest, WhatABuildThatARollbackLeavesHasAnsweredIsTakenBackBeforeItIsTold) {
  Machine m(In(Phase::kRunning));
  m.On({.type = EventType::kUpgrade, .proven = true, .rollback = true});
  m.On({.type = EventType::kRegistered, .generation = 9, .verifiable = true});
  m.On(EventType::kReplied, 9, Call::kPrepare).On(EventType::kReplied, 9, Call::kRehearse);
  m.On(EventType::kReplied, kOld, Call::kPark).On(EventType::kReplied, 9, Call::kServe);
  m.On(EventType::kReplied, 9, Call::kProbe).On(EventType::kReplied, kOld, Call::kYield);
  m.On(EventType::kReplied, 9, Call::kTake);
  EXPECT_EQ(m.phase(), Phase::kRunning);
  EXPECT_TRUE(m.Did("distrust 9 of 7")) << "it is parked: it answers nothing any more";
  EXPECT_FALSE(m.Did("done 9"));
  EXPECT_FALSE(m.state().probation);
  m.On(EventType::kReplied, 9, Call::kDistrust);
  EXPECT_TRUE(m.Did("done 9"));
  // An upgrade leaves nobody distrusted, nor does a rollback that was refused.
  Machine upgrade(In(Phase::kCommitting));
  upgrade.On(EventType::kReplied, kNew, Call::kTake);
  EXPECT_TRUE(upgrade.Did("done 8"));
  Machine refused(In(Phase::kCommitting));
  refused.On({.type = EventType::kUpgrade, .rollback = true}).On(EventType::kReplied, kNew, Call::kTake);
  EXPECT_TRUE(refused.Did("done 8"));
  State backoff = In(Phase::kBackoff);
  Machine alone(backoff);
  alone.On({.type = EventType::kUpgrade, .rollback = true}).On(EventType::kRegistered, 9);
  alone.On(EventType::kReplied, 9, Call::kServe).On(EventType::kFailed, 9, Call::kTake);
  EXPECT_EQ(alone.phase(), Phase::kNoMetadata);
  EXPECT_TRUE(alone.Did("distrust 9 of 8")) << "also without the metadata";
}

TEST(HandoverMachineTest, WorkersThatDieOverTakingBackAreNotAskedForEver) {
  Machine m(In(Phase::kProbing));
  m.On(EventType::kDied, kNew).On(EventType::kExited, kNew).On(EventType::kReplied, kOld, Call::kResume);
  ASSERT_TRUE(m.Did("distrust 7 of 8"));
  m.On(EventType::kDied, kOld).On(EventType::kExited, kOld);
  m.On(EventType::kRegistered, 9)
      .On(EventType::kReplied, 9, Call::kServe)
      .On(EventType::kReplied, 9, Call::kTake);
  ASSERT_TRUE(m.Did("distrust 9 of 8"));
  m.On(EventType::kDied, 9).On(EventType::kExited, 9);
  m.On(EventType::kRegistered, 10).On(EventType::kReplied, 10, Call::kServe);
  m.On(EventType::kReplied, 10, Call::kTake);
  EXPECT_FALSE(m.Did("distrust 10 of 8"));
  EXPECT_TRUE(m.Did("failed"));
  m.On(EventType::kUpgrade);
  EXPECT_TRUE(m.Did("spawn candidate 11"));
}

TEST(HandoverMachineTest, WithoutTheMetadataACandidateForWhichNobodyElseWouldServeIsInProbation) {
  State state = In(Phase::kCommitting);
  state.owner = state.trial = 0;  // as after an upgrade in backoff
  Machine m(state);
  m.On(EventType::kFailed, kNew, Call::kTake);
  EXPECT_TRUE(m.Did("failed"));
  EXPECT_EQ(m.phase(), Phase::kNoMetadata);
  EXPECT_EQ(m.state().owner, kNew);
  EXPECT_TRUE(m.state().probation);
}

TEST(HandoverMachineTest, OnlyWhereReadsWaitIsTheFirstWorkerAfterACrashGivenLittleTime) {
  Machine boot;
  boot.On(EventType::kStart);
  EXPECT_TRUE(boot.Did("timer 20000")) << "nobody reads yet, and the disk is cold";
  Machine m(In(Phase::kRunning));
  m.On(EventType::kTimer).On(EventType::kDied, kOld);
  EXPECT_TRUE(m.Did("timer 5000"));
  m.On(EventType::kRegistered, 9);
  EXPECT_TRUE(m.Did("timer 5000"));
  m.On(EventType::kTimer).On(EventType::kDied, 9);
  EXPECT_TRUE(m.Did("timer 20000")) << "this machine may be slow";
  m.On(EventType::kRegistered, 10);
  EXPECT_TRUE(m.Did("timer 20000"));
}

TEST(HandoverMachineTest, TwoDeathsInProbationBringLastGoodBackAndItsOwnDeathBlamesTheData) {
  Machine m(In(Phase::kCommitting));
  m.On(EventType::kReplied, kNew, Call::kTake);
  EXPECT_TRUE(m.state().probation);
  m.On(EventType::kDied, kNew).On(EventType::kExited, kNew);
  Generation second = m.state().successor;
  EXPECT_TRUE(m.state().probation);
  m.On(EventType::kRegistered, second)
      .On(EventType::kReplied, second, Call::kServe)
      .On(EventType::kReplied, second, Call::kTake);
  EXPECT_EQ(m.phase(), Phase::kRunning);
  EXPECT_TRUE(m.state().probation) << "a restart does not end it";
  m.On(EventType::kTimer).On(EventType::kDied, second);
  EXPECT_TRUE(m.Did("reverted"));
  Generation good = m.state().successor;
  EXPECT_TRUE(m.Did("spawn last-good " + std::to_string(good)));
  m.On(EventType::kExited, second)
      .On(EventType::kRegistered, good)
      .On(EventType::kReplied, good, Call::kServe)
      .On(EventType::kReplied, good, Call::kTake);
  EXPECT_FALSE(m.state().probation);
  m.On(EventType::kDied, good);
  EXPECT_TRUE(m.Did("data fault"));
  EXPECT_FALSE(m.Did("reverted")) << "no flipping";
  m.On(EventType::kDied, m.state().successor);
  EXPECT_FALSE(m.Did("data fault")) << "told once";
}

TEST(HandoverMachineTest, ABuildThatSurvivesItsProbationIsLastGood) {
  Machine m(In(Phase::kCommitting));
  m.On(EventType::kReplied, kNew, Call::kTake);
  m.On(EventType::kTimer);
  EXPECT_TRUE(m.Did("timer 60000"));
  EXPECT_FALSE(m.Did("proven 8"));
  m.On(EventType::kTimer);
  EXPECT_TRUE(m.Did("proven 8"));
  EXPECT_FALSE(m.state().probation);
  m.On(EventType::kDied, kNew).On(EventType::kDied, m.state().successor);
  EXPECT_FALSE(m.Did("reverted"));
}

TEST(HandoverMachineTest, TheLastGoodBuildNeedsNoProbation) {
  Machine m(In(Phase::kRunning));
  m.On(Event{.type = EventType::kUpgrade, .proven = true});
  m.On(EventType::kRegistered, 9)
      .On(EventType::kReplied, kOld, Call::kPark)
      .On(EventType::kReplied, 9, Call::kServe);
  m.On(EventType::kReplied, kOld, Call::kYield).On(EventType::kReplied, 9, Call::kTake);
  EXPECT_EQ(m.phase(), Phase::kRunning);
  EXPECT_FALSE(m.state().probation);
}

TEST(HandoverMachineTest, AReadySpareServesAtTheFirstSignOfDeath) {
  Machine m(In(Phase::kRunning), WithSpare());
  m.On(EventType::kTimer);
  EXPECT_TRUE(m.Did("spawn last-good 9"));
  m.On(Event{.type = EventType::kRegistered, .generation = 9, .verifiable = true});
  EXPECT_TRUE(m.Did("prepare 9"));
  m.On(EventType::kReplied, 9, Call::kPrepare);
  EXPECT_TRUE(m.state().spare_ready);
  m.On(EventType::kDied, kOld);
  EXPECT_TRUE(m.Did("serve 9"));
  EXPECT_EQ(m.phase(), Phase::kServing);
  m.On(EventType::kReplied, 9, Call::kServe);
  EXPECT_EQ(m.phase(), Phase::kAwaitingExit) << "the metadata waits for the proof all the same";
  m.On(EventType::kExited, kOld).On(EventType::kReplied, 9, Call::kTake);
  m.On(EventType::kTimer);
  EXPECT_TRUE(m.Did("spawn last-good 10")) << "the next spare";
}

TEST(HandoverMachineTest, ASpareThatIsNotReadyOrDiesIsNotWaitedFor) {
  Machine m(In(Phase::kRunning), WithSpare());
  m.On(EventType::kTimer).On(EventType::kDied, kOld);
  EXPECT_TRUE(m.Did("spawn 10"));
  Machine n(In(Phase::kRunning), WithSpare());
  n.On(EventType::kTimer).On(EventType::kDied, 9);
  EXPECT_TRUE(n.Did("timer 5000"));
  n.On(EventType::kTimer);
  EXPECT_TRUE(n.Did("spawn last-good 10"));
  Machine f(In(Phase::kRunning), WithSpare());
  f.On(EventType::kTimer).On(EventType::kFailed, 9, Call::kPrepare);
  EXPECT_TRUE(f.Did("kill 9"));
}

TEST(HandoverMachineTest, ADeathInProbationIsAnsweredByTheSpareOfTheProvenBuild) {
  State s = In(Phase::kRunning);
  s.probation = true;
  s.spare = kSpare;
  s.spare_ready = true;
  Machine m(s, WithSpare());
  m.On(EventType::kDied, kOld);
  EXPECT_TRUE(m.Did("reverted"));
  EXPECT_TRUE(m.Did("serve 6"));
}

TEST(HandoverMachineTest, ALostSpareDoesNotShortenTheTimeInWhichTheDataIsBlamed) {
  State s = In(Phase::kRunning);
  s.reverted = true;
  Machine m(s, WithSpare());
  m.On(EventType::kTimer);
  EXPECT_TRUE(m.Did("timer 60000"));
  m.On(EventType::kDied, m.state().spare);
  EXPECT_FALSE(m.Did("timer 5000"));
  m.On(EventType::kDied, kOld);
  EXPECT_TRUE(m.Did("data fault"));
}

TEST(HandoverMachineTest, AfterAProbationTheSpareIsMadeAnewFromTheProvenBuild) {
  State s = In(Phase::kRunning);
  s.probation = s.stable = true;
  s.spare = kSpare;
  s.spare_ready = true;
  Machine m(s, WithSpare());
  m.On(EventType::kTimer);
  EXPECT_EQ(m.actions(), (std::vector<std::string>{"proven 7", "kill 6", "spawn last-good 9"}));
}

TEST(HandoverMachineTest, WhenBothDieTheRunningBinaryIsStartedAgain) {
  Machine m(In(Phase::kServing));
  m.On(EventType::kDied, kOld).On(EventType::kDied, kNew);
  EXPECT_TRUE(m.Did("spawn 9"));
  EXPECT_FALSE(m.state().upgrade);
  EXPECT_EQ(m.state().tainted, kNew);
}

TEST(HandoverMachineTest, AFailedUpgradeIsNotToldAsDoneWhenTheOldWorkerIsReplacedMeanwhile) {
  Machine m(In(Phase::kYielding));
  m.On(EventType::kExited, kNew);
  EXPECT_EQ(m.phase(), Phase::kResuming);
  m.On(EventType::kTimer).On(EventType::kDied, kOld).On(EventType::kExited, kOld);  // it answers nothing
  EXPECT_EQ(m.phase(), Phase::kStarting);
  const Generation next = m.state().successor;
  m.On(EventType::kRegistered, next).On(EventType::kReplied, next).On(EventType::kReplied, next, Call::kTake);
  EXPECT_EQ(m.phase(), Phase::kRunning);
  EXPECT_FALSE(m.Did("done " + std::to_string(next)));
  EXPECT_TRUE(m.Did("distrust " + std::to_string(next) + " of " + std::to_string(kNew)));
  m.On(EventType::kReplied, next, Call::kDistrust);
  EXPECT_EQ(m.actions(), std::vector<std::string>{"failed"});
}

TEST(HandoverMachineTest, ACrashSuccessorThatCannotTakeTheMetadataKeepsServing) {
  State s = In(Phase::kCommitting);
  s.owner = s.trial = 0;
  s.upgrade = false;
  Machine m(s);
  m.On(EventType::kFailed, kNew, Call::kTake);
  EXPECT_EQ(m.phase(), Phase::kNoMetadata);
  EXPECT_EQ(m.state().owner, kNew);
  EXPECT_FALSE(m.Did("kill 8"));
}

TEST(HandoverMachineTest, QuickDeathsAreAnsweredMoreAndMoreSlowlyAndForgottenAfterAStableRun) {
  Machine m;
  m.On(EventType::kStart);
  std::vector<uint64_t> waits;
  for (int i = 0; i < 6; ++i) {
    m.On(EventType::kDied, m.state().successor);
    waits.push_back(0);
    if (m.phase() == Phase::kBackoff) {
      waits.back() = std::stoull(m.actions().back().substr(6));
      m.On(EventType::kTimer);
    }
    EXPECT_EQ(m.phase(), Phase::kStarting);
  }
  EXPECT_EQ(waits, (std::vector<uint64_t>{0, 0, 0, 50, 200, 1'000}));
  State s = In(Phase::kRunning);
  s.quick_deaths = 4;
  Machine stable(s);
  stable.On(EventType::kTimer).On(EventType::kDied, kOld);
  EXPECT_TRUE(stable.Did("spawn 9"));
}

// Explores everything reachable: no sequence of events of the workers involved leads into a corner.
TEST(HandoverMachineTest, NoSequenceOfEventsBreaksAnInvariantOrGetsStuck) {
  using Key = std::tuple<int, int, int, bool, bool, bool, bool, uint32_t, int, int, int, bool>;
  auto key = [](const State& s) {
    auto other = std::any_of(s.holders.begin(), s.holders.end(),
                             [&](Generation g) { return g != s.owner && g != s.successor; });
    return Key(static_cast<int>(s.phase), s.owner != 0, s.successor != 0, s.upgrade,
               s.holders.count(s.owner) != 0, s.holders.count(s.successor) != 0, other, s.quick_deaths,
               s.trial != 0, s.tainted == 0 ? 0 : 1 + s.tainted_exited + 2 * (s.distrusting != 0),
               s.spare == 0 ? 0 : 1 + s.spare_ready, s.probation);
  };
  std::map<Key, State> seen;
  std::vector<State> queue = {State()};
  while (!queue.empty()) {
    State state = queue.back();
    queue.pop_back();
    if (!seen.emplace(key(state), state).second) continue;
    std::vector<Event> events;
    for (EventType type : {EventType::kStart, EventType::kTimer, EventType::kUpgrade, EventType::kStop})
      events.push_back({.type = type});
    std::set<Generation> involved = state.holders;
    involved.insert({state.owner, state.successor, state.tainted, state.spare});
    for (Generation who : involved) {
      for (EventType type : {EventType::kRegistered, EventType::kDied, EventType::kExited}) {
        events.push_back({.type = type, .generation = who});
      }
      events.push_back({.type = EventType::kRegistered, .generation = who, .verifiable = true});
      for (int c = 0; c < kCallCount; ++c) {
        auto call = static_cast<Call>(c);
        events.push_back({.type = EventType::kReplied, .generation = who, .call = call});
        events.push_back({.type = EventType::kFailed, .generation = who, .call = call});
      }
    }
    for (const Event& event : events) {
      StepResult result = Step(state, event, WithSpare());
      CheckInvariants(state, event, result);
      if (::testing::Test::HasFailure()) FAIL() << "in phase " << PhaseName(state.phase);
      result.state.quick_deaths = std::min(result.state.quick_deaths, 4u);
      queue.push_back(result.state);
    }
    // A wait without a limit always waits for the exit of somebody who may hold the metadata.
    if (state.phase == Phase::kAwaitingExit || state.phase == Phase::kReclaimWait) {
      EXPECT_TRUE(std::get<6>(key(state))) << "waits for nobody";
    }
  }
  std::set<int> phases;
  for (const auto& [k, state] : seen) phases.insert(std::get<0>(k));
  EXPECT_EQ(phases.size(), static_cast<size_t>(kPhaseCount)) << "every phase is reachable";
}

}  // namespace
}  // namespace holdfast::supervisor
