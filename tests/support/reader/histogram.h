// Latencies in buckets of 1/16 of a power of two: percentiles within 6 %, the maximum exact.
#pragma once

#include <array>
#include <bit>
#include <cstdint>

namespace holdfast::reader {

class Histogram {
 public:
  void Add(uint64_t nanos) {
    buckets_[BucketOf(nanos)]++;
    count_++;
    if (nanos > max_) max_ = nanos;
  }
  void Merge(const Histogram& other) {
    for (size_t i = 0; i < buckets_.size(); i++) buckets_[i] += other.buckets_[i];
    count_ += other.count_;
    if (other.max_ > max_) max_ = other.max_;
  }
  uint64_t count() const { return count_; }
  uint64_t max() const { return max_; }
  // Upper edge of the bucket that holds the given share (0..1) of all values.
  uint64_t Percentile(double share) const {
    auto wanted = static_cast<uint64_t>(share * static_cast<double>(count_));
    uint64_t seen = 0;
    for (size_t i = 0; i < buckets_.size(); i++) {
      seen += buckets_[i];
      if (seen > wanted) return UpperEdge(i) < max_ ? UpperEdge(i) : max_;
    }
    return max_;
  }

 private:
  static size_t BucketOf(uint64_t value) {
    if (value < 16) return value;
    auto log = static_cast<unsigned>(std::bit_width(value)) - 1;  // >= 4
    return (log - 3) * 16 + ((value >> (log - 4)) & 15);
  }
  static uint64_t UpperEdge(size_t bucket) {
    if (bucket < 16) return bucket;
    size_t log = bucket / 16 + 3;
    return ((16 + bucket % 16 + 1) << (log - 4)) - 1;
  }

  std::array<uint64_t, 61 * 16 + 16> buckets_{};
  uint64_t count_ = 0;
  uint64_t max_ = 0;
};

}  // namespace holdfast::reader
