#include "worker/app/parent_attributes.h"

#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>

#include <cerrno>
#include <cstring>
#include <string_view>
#include <utility>

namespace holdfast::app {
namespace {

enum class Answer {
  kFound,   // here it is
  kAbsent,  // not in this layer: ask the next
  kHidden,  // deleted, replaced or made opaque here: the layers below must not be asked
};

struct Found {
  Answer answer = Answer::kAbsent;
  layer::Attributes attributes;
};

std::vector<std::string_view> Components(std::string_view path) {
  std::vector<std::string_view> parts;
  while (!path.empty()) {
    size_t slash = path.find('/');
    parts.push_back(path.substr(0, slash));
    path = slash == std::string_view::npos ? std::string_view() : path.substr(slash + 1);
  }
  return parts;
}

layer::Attributes OfNode(const layer::LayerIndex& index, const layer::NodeRecord& node) {
  layer::Attributes attributes;
  attributes.mode = node.mode & 07777;
  attributes.uid = node.uid;
  attributes.gid = node.gid;
  attributes.mtime_seconds = node.mtime_seconds;
  attributes.mtime_nanos = node.mtime_nanos;
  for (const auto& [name, value] : index.xattrs(node)) {
    attributes.xattrs.emplace_back(std::string(name), std::string(value));
  }
  return attributes;
}

Found AskIndex(const layer::LayerIndex& index, const std::vector<std::string_view>& parts) {
  uint64_t id = layer::kRootNode;
  bool opaque = false;
  for (std::string_view part : parts) {
    id = index.Lookup(id, part);
    if (id == 0) return {opaque ? Answer::kHidden : Answer::kAbsent, {}};
    const layer::NodeRecord* node = index.node(id);
    if (!S_ISDIR(node->mode)) return {Answer::kHidden, {}};  // a whiteout, or something else in its place
    opaque = opaque || (node->flags & layer::kNodeOpaque) != 0;
  }
  return {Answer::kFound, OfNode(index, *index.node(id))};
}

std::string ReadXattr(const std::string& path, const std::string& name) {
  std::string value(65536, '\0');
  ssize_t size = lgetxattr(path.c_str(), name.c_str(), value.data(), value.size());
  value.resize(size < 0 ? 0 : static_cast<size_t>(size));
  return value;
}

bool IsOpaque(const std::string& path) {
  return ReadXattr(path, "trusted.overlay.opaque") == "y" || ReadXattr(path, "user.overlay.opaque") == "y";
}

bool IsOverlayPrivate(std::string_view name) {
  return name.rfind("trusted.overlay.", 0) == 0 || name.rfind("user.overlay.", 0) == 0;
}

layer::Attributes OfFolder(const std::string& path, const struct stat& st) {
  layer::Attributes attributes;
  attributes.mode = st.st_mode & 07777;
  attributes.uid = st.st_uid;
  attributes.gid = st.st_gid;
  attributes.mtime_seconds = st.st_mtim.tv_sec;
  attributes.mtime_nanos = static_cast<uint32_t>(st.st_mtim.tv_nsec);
  std::string names(65536, '\0');
  ssize_t size = llistxattr(path.c_str(), names.data(), names.size());
  std::string_view rest(names.data(), size < 0 ? 0 : static_cast<size_t>(size));
  while (!rest.empty()) {
    std::string name(rest.substr(0, rest.find('\0')));
    rest.remove_prefix(std::min(rest.size(), name.size() + 1));
    if (!IsOverlayPrivate(name)) attributes.xattrs.emplace_back(name, ReadXattr(path, name));
  }
  return attributes;
}

Found AskFolder(const std::string& root, const std::vector<std::string_view>& parts) {
  std::string path = root;
  bool opaque = false;
  struct stat st;
  if (lstat(path.c_str(), &st) != 0) return {};
  for (std::string_view part : parts) {
    path += "/";
    path += part;
    if (lstat(path.c_str(), &st) != 0) return {opaque ? Answer::kHidden : Answer::kAbsent, {}};
    if (!S_ISDIR(st.st_mode)) return {Answer::kHidden, {}};
    opaque = opaque || IsOpaque(path);
  }
  return {Answer::kFound, OfFolder(path, st)};
}

}  // namespace

layer::ParentAttributes AttributesFrom(std::vector<LayerBelow> below) {
  return [below = std::move(below)](const std::string& path) -> std::optional<layer::Attributes> {
    const std::vector<std::string_view> parts = Components(path);
    for (const LayerBelow& one : below) {
      Found found = one.index != nullptr ? AskIndex(*one.index, parts) : AskFolder(one.folder, parts);
      if (found.answer == Answer::kFound) return std::move(found.attributes);
      if (found.answer == Answer::kHidden) return std::nullopt;
    }
    return std::nullopt;
  };
}

}  // namespace holdfast::app
