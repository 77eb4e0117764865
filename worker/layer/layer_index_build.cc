// From a TOC to index bytes.
//
// Numbering version 1. Entries are applied in TOC order (layer_index_tree.h). Each applied name takes the
// next place in a list; the missing folders on its path take theirs just before it, outermost first. A folder
// named again keeps its place; anything else named again loses its old place (and what lay below it) and
// takes a new one at the end. A whiteout named again keeps its place. Nodes are then numbered from 1 along
// the list, the root first, leaving out what was replaced, whiteouts of names that exist, and hard links,
// which share the node of the name they lead to. So a folder's number is smaller than its children's.
//
// Chunks are numbered file after file, files by the place of their first chunk in the blob (blob offset,
// offset in the member, nodeid). In the content file they follow each other in that order; a file of at least
// 4096 bytes begins at a multiple of 4096, so that its pages can be spliced as they are.
#include <sys/stat.h>

#include <algorithm>
#include <deque>
#include <map>
#include <tuple>

#include "common/io.h"
#include "worker/layer/layer_index.h"
#include "worker/layer/layer_index_format.h"
#include "worker/layer/layer_index_tree.h"

namespace holdfast::layer {
namespace {

constexpr uint64_t kPage = 4096;
constexpr uint64_t kMaxContentBytes = 1ull << 60;

uint32_t TypeBits(toc::Type type) {
  switch (type) {
    case toc::Type::kDirectory:
      return S_IFDIR;
    case toc::Type::kSymlink:
      return S_IFLNK;
    case toc::Type::kCharDevice:
      return S_IFCHR;
    case toc::Type::kBlockDevice:
      return S_IFBLK;
    case toc::Type::kFifo:
      return S_IFIFO;
    case toc::Type::kRegular:
    case toc::Type::kHardlink:
      break;
  }
  return S_IFREG;
}

// As the kernel packs 12 + 20 bits into fuse_attr.rdev.
uint32_t EncodeDevice(uint32_t major, uint32_t minor) {
  return (minor & 0xff) | (major << 8) | ((minor & ~uint32_t{0xff}) << 12);
}

class IndexBuilder {
 public:
  IndexBuilder(const toc::Toc& toc, const std::vector<Dentry>& dentries) : toc_(toc), dentries_(dentries) {}

  absl::StatusOr<IndexTables> Run() {
    MakeNodes();
    MakeChildren();
    HF_RETURN_IF_ERROR(MakeChunks());
    return std::move(tables_);
  }

 private:
  bool HasNode(const Dentry& dentry) const { return dentry.alive && dentry.kind != Dentry::Kind::kHardlink; }

  void MakeNodes() {
    nodeids_.assign(dentries_.size(), 0);
    const auto count = static_cast<size_t>(std::count_if(
        dentries_.begin(), dentries_.end(), [this](const Dentry& dentry) { return HasNode(dentry); }));
    tables_.nodes.reserve(count);
    tables_.links.reserve(count);
    entry_of_.reserve(count);
    for (uint32_t i = 0; i < dentries_.size(); i++) {
      if (!HasNode(dentries_[i])) continue;
      tables_.nodes.push_back(MakeNode(dentries_[i]));
      nodeids_[i] = tables_.nodes.size();
      tables_.nodes.back().parent = nodeids_[dentries_[i].parent];
    }
    for (uint32_t i = 0; i < dentries_.size(); i++) {
      const Dentry& dentry = dentries_[i];
      if (dentry.alive && dentry.kind == Dentry::Kind::kHardlink) nodeids_[i] = nodeids_[dentry.target];
    }
  }

  // Also appends to `links`, `xattrs` and `entry_of_`.
  NodeRecord MakeNode(const Dentry& dentry) {
    NodeRecord node{};
    std::string_view link;
    node.first_xattr = tables_.xattrs.size();
    if (dentry.kind == Dentry::Kind::kWhiteout) {
      node.mode = S_IFCHR;
    } else if (dentry.entry == kNone) {
      node.mode = S_IFDIR | Attributes{}.mode;
      node.flags |= kNodeImplied;
    } else {
      const toc::Entry& entry = toc_.entries[dentry.entry];
      node.mode = TypeBits(entry.type) | (entry.mode & 07777);
      node.uid = entry.uid;
      node.gid = entry.gid;
      node.mtime_seconds = entry.mtime_seconds;
      node.mtime_nanos = entry.mtime_nanos;
      if (S_ISCHR(node.mode) || S_ISBLK(node.mode))
        node.rdev = EncodeDevice(entry.dev_major, entry.dev_minor);
      if (S_ISREG(node.mode)) node.size = entry.size;
      if (S_ISLNK(node.mode)) {
        link = entry.link_target;
        node.size = link.size();
      }
      for (const auto& [name, value] : entry.xattrs) tables_.xattrs.emplace_back(name, value);
    }
    node.xattr_count = static_cast<uint32_t>(tables_.xattrs.size() - node.first_xattr);
    if (dentry.opaque) node.flags |= kNodeOpaque;
    node.nlink = S_ISDIR(node.mode) ? 2 : 0;  // names are counted as they become rows
    tables_.links.push_back(link);
    entry_of_.push_back(dentry.entry);
    return node;
  }

  void MakeChildren() {
    for (uint32_t i = 1; i < dentries_.size(); i++) {
      if (dentries_[i].alive) tables_.nodes[nodeids_[dentries_[i].parent] - 1].count++;
    }
    uint64_t next = 0;
    for (NodeRecord& node : tables_.nodes) {
      if (!S_ISDIR(node.mode)) continue;
      node.first = next;
      next += node.count;
      node.count = 0;
    }
    tables_.children.resize(next);
    for (uint32_t i = 1; i < dentries_.size(); i++) {
      if (!dentries_[i].alive) continue;
      NodeRecord& folder = tables_.nodes[nodeids_[dentries_[i].parent] - 1];
      NodeRecord& child = tables_.nodes[nodeids_[i] - 1];
      tables_.children[folder.first + folder.count++] = {dentries_[i].name, nodeids_[i]};
      if (S_ISDIR(child.mode)) {
        folder.nlink++;
      } else {
        child.nlink++;
      }
    }
    for (const NodeRecord& node : tables_.nodes) {
      if (!S_ISDIR(node.mode)) continue;
      auto begin = tables_.children.begin() + static_cast<ptrdiff_t>(node.first);
      std::sort(begin, begin + node.count, [](const auto& a, const auto& b) { return a.name < b.name; });
    }
  }

  absl::Status MakeChunks() {
    std::vector<uint32_t> files;  // positions in nodes
    for (uint32_t i = 0; i < tables_.nodes.size(); i++) {
      if (S_ISREG(tables_.nodes[i].mode) && tables_.nodes[i].size > 0) files.push_back(i);
    }
    size_t count = 0;
    for (uint32_t file : files) {
      if (toc_.entries[entry_of_[file]].chunks.empty())
        return InvalidArgument("layer: a file with content has no chunks");
      count += toc_.entries[entry_of_[file]].chunks.size();
    }
    tables_.chunks.reserve(count);
    auto place = [&](uint32_t file) {
      const toc::Chunk& first = toc_.entries[entry_of_[file]].chunks.front();
      return std::make_tuple(first.blob_offset, first.inner_offset, file);
    };
    std::sort(files.begin(), files.end(), [&](uint32_t a, uint32_t b) { return place(a) < place(b); });
    uint64_t stored = 0;
    for (uint32_t file : files) {
      NodeRecord& node = tables_.nodes[file];
      if (node.size >= kPage) stored = (stored + kPage - 1) / kPage * kPage;
      if (node.size > kMaxContentBytes - stored) return ResourceExhausted("layer: its content is too large");
      const auto& chunks = toc_.entries[entry_of_[file]].chunks;
      node.first = tables_.chunks.size();
      node.count = static_cast<uint32_t>(chunks.size());
      for (const toc::Chunk& chunk : chunks) {
        ChunkRecord& row = tables_.chunks.emplace_back();
        row = {chunk.file_offset,          chunk.size, chunk.blob_offset, chunk.blob_end, chunk.inner_offset,
               stored + chunk.file_offset, {}};
        std::copy(chunk.digest.begin(), chunk.digest.end(), row.digest);
      }
      stored += node.size;
    }
    tables_.content_bytes = stored;
    return absl::OkStatus();
  }

  const toc::Toc& toc_;
  const std::vector<Dentry>& dentries_;
  std::vector<uint64_t> nodeids_;   // by dentry; 0: not alive
  std::vector<uint32_t> entry_of_;  // by node: position in Toc::entries, or kNone
  IndexTables tables_;
};

// Gives each implied folder what the layers below say. Owns the xattrs that `tables` then points to.
class FolderBinder {
 public:
  void Bind(const ParentAttributes& below, IndexTables* tables) {
    std::vector<std::string_view> names(below ? tables->nodes.size() : 0);
    for (const auto& child : tables->children) {
      if (below) names[child.nodeid - 1] = child.name;
    }
    std::vector<IndexTables::Xattr> all;
    for (size_t i = 0; i < tables->nodes.size(); i++) {
      NodeRecord& node = tables->nodes[i];
      const auto own = tables->xattrs.begin() + static_cast<ptrdiff_t>(node.first_xattr);
      node.first_xattr = all.size();
      if ((node.flags & kNodeImplied) == 0) {
        all.insert(all.end(), own, own + node.xattr_count);
        continue;
      }
      std::optional<Attributes> found = below ? Ask(below, names, *tables, i) : std::nullopt;
      Attributes& kept = kept_.emplace_back(std::move(found).value_or(Attributes{}));
      node.mode = S_IFDIR | (kept.mode & 07777);
      node.uid = kept.uid;
      node.gid = kept.gid;
      bool before_epoch = kept.mtime_seconds < 0 || kept.mtime_nanos > 999'999'999;
      node.mtime_seconds = before_epoch ? 0 : kept.mtime_seconds;
      node.mtime_nanos = before_epoch ? 0 : kept.mtime_nanos;
      std::map<std::string_view, std::string_view> xattrs(kept.xattrs.begin(), kept.xattrs.end());
      std::erase_if(xattrs, [](const auto& xattr) { return xattr.first.starts_with("trusted."); });
      all.insert(all.end(), xattrs.begin(), xattrs.end());
      node.xattr_count = static_cast<uint32_t>(xattrs.size());
    }
    tables->xattrs = std::move(all);
  }

 private:
  // Asks for the folder at position `i` by its path.
  static std::optional<Attributes> Ask(const ParentAttributes& below,
                                       const std::vector<std::string_view>& names, const IndexTables& tables,
                                       size_t i) {
    std::vector<std::string_view> parts;
    for (size_t at = i; at != 0; at = tables.nodes[at].parent - 1) parts.push_back(names[at]);
    std::string path;
    for (auto part = parts.rbegin(); part != parts.rend(); ++part) {
      if (!path.empty()) path += '/';
      path += *part;
    }
    return below(path);
  }

  std::deque<Attributes> kept_;
};

absl::StatusOr<IndexTables> TablesOf(const toc::Toc& toc) {
  LayerTree tree(toc);  // as large as the tables, and not needed any more when they are written
  HF_RETURN_IF_ERROR(tree.Build());
  return IndexBuilder(toc, tree.dentries()).Run();
}

}  // namespace

absl::StatusOr<BuiltIndex> BuildLayerIndex(const toc::Toc& toc, const IndexInfo& info,
                                           const ParentAttributes& parent_attributes) {
  HF_ASSIGN_OR_RETURN(IndexTables tables, TablesOf(toc));
  tables.info = info;
  FolderBinder binder;
  binder.Bind(parent_attributes, &tables);
  return SerializeIndex(std::move(tables));
}

absl::StatusOr<BuiltIndex> BindImpliedFolders(const LayerIndex& base,
                                              const ParentAttributes& parent_attributes) {
  IndexTables tables;
  tables.info = base.info();
  tables.content_bytes = base.content_bytes();
  tables.chunks.assign(base.chunks().begin(), base.chunks().end());
  for (uint64_t id = kRootNode; id <= base.node_count(); id++) {
    const NodeRecord& node = *base.node(id);
    tables.nodes.push_back(node);
    tables.links.push_back(base.link_target(node));
    for (const auto& xattr : base.xattrs(node)) tables.xattrs.push_back(xattr);
    for (const ChildRecord& child : base.children(id))
      tables.children.push_back({base.name(child), child.nodeid});
  }
  FolderBinder binder;
  binder.Bind(parent_attributes, &tables);
  return SerializeIndex(std::move(tables));
}

absl::Status WriteIndexFile(const std::string& folder, const BuiltIndex& index) {
  const std::string path = folder + "/" + index.sha256 + ".idx";
  struct stat found {};
  // The name is the content's digest, and files appear here whole (rename) or not at all.
  if (lstat(path.c_str(), &found) == 0 && S_ISREG(found.st_mode) &&
      static_cast<uint64_t>(found.st_size) == index.bytes.size()) {
    return absl::OkStatus();
  }
  return WriteFileAtomic(path, index.bytes);
}

}  // namespace holdfast::layer
