// The bytes of a LayerIndex file: header, tables, writer and validator. Internal to worker/layer; the records
// of the tables are in layer_index.h. Little-endian; all sections lie one after the other in the order of the
// header's members, without gaps, so every offset follows from the counts. Thread safety: pure functions.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "worker/layer/layer_index.h"

namespace holdfast::layer {

inline constexpr char kIndexMagic[8] = {'h', 'o', 'l', 'd', 'f', 'i', 'd', 'x'};
inline constexpr uint32_t kIndexFormatVersion = 1;

struct IndexSection {
  uint64_t offset;  // of the first record, from the start of the file
  uint64_t count;   // records; strings: bytes
};

struct IndexText {  // in the string section
  uint64_t offset;
  uint64_t length;
};

struct IndexHeader {
  char magic[8];
  uint32_t format_version;
  uint32_t numbering_version;
  uint32_t crc;  // CRC-32C of the whole file, this member taken as 0
  uint32_t header_size;
  uint64_t file_size;
  IndexSection nodes;
  IndexSection children;
  IndexSection chunks;
  IndexSection xattrs;
  IndexSection strings;
  uint64_t content_bytes;
  uint64_t regular_files;
  uint64_t blob_size;
  uint64_t prefetch_end;
  IndexText layer_digest;
  IndexText toc_digest;
  uint32_t flags;  // kIndexHas...
  uint32_t reserved;
};
inline constexpr uint32_t kIndexHasXattrs = 1;
inline constexpr uint32_t kIndexHasImpliedFolders = 2;

struct XattrRecord {
  uint64_t name_offset;
  uint64_t value_offset;
  uint32_t name_length;
  uint32_t value_length;
};

static_assert(sizeof(IndexHeader) == 184 && sizeof(NodeRecord) == 88 && sizeof(ChildRecord) == 24 &&
              sizeof(ChunkRecord) == 80 && sizeof(XattrRecord) == 24);

// What the index says, before it is laid out. Views point into memory that outlives it.
struct IndexTables {
  struct Child {
    std::string_view name;
    uint64_t nodeid;
  };
  using Xattr = std::pair<std::string_view, std::string_view>;

  std::vector<NodeRecord> nodes;        // complete but for link_offset and link_length
  std::vector<std::string_view> links;  // by node; empty: not a symlink
  std::vector<Xattr> xattrs;            // node after node, sorted by name within each
  std::vector<Child> children;          // folder after folder in nodeid order, sorted within each
  std::vector<ChunkRecord> chunks;
  uint64_t content_bytes = 0;
  IndexInfo info;
};

// Lays the tables out and validates the outcome: Internal if it would not open.
absl::StatusOr<BuiltIndex> SerializeIndex(IndexTables tables);

// A validated view of index bytes; the bytes are owned by somebody else and 8-byte aligned.
struct IndexView {
  const IndexHeader* header = nullptr;
  std::span<const NodeRecord> nodes;
  std::span<const ChildRecord> children;
  std::span<const ChunkRecord> chunks;
  std::span<const XattrRecord> xattrs;
  std::string_view strings;
};

// Everything that later accesses rely on is checked here: DataLoss names what is wrong.
absl::StatusOr<IndexView> ValidateIndex(std::string_view bytes);

// Sets the CRC of changed bytes, for tests that want the other checks to speak. `bytes` holds a whole header.
void SealIndex(std::string* bytes);

}  // namespace holdfast::layer
