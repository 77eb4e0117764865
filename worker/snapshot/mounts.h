// The mounts that containerd is told to make, in the shapes of its overlayfs snapshotter. Pure.
#pragma once

#include <string>
#include <vector>

#include "worker/metadata/metadata.h"
#include "worker/snapshot/snapshotter.h"

namespace holdfast::snapshot {

// `fs` and `work` are the snapshot's own folders, `parents` the fs folders below it, nearest first.
// `index_off`: this kernel's overlayfs knows the option. A Prepare never gets a read-only mount:
// containerd 2.4 would take the layer for done.
std::vector<Mount> BuildMounts(metadata::Kind kind, const std::string& fs, const std::string& work,
                               const std::vector<std::string>& parents, bool index_off);

}  // namespace holdfast::snapshot
