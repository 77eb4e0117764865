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
    Origin& origin = origins_[start.origin];
    origin.demand.push_back({next_ticket_++, std::move(start)});
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

void FetchScheduler::Done(const std::string& origin, uint64_t bytes, bool prefetch) {
  {
    MutexLock lock(&mutex_);
    bytes_ -= bytes;
    if (prefetch) prefetch_running_--;
    auto it = origins_.find(origin);
    Origin& o = it->second;
    o.bytes -= bytes;
    o.running--;
    if (!prefetch) o.demand_running--;
    if (o.running == 0 && o.demand.empty()) origins_.erase(it);
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

std::vector<FetchScheduler::Start> FetchScheduler::Stop() {
  std::vector<Start> demand;
  std::deque<PrefetchJob> jobs;
  MutexLock lock(&mutex_);
  stopped_ = true;
  for (auto& [name, origin] : origins_) {
    for (Queued& queued : origin.demand) demand.push_back(std::move(queued.start));
    origin.demand.clear();
  }
  jobs.swap(jobs_);
  return demand;
}

void FetchScheduler::Pump() {
  while (PumpDemand()) {
  }
  while (PumpPrefetch()) {
  }
}

bool FetchScheduler::MayBegin(const Origin& origin) const {
  if (origin.demand.empty()) return false;
  if (origin.demand_running == 0) return bytes_ < 2 * max_bytes_;  // however large
  uint64_t bytes = origin.demand.front().start.bytes;
  uint64_t left_to_others = origin.bytes + bytes > max_bytes_ / 4 ? max_bytes_ / 4 : 0;
  return bytes_ + bytes + left_to_others <= max_bytes_;
}

bool FetchScheduler::PumpDemand() {
  Start start;
  {
    MutexLock lock(&mutex_);
    if (stopped_) return false;
    Origin* oldest = nullptr;
    for (auto& [name, origin] : origins_) {
      if (!MayBegin(origin)) continue;
      if (oldest == nullptr || origin.demand.front().ticket < oldest->demand.front().ticket) oldest = &origin;
    }
    if (oldest == nullptr) return false;
    start = std::move(oldest->demand.front().start);
    oldest->demand.pop_front();
    bytes_ += start.bytes;
    oldest->bytes += start.bytes;
    oldest->running++;
    oldest->demand_running++;
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
    Origin& origin = origins_[start->origin];
    origin.bytes += start->bytes;
    origin.running++;
    if (!stopped_) jobs_.push_front(std::move(job));
  }
  start->run();
  return true;
}

}  // namespace holdfast::layer
