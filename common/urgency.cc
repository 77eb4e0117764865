#include "common/urgency.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <unistd.h>

#include <filesystem>
#include <functional>
#include <string>
#include <system_error>

namespace holdfast {
namespace {

constexpr int kPriority = 1;
constexpr int kLoopPriority = 2;

constexpr int kInherited = SCHED_RR;  // what it makes is urgent, too
constexpr int kOwn = SCHED_RR | SCHED_RESET_ON_FORK;

// Of a thread; 0: the calling one.
bool Set(pid_t thread, int policy, int priority) {
  sched_param param{};
  param.sched_priority = priority;
  return sched_setscheduler(thread, policy, &param) == 0;
}

bool IsUrgentPolicy(int policy) { return policy == kInherited || policy == kOwn; }

// Of a thread of this process; 0: the calling one. Only the privileged may take the flag away; it does no
// harm.
void MakeOrdinary(pid_t thread) {
  const int policy = sched_getscheduler(thread);
  if (IsUrgentPolicy(policy)) Set(thread, SCHED_OTHER | (policy & SCHED_RESET_ON_FORK), 0);
}

absl::Status Refused(int error) { return ErrnoStatus(error, "real-time scheduling (SCHED_RR)"); }

void ForEachThread(const std::string& process, const std::function<void(pid_t)>& call) {
  std::error_code ignored;  // of threads that end meanwhile
  for (const auto& entry : std::filesystem::directory_iterator("/proc/" + process + "/task", ignored)) {
    call(static_cast<pid_t>(atoi(entry.path().filename().c_str())));
  }
}

void BecomeUrgentProcess() {
  ForEachThread("self", [](pid_t thread) {
    if (sched_getscheduler(thread) != kOwn) Set(thread, kInherited, kPriority);
  });
}

// Until a pass finds none: an urgent thread may make others while we look.
void EndUrgency(const std::string& process, pid_t except) {
  bool found = true;
  while (found) {
    found = false;
    ForEachThread(process, [&found, except](pid_t thread) {
      if (thread != except && sched_getscheduler(thread) == kInherited) found |= Set(thread, SCHED_OTHER, 0);
    });
  }
}

// The calling thread last: as an ordinary one it would have to wait for those that it is to stop.
void LeaveUrgencyProcess() {
  EndUrgency("self", gettid());
  LeaveUrgency();
}

}  // namespace

bool IsUrgent(pid_t thread) { return IsUrgentPolicy(sched_getscheduler(thread)); }

absl::Status BecomeUrgent() { return Set(0, kOwn, kLoopPriority) ? absl::OkStatus() : Refused(errno); }

void MakeUrgent(pid_t thread) { Set(thread, kOwn, kPriority); }

void LeaveUrgency() { MakeOrdinary(0); }

void UrgentThreads::Join() {
  MutexLock lock(&mutex_);
  threads_.push_back(gettid());
  if (end_nanos_ != 0) MakeUrgent(gettid());
}

void UrgentThreads::Begin(uint64_t end_nanos) {
  MutexLock lock(&mutex_);
  end_nanos_ = end_nanos;
  for (pid_t thread : threads_) MakeUrgent(thread);
}

void UrgentThreads::EndIf(uint64_t now_nanos) {
  bool one_of_them = false;
  {
    MutexLock lock(&mutex_);
    if (end_nanos_ == 0 || now_nanos < end_nanos_) return;  // it has begun anew, or another one was first
    end_nanos_ = 0;
    for (pid_t thread : threads_) {
      one_of_them |= thread == gettid();
      if (thread != gettid()) MakeOrdinary(thread);
    }
  }
  if (one_of_them) LeaveUrgency();  // last: as an ordinary one it would let those wait who want the lock
}

void EndUrgencyOf(pid_t process) { EndUrgency(std::to_string(process), 0); }

UrgentChildren::UrgentChildren() : policy_(sched_getscheduler(0)) {
  sched_param param{};
  sched_getparam(0, &param);
  priority_ = param.sched_priority;
  Set(0, kInherited, kPriority);
}

UrgentChildren::~UrgentChildren() { Set(0, policy_, priority_); }

UrgentTime::~UrgentTime() {
  EndIn(std::chrono::milliseconds(0));
  std::thread ending;
  {
    MutexLock lock(&mutex_);
    ending.swap(thread_);
  }
  if (ending.joinable()) ending.join();
}

absl::Status UrgentTime::Begin(std::chrono::milliseconds limit) {
  MutexLock lock(&mutex_);
  end_ = std::chrono::steady_clock::now() + limit;
  changed_.Signal();
  const bool started_so = sched_getscheduler(0) == kInherited;
  if (!started_so && !Set(0, kInherited, kPriority)) return Refused(errno);
  if (running_) return absl::OkStatus();
  if (thread_.joinable()) thread_.join();  // it has done its work, and takes no lock any more
  running_ = true;
  thread_ = std::thread([this, started_so] { Run(!started_so); });
  return absl::OkStatus();
}

void UrgentTime::EndIn(std::chrono::milliseconds time) {
  MutexLock lock(&mutex_);
  end_ = std::chrono::steady_clock::now() + time;
  changed_.Signal();
}

void UrgentTime::Run(bool all_threads) {
  if (all_threads) BecomeUrgentProcess();  // here: who begins it is in a hurry
  MutexLock lock(&mutex_);
  while (std::chrono::steady_clock::now() < end_)
    changed_.WaitUntil(&mutex_, std::chrono::steady_clock::time_point(end_));
  LeaveUrgencyProcess();
  running_ = false;
}

}  // namespace holdfast
