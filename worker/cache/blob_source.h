// Where a layer's compressed bytes come from. Declared here so that the layer and the cache do not know the
// network; worker/app plugs the registry client in.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "common/status.h"

namespace holdfast::cache {

enum class Priority : uint8_t {
  kDemand,      // an application waits
  kPrefetch,    // likely needed soon; never delays kDemand
  kBackground,  // completing layers; never delays the others
};

class BlobSource {
 public:
  virtual ~BlobSource() = default;
  // Fetches bytes [offset, offset + length) of the blob. Returns at once; `done` runs exactly once, on a
  // thread of the source, with exactly `length` bytes or an error: NotFound/PermissionDenied (final: 404,
  // 410, 403 after re-resolving, 401 after re-authenticating), Unavailable or DeadlineExceeded (the source
  // retried until `deadline_boot_nanos`), DataLoss (wrong length). Thread-safe. `done` may hold the last
  // reference to the source, so the source must bear being destroyed on the thread that runs it.
  virtual void Fetch(uint64_t offset, uint64_t length, Priority priority, uint64_t deadline_boot_nanos,
                     std::function<void(absl::StatusOr<std::string>)> done) = 0;
};

}  // namespace holdfast::cache
