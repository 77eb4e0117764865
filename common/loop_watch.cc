#include "common/loop_watch.h"

#include <utility>

namespace holdfast {

LoopWatch::Loop::Loop(LoopWatch* watch, std::string name) : watch_(watch), name_(std::move(name)) {
  MutexLock lock(&watch_->mutex_);
  place_ = watch_->loops_.insert(watch_->loops_.end(), this);
}

LoopWatch::Loop::~Loop() {
  MutexLock lock(&watch_->mutex_);
  watch_->loops_.erase(place_);
}

void LoopWatch::Loop::AtWork() { since_nanos_.store(watch_->clock_->BootNanos(), std::memory_order_relaxed); }

void LoopWatch::Loop::Idle() { since_nanos_.store(0, std::memory_order_relaxed); }

LoopWatch::Age LoopWatch::Oldest() const {
  Age oldest;
  MutexLock lock(&mutex_);
  const uint64_t now = clock_->BootNanos();
  for (const Loop* loop : loops_) {
    const uint64_t since = loop->since_nanos_.load(std::memory_order_relaxed);
    if (since == 0 || since >= now || now - since <= oldest.nanos) continue;
    oldest = {now - since, loop->name_};
  }
  return oldest;
}

}  // namespace holdfast
