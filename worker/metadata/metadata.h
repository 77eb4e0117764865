// Snapshot metadata in LevelDB: the only user of LevelDB. Typed rows, atomic synced batches, a schema
// version.
//
// Rows: snap/<key> -> SnapshotRow; id/next -> counter; meta/schema -> version. Values are JSON with a "v"
// field (readable with standard tools in an emergency; format and golden bytes in row_codec.h). References
// are derived from rows (parent), never counted. All rows are kept in memory too, so reads cost microseconds
// and go on while the disk is full. Thread safety: all methods; one writer at a time inside. Every write is
// synced before it returns (group commit). Errors: NotFound, AlreadyExists, FailedPrecondition as named;
// ResourceExhausted when the disk is full (nothing changed); DataLoss when the store is damaged (Open names
// the folder).
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "common/fault.h"
#include "common/loop_watch.h"
#include "common/status.h"

namespace holdfast::metadata {

enum class Kind : uint8_t { kActive, kView, kCommitted };
// "active", "view" or "committed", as containerd writes them.
const char* KindName(Kind kind);

struct SnapshotRow {
  std::string key;     // backend key, unique over all kinds
  std::string parent;  // backend key of a committed snapshot, or ""
  Kind kind = Kind::kActive;
  uint64_t id = 0;  // never reused; names snapshots/<id>
  int64_t created_wall_nanos = 0, updated_wall_nanos = 0;
  std::map<std::string, std::string> labels;
  uint64_t usage_bytes = 0, usage_inodes = 0;  // of committed ordinary snapshots
  // Of a layer served by FUSE; empty digest: an ordinary folder.
  std::string lazy_digest;  // sha256:...
  std::string lazy_image;   // reference to fetch from
  std::string lazy_index;   // SHA-256 of the LayerIndex
  uint64_t lazy_blob_size = 0;
  std::string lazy_tenant;     // whose credentials and fair share its fetches use
  std::string unknown_fields;  // JSON object of fields a newer build wrote; kept when the row is rewritten
};

// One atomic change: rows to write and keys to erase.
struct Batch {
  std::vector<SnapshotRow> put;
  std::vector<std::string> erase;
};

class MetadataStore {
 public:
  virtual ~MetadataStore() = default;  // closes; releases LevelDB's lock
  // `watch`: whether a batch is being written, in which an fsync may never return.
  // Waits for another process's lock at most `lock_wait_nanos` (a predecessor that is just ending).
  static absl::StatusOr<std::unique_ptr<MetadataStore>> Open(const std::string& folder,
                                                             uint64_t lock_wait_nanos,
                                                             FaultPoints* faults = nullptr,
                                                             LoopWatch* watch = nullptr);

  virtual std::optional<SnapshotRow> Get(const std::string& key) const = 0;
  virtual std::vector<SnapshotRow> All() const = 0;  // by key; one consistent view
  // The same without copies; a row is never changed in place.
  virtual std::vector<std::shared_ptr<const SnapshotRow>> Rows() const = 0;
  // Rows whose parent is `parent` (""; the rows without one), by key.
  virtual std::vector<std::shared_ptr<const SnapshotRow>> ChildrenOf(const std::string& parent) const = 0;
  virtual bool HasId(uint64_t id) const = 0;           // a row has it
  virtual absl::StatusOr<uint64_t> NextId() = 0;       // durable before it returns
  virtual absl::Status Apply(const Batch& batch) = 0;  // atomic, synced
};

}  // namespace holdfast::metadata
