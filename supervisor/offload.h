// Work that may block (mount, umount, copying a binary), done on helper threads; the result comes back as a promise on the
// main loop. A job that never ends costs its thread, nothing else. Threads are made as needed, up to kMaxThreads, and never
// joined: the process leaves by _exit.
#pragma once

#include <kj/async.h>

#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <thread>
#include <utility>

#include "common/mutex.h"

namespace holdfast::supervisor {

class Offload {
 public:
  // Main thread only. `job` must not throw.
  template <typename T>
  kj::Promise<kj::Own<T>> Run(std::function<T()> job) {
    using Fulfiller = kj::CrossThreadPromiseFulfiller<kj::Own<T>>;
    auto pair = kj::newPromiseAndCrossThreadFulfiller<kj::Own<T>>();
    auto fulfiller = std::make_shared<kj::Own<Fulfiller>>(kj::mv(pair.fulfiller));
    Enqueue([job = std::move(job), fulfiller] { (*fulfiller)->fulfill(kj::heap<T>(job())); });
    return kj::mv(pair.promise);
  }

 private:
  static constexpr int kMaxThreads = 16;

  // Shared with the threads.
  struct Queue {
    Mutex mutex;
    CondVar added;
    std::deque<std::function<void()>> jobs ABSL_GUARDED_BY(mutex);
    int idle ABSL_GUARDED_BY(mutex) = 0;
    int threads ABSL_GUARDED_BY(mutex) = 0;
  };

  static void Work(const std::shared_ptr<Queue>& queue) {
    for (;;) {
      std::function<void()> job;
      {
        MutexLock lock(&queue->mutex);
        ++queue->idle;
        while (queue->jobs.empty()) queue->added.Wait(&queue->mutex);
        --queue->idle;
        job = std::move(queue->jobs.front());
        queue->jobs.pop_front();
      }
      job();
    }
  }

  void Enqueue(std::function<void()> job) {
    MutexLock lock(&queue_->mutex);
    queue_->jobs.push_back(std::move(job));
    if (static_cast<int>(queue_->jobs.size()) > queue_->idle && queue_->threads < kMaxThreads) {
      ++queue_->threads;
      std::thread(&Offload::Work, queue_).detach();
    }
    queue_->added.Signal();
  }

  const std::shared_ptr<Queue> queue_ = std::make_shared<Queue>();
};

}  // namespace holdfast::supervisor
