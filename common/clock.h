// Time as a constructor argument, so tests can move it.
#pragma once

#include <cstdint>

namespace holdfast {

class Clock {
 public:
  virtual ~Clock() = default;
  // CLOCK_BOOTTIME in nanoseconds: monotonic, counts suspend, the same in every process of one boot. Ledger
  // deadlines.
  virtual uint64_t BootNanos() const = 0;
  // Wall clock in nanoseconds since 1970.
  virtual int64_t WallNanos() const = 0;

  // The system's clock; lives for ever.
  static const Clock* Real();
};

}  // namespace holdfast
