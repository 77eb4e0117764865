// Who answers a call: nobody yet (wait), the Snapshotter of this worker, or the successor behind a socket
// path. Counts who is inside the Snapshotter, so it can be taken away safely. Thread-safe.
#pragma once

#include <chrono>
#include <functional>
#include <string>

#include "common/mutex.h"
#include "common/status.h"
#include "worker/snapshot/snapshotter.h"

namespace holdfast::api {

class OwnerGate {
 public:
  struct Pass {
    snapshot::Snapshotter* snapshotter = nullptr;  // call Leave when done with it
    std::string forward_to;                        // else: the successor's socket
  };

  // Unavailable when there is no owner within `limit`; Cancelled when `cancelled` (asked now and then) says
  // so.
  absl::StatusOr<Pass> Enter(std::chrono::milliseconds limit, const std::function<bool()>& cancelled) {
    auto deadline = std::chrono::steady_clock::now() + limit;
    MutexLock lock(&mutex_);
    while (snapshotter_ == nullptr && forward_to_.empty()) {
      auto now = std::chrono::steady_clock::now();
      if (now >= deadline) return Unavailable("the snapshotter has no owner of the metadata yet");
      if (cancelled()) return Cancelled("the caller went away");
      changed_.WaitUntil(&mutex_, std::min(deadline, now + std::chrono::milliseconds(200)));
    }
    if (snapshotter_ == nullptr) return Pass{nullptr, forward_to_};
    inside_++;
    return Pass{snapshotter_, ""};
  }

  void Leave() {
    MutexLock lock(&mutex_);
    inside_--;
    changed_.SignalAll();
  }

  void Attach(snapshot::Snapshotter* snapshotter) {
    MutexLock lock(&mutex_);
    snapshotter_ = snapshotter;
    forward_to_.clear();
    changed_.SignalAll();
  }

  // Returns when nobody is inside.
  void Forward(const std::string& path) {
    snapshot::Snapshotter* leaving = nullptr;
    {
      MutexLock lock(&mutex_);
      leaving = snapshotter_;
      snapshotter_ = nullptr;
      forward_to_ = path;
      changed_.SignalAll();
    }
    if (leaving != nullptr) leaving->Abort();
    MutexLock lock(&mutex_);
    while (inside_ > 0) changed_.Wait(&mutex_);
  }

 private:
  Mutex mutex_;
  CondVar changed_;
  snapshot::Snapshotter* snapshotter_ ABSL_GUARDED_BY(mutex_) = nullptr;
  std::string forward_to_ ABSL_GUARDED_BY(mutex_);
  int inside_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace holdfast::api
