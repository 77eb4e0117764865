#include "worker/layer/layer_index.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>

#include "common/io.h"
#include "worker/layer/digest.h"
#include "worker/layer/layer_index_format.h"

namespace holdfast::layer {
namespace {

// A whole file mapped for reading; the descriptor is closed at once, the mapping keeps the file.
class Mapping {
 public:
  static absl::StatusOr<Mapping> Map(const std::string& path) {
    HF_ASSIGN_OR_RETURN(UniqueFd fd, OpenFile(path, O_RDONLY | O_NOFOLLOW));
    struct stat found {};
    if (fstat(fd.get(), &found) != 0) return ErrnoStatus(errno, "stat " + path);
    if (!S_ISREG(found.st_mode) || found.st_size == 0)
      return DataLoss("index: " + path + " is empty or not a file");
    size_t size = static_cast<size_t>(found.st_size);
    void* data = mmap(nullptr, size, PROT_READ, MAP_SHARED, fd.get(), 0);
    if (data == MAP_FAILED) return ErrnoStatus(errno, "map " + path);
    return Mapping(data, size);
  }
  Mapping() = default;
  Mapping(Mapping&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(other.size_) {}
  Mapping& operator=(Mapping&&) = delete;
  ~Mapping() {
    if (data_ != nullptr) munmap(data_, size_);
  }
  std::string_view bytes() const { return {static_cast<const char*>(data_), size_}; }

 private:
  Mapping(void* data, size_t size) : data_(data), size_(size) {}
  void* data_ = nullptr;
  size_t size_ = 0;
};

class LayerIndexImpl final : public LayerIndex {
 public:
  // One of `mapping` and `memory` holds the bytes that `view` points into.
  LayerIndexImpl(Mapping mapping, std::unique_ptr<std::string> memory, const IndexView& view)
      : mapping_(std::move(mapping)), memory_(std::move(memory)), view_(view) {
    info_.layer_digest = Text(view.header->layer_digest.offset, view.header->layer_digest.length);
    info_.toc_digest = Text(view.header->toc_digest.offset, view.header->toc_digest.length);
    info_.blob_size = view.header->blob_size;
    info_.prefetch_end = view.header->prefetch_end;
  }

  const IndexInfo& info() const override { return info_; }
  uint32_t numbering_version() const override { return view_.header->numbering_version; }
  uint64_t node_count() const override { return view_.nodes.size(); }
  uint64_t regular_files() const override { return view_.header->regular_files; }
  uint64_t content_bytes() const override { return view_.header->content_bytes; }
  uint64_t chunk_count() const override { return view_.chunks.size(); }
  bool has_xattrs() const override { return (view_.header->flags & kIndexHasXattrs) != 0; }
  bool has_implied_folders() const override { return (view_.header->flags & kIndexHasImpliedFolders) != 0; }

  const NodeRecord* node(uint64_t nodeid) const override {
    return nodeid >= kRootNode && nodeid <= view_.nodes.size() ? &view_.nodes[nodeid - 1] : nullptr;
  }

  uint64_t Lookup(uint64_t folder, std::string_view wanted) const override {
    std::span<const ChildRecord> rows = children(folder);
    auto row = std::lower_bound(
        rows.begin(), rows.end(), wanted,
        [this](const ChildRecord& child, std::string_view text) { return name(child) < text; });
    return row != rows.end() && name(*row) == wanted ? row->nodeid : 0;
  }

  uint64_t LookupPath(std::string_view path) const override {
    uint64_t at = kRootNode;
    while (!path.empty() && at != 0) {
      size_t slash = std::min(path.find('/'), path.size());
      at = Lookup(at, path.substr(0, slash));
      path.remove_prefix(std::min(slash + 1, path.size()));
    }
    return at;
  }

  std::span<const ChildRecord> children(uint64_t folder) const override {
    const NodeRecord* record = node(folder);
    if (record == nullptr || !S_ISDIR(record->mode)) return {};
    return view_.children.subspan(record->first, record->count);
  }

  std::string_view name(const ChildRecord& child) const override {
    return Text(child.name_offset, child.name_length);
  }
  std::string_view link_target(const NodeRecord& record) const override {
    return Text(record.link_offset, record.link_length);
  }

  std::vector<std::pair<std::string_view, std::string_view>> xattrs(const NodeRecord& record) const override {
    std::vector<std::pair<std::string_view, std::string_view>> pairs;
    pairs.reserve(record.xattr_count);
    for (const XattrRecord& xattr : view_.xattrs.subspan(record.first_xattr, record.xattr_count)) {
      pairs.emplace_back(Text(xattr.name_offset, xattr.name_length),
                         Text(xattr.value_offset, xattr.value_length));
    }
    return pairs;
  }

  std::span<const ChunkRecord> chunks() const override { return view_.chunks; }

  uint64_t ChunkAt(const NodeRecord& record, uint64_t offset) const override {
    std::span<const ChunkRecord> rows = view_.chunks.subspan(record.first, record.count);
    auto after = std::upper_bound(
        rows.begin(), rows.end(), offset,
        [](uint64_t wanted, const ChunkRecord& chunk) { return wanted < chunk.file_offset; });
    return record.first + static_cast<uint64_t>(after - rows.begin()) - 1;
  }

 private:
  std::string_view Text(uint64_t offset, uint64_t length) const {
    return view_.strings.substr(offset, length);
  }

  const Mapping mapping_;
  const std::unique_ptr<std::string> memory_;
  const IndexView view_;
  IndexInfo info_;
};

absl::Status CheckDigest(std::string_view bytes, const std::string& expected) {
  if (expected.empty()) return absl::OkStatus();
  std::string actual = Sha256Hex(bytes);
  if (actual == expected) return absl::OkStatus();
  return DataLoss("index: its SHA-256 is " + actual + ", not " + expected);
}

}  // namespace

absl::StatusOr<std::shared_ptr<const LayerIndex>> LayerIndex::Open(const std::string& path,
                                                                   const std::string& expected_sha256) {
  HF_ASSIGN_OR_RETURN(Mapping mapping, Mapping::Map(path));
  HF_RETURN_IF_ERROR(Annotate(CheckDigest(mapping.bytes(), expected_sha256), path));
  absl::StatusOr<IndexView> view = ValidateIndex(mapping.bytes());
  if (!view.ok()) return Annotate(view.status(), path);
  return std::make_shared<LayerIndexImpl>(std::move(mapping), nullptr, *view);
}

absl::StatusOr<std::shared_ptr<const LayerIndex>> LayerIndex::FromBytes(std::string bytes) {
  auto memory = std::make_unique<std::string>(std::move(bytes));
  HF_ASSIGN_OR_RETURN(IndexView view, ValidateIndex(*memory));
  return std::make_shared<LayerIndexImpl>(Mapping(), std::move(memory), view);
}

}  // namespace holdfast::layer
