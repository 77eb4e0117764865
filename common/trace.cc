#include "common/trace.h"

#include "glog/logging.h"

namespace holdfast {

void TraceRing::Record(std::string_view event, std::string detail, uint64_t duration_nanos) {
  VLOG(1) << "trace event=" << event << ' ' << detail << " us=" << duration_nanos / 1000;
  TraceEvent entry{clock_->WallNanos(), duration_nanos, std::string(event), std::move(detail)};
  MutexLock lock(&mutex_);
  if (ring_.size() < capacity_) {
    ring_.push_back(std::move(entry));
  } else {
    ring_[next_] = std::move(entry);
    next_ = (next_ + 1) % capacity_;
  }
}

std::vector<TraceEvent> TraceRing::Snapshot() const {
  MutexLock lock(&mutex_);
  std::vector<TraceEvent> result;
  result.reserve(ring_.size());
  for (size_t i = 0; i < ring_.size(); i++) result.push_back(ring_[(next_ + i) % ring_.size()]);
  return result;
}

TraceSpan::TraceSpan(TraceRing* ring, std::string_view event, std::string detail)
    : ring_(ring), event_(event), detail_(std::move(detail)) {
  if (ring_ != nullptr) start_ = ring_->clock()->BootNanos();
}

TraceSpan::~TraceSpan() {
  if (ring_ != nullptr) ring_->Record(event_, std::move(detail_), ring_->clock()->BootNanos() - start_);
}

void TraceSpan::AddDetail(std::string_view text) {
  detail_ += ' ';
  detail_ += text;
}

}  // namespace holdfast
