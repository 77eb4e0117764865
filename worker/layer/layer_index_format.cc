#include "worker/layer/layer_index_format.h"

#include <sys/stat.h>

#include <bit>
#include <cstddef>
#include <cstring>

#include "worker/layer/crc32c.h"
#include "worker/layer/digest.h"

namespace holdfast::layer {
namespace {

static_assert(std::endian::native == std::endian::little, "the tables are used as they lie in the file");

// Names, link targets, xattrs and digests, one after the other in the order in which the tables mention them: the same
// tables always give the same bytes.
class Strings {
 public:
  uint64_t Add(std::string_view text) {
    uint64_t offset = bytes_.size();
    bytes_ += text;
    return offset;
  }
  // The section ends aligned, so that file sizes are.
  void Pad() { bytes_.resize((bytes_.size() + 7) / 8 * 8); }
  const std::string& bytes() const { return bytes_; }

 private:
  std::string bytes_;
};

std::vector<ChildRecord> ChildRows(const IndexTables& tables, Strings* strings) {
  std::vector<ChildRecord> rows;
  rows.reserve(tables.children.size());
  for (const auto& child : tables.children) {
    rows.push_back({strings->Add(child.name), static_cast<uint32_t>(child.name.size()), 0, child.nodeid});
  }
  return rows;
}

std::vector<XattrRecord> XattrRows(const IndexTables& tables, Strings* strings, std::vector<NodeRecord>* nodes) {
  std::vector<XattrRecord> rows;
  for (size_t i = 0; i < nodes->size(); i++) {
    (*nodes)[i].first_xattr = rows.size();
    (*nodes)[i].xattr_count = static_cast<uint32_t>(tables.xattrs[i].size());
    for (const auto& [name, value] : tables.xattrs[i]) {
      uint64_t name_at = strings->Add(name), value_at = strings->Add(value);
      rows.push_back({name_at, value_at, static_cast<uint32_t>(name.size()), static_cast<uint32_t>(value.size())});
    }
  }
  return rows;
}

template <typename Record>
IndexSection Append(const std::vector<Record>& rows, std::string* bytes) {
  IndexSection section{bytes->size(), rows.size()};
  bytes->append(reinterpret_cast<const char*>(rows.data()), rows.size() * sizeof(Record));
  return section;
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
  for (size_t i = 0; i < tables.nodes.size(); i++) {
    const NodeRecord& node = tables.nodes[i];
    if (S_ISREG(node.mode)) header.regular_files++;
    if ((node.flags & kNodeImplied) != 0) header.flags |= kIndexHasImpliedFolders;
    if ((node.flags & kNodeOpaque) != 0 || !tables.xattrs[i].empty()) header.flags |= kIndexHasXattrs;
  }
  return header;
}

}  // namespace

void SealIndex(std::string* bytes) {
  uint32_t crc = 0;
  std::memcpy(bytes->data() + offsetof(IndexHeader, crc), &crc, sizeof(crc));
  crc = Crc32c(*bytes);
  std::memcpy(bytes->data() + offsetof(IndexHeader, crc), &crc, sizeof(crc));
}

absl::StatusOr<BuiltIndex> SerializeIndex(IndexTables tables) {
  Strings strings;
  IndexHeader header = MakeHeader(tables);
  std::vector<ChildRecord> children = ChildRows(tables, &strings);
  for (size_t i = 0; i < tables.nodes.size(); i++) {
    tables.nodes[i].link_offset = tables.links[i].empty() ? 0 : strings.Add(tables.links[i]);
    tables.nodes[i].link_length = static_cast<uint32_t>(tables.links[i].size());
  }
  std::vector<XattrRecord> xattrs = XattrRows(tables, &strings, &tables.nodes);
  header.layer_digest = {strings.Add(tables.info.layer_digest), tables.info.layer_digest.size()};
  header.toc_digest = {strings.Add(tables.info.toc_digest), tables.info.toc_digest.size()};
  strings.Pad();

  BuiltIndex built;
  built.bytes.reserve(sizeof(header) + tables.nodes.size() * sizeof(NodeRecord) +
                      children.size() * sizeof(ChildRecord) + tables.chunks.size() * sizeof(ChunkRecord) +
                      xattrs.size() * sizeof(XattrRecord) + strings.bytes().size());
  built.bytes.resize(sizeof(header));
  header.nodes = Append(tables.nodes, &built.bytes);
  header.children = Append(children, &built.bytes);
  header.chunks = Append(tables.chunks, &built.bytes);
  header.xattrs = Append(xattrs, &built.bytes);
  header.strings = {built.bytes.size(), strings.bytes().size()};
  built.bytes += strings.bytes();
  header.file_size = built.bytes.size();
  std::memcpy(built.bytes.data(), &header, sizeof(header));
  SealIndex(&built.bytes);
  absl::StatusOr<IndexView> valid = ValidateIndex(built.bytes);
  if (!valid.ok()) return Internal("built index is not valid: " + std::string(FromAbsl(valid.status().message())));
  built.sha256 = Sha256Hex(built.bytes);
  built.has_implied_folders = (header.flags & kIndexHasImpliedFolders) != 0;
  return built;
}

}  // namespace holdfast::layer
