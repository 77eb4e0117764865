// LayerContent over the files of presence_file.h.
//
// Threads: marks and account are atomics; files_ has its own small lock; reopen_mutex_ is held while the
// folder lock is taken and the files are replaced (reopen, eviction). Order: reopen_mutex_, then
// files_mutex_. Neither is held while StoreShared is called.
#pragma once

#include <atomic>
#include <memory>
#include <string>

#include "common/mutex.h"
#include "worker/cache/content_store.h"
#include "worker/cache/presence_file.h"

namespace holdfast::cache {

// What the store keeps about a layer whether or not it is open.
struct LayerAccount {
  std::atomic<uint64_t> bytes{0};              // on disk
  std::atomic<uint32_t> access_hour{0};        // since 1970
  std::atomic<uint64_t> active_boot_nanos{0};  // opened or read in this process; 0 = never
};

// What all layers of a store share; outlives the store while a layer is held.
class StoreShared {
 public:
  explicit StoreShared(StoreOptions store_options)
      : options(std::move(store_options)), vault_id_(options.vault_id) {}
  virtual ~StoreShared() = default;
  // OK when `bytes` more may be stored, after evicting if need be.
  virtual absl::Status MakeRoom(uint64_t bytes) = 0;

  void SetBytes(LayerAccount* account, uint64_t bytes) {
    uint64_t before = account->bytes.exchange(bytes);
    total_bytes += static_cast<int64_t>(bytes) - static_cast<int64_t>(before);
  }
  uint32_t CurrentHour() const;

  // Held while a chunk is stored; says how far it may be.
  class WritePass {
   public:
    explicit WritePass(StoreShared* shared) : shared_(shared) {
      MutexLock lock(&shared_->writing_mutex_);
      shared_->writers_++;
      writing_ = shared_->writing_;
    }
    ~WritePass() {
      MutexLock lock(&shared_->writing_mutex_);
      if (--shared_->writers_ == 0) shared_->no_writers_.SignalAll();
    }
    WritePass(const WritePass&) = delete;
    WritePass& operator=(const WritePass&) = delete;
    ContentStore::Writing writing() const { return writing_; }

   private:
    StoreShared* const shared_;
    ContentStore::Writing writing_;
  };
  ContentStore::Writing writing() const {
    MutexLock lock(&writing_mutex_);
    return writing_;
  }
  void SetWriting(ContentStore::Writing writing) {
    MutexLock lock(&writing_mutex_);
    writing_ = writing;
    if (writing != ContentStore::Writing::kNone) return;
    while (writers_ > 0) no_writers_.Wait(&writing_mutex_);
  }

  // The vault id that marks count under; the epoch changes with it.
  struct Vault {
    std::string id;
    uint64_t epoch = 0;
  };
  Vault vault() const {
    MutexLock lock(&vault_mutex_);
    return {vault_id_, vault_epoch_};
  }
  void SetVaultId(const std::string& id) {
    MutexLock lock(&vault_mutex_);
    vault_id_ = id;
    vault_epoch_++;
  }

  const StoreOptions options;  // vault_id: the first one

  std::atomic<int64_t> total_bytes{0};
  std::atomic<uint64_t> evicted_bytes{0};
  std::atomic<uint64_t> damaged_chunks{0};
  std::atomic<uint64_t> damaged_layers{0};
  std::atomic<uint64_t> unstored_bytes{0};

 private:
  mutable Mutex writing_mutex_;
  CondVar no_writers_;
  int writers_ ABSL_GUARDED_BY(writing_mutex_) = 0;
  ContentStore::Writing writing_ ABSL_GUARDED_BY(writing_mutex_) = ContentStore::Writing::kTrusted;
  mutable Mutex vault_mutex_;
  std::string vault_id_ ABSL_GUARDED_BY(vault_mutex_);
  uint64_t vault_epoch_ ABSL_GUARDED_BY(vault_mutex_) = 0;
};

class LayerContentImpl final : public LayerContent {
 public:
  // `create`: makes what is not there, and what is damaged anew; else NotFound.
  static absl::StatusOr<std::shared_ptr<LayerContentImpl>> Open(std::shared_ptr<StoreShared> shared,
                                                                std::shared_ptr<LayerAccount> account,
                                                                PresenceIdentity identity, bool create);
  ~LayerContentImpl() override;

  std::shared_ptr<const Files> files() const override;
  ChunkState StateOf(const Files& files, uint64_t chunk) const override;
  absl::Status Put(uint64_t chunk, uint64_t store_offset, std::string_view bytes) override;
  void MarkVerified(const Files& files, uint64_t chunk) override;
  void Drop(const Files& files, uint64_t chunk, uint64_t size) override;
  void Touch() override;
  uint64_t bytes() const override { return account_->bytes; }
  bool unlinked() const override;
  int64_t last_access_wall_nanos() const override;

  // Empties the layer: a new generation replaces the files, descriptors held by readers stay valid.
  void Evict();
  // Bytes, then marks and access time, to the disk. Cheap when nothing changed.
  void Flush();
  // Under another vault id than the store's: marks are distrusted and the files named anew.
  absl::Status RenewIdentity();
  bool SameShape(uint64_t chunk_count, uint64_t content_bytes) const {
    return identity_.chunk_count == chunk_count && identity_.content_bytes == content_bytes;
  }

 private:
  LayerContentImpl(std::shared_ptr<StoreShared> shared, std::shared_ptr<LayerAccount> account,
                   PresenceIdentity identity);
  absl::Status Store(uint64_t chunk, uint64_t store_offset, std::string_view bytes);
  // The current files, fit to be written: reopened when another process evicted them, repaired when cut
  // short.
  absl::StatusOr<std::shared_ptr<Files>> WritableFiles();
  absl::StatusOr<std::shared_ptr<Files>> Reopen(const std::shared_ptr<Files>& stale);
  absl::Status OpenFolder(bool create) ABSL_EXCLUSIVE_LOCKS_REQUIRED(reopen_mutex_);
  std::shared_ptr<Files> current() const;
  void SetFiles(std::shared_ptr<Files> files);
  void RepairIfShort(const Files& files);
  void CountBytes(const Files& files);
  void WriteAccessHour(const Files& files);
  PresenceIdentity identity(StoreShared::Vault vault) const;
  std::string folder() const { return shared_->options.root + "/" + identity_.layer_hex; }

  const std::shared_ptr<StoreShared> shared_;
  const std::shared_ptr<LayerAccount> account_;
  const PresenceIdentity identity_;  // but for the vault id, which the store may change: identity()
  std::atomic<bool> dirty_{false};
  std::atomic<bool> touched_{false};
  std::atomic<uint64_t> other_bytes_{0};  // blocks of the folder that are not the content file's
  Mutex reopen_mutex_;
  uint64_t vault_epoch_ ABSL_GUARDED_BY(reopen_mutex_) = 0;  // of the id that the files are named by
  uint64_t retry_boot_nanos_ ABSL_GUARDED_BY(reopen_mutex_) =
      0;  // files that store nothing: when to try again
  mutable Mutex files_mutex_;
  std::shared_ptr<Files> files_ ABSL_GUARDED_BY(files_mutex_);
};

}  // namespace holdfast::cache
