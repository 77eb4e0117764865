// Trace points: what happened to which object, and how long it took. A point is one log line at verbosity 1
// ("trace event=fuse.read mount=7 ... us=123") and an entry in a fixed ring that `holdfastctl` can show.
// Thread-safe.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "common/clock.h"
#include "common/mutex.h"

namespace holdfast {

struct TraceEvent {
  int64_t wall_nanos = 0;
  uint64_t duration_nanos = 0;
  std::string event;   // "snapshot.prepare", "swap.park", "fuse.read_miss", ...
  std::string detail;  // "key=value key=value"; digests and snapshot keys in full
};

class TraceRing {
 public:
  explicit TraceRing(size_t capacity = 512, const Clock* clock = Clock::Real())
      : capacity_(capacity), clock_(clock) {}
  void Record(std::string_view event, std::string detail, uint64_t duration_nanos);
  // Oldest first.
  std::vector<TraceEvent> Snapshot() const;
  const Clock* clock() const { return clock_; }

 private:
  const size_t capacity_;
  const Clock* const clock_;
  mutable Mutex mutex_;
  std::vector<TraceEvent> ring_ ABSL_GUARDED_BY(mutex_);
  size_t next_ ABSL_GUARDED_BY(mutex_) = 0;
};

// Records the time from construction to destruction. A null ring records nothing.
class TraceSpan {
 public:
  TraceSpan(TraceRing* ring, std::string_view event, std::string detail);
  ~TraceSpan();
  TraceSpan(const TraceSpan&) = delete;
  TraceSpan& operator=(const TraceSpan&) = delete;
  void AddDetail(std::string_view text);

 private:
  TraceRing* const ring_;
  std::string event_;
  std::string detail_;
  uint64_t start_ = 0;
};

}  // namespace holdfast
