// Touches everything that an open index offers, so that a sanitizer sees every access.
#pragma once

#include <sys/stat.h>

#include <cstdint>
#include <cstdlib>

#include "worker/layer/layer_index.h"

namespace holdfast::fuzz {

inline void WalkIndex(const layer::LayerIndex& index) {
  uint64_t sum = index.info().layer_digest.size() + index.info().toc_digest.size();
  auto add = [&sum](std::string_view text) {
    for (char c : text) sum += static_cast<uint8_t>(c);
  };
  for (uint64_t id = 0; id <= index.node_count() + 1; id++) {
    const layer::NodeRecord* node = index.node(id);
    if (node == nullptr) continue;
    if (index.node(node->parent) == nullptr) std::abort();
    add(index.link_target(*node));
    for (const auto& [name, value] : index.xattrs(*node)) add(name), add(value);
    for (const layer::ChildRecord& child : index.children(id)) {
      if (index.node(child.nodeid) == nullptr) std::abort();
      if (index.Lookup(id, index.name(child)) != child.nodeid) std::abort();
    }
    if (!S_ISREG(node->mode) || node->size == 0) continue;
    for (uint64_t offset : {uint64_t{0}, node->size / 2, node->size - 1}) {
      const layer::ChunkRecord& chunk = index.chunks()[index.ChunkAt(*node, offset)];
      if (offset < chunk.file_offset || offset - chunk.file_offset >= chunk.size) std::abort();
      if (chunk.store_offset + chunk.size > index.content_bytes()) std::abort();
      sum += chunk.digest[0];
    }
  }
  // Every folder leads to the root.
  for (uint64_t id = 1; id <= index.node_count(); id++) {
    uint64_t at = id;
    for (int steps = 0; at != layer::kRootNode && steps < 64; steps++) {
      if (index.node(at)->parent >= at) std::abort();
      at = index.node(at)->parent;
    }
  }
  volatile uint64_t kept = sum;
  static_cast<void>(kept);
}

}  // namespace holdfast::fuzz
