#include "worker/layer/layer_index_format.h"

#include <sys/stat.h>

#include <bit>
#include <cstddef>
#include <cstring>

#include "common/crc32c.h"
#include "worker/layer/digest.h"

namespace holdfast::layer {
namespace {

static_assert(std::endian::native == std::endian::little, "the tables are used as they lie in the file");

// The offsets of the string section. Strings lie there in the order in which the tables mention them (names
// of children, link targets, xattrs, digests): the same tables always give the same bytes.
class StringPlaces {
 public:
  uint64_t Take(std::string_view text) {
    uint64_t offset = next_;
    next_ += text.size();
    return offset;
  }
  uint64_t end() const { return next_; }

 private:
  uint64_t next_ = 0;
};

template <typename Record>
void Append(const Record& record, std::string* bytes) {
  bytes->append(reinterpret_cast<const char*>(&record), sizeof(record));
}

// The section of `count` records that follows `before`.
IndexSection After(const IndexSection& before, uint64_t record_size, uint64_t count) {
  return {before.offset + before.count * record_size, count};
}

IndexHeader MakeHeader(const IndexTables& tables) {
  IndexHeader header{};
  std::memcpy(header.magic, kIndexMagic, sizeof(kIndexMagic));
  header.format_version = kIndexFormatVersion;
  header.numbering_version = kNumberingVersion;
  header.header_size = sizeof(IndexHeader);
  header.content_bytes = tables.content_bytes;
  header.blob_size = tables.info.blob_size;
  header.prefetch_end = tables.info.prefetch_end;
  for (const NodeRecord& node : tables.nodes) {
    if (S_ISREG(node.mode)) header.regular_files++;
    if ((node.flags & kNodeImplied) != 0) header.flags |= kIndexHasImpliedFolders;
    if ((node.flags & kNodeOpaque) != 0 || node.xattr_count > 0) header.flags |= kIndexHasXattrs;
  }
  header.nodes = {sizeof(IndexHeader), tables.nodes.size()};
  header.children = After(header.nodes, sizeof(NodeRecord), tables.children.size());
  header.chunks = After(header.children, sizeof(ChildRecord), tables.chunks.size());
  header.xattrs = After(header.chunks, sizeof(ChunkRecord), tables.xattrs.size());
  header.strings = After(header.xattrs, sizeof(XattrRecord), 0);
  return header;
}

// All tables and strings in file order. Large tables are freed as soon as they are written: an index of
// millions of nodes would otherwise be in memory twice.
void AppendTables(IndexTables* tables, std::string* bytes) {
  StringPlaces names, rest;
  for (const auto& child : tables->children) rest.Take(child.name);
  for (size_t i = 0; i < tables->nodes.size(); i++) {
    NodeRecord& node = tables->nodes[i];
    node.link_length = static_cast<uint32_t>(tables->links[i].size());
    node.link_offset = node.link_length == 0 ? 0 : rest.Take(tables->links[i]);
    Append(node, bytes);
  }
  tables->nodes = {};
  for (const auto& child : tables->children) {
    Append(ChildRecord{names.Take(child.name), static_cast<uint32_t>(child.name.size()), 0, child.nodeid},
           bytes);
  }
  for (const ChunkRecord& chunk : tables->chunks) Append(chunk, bytes);
  tables->chunks = {};
  for (const auto& [name, value] : tables->xattrs) {
    XattrRecord row{rest.Take(name), 0, static_cast<uint32_t>(name.size()),
                    static_cast<uint32_t>(value.size())};
    row.value_offset = rest.Take(value);
    Append(row, bytes);
  }
  for (const auto& child : tables->children) *bytes += child.name;
  for (std::string_view link : tables->links) *bytes += link;
  for (const auto& [name, value] : tables->xattrs) (*bytes += name) += value;
}

uint64_t StringBytes(const IndexTables& tables) {
  StringPlaces places;
  for (const auto& child : tables.children) places.Take(child.name);
  for (std::string_view link : tables.links) places.Take(link);
  for (const auto& [name, value] : tables.xattrs) places.Take(name), places.Take(value);
  return places.end();
}

}  // namespace

void SealIndex(std::string* bytes) {
  uint32_t crc = 0;
  std::memcpy(bytes->data() + offsetof(IndexHeader, crc), &crc, sizeof(crc));
  crc = Crc32c(bytes->data(), bytes->size());
  std::memcpy(bytes->data() + offsetof(IndexHeader, crc), &crc, sizeof(crc));
}

absl::StatusOr<BuiltIndex> SerializeIndex(IndexTables tables) {
  IndexHeader header = MakeHeader(tables);
  const IndexInfo info = tables.info;
  header.layer_digest = {StringBytes(tables), info.layer_digest.size()};
  header.toc_digest = {header.layer_digest.offset + header.layer_digest.length, info.toc_digest.size()};
  // The section ends aligned, so that file sizes are.
  header.strings.count = (header.toc_digest.offset + header.toc_digest.length + 7) / 8 * 8;
  header.file_size = header.strings.offset + header.strings.count;

  BuiltIndex built;
  built.bytes.reserve(header.file_size);
  Append(header, &built.bytes);
  AppendTables(&tables, &built.bytes);
  built.bytes += info.layer_digest;
  built.bytes += info.toc_digest;
  built.bytes.resize(header.file_size);
  SealIndex(&built.bytes);
  absl::StatusOr<IndexView> valid = ValidateIndex(built.bytes);
  if (!valid.ok())
    return Internal("built index is not valid: " + std::string(FromAbsl(valid.status().message())));
  built.sha256 = Sha256Hex(built.bytes);
  built.has_implied_folders = (header.flags & kIndexHasImpliedFolders) != 0;
  return built;
}

}  // namespace holdfast::layer
