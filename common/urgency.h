// Real-time scheduling for the few milliseconds of a takeover. When a worker has died, everything that reads
// from its mounts waits; on a busy machine the supervisor that has to notice it and the successor that has to
// start would queue behind all other work, several times in a row (docs/adr/0005 has the figures). So both
// run in SCHED_RR at the lowest priorities, 1 and 2: before ordinary threads, behind every other real-time
// thread, and among themselves in turns, so that none starves the other. Priority 2 is of the two event loops
// that have to notice when a thread of priority 1 spins.
//
// Who is urgent: the supervisor's main thread and the thread on which a worker hears it, always; they do
// little. A worker's other threads from its exec (when nobody serves) or from being told to serve, until soon
// after it serves: UrgentTime ends it in any case. The thread that carries out a call for which reads wait,
// until that has returned. The threads that execute requests, while a swap is being prepared on the same
// processors.
//
// How it fails: the kernel refuses it without CAP_SYS_NICE, and in control groups that have no real-time
// budget (CONFIG_RT_GROUP_SCHED). Then everything goes on in ordinary threads, on a busy
// machine later. To give up urgency is never refused. A thread that spins in spite of all gets 95 % of a
// processor (kernel.sched_rt_runtime_us), until the turn of UrgentTime's thread comes. One that made itself
// urgent, or all of UrgentThreads at once, until the process is replaced because it hangs.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#include "common/mutex.h"
#include "common/status.h"

namespace holdfast {

// Whether a thread is, for whatever reason; 0: the calling one.
bool IsUrgent(pid_t thread = 0);

// Makes the calling thread urgent; the threads and processes that it makes are ordinary. It stays so until it
// leaves: what ends the urgency of a process leaves out threads that made themselves urgent.
absl::Status BecomeUrgent();

// The same for another thread of this process, as far as that is permitted. It may be at something else: that
// is then done sooner.
void MakeUrgent(pid_t thread);

// Makes the calling thread ordinary, and what it makes from now on.
void LeaveUrgency();

// Urgency of some threads of this process, for a limited time. Thread-safe; no call waits for anything.
class UrgentThreads {
 public:
  // The calling thread is one of them from now on, until it ends.
  void Join();
  // They are urgent on return, as far as that is permitted. In any clock. Called again, it begins anew.
  void Begin(uint64_t end_nanos);
  // It is that late. Each of them says so now and then, and the first one that finds the time over makes all
  // of them ordinary.
  void Passed(uint64_t now_nanos) {
    const uint64_t end = end_nanos_.load(std::memory_order_relaxed);
    if (end != 0 && now_nanos >= end) EndIf(now_nanos);
  }
  void End() { EndIf(UINT64_MAX); }

 private:
  void EndIf(uint64_t now_nanos);

  Mutex mutex_;
  std::vector<pid_t> threads_ ABSL_GUARDED_BY(mutex_);
  std::atomic<uint64_t> end_nanos_{0};  // 0: they are not; written under mutex_
};

// Makes all threads of another process ordinary, as far as that is permitted, except those that made
// themselves urgent.
void EndUrgencyOf(pid_t process);

// While it lives the calling thread is urgent, and so are processes and threads that it makes. Refused, it
// changes nothing.
class UrgentChildren {
 public:
  UrgentChildren();
  ~UrgentChildren();
  UrgentChildren(const UrgentChildren&) = delete;
  UrgentChildren& operator=(const UrgentChildren&) = delete;

 private:
  const int policy_;  // as it was
  int priority_ = 0;
};

// Urgency of this whole process, for a limited time: of its threads and what they make. It ends from a thread
// of its own that waits for nobody's lock or loop, so no fault elsewhere keeps it. Thread-safe.
class UrgentTime {
 public:
  UrgentTime() = default;
  ~UrgentTime();  // ends it
  UrgentTime(const UrgentTime&) = delete;
  UrgentTime& operator=(const UrgentTime&) = delete;

  // Ends it after `limit`. The calling thread, and what it makes, is urgent on return, the others soon. A
  // process that was started urgent is not made so again: threads that have left urgency stay ordinary.
  absl::Status Begin(std::chrono::milliseconds limit);
  // Ends it after `time`, which may be later or earlier than said before. Nothing if it has ended.
  void EndIn(std::chrono::milliseconds time);

 private:
  void Run(bool all_threads);

  Mutex mutex_;
  CondVar changed_;
  bool running_ ABSL_GUARDED_BY(mutex_) = false;
  std::chrono::steady_clock::time_point end_ ABSL_GUARDED_BY(mutex_);
  std::thread thread_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace holdfast
