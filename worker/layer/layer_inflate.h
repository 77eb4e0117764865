// Takes chunks out of a gzip member. Pure functions over bytes that come from outside.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>

#include "common/status.h"

namespace holdfast::layer {

struct WantedRange {
  uint64_t inner_offset = 0;  // in the uncompressed bytes
  uint64_t size = 0;
};

// Inflates the gzip member(s) that `compressed` begins with, in one pass and only as far as needed, and calls
// `deliver(position in wanted, bytes)` for each range once it is complete. `wanted` is sorted by
// inner_offset. Memory: the ranges that overlap, no more. DataLoss when the stream is broken or ends early;
// what was delivered before stays delivered.
absl::Status InflateRanges(std::string_view compressed, std::span<const WantedRange> wanted,
                           const std::function<void(size_t, std::string)>& deliver);

}  // namespace holdfast::layer
