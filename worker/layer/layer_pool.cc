#include "worker/layer/layer_pool.h"

#include <algorithm>
#include <chrono>
#include <utility>

namespace holdfast::layer {

CompletionPool::CompletionPool(int threads, const Clock* clock, LoopWatch* watch) : clock_(clock) {
  for (int i = 0; i < std::max(1, threads); i++) {
    loops_.push_back(LoopWatch::Add(watch, "layer"));
    threads_.emplace_back([this, loop = loops_.back().get()] { Work(loop); });
  }
  threads_.emplace_back([this] { WatchDeadlines(); });
}

void CompletionPool::Post(std::function<void()> task) {
  // A task refused by a stopped pool is destroyed here, outside the lock.
  MutexLock lock(&mutex_);
  if (stopping_) return;
  tasks_.push_back(std::move(task));
  work_.Signal();
}

CompletionPool::TimerId CompletionPool::AddDeadline(uint64_t boot_nanos, std::weak_ptr<Expiring> object) {
  MutexLock lock(&mutex_);
  TimerId id{boot_nanos, next_id_++};
  auto it = timers_.emplace(id, std::move(object)).first;
  if (it == timers_.begin()) timers_changed_.Signal();
  return id;
}

void CompletionPool::RemoveDeadline(const TimerId& id) {
  MutexLock lock(&mutex_);
  timers_.erase(id);
}

void CompletionPool::Work(LoopWatch::Loop* loop) {
  for (;;) {
    std::function<void()> task;
    {
      MutexLock lock(&mutex_);
      while (tasks_.empty() && !stopping_) work_.Wait(&mutex_);
      if (stopping_) return;
      task = std::move(tasks_.front());
      tasks_.pop_front();
    }
    LoopWatch::Turn turn(loop);
    task();
  }
}

void CompletionPool::WatchDeadlines() {
  MutexLock lock(&mutex_);
  while (!stopping_) {
    if (timers_.empty()) {
      timers_changed_.Wait(&mutex_);
      continue;
    }
    auto first = timers_.begin();
    uint64_t now = clock_->BootNanos();
    if (first->first.first > now) {
      uint64_t nanos = std::min<uint64_t>(first->first.first - now, 3'600'000'000'000);
      timers_changed_.WaitUntil(&mutex_, std::chrono::steady_clock::now() + std::chrono::nanoseconds(nanos));
      continue;
    }
    std::weak_ptr<Expiring> object = std::move(first->second);
    timers_.erase(first);
    tasks_.push_back([object = std::move(object)] {
      if (auto alive = object.lock()) alive->Expire();
    });
    work_.Signal();
  }
}

void CompletionPool::Stop() {
  {
    MutexLock lock(&mutex_);
    if (stopping_) return;
    stopping_ = true;
    work_.SignalAll();
    timers_changed_.SignalAll();
  }
  for (std::thread& thread : threads_) thread.join();
  loops_.clear();
  std::deque<std::function<void()>> tasks;
  std::map<TimerId, std::weak_ptr<Expiring>> timers;
  {
    MutexLock lock(&mutex_);
    tasks.swap(tasks_);
    timers.swap(timers_);
  }
  for (auto& [id, object] : timers) {
    if (auto alive = object.lock()) alive->Cancel();
  }
}

}  // namespace holdfast::layer
