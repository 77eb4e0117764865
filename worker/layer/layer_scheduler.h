// Decides when a fetch begins, for all layers of a reader: bounds the bytes that are on their way (they are
// held in memory until they are verified), lets demand go first, and holds prefetch back while the worker is
// parked.
//
// An *origin* is what falls silent as a whole, a registry. One that does not answer keeps its bytes until its
// fetches' deadlines, so none may use up the budget: beyond a quarter of it of its own, an origin leaves a
// quarter free for the others, and an origin with no demand on its way may begin one fetch even when the
// budget is spent (up to twice the budget in all). Within an origin demand begins in order; between origins
// the oldest that may begin goes first.
//
// What is to be prefetched is decided only when its turn comes (a job yields one fetch after the other), so a
// chunk that is demanded meanwhile is simply demanded.
//
// Locks: mutex_ only; nothing of a layer is called under it. Thread safety: all methods.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "common/mutex.h"

namespace holdfast::layer {

class FetchScheduler {
 public:
  struct Start {
    std::string origin;
    uint64_t bytes = 0;
    std::function<void()> run;  // begins the fetch; must not block. Done(origin, bytes, ...) is due once each
  };
  using PrefetchJob = std::function<std::optional<Start>()>;  // nullopt: the job is finished

  explicit FetchScheduler(uint64_t max_bytes) : max_bytes_(max_bytes) {}

  void Demand(Start start);
  // `soon`: before the other jobs.
  void Prefetch(PrefetchJob job, bool soon);
  void Done(const std::string& origin, uint64_t bytes, bool prefetch);
  void Pause(bool paused);
  // Nothing begins afterwards. Returns the demand that had not begun: it may hold the last reference to a
  // layer and so to the reads that wait in it, which must be answered first.
  [[nodiscard]] std::vector<Start> Stop();

 private:
  struct Queued {
    uint64_t ticket = 0;  // lower: came earlier
    Start start;
  };
  struct Origin {  // kept while it has something on its way or queued
    uint64_t bytes = 0;
    int running = 0, demand_running = 0;
    std::deque<Queued> demand;
  };

  void Pump();
  bool MayBegin(const Origin& origin) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool PumpDemand();
  bool PumpPrefetch();

  const uint64_t max_bytes_;
  Mutex mutex_;
  bool paused_ ABSL_GUARDED_BY(mutex_) = false;
  bool stopped_ ABSL_GUARDED_BY(mutex_) = false;
  uint64_t bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  int prefetch_running_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t next_ticket_ ABSL_GUARDED_BY(mutex_) = 0;
  std::map<std::string, Origin> origins_ ABSL_GUARDED_BY(mutex_);
  std::deque<PrefetchJob> jobs_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace holdfast::layer
