// Deferred deletion of snapshot folders that have no row (any more): unmounts the layer, then removes the
// folder. One background thread; failures are retried with growing pauses and never reach containerd. Needs
// no record of its own: whatever a crash leaves behind is a folder without a row, which Sweep finds. Thread
// safety: all methods. Stop (also in the destructor) interrupts a removal that runs.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <thread>

#include "common/fault.h"
#include "common/mutex.h"
#include "common/status.h"
#include "common/trace.h"
#include "worker/snapshot/folders.h"
#include "worker/snapshot/layer_mounter.h"

namespace holdfast::snapshot {

enum class FolderUse { kGarbage, kBeingCreated, kHasRow };

class Reaper {
 public:
  // `use` is asked before anything is deleted. Everything given must outlive the reaper.
  Reaper(const Folders* folders, LayerMounter* mounter, std::function<FolderUse(uint64_t)> use,
         TraceRing* trace, FaultPoints* faults);
  ~Reaper();

  void Schedule(uint64_t id);
  // Finds folders without a row and waits until all that is pending was tried once, at most `wait`.
  absl::Status Sweep(std::chrono::milliseconds wait);
  // Returns when nothing is being deleted any more and `use` will not be asked again. Idempotent.
  void Stop();

 private:
  using Time = std::chrono::steady_clock::time_point;
  struct Item {
    Time due;
    std::chrono::milliseconds pause;  // after the next failure
    Time tried{};                     // when the last try that failed began
    Time asked{};                     // when a sweep last wanted a try
  };
  void Run();
  bool Done(uint64_t id);  // false: try again later
  absl::Status Delete(uint64_t id);
  bool AllTriedSince(Time start) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const Folders* const folders_;
  LayerMounter* const mounter_;
  const std::function<FolderUse(uint64_t)> use_;
  TraceRing* const trace_;
  FaultPoints* const faults_;
  std::atomic<bool> stopping_{false};
  Mutex mutex_;
  CondVar changed_;
  std::map<uint64_t, Item> items_ ABSL_GUARDED_BY(mutex_);
  Mutex join_mutex_;
  std::thread thread_ ABSL_GUARDED_BY(join_mutex_);
};

}  // namespace holdfast::snapshot
