// Named fault points: a test (or, in the fault matrix, an operator of a debug build) makes the n-th pass
// through a point fail, kill the process or wait. Given by constructor; a null FaultPoints* means "no faults"
// and costs one branch. The points are listed in docs/FAILURES.md. Thread-safe.
#pragma once

#include <map>
#include <string>
#include <string_view>

#include "common/mutex.h"
#include "common/status.h"

namespace holdfast {

class FaultPoints {
 public:
  // Arms the points of "point=action[@n][;point=action...]" where action is kill, eio, enospc, block, or
  // wrong (what the point is named for: a wrong byte, a name left out); n is the pass that fires (default 1;
  // 0 = every pass). The worker takes it from HOLDFAST_FAULTS.
  absl::Status Parse(std::string_view spec);

  // The next pass (or n-th from now) through `point` returns `status`.
  void FailAt(std::string_view point, absl::Status status, int nth = 1);
  // The n-th pass through `point` blocks until Release(point).
  void BlockAt(std::string_view point, int nth = 1);
  // The n-th pass through `point` kills this process with SIGKILL.
  void KillAt(std::string_view point, int nth = 1);
  void Release(std::string_view point);

  // Called by the code under test at the named point. A fault that fires is logged ("fault.fired").
  absl::Status Pass(std::string_view point);

  // How often `point` was passed, and how often a fault fired there: a test that did not see its fault happen
  // fails.
  int passes(std::string_view point) const;
  int fired(std::string_view point) const;
  // Waits until `point` has fired `count` times; false after `seconds`.
  bool WaitFired(std::string_view point, int count, int seconds) const;

 private:
  enum class Kind { kNone, kFail, kBlock, kKill };
  struct Point {
    Kind kind = Kind::kNone;
    int countdown = 0;  // fires when it reaches 0; -1 = every pass
    absl::Status status;
    int passes = 0;
    int fired = 0;
    bool released = false;
  };
  static const char* NameOf(Kind kind);
  void Arm(std::string_view point, Kind kind, absl::Status status, int nth);

  mutable Mutex mutex_;
  mutable CondVar changed_;
  std::map<std::string, Point, std::less<>> points_ ABSL_GUARDED_BY(mutex_);
};

// What HOLDFAST_FAULTS says: the specification itself or, for "@exe", what stands behind "HFFAULTS:" in the
// last 512 bytes of the executable, up to the line's end; nothing there: no faults. So a test makes
// misbehaving builds by appending to a copy.
absl::StatusOr<std::string> FaultSpecFrom(const std::string& value,
                                          const std::string& executable = "/proc/self/exe");

// The usual call site: HF_RETURN_IF_ERROR(PassFault(faults, "cache.write.before_data"));
inline absl::Status PassFault(FaultPoints* faults, std::string_view point) {
  return faults == nullptr ? absl::OkStatus() : faults->Pass(point);
}

}  // namespace holdfast
