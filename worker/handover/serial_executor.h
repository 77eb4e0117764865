// Runs tasks one after the other on a thread of its own. Tasks posted before Open wait for it. Thread-safe.
#pragma once

#include <deque>
#include <functional>
#include <thread>

#include "common/mutex.h"

namespace holdfast::handover {

class SerialExecutor {
 public:
  SerialExecutor();
  // Finishes the task that runs; those not begun are destroyed unrun.
  ~SerialExecutor();
  SerialExecutor(const SerialExecutor&) = delete;
  SerialExecutor& operator=(const SerialExecutor&) = delete;

  void Open();
  void Post(std::function<void()> task);
  void Stop();  // as the destructor; idempotent

 private:
  void Run();

  Mutex mutex_;
  CondVar changed_;
  std::deque<std::function<void()>> tasks_ ABSL_GUARDED_BY(mutex_);
  bool open_ ABSL_GUARDED_BY(mutex_) = false;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace holdfast::handover
