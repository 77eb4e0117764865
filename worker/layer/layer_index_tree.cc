#include "worker/layer/layer_index_tree.h"

#include <algorithm>

#include "absl/strings/escaping.h"

namespace holdfast::layer {
namespace {

constexpr std::string_view kWhiteoutPrefix = ".wh.";
constexpr std::string_view kReservedPrefix = ".wh..wh.";  // of aufs: opaque mark, link folder, ...
constexpr std::string_view kOpaqueMark = ".wh..wh..opq";

// Takes the first component off `path`.
std::string_view TakeComponent(std::string_view* path) {
  size_t slash = std::min(path->find('/'), path->size());
  std::string_view part = path->substr(0, slash);
  path->remove_prefix(std::min(slash + 1, path->size()));
  return part;
}

Dentry::Kind KindOf(toc::Type type) {
  if (type == toc::Type::kDirectory) return Dentry::Kind::kFolder;
  if (type == toc::Type::kHardlink) return Dentry::Kind::kHardlink;
  return Dentry::Kind::kNode;
}

}  // namespace

absl::Status LayerTree::Error(uint32_t entry, std::string_view message) const {
  std::string name = absl::Utf8SafeCEscape(ToAbsl(std::string_view(toc_.entries[entry].name).substr(0, 200)));
  return InvalidArgument("layer: " + name + ": " + std::string(message));
}

absl::Status LayerTree::Build() {
  if (toc_.entries.size() >= kNone / 2) return ResourceExhausted("layer: too many entries");
  dentries_.reserve(toc_.entries.size() + 1);
  names_.reserve(toc_.entries.size());
  dentries_.push_back(Dentry{});
  for (uint32_t i = 0; i < toc_.entries.size(); i++) HF_RETURN_IF_ERROR(Apply(i));
  MarkAlive();
  return ResolveHardlinks();
}

absl::Status LayerTree::Apply(uint32_t entry) {
  std::string_view path = toc_.entries[entry].name;
  if (path.empty()) {
    if (toc_.entries[entry].type != toc::Type::kDirectory) return Error(entry, "the root must be a folder");
    dentries_[0].entry = entry;
    return absl::OkStatus();
  }
  // What lies below a name of aufs' own is hidden, and so implies nothing.
  std::string_view last = path;
  for (std::string_view rest = path; !rest.empty();) {
    last = TakeComponent(&rest);
    if (!rest.empty() && last.starts_with(kWhiteoutPrefix)) return absl::OkStatus();
  }
  if (last.starts_with(kReservedPrefix) && last != kOpaqueMark) return absl::OkStatus();

  uint32_t folder = 0;
  for (std::string_view rest = path; rest.size() > last.size();) {
    HF_ASSIGN_OR_RETURN(folder, Folder(folder, TakeComponent(&rest), entry));
  }
  return ApplyNamed(entry, folder, last);
}

// The folder `name` in `parent`, made if there is none.
absl::StatusOr<uint32_t> LayerTree::Folder(uint32_t parent, std::string_view name, uint32_t entry) {
  auto found = names_.find(Key(parent, ToAbsl(name)));
  if (found == names_.end()) return Add(Dentry{.parent = parent, .name = name}, &names_);
  if (dentries_[found->second].kind != Dentry::Kind::kFolder) {
    return Error(entry, "its path leads through something that is not a folder");
  }
  return found->second;
}

uint32_t LayerTree::Add(Dentry dentry, absl::flat_hash_map<Key, uint32_t>* names) {
  uint32_t position = static_cast<uint32_t>(dentries_.size());
  auto [slot, fresh] = names->try_emplace(Key(dentry.parent, ToAbsl(dentry.name)), position);
  if (!fresh) {
    dentries_[slot->second].replaced = true;
    slot->second = position;
  }
  dentries_.push_back(dentry);
  return position;
}

absl::Status LayerTree::ApplyNamed(uint32_t entry, uint32_t folder, std::string_view name) {
  if (name == kOpaqueMark) {
    dentries_[folder].opaque = true;
    return absl::OkStatus();
  }
  Dentry dentry{.parent = folder, .entry = entry, .kind = KindOf(toc_.entries[entry].type), .name = name};
  if (name.starts_with(kWhiteoutPrefix)) {
    dentry.name.remove_prefix(kWhiteoutPrefix.size());
    if (dentry.name.empty() || dentry.name == "." || dentry.name == "..")
      return Error(entry, "a whiteout of nothing");
    dentry.kind = Dentry::Kind::kWhiteout;
    if (!whiteouts_.contains(Key(folder, ToAbsl(dentry.name)))) Add(dentry, &whiteouts_);
    return absl::OkStatus();
  }
  auto found = names_.find(Key(folder, ToAbsl(name)));
  // A folder named again keeps its children and its place; only its attributes are new.
  if (found != names_.end() && dentry.kind == Dentry::Kind::kFolder &&
      dentries_[found->second].kind == Dentry::Kind::kFolder) {
    dentries_[found->second].entry = entry;
    return absl::OkStatus();
  }
  Add(dentry, &names_);
  return absl::OkStatus();
}

void LayerTree::MarkAlive() {
  for (size_t i = 1; i < dentries_.size(); i++) {
    Dentry& dentry = dentries_[i];
    dentry.alive = !dentry.replaced && dentries_[dentry.parent].alive;
    if (dentry.kind == Dentry::Kind::kWhiteout && names_.contains(Key(dentry.parent, ToAbsl(dentry.name)))) {
      dentry.alive = false;  // the real thing hides what is below all the same
    }
  }
}

// Only names that are alive can be found: the search begins at the root and sees the latest of each name.
uint32_t LayerTree::Find(std::string_view path) const {
  uint32_t at = 0;
  while (!path.empty()) {
    auto found = names_.find(Key(at, ToAbsl(TakeComponent(&path))));
    if (found == names_.end()) return kNone;
    at = found->second;
    if (!path.empty() && dentries_[at].kind != Dentry::Kind::kFolder) return kNone;
  }
  return at;
}

absl::Status LayerTree::ResolveHardlinks() {
  for (uint32_t i = 0; i < dentries_.size(); i++) {
    if (dentries_[i].kind != Dentry::Kind::kHardlink || !dentries_[i].alive) continue;
    HF_ASSIGN_OR_RETURN(uint32_t target, FollowHardlink(i));
    // All links on the way know their node now, so long chains are walked once.
    for (uint32_t link = i; dentries_[link].target != target;) {
      uint32_t next = dentries_[link].target;
      dentries_[link].target = target;
      if (dentries_[next].kind != Dentry::Kind::kHardlink) break;
      link = next;
    }
  }
  return absl::OkStatus();
}

// Sets the `target` of each link on the way to the next name, and returns the node at the end.
absl::StatusOr<uint32_t> LayerTree::FollowHardlink(uint32_t from) {
  uint32_t at = from;
  // A chain without a cycle has fewer steps than there are dentries; a link already resolved leads to its
  // node at once.
  for (size_t steps = 0; steps <= dentries_.size(); steps++) {
    Dentry& dentry = dentries_[at];
    if (dentry.kind != Dentry::Kind::kHardlink) return at;
    if (dentry.target == kNone) {
      dentry.target = Find(toc_.entries[dentry.entry].link_target);
      if (dentry.target == kNone) return Error(dentry.entry, "its hard link target is not in this layer");
      if (dentries_[dentry.target].kind == Dentry::Kind::kFolder)
        return Error(dentry.entry, "a hard link to a folder");
    }
    at = dentry.target;
  }
  return Error(dentries_[from].entry, "a circle of hard links");
}

}  // namespace holdfast::layer
