// What earlier answers taught about a blob: its size, and where the registry redirects to. Bounded. Used by
// one thread.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>

#include "worker/fetch/registry_client.h"
#include "worker/fetch/url.h"

namespace holdfast::fetch {

class BlobTable {
 public:
  struct Entry {
    std::optional<uint64_t> size;
    std::optional<Url> target;  // ask there instead, without authorization
    uint64_t target_until = 0;  // BootNanos
    uint64_t last_use = 0;
  };

  static std::string Key(const BlobRef& blob) {
    return blob.image.host + "/" + blob.image.repository + "@" + blob.digest;
  }
  // Valid until the next call.
  Entry* Find(const BlobRef& blob, uint64_t now_nanos);
  void ForgetTarget(const BlobRef& blob);
  void Forget(const BlobRef& blob) { entries_.erase(Key(blob)); }
  size_t size() const { return entries_.size(); }

 private:
  std::map<std::string, Entry> entries_;
};

}  // namespace holdfast::fetch
