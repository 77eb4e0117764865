#include "worker/layer/layer_scheduler.h"

#include <utility>

namespace holdfast::layer {
namespace {

// Enough to keep a link busy across a round trip, few enough that what is demanded next shares it with
// little.
constexpr int kPrefetchRunning = 2;
constexpr size_t kMaxJobs = 4096;

}  // namespace

void FetchScheduler::Demand(Start start) {
  {
    MutexLock lock(&mutex_);
    if (stopped_) return;
    demand_.push_back(std::move(start));
  }
  Pump();
}

void FetchScheduler::Prefetch(PrefetchJob job, bool soon) {
  {
    MutexLock lock(&mutex_);
    if (stopped_ || jobs_.size() >= kMaxJobs) return;
    if (soon) {
      jobs_.push_front(std::move(job));
    } else {
      jobs_.push_back(std::move(job));
    }
  }
  Pump();
}

void FetchScheduler::Done(uint64_t bytes, bool prefetch) {
  {
    MutexLock lock(&mutex_);
    bytes_ -= bytes;
    (prefetch ? prefetch_running_ : demand_running_)--;
  }
  Pump();
}

void FetchScheduler::Pause(bool paused) {
  {
    MutexLock lock(&mutex_);
    paused_ = paused;
  }
  Pump();
}

void FetchScheduler::Stop() {
  std::deque<Start> demand;
  std::deque<PrefetchJob> jobs;
  MutexLock lock(&mutex_);
  stopped_ = true;
  demand.swap(demand_);
  jobs.swap(jobs_);
}

void FetchScheduler::Pump() {
  while (PumpDemand()) {
  }
  while (PumpPrefetch()) {
  }
}

bool FetchScheduler::PumpDemand() {
  Start start;
  {
    MutexLock lock(&mutex_);
    if (stopped_ || demand_.empty()) return false;
    // One may always run, however large.
    if (demand_running_ > 0 && bytes_ + demand_.front().bytes > max_bytes_) return false;
    start = std::move(demand_.front());
    demand_.pop_front();
    bytes_ += start.bytes;
    demand_running_++;
  }
  start.run();
  return true;
}

bool FetchScheduler::PumpPrefetch() {
  PrefetchJob job;
  {
    MutexLock lock(&mutex_);
    if (stopped_ || paused_ || jobs_.empty() || prefetch_running_ >= kPrefetchRunning) return false;
    // The other half is for what applications wait for.
    if (bytes_ >= max_bytes_ / 2) return false;
    job = std::move(jobs_.front());
    jobs_.pop_front();
    prefetch_running_++;
  }
  std::optional<Start> start = job();
  {
    MutexLock lock(&mutex_);
    if (!start.has_value()) {
      prefetch_running_--;
      return true;
    }
    bytes_ += start->bytes;
    if (!stopped_) jobs_.push_front(std::move(job));
  }
  start->run();
  return true;
}

}  // namespace holdfast::layer
