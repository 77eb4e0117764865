// Checks of index bytes. An index may have been damaged or written by anybody: after ValidateIndex no access
// through the tables can leave them, whatever the bytes are. One pass a table; 100,000 nodes take a few
// milliseconds.
#include <sys/stat.h>

#include <cstring>

#include "common/crc32c.h"
#include "worker/layer/layer_index_format.h"

namespace holdfast::layer {
namespace {

constexpr uint64_t kMaxNameBytes = 255;
constexpr uint64_t kMaxLinkBytes = 4095;
constexpr uint64_t kMaxXattrValueBytes = 65536;
constexpr uint64_t kMaxOffset = 1ull << 62;  // of anything, so that sums cannot overflow
constexpr uint32_t kNanosPerSecond = 1'000'000'000;

absl::Status Bad(std::string_view what) { return DataLoss("index: " + std::string(what)); }
absl::Status BadNode(size_t position, std::string_view what) {
  return Bad("node " + std::to_string(position + 1) + ": " + std::string(what));
}

class Validator {
 public:
  explicit Validator(std::string_view bytes) : bytes_(bytes) {}

  absl::StatusOr<IndexView> Run() {
    HF_RETURN_IF_ERROR(Header());
    HF_RETURN_IF_ERROR(Sections());
    HF_RETURN_IF_ERROR(Nodes());
    HF_RETURN_IF_ERROR(Children());
    HF_RETURN_IF_ERROR(Chunks());
    HF_RETURN_IF_ERROR(Xattrs());
    return view_;
  }

 private:
  absl::Status Header() {
    if (bytes_.size() < sizeof(IndexHeader)) return Bad("shorter than its header");
    if (reinterpret_cast<uintptr_t>(bytes_.data()) % 8 != 0) return Internal("index bytes are not aligned");
    header_ = reinterpret_cast<const IndexHeader*>(bytes_.data());
    if (std::memcmp(header_->magic, kIndexMagic, sizeof(kIndexMagic)) != 0)
      return Bad("not a holdfast index");
    if (header_->format_version != kIndexFormatVersion) {
      return Bad("format version " + std::to_string(header_->format_version) + " is not known to this build");
    }
    if (header_->numbering_version != kNumberingVersion) {
      return Bad("numbering version " + std::to_string(header_->numbering_version) +
                 " is not known to this build");
    }
    if (header_->header_size != sizeof(IndexHeader) || header_->file_size != bytes_.size()) {
      return Bad("its size is not what its header says");
    }
    IndexHeader blank = *header_;
    blank.crc = 0;
    uint32_t crc = Crc32c(&blank, sizeof(blank));
    crc = Crc32c(bytes_.data() + sizeof(blank), bytes_.size() - sizeof(blank), crc);
    if (crc != header_->crc) return Bad("its checksum is wrong");
    if (header_->content_bytes > kMaxOffset || header_->blob_size > kMaxOffset) return Bad("absurd sizes");
    if (header_->prefetch_end > header_->blob_size) return Bad("its prefetch range leaves the blob");
    if (header_->flags > (kIndexHasXattrs | kIndexHasImpliedFolders) || header_->reserved != 0) {
      return Bad("unknown header flags");
    }
    view_.header = header_;
    return absl::OkStatus();
  }

  template <typename Record>
  bool Table(const IndexSection& section, std::span<const Record>* table) {
    if (section.offset != next_section_ || section.count > (bytes_.size() - next_section_) / sizeof(Record))
      return false;
    *table = {reinterpret_cast<const Record*>(bytes_.data() + section.offset), section.count};
    next_section_ += section.count * sizeof(Record);
    return true;
  }

  absl::Status Sections() {
    std::span<const char> strings;
    if (!Table(header_->nodes, &view_.nodes) || !Table(header_->children, &view_.children) ||
        !Table(header_->chunks, &view_.chunks) || !Table(header_->xattrs, &view_.xattrs) ||
        !Table(header_->strings, &strings) || next_section_ != bytes_.size()) {
      return Bad("its sections do not fill the file");
    }
    view_.strings = {strings.data(), strings.size()};
    if (!Text(header_->layer_digest.offset, header_->layer_digest.length) ||
        !Text(header_->toc_digest.offset, header_->toc_digest.length)) {
      return Bad("its digests lie outside the strings");
    }
    if (view_.nodes.empty()) return Bad("no root");
    return absl::OkStatus();
  }

  bool Text(uint64_t offset, uint64_t length) const {
    return length <= view_.strings.size() && offset <= view_.strings.size() - length;
  }

  absl::Status Nodes() {
    uint64_t children = 0, chunks = 0, xattrs = 0, files = 0;
    uint32_t flags = 0;
    for (size_t i = 0; i < view_.nodes.size(); i++) {
      const NodeRecord& node = view_.nodes[i];
      HF_RETURN_IF_ERROR(OneNode(i, node));
      if (S_ISDIR(node.mode)) {
        if (node.first != children || node.count > view_.children.size() - children)
          return BadNode(i, "its children");
        children += node.count;
      }
      if (S_ISREG(node.mode)) {
        if (node.first > view_.chunks.size() || node.count > view_.chunks.size() - node.first) {
          return BadNode(i, "its chunks");
        }
        chunks += node.count;
        files++;
      }
      if (node.first_xattr != xattrs || node.xattr_count > view_.xattrs.size() - xattrs)
        return BadNode(i, "its xattrs");
      xattrs += node.xattr_count;
      if ((node.flags & kNodeOpaque) != 0 || node.xattr_count > 0) flags |= kIndexHasXattrs;
      if ((node.flags & kNodeImplied) != 0) flags |= kIndexHasImpliedFolders;
    }
    if (children != view_.children.size() || chunks != view_.chunks.size() || xattrs != view_.xattrs.size()) {
      return Bad("rows that belong to no node");
    }
    if (files != header_->regular_files || flags != header_->flags)
      return Bad("its header does not describe its nodes");
    return absl::OkStatus();
  }

  absl::Status OneNode(size_t i, const NodeRecord& node) const {
    const bool folder = S_ISDIR(node.mode), link = S_ISLNK(node.mode), file = S_ISREG(node.mode);
    const bool device = S_ISCHR(node.mode) || S_ISBLK(node.mode);
    if ((node.mode & ~uint32_t{S_IFMT | 07777}) != 0 ||
        !(folder || link || file || device || S_ISFIFO(node.mode))) {
      return BadNode(i, "its mode");
    }
    // Parents come before their children, so the folders are a tree.
    const bool parent_before =
        i == 0 ? node.parent == kRootNode : node.parent >= kRootNode && node.parent <= i;
    if (!parent_before || !S_ISDIR(view_.nodes[node.parent - 1].mode)) return BadNode(i, "its parent");
    if (i == 0 && !folder) return BadNode(i, "the root is not a folder");
    if (node.mtime_nanos >= kNanosPerSecond || node.mtime_seconds < 0) return BadNode(i, "its time");
    if (node.size > kMaxOffset || (!file && !link && node.size != 0)) return BadNode(i, "its size");
    if (!device && node.rdev != 0) return BadNode(i, "its device number");
    if (!folder && (node.flags != 0 || (!file && (node.first != 0 || node.count != 0))))
      return BadNode(i, "its flags");
    if ((node.flags & ~(kNodeImplied | kNodeOpaque)) != 0) return BadNode(i, "its flags");
    if (link ? node.link_length == 0 || node.link_length > kMaxLinkBytes || node.size != node.link_length ||
                   !Text(node.link_offset, node.link_length)
             : node.link_length != 0 || node.link_offset != 0) {
      return BadNode(i, "its link target");
    }
    return absl::OkStatus();
  }

  absl::Status Children() {
    std::vector<uint32_t> names(view_.nodes.size()), subfolders(view_.nodes.size());
    for (size_t i = 0; i < view_.nodes.size(); i++) {
      if (!S_ISDIR(view_.nodes[i].mode)) continue;
      std::string_view previous;
      for (const ChildRecord& child : view_.children.subspan(view_.nodes[i].first, view_.nodes[i].count)) {
        if (child.nodeid <= kRootNode || child.nodeid > view_.nodes.size() || child.reserved != 0) {
          return BadNode(i, "a child's node");
        }
        if (child.name_length > kMaxNameBytes || !Text(child.name_offset, child.name_length)) {
          return BadNode(i, "a child's name");
        }
        std::string_view name = view_.strings.substr(child.name_offset, child.name_length);
        // The first name must only be there; the others must come after the one before.
        if (name <= previous || !ValidName(name)) return BadNode(i, "a child's name or order");
        previous = name;
        const NodeRecord& target = view_.nodes[child.nodeid - 1];
        names[child.nodeid - 1]++;
        if (S_ISDIR(target.mode)) {
          if (target.parent != i + 1) return BadNode(i, "a child folder of another folder");
          subfolders[i]++;
        }
      }
    }
    for (size_t i = 0; i < view_.nodes.size(); i++) {
      const bool folder = S_ISDIR(view_.nodes[i].mode);
      if (names[i] != (i == 0 ? 0u : folder ? 1u : view_.nodes[i].nlink))
        return BadNode(i, "the number of its names");
      if (i != 0 && names[i] == 0) return BadNode(i, "it has no name");
      if (folder && view_.nodes[i].nlink != 2 + subfolders[i]) return BadNode(i, "its link count");
    }
    return absl::OkStatus();
  }

  static bool ValidName(std::string_view name) {
    return name != "." && name != ".." && std::memchr(name.data(), '/', name.size()) == nullptr &&
           std::memchr(name.data(), '\0', name.size()) == nullptr;
  }

  absl::Status Chunks() {
    uint64_t stored = 0;
    for (const ChunkRecord& chunk : view_.chunks) {
      if (chunk.size == 0 || chunk.size > kMaxOffset || chunk.file_offset > kMaxOffset ||
          chunk.inner_offset > kMaxOffset || chunk.blob_offset >= chunk.blob_end ||
          chunk.blob_end > header_->blob_size) {
        return Bad("a chunk's sizes or place in the blob");
      }
      if (chunk.store_offset < stored || chunk.store_offset > header_->content_bytes ||
          chunk.size > header_->content_bytes - chunk.store_offset) {
        return Bad("a chunk's place in the content file");
      }
      stored = chunk.store_offset + chunk.size;
    }
    if (stored != header_->content_bytes) return Bad("content that belongs to no chunk");
    for (size_t i = 0; i < view_.nodes.size(); i++) {
      const NodeRecord& node = view_.nodes[i];
      if (!S_ISREG(node.mode)) continue;
      uint64_t covered = 0;
      for (const ChunkRecord& chunk : view_.chunks.subspan(node.first, node.count)) {
        const ChunkRecord& first = view_.chunks[node.first];
        if (chunk.file_offset != covered || chunk.store_offset != first.store_offset + covered) {
          return BadNode(i, "its chunks do not follow each other");
        }
        covered += chunk.size;
      }
      if (covered != node.size) return BadNode(i, "its chunks do not cover it");
    }
    return absl::OkStatus();
  }

  absl::Status Xattrs() const {
    for (size_t i = 0; i < view_.nodes.size(); i++) {
      std::string_view previous;
      for (const XattrRecord& xattr :
           view_.xattrs.subspan(view_.nodes[i].first_xattr, view_.nodes[i].xattr_count)) {
        if (xattr.name_length > kMaxNameBytes || !Text(xattr.name_offset, xattr.name_length) ||
            xattr.value_length > kMaxXattrValueBytes || !Text(xattr.value_offset, xattr.value_length)) {
          return BadNode(i, "an xattr");
        }
        std::string_view name = view_.strings.substr(xattr.name_offset, xattr.name_length);
        if (name <= previous || name.find('\0') != std::string_view::npos)
          return BadNode(i, "the name of an xattr");
        previous = name;
      }
    }
    return absl::OkStatus();
  }

  const std::string_view bytes_;
  const IndexHeader* header_ = nullptr;
  uint64_t next_section_ = sizeof(IndexHeader);
  IndexView view_;
};

}  // namespace

absl::StatusOr<IndexView> ValidateIndex(std::string_view bytes) { return Validator(bytes).Run(); }

}  // namespace holdfast::layer
