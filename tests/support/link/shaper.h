// One direction of an emulated link: a bottleneck of a given rate with a tail-drop queue, then a fixed delay.
// Pure: the caller brings the time.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <string>

namespace holdfast::link {

class Shaper {
 public:
  // `queue_bytes`: what may wait at the bottleneck before packets are dropped.
  Shaper(uint64_t bits_per_second, uint64_t delay_nanos, uint64_t queue_bytes)
      : bits_per_second_(bits_per_second), delay_nanos_(delay_nanos), queue_bytes_(queue_bytes) {}

  // A packet arrives at `now`. False: dropped.
  bool Push(uint64_t now, std::string packet) {
    uint64_t start = free_at_ > now ? free_at_ : now;
    uint64_t waiting_bytes = (start - now) * bits_per_second_ / 8 / 1'000'000'000;
    if (waiting_bytes + packet.size() > queue_bytes_) {
      dropped_++;
      return false;
    }
    free_at_ = start + packet.size() * 8 * 1'000'000'000 / bits_per_second_;
    bytes_ += packet.size();
    queue_.push_back({free_at_ + delay_nanos_, std::move(packet)});
    return true;
  }

  // When the next packet is due; nullopt when none is under way.
  std::optional<uint64_t> NextDue() const {
    if (queue_.empty()) return std::nullopt;
    return queue_.front().due;
  }
  std::string Pop() {
    std::string packet = std::move(queue_.front().packet);
    queue_.pop_front();
    return packet;
  }
  uint64_t bytes() const { return bytes_; }
  uint64_t dropped() const { return dropped_; }

 private:
  struct Item {
    uint64_t due;
    std::string packet;
  };
  const uint64_t bits_per_second_, delay_nanos_, queue_bytes_;
  uint64_t free_at_ = 0, bytes_ = 0, dropped_ = 0;
  std::deque<Item> queue_;
};

}  // namespace holdfast::link
