#include "worker/handover/serial_executor.h"

#include <utility>

namespace holdfast::handover {

SerialExecutor::SerialExecutor() : thread_([this] { Run(); }) {}

SerialExecutor::~SerialExecutor() { Stop(); }

void SerialExecutor::Open() {
  MutexLock lock(&mutex_);
  open_ = true;
  changed_.SignalAll();
}

void SerialExecutor::Post(std::function<void()> task) {
  MutexLock lock(&mutex_);
  if (stopping_) return;
  tasks_.push_back(std::move(task));
  changed_.SignalAll();
}

void SerialExecutor::Stop() {
  std::deque<std::function<void()>> unrun;
  {
    MutexLock lock(&mutex_);
    stopping_ = true;
    unrun.swap(tasks_);
    changed_.SignalAll();
  }
  if (thread_.joinable()) thread_.join();
}

void SerialExecutor::Run() {
  while (true) {
    std::function<void()> task;
    {
      MutexLock lock(&mutex_);
      while (!stopping_ && (!open_ || tasks_.empty())) changed_.Wait(&mutex_);
      if (stopping_) return;
      task = std::move(tasks_.front());
      tasks_.pop_front();
    }
    task();
  }
}

}  // namespace holdfast::handover
