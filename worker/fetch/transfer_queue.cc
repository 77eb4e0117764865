#include "worker/fetch/transfer_queue.h"

#include <algorithm>

namespace holdfast::fetch {

using cache::Priority;

TransferQueue::Limits::Limits(int limit)
    : all(std::max(limit, 1)),
      optional(std::max(all - std::max(all / 4, 1), 1)),
      background(std::max(all / 2, 1)) {}

TransferQueue::TransferQueue(int max_requests, int max_per_host)
    : total_limits_(max_requests), host_limits_(max_per_host) {}

bool TransferQueue::HasRoom(const Running& running, const Limits& limits, Priority priority) {
  if (running.all >= limits.all) return false;
  if (priority != Priority::kDemand && running.optional >= limits.optional) return false;
  return priority != Priority::kBackground || running.background < limits.background;
}

void TransferQueue::Count(Running* running, Priority priority, int by) {
  running->all += by;
  if (priority != Priority::kDemand) running->optional += by;
  if (priority == Priority::kBackground) running->background += by;
}

void TransferQueue::Push(const Item& item) {
  std::list<Lane>& lanes = lanes_[static_cast<size_t>(item.priority)];
  auto lane = std::find_if(lanes.begin(), lanes.end(),
                           [&](const Lane& l) { return l.tenant == item.tenant && l.host == item.host; });
  if (lane == lanes.end()) lane = lanes.insert(lanes.end(), Lane{item.tenant, item.host, {}});
  lane->items.push_back(item);
  queued_++;
}

std::optional<TransferQueue::Item> TransferQueue::Pop() {
  for (std::list<Lane>& lanes : lanes_) {
    auto best = lanes.end();
    uint64_t best_turn = 0;
    for (auto lane = lanes.begin(); lane != lanes.end(); ++lane) {
      const Priority priority = lane->items.front().priority;
      if (!HasRoom(total_, total_limits_, priority) || !HasRoom(hosts_[lane->host], host_limits_, priority))
        continue;
      const auto seen = last_turn_.find(lane->tenant);
      const uint64_t turn = seen == last_turn_.end() ? 0 : seen->second;
      if (best == lanes.end() || turn < best_turn) {
        best = lane;
        best_turn = turn;
      }
    }
    if (best == lanes.end()) continue;
    Item item = std::move(best->items.front());
    best->items.pop_front();
    // A tenant's lanes of several hosts take turns too: a served lane goes to the end.
    if (best->items.empty()) {
      lanes.erase(best);
    } else {
      lanes.splice(lanes.end(), lanes, best);
    }
    last_turn_[item.tenant] = ++turn_;
    Count(&total_, item.priority, 1);
    Count(&hosts_[item.host], item.priority, 1);
    if (--queued_ == 0) last_turn_.clear();
    return item;
  }
  return std::nullopt;
}

void TransferQueue::Finish(const Item& item) {
  Count(&total_, item.priority, -1);
  const auto host = hosts_.find(item.host);
  Count(&host->second, item.priority, -1);
  if (host->second.all == 0) hosts_.erase(host);
}

}  // namespace holdfast::fetch
