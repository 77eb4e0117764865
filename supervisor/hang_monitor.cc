#include "supervisor/hang_monitor.h"

#include <stdio.h>

#include <algorithm>

namespace holdfast::supervisor {
namespace {

std::string Seconds(uint64_t nanos) {
  char text[32];
  snprintf(text, sizeof(text), "%.1f s", static_cast<double>(nanos) / 1e9);
  return text;
}

std::string Number(uint64_t number) { return std::to_string(number); }

}  // namespace

std::optional<HangVerdict> HangMonitor::Tick(const HangSample& sample) {
  Advance(sample);
  std::optional<HangVerdict> verdict;
  auto judge = [&](uint64_t age, uint64_t limit, const std::string& what) {
    if (age > limit && !verdict) verdict = HangVerdict{what, age};
  };
  for (const ExecutingSlot& slot : sample.executing) {
    uint64_t age = Age(Rule::kSlot, slot.index, slot.received_ns);
    judge(age, limits_.limit_ns,
          "slot " + Number(slot.index) + " executing for " + Seconds(age) + ", mount " + Number(slot.mount) +
              ", opcode " + Number(slot.opcode));
  }
  if (sample.overdue_deadline_ns != 0) {
    uint64_t age = Age(Rule::kRecord, 0, sample.overdue_deadline_ns);
    judge(age, limits_.overdue_ns,
          "a READ of mount " + Number(sample.overdue_mount) + " unanswered " + Seconds(age) +
              " past its deadline");
  }
  // A young loop is a new loop. What it reports may hold time that does not count, hence the second
  // condition.
  if (sample.loop_age_ns > limits_.limit_ns / 3) {
    uint64_t age = Age(Rule::kLoop, 0, 0);
    if (sample.loop_age_ns > limits_.limit_ns)
      judge(age, limits_.limit_ns / 2,
            "loop " + sample.loop + " at one turn for " + Seconds(sample.loop_age_ns));
  }
  if (sample.heartbeat_ns != 0) {
    uint64_t age = Age(Rule::kHeartbeat, 0, sample.heartbeat_ns);
    judge(age, limits_.limit_ns, "no pool thread turned for " + Seconds(age));
  }
  if (sample.ping != 0) {
    uint64_t age = Age(Rule::kPing, 0, sample.ping);
    judge(age, limits_.limit_ns, "ping unanswered for " + Seconds(age));
  }
  for (uint64_t mount : sample.readable) {
    if (std::find(sample.held_back.begin(), sample.held_back.end(), mount) != sample.held_back.end())
      continue;
    uint64_t age = Age(Rule::kReadable, mount, sample.received);
    judge(age, limits_.limit_ns,
          "a request of mount " + Number(mount) + " unread for " + Seconds(age) + ", and no other was read");
  }
  std::erase_if(seen_, [this](const auto& entry) { return entry.second.tick != tick_; });
  return verdict;
}

void HangMonitor::Advance(const HangSample& sample) {
  uint64_t gap = sample.now_ns - last_ns_;
  uint64_t throttled = sample.throttled_ns - std::min(sample.throttled_ns, last_throttled_ns_);
  if (tick_ == 0 || gap > limits_.late_tick_ns) {
    seen_.clear();
  } else {
    // Never all of it: a worker that is throttled for ever (spinning, say) is noticed eight times later, not
    // never.
    usable_ns_ += gap - std::min(throttled, gap / 8 * 7);
  }
  last_ns_ = sample.now_ns;
  last_throttled_ns_ = sample.throttled_ns;
  ++tick_;
}

uint64_t HangMonitor::Age(Rule rule, uint64_t which, uint64_t identity) {
  auto [entry, is_new] = seen_.try_emplace({rule, which}, Since{identity, usable_ns_, tick_});
  Since& since = entry->second;
  if (since.identity != identity) since = {identity, usable_ns_, tick_};
  since.tick = tick_;
  return usable_ns_ - since.usable_ns;
}

}  // namespace holdfast::supervisor
