// Functions to be run at a time. Used by one thread.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <utility>

namespace holdfast::fetch {

class TimerQueue {
 public:
  using Id = std::pair<uint64_t, uint64_t>;  // never {0, 0}

  Id Add(uint64_t at_nanos, std::function<void()> run) {
    const Id id{at_nanos, ++next_};
    timers_.emplace(id, std::move(run));
    return id;
  }
  void Cancel(const Id& id) { timers_.erase(id); }
  std::optional<uint64_t> NextAt() const {
    return timers_.empty() ? std::nullopt : std::optional(timers_.begin()->first.first);
  }
  void RunExpired(uint64_t now_nanos) {
    while (!timers_.empty() && timers_.begin()->first.first <= now_nanos) {
      auto timer = timers_.extract(timers_.begin());
      timer.mapped()();
    }
  }

 private:
  std::map<Id, std::function<void()>> timers_;
  uint64_t next_ = 0;
};

}  // namespace holdfast::fetch
