// The swap machine (DESIGN 4.4, 4.5; table in README.md): which worker serves reads, which owns the metadata,
// and what happens when one dies, fails or hangs. A pure function: no descriptor, no clock, no RPC.
//
// One path for every change: a *successor* is spawned, registers, takes over reads, then the metadata. In an
// upgrade an *owner* parks and yields meanwhile and can have all back; at a start or after a crash there is
// none. Reads are granted at once, the metadata when no other worker can hold it: by a yield or a proven
// exit, never by a time limit.
//
// A candidate touches no container before it has been compared with the owner (rehearsing). It serves on
// trial until it has the metadata; a failure until then gives all back to the owner, who is told to distrust
// what the candidate did, once its exit is proven. After that it is in probation: deaths bring the build that
// proved itself last (last-good) back. A spare is a worker of the last-good build that waits, prepared.
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <vector>

namespace holdfast::supervisor {

using Generation = uint64_t;  // 0: none

enum class Phase {
  kIdle,          // before the first start
  kBackoff,       // no worker; the next one is spawned when the timer fires
  kStarting,      // the successor is spawned and not yet registered
  kPreparing,     // prepare() of the candidate is under way; the owner serves
  kRehearsing,    // the candidate is compared with the owner, which serves
  kParking,       // park() of the owner is under way
  kServing,       // serve() of the successor is under way
  kProbing,       // the candidate serves on trial; a helper process reads through the kernel
  kYielding,      // yieldMetadata() of the owner is under way
  kAwaitingExit,  // the successor serves reads; a dead worker may still hold the metadata
  kCommitting,    // takeMetadata() of the successor is under way
  kRunning,       // the owner has everything
  kResuming,      // rollback: resume() of the owner is under way
  kReclaimWait,   // rollback: the owner serves reads; the killed successor may still hold the metadata
  kReclaiming,    // takeMetadata() of the owner is under way, again
  kNoMetadata,    // the owner serves reads, but could not take the metadata; tried again when the timer fires
  kStopYielding,  // shutting down: yieldMetadata() of the owner is under way
  kStopRetiring,  // shutting down: waits for the owner's exit
  kStopKilling,   // shutting down: waits for a killed worker's exit
  kStopped,
};
inline constexpr int kPhaseCount = 20;
const char* PhaseName(Phase phase);

// Calls of workers, but for kRehearse and kProbe: what the supervisor does with the successor in these
// phases.
enum class Call {
  kServe,
  kPark,
  kResume,
  kYield,
  kTake,
  kRetire,
  kPrepare,
  kRehearse,
  kProbe,
  kEndTrial,
  kDistrust
};
inline constexpr int kCallCount = 11;
const char* CallName(Call call);

enum class Binary { kRunning, kCandidate, kLastGood };

// How long each step may take before its worker counts as hung. Milliseconds. Where reads wait they are
// short, for what took longer would be a hang to the readers, who lose nothing when a worker is replaced that
// was only slow.
struct Limits {
  uint64_t register_ms = 20'000;
  uint64_t prepare_ms = 60'000;
  uint64_t rehearse_ms = 30'000;
  uint64_t probe_ms = 10'000;
  uint64_t serve_ms = 20'000;
  uint64_t first_ms = 5'000;           // register and serve of the first worker after a crash, instead
  uint64_t prepared_serve_ms = 3'000;  // serve of a candidate or a spare, instead
  uint64_t park_ms = 3'000;
  uint64_t yield_ms = 10'000;
  uint64_t take_ms = 120'000;
  uint64_t resume_ms = 5'000;
  uint64_t retired_ms = 600'000;  // for a retired worker's old calls; the supervisor's affair
  uint64_t metadata_retry_ms = 5'000;
  uint64_t stable_ms = 1'000;      // a worker that ran this long did not die quickly
  uint64_t probation_ms = 60'000;  // of a new build, after it took over; each restart begins it anew
  uint64_t spare_retry_ms = 5'000;
  bool spare = false;  // keep a spare
  uint64_t stop_retire_ms = 10'000;
  uint64_t stop_kill_ms = 2'000;
};

enum class EventType {
  kStart,
  kRegistered,  // generation introduced itself
  kDied,        // generation is of no use any more (socket EOF, exit, or killed); it may still exist
  kExited,      // generation's exit is proven
  kReplied,     // `call` of generation succeeded
  kFailed,      // `call` of generation returned an error
  kTimer,       // the timer armed last fired
  kUpgrade,     // swap to the candidate binary
  kStop,
};

inline constexpr uint32_t kProbationDeaths = 2;  // that bring last-good back
inline constexpr uint32_t kDistrustDeaths = 2;   // over taking back the same: it is given up

struct Event {
  EventType type = EventType::kStart;
  Generation generation = 0;
  Call call = Call::kServe;
  std::string reason{};
  // kRegistered: it and the owner (if any) know prepare, trial and distrust.
  bool verifiable = false;
  // kUpgrade: the candidate is the last-good build, and needs no probation.
  bool proven = false;
  // kUpgrade: a rollback: what the build that is left has answered and stored is to be distrusted.
  bool rollback = false;
};

struct State {
  Phase phase = Phase::kIdle;
  Generation owner = 0;  // serves, or is parked
  Generation successor = 0;
  bool upgrade = false;  // the swap under way was asked for
  Generation next_generation = 1;
  std::set<Generation> holders{};  // may hold the metadata
  uint32_t quick_deaths = 0;

  bool candidate_proven = false;  // of the upgrade under way
  Generation leaving = 0;         // in a rollback: whom it leaves
  Generation trial = 0;           // the successor, while it serves on trial
  // A candidate that failed after it had served, or whom a rollback has left: what it did is to be
  // distrusted. How the swap went is told when that is done.
  Generation tainted = 0;
  bool tainted_exited = false;
  Generation distrusting = 0;  // whose distrust() is under way
  uint32_t distrust_deaths = 0;
  std::string failure{};

  bool stable = false;     // kRunning: it ran for stable_ms
  bool probation = false;  // the running build has not proved itself; a last-good build is known
  uint32_t probation_deaths = 0;
  bool reverted = false;  // last-good was brought back, and runs

  Generation spare = 0;
  bool spare_ready = false;
};

enum class ActionType {
  kSpawn,       // start `generation` from `binary`
  kCall,        // call `call` of `generation`
  kTellExited,  // tell `generation` that the exit of `subject` is proven
  kKill,        // SIGKILL `generation`
  kKillFailed,  // the same to a worker that cannot do what it must: `reason`. Its death is told at once
  kKillHung,    // the same, after its traces are kept: `reason`. Its death is told when it is killed, and
                // nothing that it answers until then
  kTimer,       // arm the only timer (`milliseconds`); replaces an earlier one
  kStopTimer,
  kSwapDone,  // the swap under way succeeded; `generation` owns everything and its binary is the running one
  kSwapFailed,  // the upgrade under way failed, or a crash's successor serves without metadata: `reason`
  kProven,      // the probation of `generation` is over: its build is last-good
  kReverted,    // the running build did not survive its probation, last-good is brought back
  kDataFault,   // last-good dies in the same way: not the build is to blame
  kRefused,     // the upgrade just asked for cannot begin: `reason`
  kExit,        // the supervisor may exit
};

struct Action {
  ActionType type = ActionType::kStopTimer;
  Generation generation = 0, subject = 0;
  Call call = Call::kServe;
  Binary binary = Binary::kRunning;
  uint64_t milliseconds = 0;
  std::string reason{};
};

struct StepResult {
  State state;
  std::vector<Action> actions;  // to be carried out in order
};

// Every event is allowed in every phase; one without meaning there changes nothing.
StepResult Step(const State& state, const Event& event, const Limits& limits);

// Wait before the next spawn after n quick deaths in a row.
uint64_t BackoffMillis(uint32_t quick_deaths);

}  // namespace holdfast::supervisor
