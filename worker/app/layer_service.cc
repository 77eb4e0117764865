#include "worker/app/layer_service.h"

#include <algorithm>
#include <set>
#include <utility>

#include "common/log.h"
#include "common/unhurried.h"
#include "glog/logging.h"
#include "worker/app/samples.h"
#include "worker/layer/digest.h"
#include "worker/layer/layer_index.h"

namespace holdfast::app {
namespace {

// FUSE_INIT flags (include/uapi/linux/fuse.h); the newest are not in Debian 12's header.
constexpr uint64_t kAsyncRead = 1ull << 0;
constexpr uint64_t kIoctlDir =
    1ull << 11;  // for a later live probe on the root; INIT is fixed for the mount's life
constexpr uint64_t kDoReaddirplus = 1ull << 13;
constexpr uint64_t kNoOpenSupport = 1ull << 17;
constexpr uint64_t kParallelDirops = 1ull << 18;
constexpr uint64_t kMaxPages = 1ull << 22;
constexpr uint64_t kCacheSymlinks = 1ull << 23;
constexpr uint64_t kNoOpendirSupport = 1ull << 24;
constexpr uint64_t kInitExt = 1ull << 30;
constexpr uint64_t kHasResend = 1ull << 39;
constexpr uint64_t kAllowIdmap = 1ull << 40;

handover::InitOptions LayerInitOptions() {
  handover::InitOptions options;
  options.flags = kAsyncRead | kIoctlDir | kDoReaddirplus | kNoOpenSupport | kParallelDirops | kMaxPages |
                  kCacheSymlinks | kNoOpendirSupport | kInitExt | kHasResend | kAllowIdmap;
  return options;
}

fuse::MountFlags FlagsOf(const handover::MountBlob& blob) {
  fuse::MountFlags flags;
  flags.no_xattrs = blob.no_xattrs;
  flags.zero_open = blob.zero_open;
  flags.opaque_user = blob.overlay_opaque_user;
  return flags;
}

// Names content in the store. A layer that is read lazily is never compared with its own digest: each chunk
// is checked against the TOC that the image names. So what one TOC vouched for may serve only images that
// name the same TOC, or an image could place its bytes under another's layer. The chunks are counted in the
// numbering's order. Indexes bound to different parents share all three, hence the content.
std::string ContentKey(const layer::LayerIndex& index) {
  const layer::IndexInfo& info = index.info();
  return layer::Sha256Name(info.layer_digest + " " + info.toc_digest + " " +
                           std::to_string(index.numbering_version()));
}

std::string HexOf(const std::string& digest) { return digest.substr(digest.find(':') + 1); }

}  // namespace

absl::StatusOr<LayerService::IndexPtr> LayerService::OpenIndex(const std::string& layer_digest,
                                                               const std::string& sha256, bool verify) {
  return layer::LayerIndex::Open(parts_.files->IndexPath(layer_digest, sha256),
                                 verify ? sha256 : std::string());
}

absl::StatusOr<LayerBelow> LayerService::Below(const snapshot::ParentLayer& parent) {
  LayerBelow below;
  below.folder = parent.folder;
  if (parent.lazy_index.empty()) return below;
  HF_ASSIGN_OR_RETURN(std::string path, parts_.files->FindIndex(parent.lazy_index));
  HF_ASSIGN_OR_RETURN(below.index, layer::LayerIndex::Open(path, parent.lazy_index));
  return below;
}

absl::StatusOr<LayerService::IndexPtr> LayerService::BindToParents(
    IndexPtr base, const std::vector<snapshot::ParentLayer>& parents, const std::string& layer_digest,
    std::string* sha256) {
  if (!base->has_implied_folders() || parents.empty()) return base;
  std::vector<LayerBelow> below;
  for (const snapshot::ParentLayer& parent : parents) {
    absl::StatusOr<LayerBelow> one = Below(parent);
    if (!one.ok()) return Annotate(one.status(), "layer below");
    below.push_back(std::move(*one));
  }
  HF_ASSIGN_OR_RETURN(layer::BuiltIndex bound,
                      layer::BindImpliedFolders(*base, AttributesFrom(std::move(below))));
  HF_RETURN_IF_ERROR(parts_.files->StoreIndex(layer_digest, bound.sha256, bound.bytes));
  *sha256 = bound.sha256;
  return OpenIndex(layer_digest, bound.sha256, /*verify=*/true);
}

absl::StatusOr<snapshot::MountedLayer> LayerService::Mount(const snapshot::LayerRequest& request,
                                                           uint64_t snapshot_id, const std::string& folder,
                                                           const std::vector<snapshot::ParentLayer>& parents,
                                                           uint64_t deadline_boot_nanos) {
  for (const std::string& neighbour : request.neighbours) {
    if (neighbour == request.layer_digest) continue;
    parts_.resolver->ResolveAhead({request.image_ref, neighbour, "", request.tenant, deadline_boot_nanos});
  }
  HF_ASSIGN_OR_RETURN(LayerRecord record,
                      parts_.resolver->Resolve({request.image_ref, request.layer_digest, request.toc_digest,
                                                request.tenant, deadline_boot_nanos}));
  handover::MountBlob blob;
  blob.layer_digest = record.layer_digest;
  blob.index_digest = record.index_sha256;
  HF_ASSIGN_OR_RETURN(IndexPtr index, OpenIndex(record.layer_digest, record.index_sha256, /*verify=*/true));
  HF_ASSIGN_OR_RETURN(index, BindToParents(index, parents, record.layer_digest, &blob.index_digest));
  blob.numbering_version = index->numbering_version();
  blob.image_ref = request.image_ref;
  blob.snapshot_id = snapshot_id;
  blob.blob_size = record.blob_size;
  blob.no_xattrs = !index->has_xattrs();
  blob.zero_open = true;
  HF_RETURN_IF_ERROR(MountIndex(blob, folder));
  if (index->info().prefetch_end > 0) {
    absl::StatusOr<std::shared_ptr<layer::Layer>> layer = OpenLayer(blob, /*verify_index=*/false);
    if (layer.ok()) (*layer)->StartPrefetch();
  }
  return snapshot::MountedLayer{blob.index_digest, blob.blob_size};
}

absl::Status LayerService::Remount(const std::string& layer_digest, const std::string& index_sha256,
                                   const std::string& image_ref, uint64_t blob_size, uint64_t snapshot_id,
                                   const std::string& folder) {
  if (IsMounted(snapshot_id)) return absl::OkStatus();
  if (!layer::IsSha256Digest(layer_digest)) return InvalidArgument("not a layer digest: " + layer_digest);
  HF_ASSIGN_OR_RETURN(IndexPtr index, OpenIndex(layer_digest, index_sha256, /*verify=*/true));
  handover::MountBlob blob;
  blob.layer_digest = layer_digest;
  blob.index_digest = index_sha256;
  blob.numbering_version = index->numbering_version();
  blob.image_ref = image_ref;
  blob.snapshot_id = snapshot_id;
  blob.blob_size = blob_size;
  blob.no_xattrs = !index->has_xattrs();
  blob.zero_open = true;
  return MountIndex(blob, folder);
}

absl::Status LayerService::MountIndex(const handover::MountBlob& blob, const std::string& folder) {
  TraceSpan span(parts_.trace, "layer.mount",
                 "layer=" + blob.layer_digest + " snapshot=" + std::to_string(blob.snapshot_id));
  HF_RETURN_IF_ERROR(PassFault(parts_.faults, "layer.before_mount"));
  HF_ASSIGN_OR_RETURN(handover::MountEntry entry,
                      parts_.vault->Mount(folder, LayerInitOptions(), handover::EncodeMountBlob(blob)));
  HF_RETURN_IF_ERROR(PassFault(parts_.faults, "layer.after_mount"));
  const uint64_t mount_id = entry.mount_id;
  absl::Status served = Serve(std::move(entry), blob, absl::OkStatus(), /*private_mount=*/false);
  if (served.ok()) {
    LOG(INFO) << "layer.mounted layer=" << blob.layer_digest << " mount=" << mount_id
              << " snapshot=" << blob.snapshot_id << " index=" << blob.index_digest;
    return served;
  }
  absl::Status undone = parts_.vault->Unmount(mount_id).status();
  LOG_IF(ERROR, !undone.ok()) << "layer.unmount_failed mount=" << mount_id << " error=" << undone;
  ForgetMounts({mount_id});
  return served;
}

absl::Status LayerService::Serve(handover::MountEntry entry, const handover::MountBlob& blob,
                                 const absl::Status& unreadable, bool private_mount) {
  const uint64_t mount_id = entry.mount_id;
  MutexLock one_at_a_time(&serve_mutex_);
  {
    MutexLock lock(&mutex_);
    auto it = mounts_.find(mount_id);
    // A new mount comes here twice when the vault's list is read while it is made.
    if (it != mounts_.end() && it->second.blob == blob) return absl::OkStatus();
    if (it != mounts_.end())
      return AlreadyExists("mount " + std::to_string(mount_id) + " is served with another blob");
    MountRow& row = mounts_[mount_id];
    row.blob = blob;
    row.detached = entry.state == handover::MountState::kDetached;
    row.private_mount = private_mount;
  }
  const int device = entry.device.get();
  fuse::MountSpec spec;
  spec.serve_now = private_mount;
  spec.mount_id = mount_id;
  spec.device = std::move(entry.device);
  spec.init_request = std::move(entry.init_request);
  spec.flags = FlagsOf(blob);
  spec.description = blob.layer_digest;
  // The index was verified when the layer was mounted, under this same vault: on the first request its bytes
  // need not be hashed again.
  spec.open_layer = [this, mount_id, blob, unreadable]() -> absl::StatusOr<std::shared_ptr<layer::Layer>> {
    HF_RETURN_IF_ERROR(unreadable);
    return OpenLayer(blob, /*verify_index=*/false, OpenedAhead(mount_id));
  };
  absl::Status added = parts_.server->AddMount(std::move(spec));
  MutexLock lock(&mutex_);
  if (!added.ok()) {
    mounts_.erase(mount_id);
  } else if (auto it = mounts_.find(mount_id); it != mounts_.end()) {
    it->second.device = device;
  }
  return added;
}

absl::Status LayerService::AdoptMount(handover::MountEntry entry, bool private_mount) {
  absl::StatusOr<handover::MountBlob> blob = handover::DecodeMountBlob(entry.blob);
  if (blob.ok()) return Serve(std::move(entry), *blob, absl::OkStatus(), private_mount);
  const absl::Status unreadable =
      Annotate(blob.status(), "mount " + std::to_string(entry.mount_id) + " at " + entry.path);
  LOG(ERROR) << "layer.mount_unreadable mount=" << entry.mount_id
             << " error=" << LogValue(FromAbsl(unreadable.message())) << " effect=\"reads get EIO\"";
  return Serve(std::move(entry), handover::MountBlob(), unreadable, private_mount);
}

absl::Status LayerService::MountPrivate(const std::string& folder, const std::string& blob) {
  HF_ASSIGN_OR_RETURN(handover::MountEntry entry, parts_.vault->Mount(folder, LayerInitOptions(), blob));
  return AdoptMount(std::move(entry));
}

void LayerService::OpenAhead(uint64_t budget_nanos) {
  struct Opened {
    IndexPtr index;
    std::shared_ptr<cache::LayerContent> content;
  };
  const Clock* clock = Clock::Real();
  const uint64_t deadline = clock->BootNanos() + budget_nanos;
  std::map<std::pair<std::string, std::string>, Opened> opened;  // by index and layer digest
  {
    MutexLock lock(&mutex_);
    for (const auto& [id, row] : mounts_) {
      if (row.blob.index_digest.empty()) continue;
      opened[{row.blob.index_digest, row.blob.layer_digest}] = {row.index, row.content};
    }
  }
  size_t failed = 0;
  Unhurried unhurried;
  for (auto& [key, layer] : opened) {
    if (layer.index != nullptr && layer.content != nullptr) continue;
    unhurried.Rest();
    if (clock->BootNanos() >= deadline) break;
    if (layer.index == nullptr) {
      absl::StatusOr<IndexPtr> index = OpenIndex(key.second, key.first, /*verify=*/false);
      if (!index.ok()) {
        failed++;  // its first request tries again and says why
        continue;
      }
      layer.index = *std::move(index);
    }
    auto content = parts_.store->FindLayer(ContentKey(*layer.index), layer.index->chunk_count(),
                                           layer.index->content_bytes());
    if (content.ok()) layer.content = *std::move(content);
  }
  LOG_IF(WARNING, failed > 0) << "layer.indexes_not_opened count=" << failed;
  MutexLock lock(&mutex_);
  for (auto& [id, row] : mounts_) {
    auto it = opened.find({row.blob.index_digest, row.blob.layer_digest});
    if (it == opened.end()) continue;
    if (row.index == nullptr) row.index = it->second.index;
    if (row.content == nullptr) row.content = it->second.content;
  }
}

void LayerService::LetGoOfEvicted() {
  std::set<std::shared_ptr<cache::LayerContent>> contents;
  {
    MutexLock lock(&mutex_);
    for (const auto& [id, row] : mounts_) {
      if (row.content != nullptr) contents.insert(row.content);
    }
  }
  std::erase_if(contents, [](const auto& content) { return !content->unlinked(); });
  if (contents.empty()) return;
  MutexLock lock(&mutex_);
  for (auto& [id, row] : mounts_) {
    if (contents.contains(row.content)) row.content = nullptr;
  }
  // The last ones close when `contents` goes, after the lock.
}

LayerService::IndexPtr LayerService::OpenedAhead(uint64_t mount_id) const {
  MutexLock lock(&mutex_);
  auto it = mounts_.find(mount_id);
  return it == mounts_.end() ? nullptr : it->second.index;
}

std::vector<handover::SampleFile> LayerService::Samples(uint32_t limit, uint64_t deadline_boot_nanos) {
  std::vector<std::pair<uint64_t, handover::MountBlob>> mounts;
  {
    MutexLock lock(&mutex_);
    for (const auto& [id, row] : mounts_) {
      if (!row.detached && !row.private_mount && !row.blob.index_digest.empty())
        mounts.push_back({id, row.blob});
    }
  }
  return SampleMounts(
      mounts.size(),
      [&](size_t i) -> SampledMount {
        absl::StatusOr<std::shared_ptr<layer::Layer>> layer =
            OpenLayer(mounts[i].second, /*verify_index=*/false, OpenedAhead(mounts[i].first));
        return {mounts[i].first, layer.ok() ? *layer : nullptr};
      },
      limit, deadline_boot_nanos, *Clock::Real());
}

absl::StatusOr<handover::Page<handover::HeldMount>> LayerService::HeldMounts(uint64_t after,
                                                                             size_t limit) const {
  handover::Page<handover::HeldMount> page;
  // A row goes before its device does (ForgetMounts), so under the lock the number is that of the device.
  MutexLock lock(&mutex_);
  for (auto it = mounts_.upper_bound(after); it != mounts_.end(); ++it) {
    if (it->second.device < 0) continue;
    if (page.elements.size() == limit) {
      page.more = true;
      break;
    }
    HF_ASSIGN_OR_RETURN(UniqueFd device, DupFd(it->second.device));
    page.elements.push_back({it->first, std::move(device)});
  }
  return page;
}

absl::StatusOr<std::shared_ptr<layer::Layer>> LayerService::OpenLayer(const handover::MountBlob& blob,
                                                                      bool verify_index,
                                                                      IndexPtr opened_ahead) {
  {
    MutexLock lock(&mutex_);
    auto it = layers_.find({blob.index_digest, blob.image_ref});
    if (it != layers_.end()) {
      if (std::shared_ptr<layer::Layer> open = it->second.lock()) return open;
    }
  }
  IndexPtr index = std::move(opened_ahead);
  if (index == nullptr) {
    HF_ASSIGN_OR_RETURN(index, OpenIndex(blob.layer_digest, blob.index_digest, verify_index));
  }
  if (index->numbering_version() != blob.numbering_version ||
      index->info().layer_digest != blob.layer_digest) {
    return DataLoss("index " + blob.index_digest + " is not the one this mount was made with");
  }
  HF_ASSIGN_OR_RETURN(
      std::shared_ptr<cache::LayerContent> content,
      parts_.store->OpenLayer(ContentKey(*index), index->chunk_count(), index->content_bytes()));
  fetch::BlobRef ref;
  HF_ASSIGN_OR_RETURN(ref.image, fetch::ParseImageReference(blob.image_ref));
  ref.digest = blob.layer_digest;
  std::shared_ptr<layer::Layer> layer =
      parts_.reader->Open(index, content, parts_.client->Source(ref), ref.image.host);
  MutexLock lock(&mutex_);
  std::weak_ptr<layer::Layer>& slot = layers_[{blob.index_digest, blob.image_ref}];
  if (std::shared_ptr<layer::Layer> other = slot.lock()) return other;  // opened meanwhile by another mount
  slot = layer;
  return layer;
}

bool LayerService::IsMounted(uint64_t snapshot_id) const {
  MutexLock lock(&mutex_);
  for (const auto& [id, row] : mounts_) {
    if (row.blob.snapshot_id == snapshot_id && !row.detached) return true;
  }
  return false;
}

absl::Status LayerService::Unmount(uint64_t snapshot_id, bool* still_used) {
  *still_used = false;
  std::vector<uint64_t> ids;
  {
    MutexLock lock(&mutex_);
    for (const auto& [id, row] : mounts_) {
      if (row.blob.snapshot_id != snapshot_id) continue;
      if (row.detached) {
        *still_used = true;
      } else {
        ids.push_back(id);
      }
    }
  }
  for (uint64_t id : ids) {
    TraceSpan span(parts_.trace, "layer.unmount",
                   "mount=" + std::to_string(id) + " snapshot=" + std::to_string(snapshot_id));
    HF_ASSIGN_OR_RETURN(handover::MountState state, parts_.vault->Unmount(id));
    if (state == handover::MountState::kGone) {
      ForgetMounts({id});
      continue;
    }
    *still_used = true;
    MutexLock lock(&mutex_);
    if (auto it = mounts_.find(id); it != mounts_.end()) it->second.detached = true;
  }
  return absl::OkStatus();
}

void LayerService::ForgetMounts(const std::vector<uint64_t>& mount_ids) {
  for (uint64_t id : mount_ids) {
    std::map<uint64_t, MountRow>::node_type row;  // what it holds open closes off the lock
    {
      MutexLock lock(&mutex_);
      row = mounts_.extract(id);
    }
    parts_.server->RemoveMount(id);
  }
  // Nobody holds the layers of the mounts that ended; drop their rows.
  MutexLock lock(&mutex_);
  for (auto it = layers_.begin(); it != layers_.end();) {
    it = it->second.expired() ? layers_.erase(it) : std::next(it);
  }
}

void LayerService::Usage(const std::string& layer_digest, const std::string& index_sha256, uint64_t* bytes,
                         uint64_t* inodes) {
  *bytes = 0;
  *inodes = 0;
  absl::StatusOr<IndexPtr> index = OpenIndex(layer_digest, index_sha256, /*verify=*/false);
  if (!index.ok()) return;
  *inodes = (*index)->node_count();
  auto content =
      parts_.store->OpenLayer(ContentKey(**index), (*index)->chunk_count(), (*index)->content_bytes());
  if (content.ok()) *bytes = (*content)->bytes();
}

bool LayerService::Serves(uint64_t mount_id) const {
  MutexLock lock(&mutex_);
  return mounts_.count(mount_id) != 0;
}

std::vector<uint64_t> LayerService::ServedMounts() const {
  MutexLock lock(&mutex_);
  std::vector<uint64_t> ids;
  for (const auto& [id, row] : mounts_) {
    if (!row.private_mount) ids.push_back(id);
  }
  return ids;
}

size_t LayerService::mount_count() const {
  MutexLock lock(&mutex_);
  return mounts_.size();
}

std::vector<handover::LayerInfo> LayerService::Layers() const {
  std::map<std::string, handover::LayerInfo> by_digest;
  std::vector<std::shared_ptr<layer::Layer>> open;
  {
    MutexLock lock(&mutex_);
    for (const auto& [id, row] : mounts_) {
      if (row.blob.layer_digest.empty()) continue;  // its blob could not be read
      handover::LayerInfo& info = by_digest[row.blob.layer_digest];
      info.digest = row.blob.layer_digest;
      if (info.image.empty()) info.image = row.blob.image_ref;
      info.compressed_bytes = row.blob.blob_size;
      info.index_digest = row.blob.index_digest;
      info.mounts++;
    }
    for (const auto& [key, weak] : layers_) {
      if (std::shared_ptr<layer::Layer> layer = weak.lock()) open.push_back(std::move(layer));
    }
  }
  for (const std::shared_ptr<layer::Layer>& layer : open) {
    auto it = by_digest.find(layer->index().info().layer_digest);
    if (it == by_digest.end()) continue;
    layer::LayerStats stats = layer->stats();
    it->second.fetched_bytes += stats.fetched_bytes;
    it->second.touched_bytes += stats.touched_compressed_bytes;
  }
  std::vector<handover::LayerInfo> layers;
  for (auto& [digest, info] : by_digest) {
    absl::StatusOr<IndexPtr> index =
        layer::LayerIndex::Open(parts_.files->IndexPath(digest, info.index_digest), std::string());
    if (index.ok()) {
      info.content_bytes = (*index)->content_bytes();
      info.files = (*index)->regular_files();
      info.folders = {kLayersFolder + ("/" + HexOf(digest)),
                      kContentFolder + ("/" + HexOf(ContentKey(**index)))};
      auto content =
          parts_.store->OpenLayer(ContentKey(**index), (*index)->chunk_count(), (*index)->content_bytes());
      if (content.ok()) {
        // On disk it is counted in blocks; a layer that is complete shall not look more than complete.
        info.cached_bytes = std::min((*content)->bytes(), info.content_bytes);
        info.last_access_wall_nanos = (*content)->last_access_wall_nanos();
      }
    }
    layers.push_back(std::move(info));
  }
  return layers;
}

}  // namespace holdfast::app
