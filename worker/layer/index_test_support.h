// Short ways to make TOCs and indexes in tests of worker/layer.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "worker/layer/layer_index.h"
#include "worker/toc/toc.h"

namespace holdfast::layer {

inline toc::Entry MakeEntry(std::string name, toc::Type type, uint32_t uid = 0) {
  toc::Entry entry;
  entry.name = std::move(name);
  entry.type = type;
  entry.mode = type == toc::Type::kDirectory ? 0755 : 0644;
  entry.uid = uid;
  return entry;
}

inline toc::Entry MakeFolder(std::string name, uint32_t uid = 0) {
  return MakeEntry(std::move(name), toc::Type::kDirectory, uid);
}

// A file of one chunk at `blob_offset` (a span of 100 bytes), or an empty one.
inline toc::Entry MakeFile(std::string name, uint64_t size = 0, uint64_t blob_offset = 0, uint32_t uid = 0) {
  toc::Entry entry = MakeEntry(std::move(name), toc::Type::kRegular, uid);
  entry.size = size;
  if (size > 0) {
    entry.chunks.push_back(
        {.file_offset = 0, .size = size, .blob_offset = blob_offset, .blob_end = blob_offset + 100});
    entry.chunks.back().digest.fill(static_cast<uint8_t>(size));
  }
  return entry;
}

inline toc::Entry MakeLink(std::string name, toc::Type type, std::string target) {
  toc::Entry entry = MakeEntry(std::move(name), type);
  entry.link_target = std::move(target);
  return entry;
}

inline constexpr uint64_t kTestBlobSize = 1 << 30;

inline absl::StatusOr<BuiltIndex> TryBuild(const std::vector<toc::Entry>& entries,
                                           const ParentAttributes& below = {}) {
  toc::Toc toc;
  toc.entries = entries;
  IndexInfo info;
  info.layer_digest = "sha256:" + std::string(64, 'a');
  info.toc_digest = "sha256:" + std::string(64, 'b');
  info.blob_size = kTestBlobSize;
  info.prefetch_end = 77;
  return BuildLayerIndex(toc, info, below);
}

// The index of entries that must be good.
inline std::shared_ptr<const LayerIndex> Build(const std::vector<toc::Entry>& entries,
                                               const ParentAttributes& below = {}) {
  absl::StatusOr<BuiltIndex> built = TryBuild(entries, below);
  EXPECT_TRUE(built.ok()) << built.status();
  if (!built.ok()) return nullptr;
  auto index = LayerIndex::FromBytes(built->bytes);
  EXPECT_TRUE(index.ok()) << index.status();
  return index.ok() ? *index : nullptr;
}

inline const NodeRecord& NodeAt(const LayerIndex& index, std::string_view path) {
  uint64_t id = index.LookupPath(path);
  EXPECT_NE(id, 0u) << path;
  return *index.node(id == 0 ? kRootNode : id);
}

inline std::vector<std::string> Names(const LayerIndex& index, std::string_view folder) {
  std::vector<std::string> names;
  for (const ChildRecord& child : index.children(index.LookupPath(folder)))
    names.emplace_back(index.name(child));
  return names;
}

}  // namespace holdfast::layer
