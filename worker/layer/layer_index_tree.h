// The tree that a TOC describes once all its entries have been applied: names, replacements, implied folders,
// whiteouts, hard links. Internal to worker/layer (layer_index_build.cc lays it out).
//
// Every name that an entry adds becomes a Dentry; dentries are kept in the order in which they were added,
// and one that is replaced stays in the list but is not alive. Lookups use a hash table that is never
// iterated: everything that is emitted follows the order of the list. Thread safety: none. The Toc outlives
// the tree. Errors: InvalidArgument, with the entry's name.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "common/status.h"
#include "worker/toc/toc.h"

namespace holdfast::layer {

inline constexpr uint32_t kNone = UINT32_MAX;

struct Dentry {
  enum class Kind : uint8_t { kFolder, kNode, kHardlink, kWhiteout };  // kNode: neither folder nor hard link
  uint32_t parent = 0;      // position in the list; the root's is itself
  uint32_t entry = kNone;   // position in Toc::entries; kNone: implied folder
  uint32_t target = kNone;  // hard link: the dentry of the node it names, set by ResolveHardlinks
  Kind kind = Kind::kFolder;
  bool opaque = false;
  bool replaced = false;
  bool alive = true;  // set by Finish
  std::string_view name;
};

class LayerTree {
 public:
  explicit LayerTree(const toc::Toc& toc) : toc_(toc) {}
  absl::Status Build();
  // Parents come before their children; the root is the first.
  const std::vector<Dentry>& dentries() const { return dentries_; }

 private:
  using Key = std::pair<uint32_t, absl::string_view>;  // folder, name

  absl::Status Apply(uint32_t entry);
  absl::Status ApplyNamed(uint32_t entry, uint32_t folder, std::string_view name);
  absl::StatusOr<uint32_t> Folder(uint32_t parent, std::string_view name, uint32_t entry);
  uint32_t Add(Dentry dentry, absl::flat_hash_map<Key, uint32_t>* names);
  absl::Status ResolveHardlinks();
  absl::StatusOr<uint32_t> FollowHardlink(uint32_t from);
  uint32_t Find(std::string_view path) const;
  void MarkAlive();
  absl::Status Error(uint32_t entry, std::string_view message) const;

  const toc::Toc& toc_;
  std::vector<Dentry> dentries_;
  absl::flat_hash_map<Key, uint32_t> names_;
  absl::flat_hash_map<Key, uint32_t> whiteouts_;
};

}  // namespace holdfast::layer
