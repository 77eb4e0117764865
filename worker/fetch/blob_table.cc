#include "worker/fetch/blob_table.h"

#include <algorithm>

namespace holdfast::fetch {
namespace {
constexpr size_t kMaxEntries = 4096;
}

BlobTable::Entry* BlobTable::Find(const BlobRef& blob, uint64_t now_nanos) {
  const std::string key = Key(blob);
  if (entries_.size() >= kMaxEntries && entries_.find(key) == entries_.end()) {
    entries_.erase(std::min_element(entries_.begin(), entries_.end(), [](const auto& a, const auto& b) {
      return a.second.last_use < b.second.last_use;
    }));
  }
  Entry& entry = entries_[key];
  entry.last_use = now_nanos;
  if (entry.target && now_nanos >= entry.target_until) entry.target.reset();
  return &entry;
}

void BlobTable::ForgetTarget(const BlobRef& blob) {
  const auto it = entries_.find(Key(blob));
  if (it != entries_.end()) it->second.target.reset();
}

}  // namespace holdfast::fetch
