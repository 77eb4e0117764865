// What the layers below say of a folder that a layer only implies: owner, mode, times and xattrs of the
// nearest one that has it, as an ordinary unpack over overlayfs would copy them up. Whiteouts and opaque
// folders hide what lies below.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "worker/layer/layer_index.h"

namespace holdfast::app {

// One layer below: either an index (lazily served) or a folder on disk (an ordinary snapshot).
struct LayerBelow {
  std::shared_ptr<const layer::LayerIndex> index;
  std::string folder;  // used when there is no index; never a path into a FUSE mount
};

// `below` is nearest first. The function is pure but for reading the folders; it never follows a symlink.
layer::ParentAttributes AttributesFrom(std::vector<LayerBelow> below);

}  // namespace holdfast::app
