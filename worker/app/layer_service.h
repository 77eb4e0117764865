// Lazily served layers as the snapshotter sees them (snapshot::LayerMounter), made of fetch, toc, layer,
// cache, fuse and the supervisor's vault. Also the table of mounts: which snapshot is which mount, and how a
// mount's layer is opened.
//
// Serving a mount needs its blob and files only: AdoptMount parses nothing and opens nothing; the layer is
// opened on the mount's first request.
//
// Thread safety: all methods. The lock guards the tables and is held over no call into another module;
// another one lets one mount at a time be handed to the FUSE server. Errors: LayerMounter's. Without a
// supervisor mounting and unmounting are Unavailable; reading goes on.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/clock.h"
#include "common/fault.h"
#include "common/mutex.h"
#include "common/status.h"
#include "common/trace.h"
#include "worker/app/layer_files.h"
#include "worker/app/layer_resolver.h"
#include "worker/app/parent_attributes.h"
#include "worker/cache/content_store.h"
#include "worker/fetch/registry_client.h"
#include "worker/fuse/fuse_server.h"
#include "worker/handover/mount_blob.h"
#include "worker/handover/supervisor_link.h"
#include "worker/layer/layer.h"
#include "worker/snapshot/layer_mounter.h"

namespace holdfast::app {

// Below the state folder: the roots of LayerFiles and ContentStore.
inline constexpr char kLayersFolder[] = "layers";
inline constexpr char kContentFolder[] = "content";

struct LayerServiceParts {
  LayerFiles* files = nullptr;
  LayerResolver* resolver = nullptr;
  handover::MountVault* vault = nullptr;
  fetch::RegistryClient* client = nullptr;
  cache::ContentStore* store = nullptr;
  layer::LayerReader* reader = nullptr;
  fuse::FuseServer* server = nullptr;
  TraceRing* trace = nullptr;
  FaultPoints* faults = nullptr;  // layer.before_mount, layer.after_mount
};

class LayerService final : public snapshot::LayerMounter {
 public:
  explicit LayerService(const LayerServiceParts& parts) : parts_(parts) {}

  absl::StatusOr<snapshot::MountedLayer> Mount(const snapshot::LayerRequest& request, uint64_t snapshot_id,
                                               const std::string& folder,
                                               const std::vector<snapshot::ParentLayer>& parents,
                                               uint64_t deadline_boot_nanos) override;
  absl::Status Remount(const std::string& layer_digest, const std::string& index_sha256,
                       const std::string& image_ref, uint64_t blob_size, uint64_t snapshot_id,
                       const std::string& folder) override;
  bool IsMounted(uint64_t snapshot_id) const override;
  absl::Status Unmount(uint64_t snapshot_id, bool* still_used) override;
  void Usage(const std::string& layer_digest, const std::string& index_sha256, uint64_t* bytes,
             uint64_t* inodes) override;

  // Serves a mount that the vault holds already. Fast. An entry whose blob cannot be read is served with EIO:
  // guessing would mean wrong bytes, and unserved its readers would hang.
  // `private_mount`: read at once, also by a server that is not started, and not missed when the vault's list
  // does not have it.
  absl::Status AdoptMount(handover::MountEntry entry, bool private_mount = false);
  // A mount of a drill.
  absl::Status MountPrivate(const std::string& folder, const std::string& blob);
  // The vault says these are gone.
  void ForgetMounts(const std::vector<uint64_t>& mount_ids);

  // Maps the indexes and opens the content of mounts that are served ahead of their first request, for at
  // most that long, so that a successor's first requests find them open. Makes nothing: content that is not
  // there is left to its first reader. May be repeated.
  void OpenAhead(uint64_t budget_nanos);
  // Closes content that OpenAhead opened and another worker has evicted since, for open it would keep its
  // space on the disk.
  void LetGoOfEvicted();
  // Something to look at in mounts that can be looked at: see samples.h. A layer that cannot be opened is
  // left out.
  std::vector<handover::SampleFile> Samples(uint32_t limit, uint64_t deadline_boot_nanos);

  std::vector<handover::LayerInfo> Layers() const;
  bool Serves(uint64_t mount_id) const;
  std::vector<uint64_t> ServedMounts() const;  // private ones left out
  size_t mount_count() const;
  // Dups of the devices of at most `limit` mounts with an id above `after`, in order.
  absl::StatusOr<handover::Page<handover::HeldMount>> HeldMounts(uint64_t after, size_t limit) const;

 private:
  using IndexPtr = std::shared_ptr<const layer::LayerIndex>;
  struct MountRow {
    handover::MountBlob blob;
    bool detached = false;
    bool private_mount = false;
    // Owned by the server, which has it as long as this row exists.
    int device = -1;
    IndexPtr index;                                // opened ahead
    std::shared_ptr<cache::LayerContent> content;  // opened ahead; held so that OpenLayer finds it open
  };

  absl::StatusOr<IndexPtr> OpenIndex(const std::string& layer_digest, const std::string& sha256, bool verify);
  absl::StatusOr<IndexPtr> BindToParents(IndexPtr base, const std::vector<snapshot::ParentLayer>& parents,
                                         const std::string& layer_digest, std::string* sha256);
  absl::StatusOr<LayerBelow> Below(const snapshot::ParentLayer& parent);
  absl::StatusOr<std::shared_ptr<layer::Layer>> OpenLayer(const handover::MountBlob& blob, bool verify_index,
                                                          IndexPtr opened_ahead = nullptr);
  absl::Status MountIndex(const handover::MountBlob& blob, const std::string& folder);
  // `unreadable`: not OK when the blob is not known; every request then gets EIO.
  absl::Status Serve(handover::MountEntry entry, const handover::MountBlob& blob,
                     const absl::Status& unreadable, bool private_mount);
  IndexPtr OpenedAhead(uint64_t mount_id) const;  // null when it was not

  const LayerServiceParts parts_;
  Mutex serve_mutex_;  // before mutex_; a mount's row and its place in the server appear together
  mutable Mutex mutex_;
  std::map<uint64_t, MountRow> mounts_ ABSL_GUARDED_BY(mutex_);  // by mount_id
  // By index SHA-256 and image reference: each image fetches from its own registry, with its own credentials.
  // What is on disk they share.
  std::map<std::pair<std::string, std::string>, std::weak_ptr<layer::Layer>> layers_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace holdfast::app
