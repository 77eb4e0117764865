// admin.capnp as plain structs: what the worker's end fills in and holdfastctl shows. Units and meanings are
// the schema's.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace holdfast::admin {

struct LayerInfo {
  std::string digest, image, index_digest;
  uint64_t compressed_bytes = 0, content_bytes = 0, cached_bytes = 0, fetched_bytes = 0, touched_bytes = 0,
           files = 0;
  uint32_t mounts = 0;
  int64_t last_access_wall_nanos = 0;
  std::vector<std::string> folders;
};

struct SnapshotInfo {
  std::string key, parent, kind, lazy_digest, image;
  uint64_t id = 0;
  int64_t created_wall_nanos = 0;
};

struct WorkerStats {
  uint64_t fetch_requests = 0, fetch_bytes = 0, fetch_failures = 0, fetch_retries = 0, fetch_in_flight = 0;
  uint64_t cache_bytes = 0, cache_limit_bytes = 0, cache_evicted_bytes = 0, cache_damaged_chunks = 0,
           cache_unstored_bytes = 0;
};

}  // namespace holdfast::admin
