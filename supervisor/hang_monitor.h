// Decides whether a worker that reads requests hangs (DESIGN 4.5, handover-pitfalls 18; table in README.md).
// Pure: the caller looks at ledger, descriptors and ping every half second and hands over what it saw.
//
// Every rule is "the same bad thing in every look for longer than its limit". A thing is told from the next
// one of its kind by a number the worker wrote (a request's time of receipt, a heartbeat), which is compared
// and nothing else. How long it lasts is counted here, in time that the worker could have used: what the
// supervisor or the machine slept through does not count, nor what the worker's cgroup was throttled for. So
// a slow registry is never a hang: a waiting READ occupies no slot and has a deadline of its own.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace holdfast::supervisor {

inline constexpr uint64_t kHangTickMillis = 500;

struct HangLimits {
  uint64_t limit_ns = 3'000'000'000;
  uint64_t overdue_ns = 2'000'000'000;    // a record past its own deadline
  uint64_t late_tick_ns = 1'500'000'000;  // a longer pause between two looks is not the worker's: begin anew
};

// A receive slot in which a request is being executed. All numbers are the worker's word.
struct ExecutingSlot {
  uint32_t index = 0, opcode = 0;
  uint64_t received_ns = 0, mount = 0;
};

struct HangSample {
  uint64_t now_ns = 0;  // CLOCK_BOOTTIME
  uint64_t received = 0;
  uint64_t heartbeat_ns = 0;  // 0: this build has none
  std::vector<ExecutingSlot> executing{};
  uint64_t overdue_deadline_ns = 0, overdue_mount = 0;  // the record longest past its deadline; 0: none
  std::vector<uint64_t> readable{};                     // mounts with a request that nobody has read
  std::vector<uint64_t> held_back{};                    // of them, those that are not read on purpose
  uint64_t ping = 0;                                    // number of the ping that has no answer yet; 0: none
  uint64_t loop_age_ns = 0;
  std::string loop{};         // of the last answer
  uint64_t throttled_ns = 0;  // of the worker's cgroup, ever
};

struct HangVerdict {
  std::string what;
  uint64_t age_ns = 0;
};

class HangMonitor {
 public:
  explicit HangMonitor(const HangLimits& limits) : limits_(limits) {}
  std::optional<HangVerdict> Tick(const HangSample& sample);

 private:
  enum class Rule { kSlot, kRecord, kHeartbeat, kPing, kLoop, kReadable };
  struct Since {
    uint64_t identity = 0, usable_ns = 0, tick = 0;
  };
  // How long (rule, which) has been seen in every look with the same identity.
  uint64_t Age(Rule rule, uint64_t which, uint64_t identity);
  void Advance(const HangSample& sample);

  const HangLimits limits_;
  uint64_t usable_ns_ = 0;  // the worker's time, since the first look
  uint64_t last_ns_ = 0, last_throttled_ns_ = 0, tick_ = 0;
  std::map<std::pair<Rule, uint64_t>, Since> seen_;
};

}  // namespace holdfast::supervisor
