#include "worker/cache/content_store.h"

#include <dirent.h>
#include <sys/statvfs.h>

#include <algorithm>
#include <cerrno>
#include <map>

#include "common/mutex.h"
#include "glog/logging.h"
#include "worker/cache/layer_content.h"
#include "worker/cache/layer_folder.h"

namespace holdfast::cache {
namespace {

constexpr uint64_t kSecondNanos = 1'000'000'000;
constexpr uint64_t kIdleNanos = 60 * kSecondNanos;
constexpr std::string_view kDigestPrefix = "sha256:";

bool IsHex64(std::string_view text) {
  return text.size() == 64 && std::all_of(text.begin(), text.end(), [](char c) {
           return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
         });
}

absl::StatusOr<std::string> HexOf(const std::string& content_key) {
  std::string_view digest = content_key;
  if (digest.substr(0, kDigestPrefix.size()) != kDigestPrefix ||
      !IsHex64(digest.substr(kDigestPrefix.size()))) {
    return InvalidArgument("not a sha256 digest: '" + content_key + "'");
  }
  return std::string(digest.substr(kDigestPrefix.size()));
}

absl::Status CheckVaultId(const std::string& vault_id) {
  if (!vault_id.empty() && vault_id.size() <= sizeof(PresenceHeader::vault_id)) return absl::OkStatus();
  return InvalidArgument("the vault id must be 1 to 32 characters");
}

std::vector<std::string> LayersIn(const std::string& root) {
  std::vector<std::string> layers;
  std::unique_ptr<DIR, int (*)(DIR*)> dir(opendir(root.c_str()), closedir);
  if (dir == nullptr) return layers;
  while (const dirent* entry = readdir(dir.get())) {
    if (IsHex64(entry->d_name)) layers.emplace_back(entry->d_name);
  }
  return layers;
}

// Free bytes of the store's file system, asked for once a second.
class FreeSpace {
 public:
  FreeSpace(const std::string& root, const Clock* clock) : root_(root), clock_(clock) {}
  uint64_t Get(bool fresh) {
    MutexLock lock(&mutex_);
    uint64_t now = clock_->BootNanos();
    if (fresh || asked_ == 0 || now - asked_ >= kSecondNanos) {
      struct statvfs fs {};
      // Unknown is not full: the write itself tells.
      free_ = statvfs(root_.c_str(), &fs) == 0 ? fs.f_bavail * fs.f_frsize : UINT64_MAX;
      asked_ = now;
    }
    return free_;
  }
  void Take(uint64_t bytes) {
    MutexLock lock(&mutex_);
    free_ -= std::min(free_, bytes);
  }

 private:
  const std::string root_;
  const Clock* const clock_;
  Mutex mutex_;
  uint64_t free_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t asked_ ABSL_GUARDED_BY(mutex_) = 0;
};

// The store's state; every open layer holds it.
// Locks: evict_mutex_ (one eviction at a time) before scan_mutex_ before mutex_ (the map); no layer is
// created, destroyed or evicted under mutex_.
class StoreState final : public StoreShared {
 public:
  explicit StoreState(StoreOptions store_options)
      : StoreShared(std::move(store_options)), free_space_(options.root, options.clock) {}

  // Learns what layers that are not open occupy. At the first need of it, not at the start: it looks at every
  // folder of the store, and reads wait for a worker that starts.
  void EnsureScanned();
  // `self` is this object: the layer shares it.
  absl::StatusOr<std::shared_ptr<LayerContent>> OpenLayer(std::shared_ptr<StoreShared> self,
                                                          const std::string& hex, uint64_t chunk_count,
                                                          uint64_t content_bytes, bool create);
  absl::Status Remove(const std::string& hex);
  absl::Status MakeRoom(uint64_t bytes) override;
  void FlushAll();
  void AllowEviction(bool allow) {
    may_evict_ = allow;
    if (allow) return;
    MutexLock lock(&evict_mutex_);  // one under way stops at its next layer
  }
  absl::Status Renew();

 private:
  struct Entry {
    std::shared_ptr<LayerAccount> account;
    std::weak_ptr<LayerContentImpl> live;
  };
  struct Candidate {
    std::string hex;
    std::shared_ptr<LayerAccount> account;
    std::shared_ptr<LayerContentImpl> held;  // null: nobody holds it
  };

  void Scan();
  bool Fits(uint64_t bytes, bool fresh);
  bool EvictFor(uint64_t bytes) ABSL_EXCLUSIVE_LOCKS_REQUIRED(evict_mutex_);
  std::vector<Candidate> Candidates();
  std::vector<std::shared_ptr<LayerContentImpl>> Held();

  FreeSpace free_space_;
  std::atomic<bool> may_evict_{false};
  std::atomic<uint64_t> next_try_boot_nanos_{0};  // after an eviction that did not make room
  Mutex evict_mutex_;
  Mutex scan_mutex_;
  bool scanned_ ABSL_GUARDED_BY(scan_mutex_) = false;
  Mutex mutex_;
  std::map<std::string, Entry> layers_ ABSL_GUARDED_BY(mutex_);
};

void StoreState::EnsureScanned() {
  MutexLock lock(&scan_mutex_);
  if (!scanned_) Scan();
  scanned_ = true;
}

void StoreState::Scan() {
  for (const std::string& hex : LayersIn(options.root)) {
    FolderUsage usage = UsageOf(options.root + "/" + hex);
    MutexLock lock(&mutex_);
    Entry& entry = layers_[hex];
    if (entry.account != nullptr) continue;  // it was opened, and counts for itself
    entry.account = std::make_shared<LayerAccount>();
    entry.account->access_hour = usage.access_hour;
    SetBytes(entry.account.get(), usage.bytes);
  }
}

absl::StatusOr<std::shared_ptr<LayerContent>> StoreState::OpenLayer(std::shared_ptr<StoreShared> self,
                                                                    const std::string& hex,
                                                                    uint64_t chunk_count,
                                                                    uint64_t content_bytes, bool create) {
  std::shared_ptr<LayerAccount> account;
  std::shared_ptr<LayerContentImpl> live;
  {
    MutexLock lock(&mutex_);
    Entry& entry = layers_[hex];
    if (entry.account == nullptr) entry.account = std::make_shared<LayerAccount>();
    account = entry.account;
    live = entry.live.lock();
  }
  if (live == nullptr) {
    account->active_boot_nanos = options.clock->BootNanos();
    PresenceIdentity identity{hex, chunk_count, content_bytes, "", options.boot_id};
    absl::StatusOr<std::shared_ptr<LayerContentImpl>> made =
        LayerContentImpl::Open(std::move(self), account, std::move(identity), create);
    if (!made.ok()) {
      SetBytes(account.get(), UsageOf(options.root + "/" + hex).bytes);
      return made.status();
    }
    std::shared_ptr<LayerContentImpl> opened = std::move(*made);
    MutexLock lock(&mutex_);
    Entry& entry = layers_[hex];
    live = entry.live.lock();
    if (live == nullptr) {
      entry.account = account;
      entry.live = opened;
      live = std::move(opened);
    }
  }
  HF_RETURN_IF_ERROR(live->RenewIdentity());  // the vault id may have changed while it was opened
  if (!live->SameShape(chunk_count, content_bytes)) {
    return FailedPrecondition("content " + hex + " is open with another number of chunks");
  }
  return std::static_pointer_cast<LayerContent>(live);
}

absl::Status StoreState::Remove(const std::string& hex) {
  std::shared_ptr<LayerAccount> account;
  {
    MutexLock lock(&mutex_);
    auto it = layers_.find(hex);
    if (it != layers_.end()) {
      if (!it->second.live.expired()) return FailedPrecondition("content " + hex + " is in use");
      account = it->second.account;
    }
  }
  auto folder = LayerFolder::Lock(options.root + "/" + hex, /*create=*/false);
  if (folder.ok()) {
    HF_RETURN_IF_ERROR(folder->Remove().status());
  } else if (folder.status().code() != absl::StatusCode::kNotFound) {
    return folder.status();
  }
  if (account == nullptr) return absl::OkStatus();
  SetBytes(account.get(), 0);
  MutexLock lock(&mutex_);
  auto it = layers_.find(hex);
  // Somebody may have opened it meanwhile: he then finds his files unlinked and makes new ones.
  if (it != layers_.end() && it->second.live.expired()) layers_.erase(it);
  return absl::OkStatus();
}

bool StoreState::Fits(uint64_t bytes, bool fresh) {
  uint64_t total = static_cast<uint64_t>(std::max<int64_t>(0, total_bytes));
  if (options.limit_bytes != 0 && (bytes > options.limit_bytes || total > options.limit_bytes - bytes))
    return false;
  if (options.free_floor_bytes == 0) return true;
  uint64_t free = free_space_.Get(fresh);
  return free >= bytes && free - bytes >= options.free_floor_bytes;
}

absl::Status StoreState::MakeRoom(uint64_t bytes) {
  if (options.limit_bytes != 0) EnsureScanned();
  bool fits = Fits(bytes, /*fresh=*/false);
  if (!fits && may_evict_ && options.clock->BootNanos() >= next_try_boot_nanos_) {
    MutexLock lock(&evict_mutex_);
    fits = Fits(bytes, /*fresh=*/true) || EvictFor(bytes);
    if (!fits) next_try_boot_nanos_ = options.clock->BootNanos() + kSecondNanos;
  }
  if (!fits) return ResourceExhausted("the cache's size limit or free-space floor is reached");
  free_space_.Take(bytes);
  return absl::OkStatus();
}

bool StoreState::EvictFor(uint64_t bytes) {
  EnsureScanned();
  uint64_t now = options.clock->BootNanos();
  for (const Candidate& layer : Candidates()) {
    if (Fits(bytes, /*fresh=*/true)) return true;
    if (!may_evict_) return false;
    uint64_t before = layer.account->bytes;
    if (layer.held == nullptr) {
      // FailedPrecondition: opened since the list was made.
      if (absl::Status status = Remove(layer.hex); !status.ok()) continue;
    } else {
      if (now - layer.account->active_boot_nanos < kIdleNanos) continue;
      layer.held->Evict();
    }
    uint64_t freed = before - std::min(before, layer.account->bytes.load());
    evicted_bytes += freed;
    LOG(INFO) << "cache.evicted content=" << layer.hex << " bytes=" << freed
              << " held=" << (layer.held != nullptr);
  }
  return Fits(bytes, /*fresh=*/true);
}

std::vector<StoreState::Candidate> StoreState::Candidates() {
  std::vector<Candidate> candidates;
  {
    MutexLock lock(&mutex_);
    for (const auto& [hex, entry] : layers_) candidates.push_back({hex, entry.account, entry.live.lock()});
  }
  struct Ranked {
    bool held;
    uint32_t hour;
    uint64_t active;
    size_t position;
    auto operator<=>(const Ranked&) const = default;
  };
  std::vector<Ranked> order;
  for (size_t i = 0; i < candidates.size(); i++) {
    const Candidate& layer = candidates[i];
    if (layer.held == nullptr) {
      // Another worker may have added to it or read it.
      FolderUsage usage = UsageOf(options.root + "/" + layer.hex);
      SetBytes(layer.account.get(), usage.bytes);
      layer.account->access_hour = std::max(layer.account->access_hour.load(), usage.access_hour);
    }
    order.push_back({layer.held != nullptr, layer.account->access_hour, layer.account->active_boot_nanos, i});
  }
  std::sort(order.begin(), order.end());
  std::vector<Candidate> sorted;
  for (const Ranked& ranked : order) sorted.push_back(std::move(candidates[ranked.position]));
  return sorted;
}

std::vector<std::shared_ptr<LayerContentImpl>> StoreState::Held() {
  std::vector<std::shared_ptr<LayerContentImpl>> held;
  MutexLock lock(&mutex_);
  for (const auto& [hex, entry] : layers_) {
    if (auto layer = entry.live.lock()) held.push_back(std::move(layer));
  }
  return held;
}

absl::Status StoreState::Renew() {
  absl::Status first;
  for (const auto& layer : Held()) first.Update(layer->RenewIdentity());
  return first;
}

void StoreState::FlushAll() {
  for (const auto& layer : Held()) layer->Flush();
}

class ContentStoreImpl final : public ContentStore {
 public:
  explicit ContentStoreImpl(std::shared_ptr<StoreState> state) : state_(std::move(state)) {}

  absl::StatusOr<std::shared_ptr<LayerContent>> OpenLayer(const std::string& content_key,
                                                          uint64_t chunk_count,
                                                          uint64_t content_bytes) override {
    HF_ASSIGN_OR_RETURN(std::string hex, HexOf(content_key));
    return state_->OpenLayer(state_, hex, chunk_count, content_bytes, /*create=*/true);
  }
  absl::StatusOr<std::shared_ptr<LayerContent>> FindLayer(const std::string& content_key,
                                                          uint64_t chunk_count,
                                                          uint64_t content_bytes) override {
    HF_ASSIGN_OR_RETURN(std::string hex, HexOf(content_key));
    return state_->OpenLayer(state_, hex, chunk_count, content_bytes, /*create=*/false);
  }
  void AllowEviction(bool allow) override { state_->AllowEviction(allow); }
  absl::Status SetVaultId(const std::string& vault_id) override {
    HF_RETURN_IF_ERROR(CheckVaultId(vault_id));
    state_->SetVaultId(vault_id);
    return state_->Renew();
  }
  void SetWriting(Writing writing) override { state_->SetWriting(writing); }
  StoreStats stats() const override {
    state_->EnsureScanned();
    StoreStats stats;
    stats.bytes = static_cast<uint64_t>(std::max<int64_t>(0, state_->total_bytes));
    stats.limit_bytes = state_->options.limit_bytes;
    stats.evicted_bytes = state_->evicted_bytes;
    stats.damaged_chunks = state_->damaged_chunks;
    stats.damaged_layers = state_->damaged_layers;
    stats.unstored_bytes = state_->unstored_bytes;
    return stats;
  }
  void Flush() override { state_->FlushAll(); }

 private:
  const std::shared_ptr<StoreState> state_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<ContentStore>> ContentStore::Open(const StoreOptions& options) {
  StoreOptions complete = options;
  HF_RETURN_IF_ERROR(CheckVaultId(complete.vault_id));
  if (complete.boot_id.empty()) {
    HF_ASSIGN_OR_RETURN(complete.boot_id, ReadFile("/proc/sys/kernel/random/boot_id"));
    while (!complete.boot_id.empty() && complete.boot_id.back() == '\n') complete.boot_id.pop_back();
  }
  if (complete.boot_id.size() > sizeof(PresenceHeader::boot_id))
    return InvalidArgument("the boot id is too long");
  HF_RETURN_IF_ERROR(MakeDirs(complete.root));
  auto state = std::make_shared<StoreState>(std::move(complete));
  return std::make_unique<ContentStoreImpl>(std::move(state));
}

}  // namespace holdfast::cache
