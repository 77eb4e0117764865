#include "worker/handover/serial_executor.h"

#include <unistd.h>

#include <utility>

#include "common/urgency.h"

namespace holdfast::handover {

SerialExecutor::SerialExecutor() : thread_([this] { Run(); }) {}

SerialExecutor::~SerialExecutor() { Stop(); }

void SerialExecutor::Open() {
  MutexLock lock(&mutex_);
  open_ = true;
  changed_.SignalAll();
}

void SerialExecutor::Post(std::function<void()> task, Urgency urgency) {
  MutexLock lock(&mutex_);
  if (stopping_) return;
  tasks_.push_back({std::move(task), urgency});
  if (urgency == Urgency::kReadsWait) {
    reads_wait_++;
    if (thread_id_ != 0) MakeUrgent(thread_id_);
  }
  changed_.SignalAll();
}

void SerialExecutor::Stop() {
  std::deque<Task> unrun;
  {
    MutexLock lock(&mutex_);
    stopping_ = true;
    unrun.swap(tasks_);
    changed_.SignalAll();
  }
  if (thread_.joinable()) thread_.join();
}

void SerialExecutor::Run() {
  {
    MutexLock lock(&mutex_);
    thread_id_ = gettid();
    if (reads_wait_ > 0) MakeUrgent(thread_id_);
  }
  while (true) {
    Task task;
    {
      MutexLock lock(&mutex_);
      while (!stopping_ && (!open_ || tasks_.empty())) changed_.Wait(&mutex_);
      if (stopping_) return;
      task = std::move(tasks_.front());
      tasks_.pop_front();
    }
    task.run();
    MutexLock lock(&mutex_);
    if (task.urgency == Urgency::kReadsWait && --reads_wait_ == 0) LeaveUrgency();
  }
}

}  // namespace holdfast::handover
