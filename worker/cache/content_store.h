// Layer content on disk. Decompressed chunks lie packed in one sparse file a layer, in blob order, with a
// presence map beside it; the pair describes itself and survives every restart. No database, so reading needs
// none.
//
// Folder: <root>/<hex of the content key>/{content.<g>, presence.<g>}, g = store generation of the layer (a
// new one after an eviction; eviction unlinks whole files, so a reader in the middle of one keeps valid bytes
// through its descriptor).
//
// Files: presence_file.h. One byte a chunk says absent, verified or unverified; the header says under which
// vault id and in which boot "verified" is true. README.md tells how this survives kills, power failures and
// full disks.
//
// Invariants:
//  1. Presence never outlives data: the bytes are written before their mark is set, after a
//     power failure (another boot id) every mark must be verified again, and eviction removes presence before
//     content.
//  2. Two worker generations may store the same chunk at once: same bytes, same mark, no lock needed.
//  3. Only the metadata owner evicts (AllowEviction).
//  4. A mark says under which vault id (supervisor start) the bytes were verified. Content from an earlier
//  one, or from an
//     earlier boot, is re-verified before its first use: StateOf says kUnverified until MarkVerified or Drop.
//
// Thread safety: all methods. Errors: ResourceExhausted for a full disk or a reached limit (the caller serves
// the bytes without storing them). A damaged presence or content file is not an error: it is renamed to
// *.damaged (the last one is kept), counted, and the layer starts afresh. A layer can be opened on a full
// disk: it then stores nothing until there is room.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "common/clock.h"
#include "common/fault.h"
#include "common/io.h"
#include "common/status.h"

namespace holdfast::cache {

struct StoreOptions {
  std::string root;
  std::string vault_id;           // 32 hex digits
  uint64_t limit_bytes = 0;       // 0 = no limit
  uint64_t free_floor_bytes = 0;  // stop storing when the file system has less free than this
  std::string boot_id;            // empty: /proc/sys/kernel/random/boot_id
  const Clock* clock = Clock::Real();
  FaultPoints* faults = nullptr;  // cache.before_data, cache.before_mark
};

struct StoreStats {
  uint64_t bytes = 0;
  uint64_t limit_bytes = 0;
  uint64_t evicted_bytes = 0;
  uint64_t damaged_chunks = 0;
  uint64_t damaged_layers = 0;  // content or presence files set aside or found truncated
  uint64_t unstored_bytes = 0;  // of chunks that Put did not store
};

enum class ChunkState : uint8_t { kAbsent = 0, kUnverified = 1, kPresent = 2 };

// The content of one layer. Held by shared_ptr; an eviction replaces the files behind it (Data() then returns
// the new ones), and whoever still holds the old Data keeps reading valid bytes.
class LayerContent {
 public:
  // One store generation: the open files.
  struct Files {
    UniqueFd data;  // O_RDWR; chunk c lies at its store_offset
    UniqueFd presence;
    std::atomic<uint8_t>* marks = nullptr;  // mapped, one byte a chunk
    uint64_t mapped_bytes = 0;
    uint64_t generation = 0;
    ~Files();
  };

  virtual ~LayerContent() = default;
  virtual std::shared_ptr<const Files> files() const = 0;
  // State of a chunk in `files`. One atomic load; safe on the read path. The data file always has its full
  // length; one that was cut short behind our back is found by Put, Drop and Flush, which then make every
  // mark kUnverified. A reader that meets a short read calls Drop.
  virtual ChunkState StateOf(const Files& files, uint64_t chunk) const = 0;
  // Stores a verified chunk (data, then mark) in the current files. Counts toward the limit. After OK the
  // chunk may be gone again (evicted): ask StateOf with the files that you hold.
  virtual absl::Status Put(uint64_t chunk, uint64_t store_offset, std::string_view bytes) = 0;
  virtual void MarkVerified(const Files& files, uint64_t chunk) = 0;
  // The bytes on disk are wrong: forget the chunk (counted as damaged).
  virtual void Drop(const Files& files, uint64_t chunk, uint64_t size) = 0;
  // An application read from this layer. Kept at hour granularity, written in batches.
  virtual void Touch() = 0;
  virtual uint64_t bytes() const = 0;
  virtual int64_t last_access_wall_nanos() const = 0;
  // Another process evicted the layer: the files that are open here have no name any more, and keep their
  // space on the disk for as long as somebody holds them.
  virtual bool unlinked() const = 0;
};

class ContentStore {
 public:
  virtual ~ContentStore() = default;
  static absl::StatusOr<std::unique_ptr<ContentStore>> Open(const StoreOptions& options);

  // The same object for the same key while somebody holds it. `content_key` is "sha256:<hex>" and stands for
  // all that decides which bytes are right: the layer, the TOC they are verified against, the numbering of
  // the chunks. Marks are believed without hashing, so no two that differ in any of it may share a key.
  // `chunk_count` and `content_bytes` are checked against what is on disk: content of another shape is
  // dropped.
  virtual absl::StatusOr<std::shared_ptr<LayerContent>> OpenLayer(const std::string& content_key,
                                                                  uint64_t chunk_count,
                                                                  uint64_t content_bytes) = 0;
  // The same, but NotFound unless it is there already, sound and of this vault and boot: changes nothing.
  virtual absl::StatusOr<std::shared_ptr<LayerContent>> FindLayer(const std::string& content_key,
                                                                  uint64_t chunk_count,
                                                                  uint64_t content_bytes) = 0;
  // From now on this process may evict, or (after the return) no longer does. In Put: whole layers, those
  // nobody holds first, least recently read first, then held ones that were neither opened nor read for 60 s.
  // If that does not make room, Put returns ResourceExhausted.
  virtual void AllowEviction(bool allow) = 0;
  virtual StoreStats stats() const = 0;
  // What was stored before now is not to be believed: every mark becomes kUnverified, also in files that are
  // open, and marks count under `vault_id` (32 hex digits) from now on. Blocks on the disk. Errors: those of
  // single layers, the first one; their marks are distrusted all the same.
  virtual absl::Status SetVaultId(const std::string& vault_id) = 0;
  // How far this process may write. kTrusted: as described above. kOnTrial: chunks are stored as kUnverified
  // and no mark becomes verified, so what a worker stores that turns out to be bad is quarantined already.
  // kNone (a parked worker): Put stores nothing and says OK, as if the chunk had been evicted at once;
  // on return of SetWriting(kNone) no earlier Put is under way.
  enum class Writing { kTrusted, kOnTrial, kNone };
  virtual void SetWriting(Writing writing) = 0;
  // Makes stored content durable and writes access times (called every few seconds by the owner, and before
  // it parks).
  virtual void Flush() = 0;
};

}  // namespace holdfast::cache
