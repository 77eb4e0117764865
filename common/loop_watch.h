// Who is at work, and since when: each loop of a process says when a turn begins and when it waits, so that a
// turn that never ends (a deadlock, a spin, an fsync that does not return) can be told from waiting, however
// long, for the network.
//
// A *loop* is a thread's loop or a kind of local work. It is at work from AtWork until Idle; what waits for
// somebody else (the network, the supervisor) is idle. Oldest() is the age of the one longest at work.
//
// Thread safety: all methods. AtWork and Idle are one clock reading and one atomic store. Ownership: a Loop
// may outlive neither its LoopWatch nor be used after it; ~Loop takes it off the list.
#pragma once

#include <atomic>
#include <cstdint>
#include <list>
#include <memory>
#include <string>

#include "common/clock.h"
#include "common/mutex.h"

namespace holdfast {

class LoopWatch {
 public:
  class Loop {
   public:
    Loop(LoopWatch* watch, std::string name);
    ~Loop();
    Loop(const Loop&) = delete;
    Loop& operator=(const Loop&) = delete;
    // Begins a turn; a turn under way begins anew.
    void AtWork();
    void Idle();

   private:
    friend class LoopWatch;
    LoopWatch* const watch_;
    const std::string name_;
    std::atomic<uint64_t> since_nanos_{0};  // 0: idle
    std::list<Loop*>::iterator place_;
  };

  // At work for the scope's time; a null loop is not watched.
  class Turn {
   public:
    explicit Turn(Loop* loop) : loop_(loop) {
      if (loop_ != nullptr) loop_->AtWork();
    }
    ~Turn() {
      if (loop_ != nullptr) loop_->Idle();
    }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

   private:
    Loop* const loop_;
  };

  // Idle for the scope's time, within a turn.
  class Pause {
   public:
    explicit Pause(Loop* loop) : loop_(loop) {
      if (loop_ != nullptr) loop_->Idle();
    }
    ~Pause() {
      if (loop_ != nullptr) loop_->AtWork();
    }
    Pause(const Pause&) = delete;
    Pause& operator=(const Pause&) = delete;

   private:
    Loop* const loop_;
  };

  explicit LoopWatch(const Clock* clock) : clock_(clock) {}

  struct Age {
    uint64_t nanos = 0;  // 0: nobody is at work
    std::string name;
  };
  Age Oldest() const;

  // Null when nobody watches.
  static std::unique_ptr<Loop> Add(LoopWatch* watch, std::string name) {
    return watch == nullptr ? nullptr : std::make_unique<Loop>(watch, std::move(name));
  }

 private:
  const Clock* const clock_;
  mutable Mutex mutex_;
  std::list<Loop*> loops_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace holdfast
