// Keeps some of the requests that the kernel sent, for a candidate build to repeat: the last 512, in places
// that are shared out among the mounts and among kinds of requests, so that a busy mount does not push out
// the others and reads do not push out names.
//
// The hot path counts (one atomic word of the mount) and now and then copies at most 512 bytes; it allocates,
// hashes and waits for nothing. Thread safety: all methods.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

namespace holdfast::fuse {

enum class SampleLane : uint8_t { kNames, kReads, kListings, kOther };
inline constexpr uint32_t kSampleLanes = 4;

class Sampler {
 public:
  static constexpr uint32_t kEntries = 512;
  static constexpr uint32_t kRequestBytes = 512;

  // What the sampler knows of a mount; lies in the mount.
  struct Seen {
    std::atomic<uint32_t> requests[kSampleLanes] = {};
  };
  struct Kept {
    uint64_t mount_id = 0;
    uint64_t when = 0;
    std::string request;
  };

  Sampler();

  // Among how many the places are shared out.
  void SetMounts(size_t mounts);
  // A request was received. Requests that a candidate cannot repeat are not kept.
  void Offer(uint64_t mount_id, Seen& seen, uint32_t opcode, const uint8_t* request, uint32_t length,
             uint64_t when);
  // Copies of what is kept, in no order.
  std::vector<Kept> All() const;

  // False for a request that cannot be repeated.
  static bool LaneOf(uint32_t opcode, SampleLane* lane);

 private:
  struct Entry {      // zeros: empty. Pages that were never written cost nothing
    uint32_t locked;  // only ever tried, never waited for, by Offer
    uint32_t length;
    uint64_t mount_id;
    uint64_t when;
    uint8_t request[kRequestBytes];
  };
  struct Free {
    void operator()(Entry* entries) const { free(entries); }
  };

  const std::unique_ptr<Entry[], Free> entries_;
  std::atomic<uint32_t> lane_entries_{kEntries / kSampleLanes};  // of one mount
};

}  // namespace holdfast::fuse
