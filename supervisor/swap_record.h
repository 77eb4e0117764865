// What people are told of swaps (schema/control.capnp, SwapStatus): how the last one went, each step of one
// that was asked for, and how long readers waited. Decides nothing.
//
// Main thread only. Progress is sent and not waited for: who asked may be gone.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "common/clock.h"
#include "schema/control.capnp.h"
#include "supervisor/handover_machine.h"

namespace holdfast::supervisor {

class SwapRecord {
 public:
  explicit SwapRecord(const Clock* clock) : clock_(*clock) {}

  // One that was asked for (`kind`: "upgrade", "rollback"), until it is answered.
  void Ask(const std::string& kind, kj::Maybe<schema::Progress::Client> progress);
  void Answered() { asked_ = begun_ = false; }
  bool asked() const { return asked_; }
  bool is_rollback() const { return asked_kind_ == "rollback"; }
  // Its steps: what the supervisor does by itself, then the machine's phases.
  void BeginStep(const std::string& name);
  void EndStep(bool ok);
  void NotePhase(Phase from, Phase to, bool upgrade);
  void Detail(const std::string& text);  // of the step under way
  void TellProgress();

  // Any swap: `kind` as above, or "crash", "hang", "supervisor". BeginAsked: the one that was asked for.
  void Begin(const std::string& kind, const std::string& from_build);
  void BeginAsked(const std::string& from_build, Generation candidate) {
    Begin(asked_kind_, from_build);
    begun_ = true;
    candidate_ = candidate;
  }
  // The one that was asked for has begun. Before, while its executable is copied, a crash is a swap of its
  // own.
  bool begun() const { return begun_; }
  // The kind of the one that was asked for, from its beginning to its result; else "".
  std::string unfinished() const { return begun_ && last_.result == "running" ? last_.kind : ""; }
  Generation candidate() const { return candidate_; }  // of the last one that was asked for
  // `result`: "done", or what failed. Nothing if none is under way.
  void Finish(const std::string& result, const std::string& to_build);

  // Nobody reads from then on (CLOCK_BOOTTIME, nanoseconds), or since the earliest time told. A swap that is
  // rolled back may have two such pauses: they are added up.
  void ReadsStopped(uint64_t boot_nanos);
  void CarriesOver(uint64_t requests) { last_.carried_over = requests; }
  void ReadsTakenOver(Generation by, bool from_another);

  void FillLast(schema::SwapStatus::Builder out) const;
  void FillInProgress(schema::Status::Builder out) const;

  // Since the first supervisor.
  void Restore(uint64_t swaps, uint64_t carried_over);
  uint64_t swaps() const { return swaps_; }
  uint64_t carried_over() const { return carried_over_; }

 private:
  struct Step {
    std::string name, detail{};
    uint64_t begun_boot_nanos = 0, nanos = 0;
  };
  struct Last {
    std::string kind = "none", result{}, from_build{}, to_build{};
    int64_t finished_wall_nanos = 0;
    uint64_t pause_nanos = 0, carried_over = 0;
    std::vector<Step> steps{};
  };
  static void Fill(const Step& step, schema::SwapStep::Builder out);

  const Clock& clock_;
  Last last_;
  bool asked_ = false, begun_ = false, step_failed_ = false;
  std::string asked_kind_;
  Generation candidate_ = 0;
  std::vector<Step> steps_;  // of the one asked for; the last one is under way
  kj::Maybe<schema::Progress::Client> progress_;
  std::vector<std::pair<Step, bool>> progress_due_;  // begun or (true) done, not told yet
  uint64_t reads_stopped_boot_nanos_ = 0;            // 0: somebody reads
  uint64_t swaps_ = 0, carried_over_ = 0;
};

}  // namespace holdfast::supervisor
