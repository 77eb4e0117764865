#include "worker/fuse/sampler.h"

#include <linux/fuse.h>

#include <algorithm>
#include <cstring>
#include <thread>

#include "glog/logging.h"
#include "worker/fuse/ledger_view.h"

namespace holdfast::fuse {
namespace {

constexpr uint32_t kFewest = 4;  // places of one mount in one lane; with many mounts they overlap
constexpr uint32_t kEvery = 61;  // of the requests after the first ones: a prime, so that no rhythm is missed

}  // namespace

Sampler::Sampler() : entries_(static_cast<Entry*>(calloc(kEntries, sizeof(Entry)))) {
  CHECK(entries_ != nullptr) << "out of memory";
}

void Sampler::SetMounts(size_t mounts) {
  auto share = static_cast<uint32_t>(kEntries / kSampleLanes / std::max<size_t>(1, mounts));
  lane_entries_.store(std::max(share, kFewest), std::memory_order_relaxed);
}

bool Sampler::LaneOf(uint32_t opcode, SampleLane* lane) {
  switch (opcode) {
    case FUSE_LOOKUP:
    case FUSE_GETATTR:
      *lane = SampleLane::kNames;
      return true;
    case FUSE_READ:
      *lane = SampleLane::kReads;
      return true;
    case FUSE_READDIR:
    case FUSE_READDIRPLUS:
      *lane = SampleLane::kListings;
      return true;
    case FUSE_READLINK:
    case FUSE_GETXATTR:
    case FUSE_LISTXATTR:
    case FUSE_STATFS:
      *lane = SampleLane::kOther;
      return true;
    default:
      return false;
  }
}

void Sampler::Offer(uint64_t mount_id, Seen& seen, uint32_t opcode, const uint8_t* request, uint32_t length,
                    uint64_t when) {
  SampleLane lane;
  if (length > kRequestBytes || !LaneOf(opcode, &lane)) return;
  auto lane_number = static_cast<uint32_t>(lane);
  uint32_t mine = lane_entries_.load(std::memory_order_relaxed);
  uint32_t n = seen.requests[lane_number].fetch_add(1, std::memory_order_relaxed);
  if (n >= mine) {
    if (n % kEvery != 0) return;
    n /= kEvery;
  }
  auto begin = static_cast<uint32_t>(mount_id * mine * kSampleLanes % kEntries);
  Entry& entry = entries_[(begin + lane_number * mine + n % mine) % kEntries];
  if (Shared(entry.locked).exchange(1, std::memory_order_acquire) != 0) return;
  entry.mount_id = mount_id;
  entry.when = when;
  entry.length = length;
  memcpy(entry.request, request, length);
  Shared(entry.locked).store(0, std::memory_order_release);
}

std::vector<Sampler::Kept> Sampler::All() const {
  std::vector<Kept> all;
  for (uint32_t i = 0; i < kEntries; i++) {
    Entry& entry = entries_[i];
    while (Shared(entry.locked).exchange(1, std::memory_order_acquire) != 0) std::this_thread::yield();
    if (entry.length > 0) {
      all.push_back({entry.mount_id, entry.when,
                     std::string(reinterpret_cast<const char*>(entry.request), entry.length)});
    }
    Shared(entry.locked).store(0, std::memory_order_release);
  }
  return all;
}

}  // namespace holdfast::fuse
