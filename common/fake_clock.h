// For tests: a clock that stands still until told to advance. Thread-safe.
#pragma once

#include <atomic>

#include "common/clock.h"

namespace holdfast {

class FakeClock final : public Clock {
 public:
  uint64_t BootNanos() const override { return boot_nanos_; }
  int64_t WallNanos() const override {
    return 1'700'000'000'000'000'000 + static_cast<int64_t>(boot_nanos_.load());
  }
  void Advance(uint64_t nanos) { boot_nanos_ += nanos; }

 private:
  std::atomic<uint64_t> boot_nanos_{1'000'000'000};
};

}  // namespace holdfast
