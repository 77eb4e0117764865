// The index of one layer: everything its file system says, names to chunks, in one read-only file that is
// mapped and served from directly. Built once from a TOC, written atomically, named by its SHA-256.
//
// nodeid = position of the node in this file + 1 (the root is 1). The kernel and the overlay of running
// containers keep nodeids across worker generations, so a mount is served from exactly the index whose digest
// it names, or answers EIO (docs/HANDOVER.md). The numbering is versioned: same TOC + same version + same
// parent attributes -> same bytes (golden test). Old numbering versions stay in the code.
//
// What becomes of a TOC here: later duplicates win, hard links share one node, missing parent folders are
// made
// ("implied"), `.wh.NAME` becomes a 0:0 character device NAME, `.wh..wh..opq` marks its folder opaque.
//
// Format (little-endian, 8-byte aligned sections, documented in docs/STORAGE.md): header {magic, format
// version, numbering version, section offsets and counts, CRC-32C}, nodes, child table (sorted by name bytes
// within a folder), chunks (in blob order: the chunk's position is its id in the content store), xattrs,
// string bytes.
//
// Thread safety: an open index is immutable; share it by std::shared_ptr<const LayerIndex>.
// Errors: Open validates every offset, count and order before it returns: DataLoss for anything wrong.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "common/status.h"
#include "worker/toc/toc.h"

namespace holdfast::layer {

inline constexpr uint32_t kNumberingVersion = 1;
inline constexpr uint64_t kRootNode = 1;

// One node as stored. `mode` holds the S_IF type bits too.
struct NodeRecord {
  uint32_t mode;
  uint32_t uid;
  uint32_t gid;
  uint32_t nlink;
  uint64_t size;
  int64_t mtime_seconds;
  uint32_t mtime_nanos;
  uint32_t rdev;         // makedev(major, minor) as the kernel encodes it in fuse_attr (32 bit)
  uint64_t parent;       // nodeid of (one of) its folders; the root's is itself
  uint64_t first;        // folder: first row in the child table; file: first chunk in FileChunkRecords
  uint32_t count;        // rows or chunks
  uint32_t flags;        // kNodeImplied, kNodeOpaque
  uint64_t first_xattr;  // row in the xattr table
  uint32_t xattr_count;
  uint32_t link_length;  // symlink target
  uint64_t link_offset;  // in the string section
};
inline constexpr uint32_t kNodeImplied = 1;  // the TOC has no entry of its own for this folder
inline constexpr uint32_t kNodeOpaque = 2;

struct ChildRecord {
  uint64_t name_offset;
  uint32_t name_length;
  uint32_t reserved;
  uint64_t nodeid;
};

struct ChunkRecord {
  uint64_t file_offset;
  uint64_t size;  // uncompressed
  uint64_t blob_offset;
  uint64_t blob_end;
  uint64_t inner_offset;
  uint64_t store_offset;  // where its bytes lie in the layer's content file (worker/cache)
  uint8_t digest[32];
};

struct Attributes {      // of a folder in a layer below, for implied folders
  uint32_t mode = 0755;  // permission bits
  uint32_t uid = 0, gid = 0;
  int64_t mtime_seconds = 0;
  uint32_t mtime_nanos = 0;
  std::vector<std::pair<std::string, std::string>> xattrs;
};

// Asks the layers below for a folder ("a/b", relative). nullopt: none of them has it.
using ParentAttributes = std::function<std::optional<Attributes>(const std::string& path)>;

struct IndexInfo {
  std::string layer_digest;  // sha256:... of the compressed blob
  uint64_t blob_size = 0;
  std::string toc_digest;     // sha256:... of the TOC JSON
  uint64_t prefetch_end = 0;  // from the TOC's landmark
};

struct BuiltIndex {
  std::string bytes;
  std::string sha256;  // lower-case hex of `bytes`; the file is stored under this name
  bool has_implied_folders =
      false;  // bound to its parent chain: build again with ParentAttributes at mount time
};

// Implied folders with nothing below get mode 0755, owner 0:0, mtime 0.
absl::StatusOr<BuiltIndex> BuildLayerIndex(const toc::Toc& toc, const IndexInfo& info,
                                           const ParentAttributes& parent_attributes);

// The same layer with the attributes of its implied folders taken from below: a derived index. Nodes keep
// their ids.
class LayerIndex;
absl::StatusOr<BuiltIndex> BindImpliedFolders(const LayerIndex& base,
                                              const ParentAttributes& parent_attributes);

// Stores an index as <folder>/<sha256>.idx, whole or not at all; nothing is written if it is there already.
absl::Status WriteIndexFile(const std::string& folder, const BuiltIndex& index);

class LayerIndex {
 public:
  virtual ~LayerIndex() = default;

  // Maps `path`, checks that its SHA-256 is `expected_sha256` (empty: not checked; a successor that takes
  // over a mount passes empty for speed when the file was verified under the same vault id) and validates it.
  static absl::StatusOr<std::shared_ptr<const LayerIndex>> Open(const std::string& path,
                                                                const std::string& expected_sha256);

  // The same over bytes in memory (BuiltIndex::bytes); the digest is not checked.
  static absl::StatusOr<std::shared_ptr<const LayerIndex>> FromBytes(std::string bytes);

  virtual const IndexInfo& info() const = 0;
  virtual uint32_t numbering_version() const = 0;
  virtual uint64_t node_count() const = 0;
  virtual uint64_t regular_files() const = 0;
  virtual uint64_t content_bytes() const = 0;  // size of the content file: the end of the last chunk in it
  virtual uint64_t chunk_count() const = 0;
  virtual bool has_xattrs() const = 0;  // any node with an xattr or an opaque mark
  virtual bool has_implied_folders() const = 0;

  // nullptr for an id out of range.
  virtual const NodeRecord* node(uint64_t nodeid) const = 0;
  // 0 when the folder has no such name.
  virtual uint64_t Lookup(uint64_t folder, std::string_view name) const = 0;
  virtual uint64_t LookupPath(std::string_view path) const = 0;  // "" is the root; 0 = none
  // Children in readdir order (position = cookie).
  virtual std::span<const ChildRecord> children(uint64_t folder) const = 0;
  virtual std::string_view name(const ChildRecord& child) const = 0;
  virtual std::string_view link_target(const NodeRecord& node) const = 0;
  // (name, value) pairs; the opaque mark is not among them.
  virtual std::vector<std::pair<std::string_view, std::string_view>> xattrs(const NodeRecord& node) const = 0;

  // Chunks of all files in blob order: position = chunk id in the content store. A file's chunks are
  // contiguous ids in file order only if first/count of its node say so: node.first is the first id, ids run
  // node.first .. +count.
  virtual std::span<const ChunkRecord> chunks() const = 0;
  // The chunk of a regular file that holds `offset`; chunks() position. node must be a regular file, offset <
  // size.
  virtual uint64_t ChunkAt(const NodeRecord& node, uint64_t offset) const = 0;
};

}  // namespace holdfast::layer
