// What snapshots need of lazily served layers; worker/app plugs the real thing in.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "common/status.h"

namespace holdfast::snapshot {

struct ParentLayer {  // nearest first
  uint64_t snapshot_id = 0;
  std::string folder;      // snapshots/<id>/fs
  std::string lazy_index;  // SHA-256 of its LayerIndex; empty: an ordinary folder
};

struct LayerRequest {
  std::string image_ref;     // where the layer comes from
  std::string layer_digest;  // sha256:...
  std::string toc_digest;  // sha256:... from the label containerd.io/snapshot/stargz/toc.digest; may be empty
  std::vector<std::string>
      neighbours;  // digests of the layers named with it: resolved in parallel, ahead of their turn
  std::map<std::string, std::string> labels;  // validated labels, for what else a format needs
  std::string tenant;                         // containerd namespace
};

struct MountedLayer {
  std::string index_sha256;
  uint64_t blob_size = 0;
};

class LayerMounter {
 public:
  virtual ~LayerMounter() = default;
  // Resolves the layer (network; before deadline_boot_nanos), binds it to its parents and mounts it on
  // `folder`, whose snapshot is `snapshot_id`. Blocking; thread-safe. Errors: FailedPrecondition (this layer
  // cannot be lazy: no TOC, no digest, mismatch), Unavailable/DeadlineExceeded (the registry), anything else:
  // not now. On error nothing is mounted.
  virtual absl::StatusOr<MountedLayer> Mount(const LayerRequest& request, uint64_t snapshot_id,
                                             const std::string& folder,
                                             const std::vector<ParentLayer>& parents,
                                             uint64_t deadline_boot_nanos) = 0;
  // Mounts again what the vault does not hold, from the index on disk, without network.
  virtual absl::Status Remount(const std::string& layer_digest, const std::string& index_sha256,
                               const std::string& image_ref, uint64_t blob_size, uint64_t snapshot_id,
                               const std::string& folder) = 0;
  virtual bool IsMounted(uint64_t snapshot_id) const = 0;
  // umount(2); OK when it was not mounted. `still_used` tells that a container's overlay holds it: it is
  // served on, and its content must stay.
  virtual absl::Status Unmount(uint64_t snapshot_id, bool* still_used) = 0;
  // Bytes of this layer on the local disk, and its files. Zeros when the index is not there.
  virtual void Usage(const std::string& layer_digest, const std::string& index_sha256, uint64_t* bytes,
                     uint64_t* inodes) = 0;
};

}  // namespace holdfast::snapshot
