// Runs tasks one after the other on a thread of its own. Tasks posted before Open wait for it. Thread-safe.
//
// While a task for which reads wait is posted or runs, the thread is urgent (common/urgency.h), whatever it
// is at: it has to come to that task.
#pragma once

#include <sys/types.h>

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

  enum class Urgency { kOrdinary, kReadsWait };

  void Open();
  void Post(std::function<void()> task, Urgency urgency = Urgency::kOrdinary);
  void Stop();  // as the destructor; idempotent

 private:
  struct Task {
    std::function<void()> run;
    Urgency urgency = Urgency::kOrdinary;
  };

  void Run();

  Mutex mutex_;
  CondVar changed_;
  std::deque<Task> tasks_ ABSL_GUARDED_BY(mutex_);
  int reads_wait_ ABSL_GUARDED_BY(mutex_) = 0;   // such tasks, the running one included
  pid_t thread_id_ ABSL_GUARDED_BY(mutex_) = 0;  // 0: not running yet
  bool open_ ABSL_GUARDED_BY(mutex_) = false;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace holdfast::handover
