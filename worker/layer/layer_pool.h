// The threads of a LayerReader: completion threads that run tasks which may block on the local disk, and one
// timer thread for deadlines.
//
// Locks: mutex_ only; no task and no expiry runs under it. Thread safety: all methods. Stop waits for the
// tasks that run; those queued are destroyed without running, and what is still registered is handed back for
// the caller to fail.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <thread>
#include <vector>

#include "common/clock.h"
#include "common/loop_watch.h"
#include "common/mutex.h"

namespace holdfast::layer {

// Something with a deadline (a pending read).
class Expiring {
 public:
  virtual ~Expiring() = default;
  virtual void Expire() = 0;  // the deadline passed; on a completion thread
  virtual void Cancel() = 0;  // the reader ends
};

class CompletionPool {
 public:
  using TimerId = std::pair<uint64_t, uint64_t>;  // deadline, sequence

  // `watch`, if any: each thread is at work while it runs a task.
  CompletionPool(int threads, const Clock* clock, LoopWatch* watch = nullptr);
  ~CompletionPool() { Stop(); }

  void Post(std::function<void()> task);
  TimerId AddDeadline(uint64_t boot_nanos, std::weak_ptr<Expiring> object);
  void RemoveDeadline(const TimerId& id);
  // Idempotent. Cancels everything registered.
  void Stop();

 private:
  void Work(LoopWatch::Loop* loop);
  void WatchDeadlines();

  const Clock* const clock_;
  Mutex mutex_;
  CondVar work_;
  CondVar timers_changed_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  uint64_t next_id_ ABSL_GUARDED_BY(mutex_) = 0;
  std::deque<std::function<void()>> tasks_ ABSL_GUARDED_BY(mutex_);
  std::map<TimerId, std::weak_ptr<Expiring>> timers_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::unique_ptr<LoopWatch::Loop>> loops_;  // one a thread
  std::vector<std::thread> threads_;
};

}  // namespace holdfast::layer
