// Decides when a fetch begins, for all layers of a reader: bounds the bytes that are on their way (they are
// held in memory until they are verified), lets demand go first, and holds prefetch back while the worker is
// parked.
//
// What is to be prefetched is decided only when its turn comes (a job yields one fetch after the other), so a
// chunk that is demanded meanwhile is simply demanded.
//
// Locks: mutex_ only; nothing of a layer is called under it. Thread safety: all methods.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <optional>

#include "common/mutex.h"

namespace holdfast::layer {

class FetchScheduler {
 public:
  struct Start {
    uint64_t bytes = 0;
    std::function<void()> run;  // begins the fetch; must not block. Done(bytes, ...) is due once for each
  };
  using PrefetchJob = std::function<std::optional<Start>()>;  // nullopt: the job is finished

  explicit FetchScheduler(uint64_t max_bytes) : max_bytes_(max_bytes) {}

  void Demand(Start start);
  // `soon`: before the other jobs.
  void Prefetch(PrefetchJob job, bool soon);
  void Done(uint64_t bytes, bool prefetch);
  void Pause(bool paused);
  // Forgets what has not begun; nothing begins afterwards.
  void Stop();

 private:
  void Pump();
  bool PumpDemand();
  bool PumpPrefetch();

  const uint64_t max_bytes_;
  Mutex mutex_;
  bool paused_ ABSL_GUARDED_BY(mutex_) = false;
  bool stopped_ ABSL_GUARDED_BY(mutex_) = false;
  uint64_t bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  int demand_running_ ABSL_GUARDED_BY(mutex_) = 0;
  int prefetch_running_ ABSL_GUARDED_BY(mutex_) = 0;
  std::deque<Start> demand_ ABSL_GUARDED_BY(mutex_);
  std::deque<PrefetchJob> jobs_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace holdfast::layer
