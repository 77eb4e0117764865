// Which request goes next. Demand before prefetch before background; within a priority the tenants take
// turns, so one with ten thousand queued requests delays another by one. Limits: in all and per host; what
// nobody waits for may not fill either, so a demand request always finds a connection free. Used by one
// thread.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <list>
#include <map>
#include <optional>
#include <string>

#include "worker/cache/blob_source.h"

namespace holdfast::fetch {

class TransferQueue {
 public:
  struct Item {
    uint64_t id = 0;
    cache::Priority priority = cache::Priority::kDemand;
    std::string tenant, host;
  };

  TransferQueue(int max_requests, int max_per_host);

  void Push(const Item& item);
  // Takes the next that may start now; it counts as running until Finish is called with it.
  std::optional<Item> Pop();
  void Finish(const Item& item);

  size_t queued() const { return queued_; }

 private:
  struct Lane {
    std::string tenant, host;
    std::deque<Item> items;
  };
  struct Running {
    int all = 0;       // of every priority
    int optional = 0;  // prefetch and background
    int background = 0;
  };
  // How many may run at once.
  struct Limits {
    explicit Limits(int limit);
    int all, optional, background;
  };
  static bool HasRoom(const Running& running, const Limits& limits, cache::Priority priority);
  static void Count(Running* running, cache::Priority priority, int by);

  const Limits total_limits_, host_limits_;
  std::array<std::list<Lane>, 3> lanes_;       // by priority; never empty lanes
  std::map<std::string, uint64_t> last_turn_;  // by tenant; of those with lanes
  uint64_t turn_ = 0;
  size_t queued_ = 0;
  Running total_;
  std::map<std::string, Running> hosts_;
};

}  // namespace holdfast::fetch
