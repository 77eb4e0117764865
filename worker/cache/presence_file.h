// The presence file of one layer: a header page that says whose content it describes, then one byte ("mark")
// a chunk. Mapped shared by every process that has the layer open.
//
// Marks, and what makes them change:
//   kMarkAbsent      the bytes are not there.
//   kMarkVerified    the bytes matched their digest under the header's vault id and boot id. Set after they
//                    were written or re-verified; trusted by every process of the same vault and boot.
//   kMarkUnverified  bytes were there once; they must match their digest again before they are used. Every
//                    kMarkVerified becomes this when the header names another vault id or another boot:
//                    after a power failure a mark may have reached the disk before its bytes, and one rule
//                    covers both cases.
// Any other value counts as kMarkUnverified.
//
// The header's identity (everything under the CRC) changes only under the layer folder's lock; marks and the
// hour of the last access change at any time, atomically, in any process.
//
// Format, version 1, little-endian: struct PresenceHeader at 0, marks from kPresenceHeaderBytes. All blocks
// of the file are allocated when it is made, so that setting a mark on a full disk cannot fault.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "common/status.h"
#include "worker/cache/content_store.h"

namespace holdfast::cache {

inline constexpr uint8_t kMarkAbsent = 0;
inline constexpr uint8_t kMarkVerified = 1;
inline constexpr uint8_t kMarkUnverified = 2;

inline constexpr uint64_t kPresenceHeaderBytes = 4096;
inline constexpr uint32_t kPresenceVersion = 1;

struct PresenceHeader {
  char magic[8];  // "HFPRES\0\0"
  uint32_t version;
  uint32_t header_bytes;  // kPresenceHeaderBytes
  char layer[64];         // hex of the content key (content_store.h)
  uint64_t chunk_count;
  uint64_t content_bytes;
  uint64_t generation;
  char vault_id[32];
  char boot_id[36];
  uint32_t crc;          // CRC-32C of all bytes before it
  uint64_t last_access;  // hours since 1970 in the low half, its complement in the high half; else unknown
};
static_assert(sizeof(PresenceHeader) == 184);

// What a presence file must be for, and under which ids its marks are trusted.
struct PresenceIdentity {
  std::string layer_hex;  // of the content key
  uint64_t chunk_count = 0;
  uint64_t content_bytes = 0;
  std::string vault_id;
  std::string boot_id;
};

uint64_t PackAccessHour(uint32_t hour);
uint32_t UnpackAccessHour(uint64_t packed);  // 0 = unknown

// The header inside a mapping made by MapPresence.
PresenceHeader* HeaderOf(const LayerContent::Files& files);

// Makes content.<generation> and presence.<generation> in `folder`; the presence file appears whole, by
// rename. ResourceExhausted when the disk is full.
absl::StatusOr<std::shared_ptr<LayerContent::Files>> CreateGeneration(const std::string& folder,
                                                                      uint64_t generation,
                                                                      const PresenceIdentity& identity,
                                                                      uint32_t access_hour);
// Opens an existing pair. DataLoss: not a sound pair of this identity (vault and boot aside). When the header
// names another vault or boot, its marks become kMarkUnverified and the header is rewritten;
// FailedPrecondition instead if not `may_renew`.
absl::StatusOr<std::shared_ptr<LayerContent::Files>> OpenGeneration(const std::string& folder,
                                                                    uint64_t generation,
                                                                    const PresenceIdentity& identity,
                                                                    bool may_renew);
// Files that hold nothing and store nothing, for a disk too full to hold even a presence file. generation =
// 0.
absl::StatusOr<std::shared_ptr<LayerContent::Files>> UnstoredGeneration(uint64_t chunk_count);

// The marks become kMarkUnverified, then the header names the vault and boot of `identity`. Under the
// folder's lock.
absl::Status RenewIdentity(const LayerContent::Files& files, const PresenceIdentity& identity);

// Every kMarkVerified becomes kMarkUnverified.
void DistrustMarks(const LayerContent::Files& files, uint64_t chunk_count);

}  // namespace holdfast::cache
