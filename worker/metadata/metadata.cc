#include "worker/metadata/metadata.h"

#include <poll.h>

#include <cerrno>
#include <cstring>
#include <deque>
#include <set>

#include "absl/strings/numbers.h"
#include "common/clock.h"
#include "common/io.h"
#include "common/mutex.h"
#include "glog/logging.h"
#include "leveldb/cache.h"
#include "leveldb/db.h"
#include "leveldb/env.h"
#include "leveldb/write_batch.h"
#include "worker/metadata/row_codec.h"

namespace holdfast::metadata {
namespace {

constexpr char kRowPrefix[] = "snap/";
constexpr char kNextIdKey[] = "id/next";
constexpr char kSchemaKey[] = "meta/schema";
constexpr char kSchemaValue[] = "1";
// Small, so that little is left in the log for the next open: it happens inside a swap, while containerd
// waits.
constexpr size_t kWriteBufferBytes = 1 << 20;
constexpr size_t kBlockCacheBytes = 256 << 10;  // rows are read once, at open
// Ids are reserved in blocks: one synced write serves this many Prepares; a crash skips at most as many
// numbers.
constexpr uint64_t kIdBlock = 64;
constexpr int kLockRetryMillis = 2;

// LevelDB's own log says nothing an operator needs, and opening it would rename the log of the process that
// holds the lock.
class SilentLogger final : public leveldb::Logger {
 public:
  void Logv(const char*, std::va_list) override {}
};

bool Mentions(const leveldb::Status& status, const char* text) {
  return status.ToString().find(text) != std::string::npos;
}

bool IsLockHeld(const leveldb::Status& status) {
  return status.IsIOError() && Mentions(status, "LOCK") &&
         (Mentions(status, std::strerror(EAGAIN)) || Mentions(status, std::strerror(EACCES)) ||
          Mentions(status, "already held"));
}

// LevelDB reports errno values only as text.
absl::Status FromLevelDb(const leveldb::Status& status, const std::string& folder) {
  if (status.ok()) return absl::OkStatus();
  std::string text = "metadata store " + folder + ": " + status.ToString();
  if (IsLockHeld(status)) return Unavailable(text + " (another worker still holds it)");
  if (Mentions(status, std::strerror(ENOSPC)) || Mentions(status, std::strerror(EDQUOT))) {
    return ResourceExhausted(text);
  }
  if (status.IsCorruption() || status.IsNotFound() || Mentions(status, std::strerror(ENOENT))) {
    return DataLoss(text + " (the store is damaged)");
  }
  return Internal(text);
}

struct Op {
  std::string key;
  std::optional<std::string> value;  // nothing: erase
};

class LevelStore final : public MetadataStore {
 public:
  LevelStore(std::string folder, FaultPoints* faults, LoopWatch* watch)
      : folder_(std::move(folder)), faults_(faults), loop_(LoopWatch::Add(watch, "metadata")) {}

  absl::Status Start(uint64_t lock_wait_nanos) {
    HF_RETURN_IF_ERROR(MakeDirs(folder_));
    uint64_t deadline = Clock::Real()->BootNanos() + lock_wait_nanos;
    while (true) {
      leveldb::Status status = OpenDatabase();
      if (status.ok()) break;
      if (!IsLockHeld(status) || Clock::Real()->BootNanos() >= deadline) return FromLevelDb(status, folder_);
      poll(nullptr, 0, kLockRetryMillis);
    }
    HF_RETURN_IF_ERROR(CheckSchema());
    return Load();
  }

  std::optional<SnapshotRow> Get(const std::string& key) const override {
    std::shared_ptr<const SnapshotRow> row;
    {
      MutexLock lock(&mutex_);
      auto it = rows_.find(key);
      if (it == rows_.end()) return std::nullopt;
      row = it->second;
    }
    return *row;
  }

  std::vector<SnapshotRow> All() const override {
    std::vector<SnapshotRow> result;
    for (const auto& row : Rows()) result.push_back(*row);
    return result;
  }

  std::vector<std::shared_ptr<const SnapshotRow>> Rows() const override {
    MutexLock lock(&mutex_);
    std::vector<std::shared_ptr<const SnapshotRow>> result;
    result.reserve(rows_.size());
    for (const auto& [key, row] : rows_) result.push_back(row);
    return result;
  }

  std::vector<std::shared_ptr<const SnapshotRow>> ChildrenOf(const std::string& parent) const override {
    MutexLock lock(&mutex_);
    std::vector<std::shared_ptr<const SnapshotRow>> result;
    for (auto it = by_parent_.lower_bound({parent, ""}); it != by_parent_.end() && it->first == parent;
         ++it) {
      result.push_back(rows_.at(it->second));
    }
    return result;
  }

  bool HasId(uint64_t id) const override {
    MutexLock lock(&mutex_);
    return ids_.count(id) != 0;
  }

  absl::StatusOr<uint64_t> NextId() override {
    MutexLock lock(&id_mutex_);
    if (next_id_ == reserved_end_) {
      Pending pending;
      pending.ops.push_back({kNextIdKey, std::to_string(reserved_end_ + kIdBlock)});
      HF_RETURN_IF_ERROR(Commit(&pending));
      reserved_end_ += kIdBlock;
    }
    return next_id_++;
  }

  absl::Status Apply(const Batch& batch) override {
    Pending pending;
    pending.batch = &batch;
    for (const std::string& key : batch.erase) pending.ops.push_back({kRowPrefix + key, std::nullopt});
    for (const SnapshotRow& row : batch.put) {
      HF_ASSIGN_OR_RETURN(std::string value, EncodeRow(row));
      pending.ops.push_back({kRowPrefix + row.key, std::move(value)});
    }
    return Commit(&pending);
  }

 private:
  struct Pending {
    std::vector<Op> ops;
    const Batch* batch = nullptr;
    bool done = false;
    absl::Status status;
  };

  leveldb::Status OpenDatabase() {
    leveldb::Options options;
    options.create_if_missing = true;
    options.paranoid_checks = true;
    options.write_buffer_size = kWriteBufferBytes;
    options.max_open_files = 64;
    options.block_cache = cache_.get();
    options.info_log = &logger_;
    leveldb::DB* db = nullptr;
    leveldb::Status status = leveldb::DB::Open(options, folder_, &db);
    db_.reset(db);
    return status;
  }

  absl::Status CheckSchema() {
    std::string value;
    leveldb::Status status = db_->Get(leveldb::ReadOptions(), kSchemaKey, &value);
    if (status.IsNotFound()) {
      leveldb::WriteOptions synced;
      synced.sync = true;
      return FromLevelDb(db_->Put(synced, kSchemaKey, kSchemaValue), folder_);
    }
    HF_RETURN_IF_ERROR(FromLevelDb(status, folder_));
    if (value == kSchemaValue) return absl::OkStatus();
    return FailedPrecondition("metadata store " + folder_ + " has schema " + value + ", this build reads " +
                              kSchemaValue);
  }

  absl::Status Load() {
    MutexLock id_lock(&id_mutex_);
    MutexLock lock(&mutex_);
    leveldb::ReadOptions checked;
    checked.verify_checksums = true;
    checked.fill_cache = false;
    std::unique_ptr<leveldb::Iterator> it(db_->NewIterator(checked));
    uint64_t highest = 0;
    for (it->Seek(kRowPrefix); it->Valid() && it->key().starts_with(kRowPrefix); it->Next()) {
      absl::StatusOr<SnapshotRow> row = DecodeRow({it->value().data(), it->value().size()});
      if (!row.ok()) return Annotate(row.status(), "metadata store " + folder_ + ", " + it->key().ToString());
      highest = std::max(highest, row->id);
      InsertRow(*row);
    }
    HF_RETURN_IF_ERROR(FromLevelDb(it->status(), folder_));
    std::string value;
    leveldb::Status status = db_->Get(checked, kNextIdKey, &value);
    uint64_t next = 1;
    if (status.ok() && !absl::SimpleAtoi(value, &next)) {
      return DataLoss("metadata store " + folder_ + ": " + kNextIdKey + " is not a number");
    }
    if (!status.ok() && !status.IsNotFound()) return FromLevelDb(status, folder_);
    next_id_ = reserved_end_ = std::max(next, highest + 1);
    return absl::OkStatus();
  }

  void InsertRow(const SnapshotRow& row) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    EraseRow(row.key);
    by_parent_.insert({row.parent, row.key});
    ids_.insert(row.id);
    rows_[row.key] = std::make_shared<const SnapshotRow>(row);
  }

  void EraseRow(const std::string& key) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    auto it = rows_.find(key);
    if (it == rows_.end()) return;
    by_parent_.erase({it->second->parent, key});
    ids_.erase(ids_.find(it->second->id));
    rows_.erase(it);
  }

  // Group commit: whoever is first in the queue writes everything that waits, in one synced batch.
  absl::Status Commit(Pending* pending) {
    MutexLock lock(&mutex_);
    queue_.push_back(pending);
    if (faults_ != nullptr) static_cast<void>(faults_->Pass("metadata.write.queued"));
    while (!pending->done && queue_.front() != pending) changed_.Wait(&mutex_);
    if (pending->done) return pending->status;
    std::vector<Pending*> group(queue_.begin(), queue_.end());
    leveldb::WriteBatch repairs = Repairs();
    mutex_.Unlock();
    absl::Status status = WriteGroup(group, std::move(repairs));
    mutex_.Lock();
    for (Pending* member : group) {
      if (status.ok() && member->batch != nullptr) {
        for (const std::string& key : member->batch->erase) EraseRow(key);
        for (const SnapshotRow& row : member->batch->put) InsertRow(row);
      }
      member->status = status;
      member->done = true;
      queue_.pop_front();
    }
    if (status.ok()) uncertain_.clear();
    changed_.SignalAll();
    return status;
  }

  // A batch that was reported as failed may still be in LevelDB's log. What it touched is set back to what
  // callers saw, as part of the next batch.
  leveldb::WriteBatch Repairs() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    leveldb::WriteBatch batch;
    for (const std::string& key : uncertain_) {
      auto it = rows_.find(key);
      if (it == rows_.end()) {
        batch.Delete(kRowPrefix + key);
        continue;
      }
      absl::StatusOr<std::string> value = EncodeRow(*it->second);
      if (value.ok()) batch.Put(kRowPrefix + key, *value);
    }
    return batch;
  }

  // Only the head of the queue is here, so db_ and broken_ need no lock.
  absl::Status WriteGroup(const std::vector<Pending*>& group, leveldb::WriteBatch batch) {
    LoopWatch::Turn turn(loop_.get());
    HF_RETURN_IF_ERROR(PassFault(faults_, "metadata.write.before"));
    if (broken_) HF_RETURN_IF_ERROR(Reopen());
    for (const Pending* member : group) {
      for (const Op& op : member->ops) {
        if (op.value.has_value()) {
          batch.Put(op.key, *op.value);
        } else {
          batch.Delete(op.key);
        }
      }
    }
    leveldb::WriteOptions synced;
    synced.sync = true;
    leveldb::Status written = db_->Write(synced, &batch);
    absl::Status status = FromLevelDb(written, folder_);
    if (status.ok()) status = PassFault(faults_, "metadata.write.after");
    if (!status.ok()) {
      LOG(ERROR) << "metadata.write_failed folder=" << folder_ << " error=" << status.message();
      broken_ = true;
      MutexLock lock(&mutex_);
      for (const Pending* member : group) {
        if (member->batch == nullptr) continue;
        uncertain_.insert(member->batch->erase.begin(), member->batch->erase.end());
        for (const SnapshotRow& row : member->batch->put) uncertain_.insert(row.key);
      }
    }
    return status;
  }

  // After a failed write LevelDB's log has a torn record, behind which it would write records that recovery
  // cannot read. Opening again starts a new log.
  absl::Status Reopen() {
    db_.reset();
    leveldb::Status status = OpenDatabase();
    if (!status.ok()) return FromLevelDb(status, folder_);
    broken_ = false;
    LOG(INFO) << "metadata.reopened folder=" << folder_;
    return absl::OkStatus();
  }

  const std::string folder_;
  FaultPoints* const faults_;
  const std::unique_ptr<LoopWatch::Loop> loop_;  // the head of the queue's
  SilentLogger logger_;
  std::unique_ptr<leveldb::Cache> cache_{leveldb::NewLRUCache(kBlockCacheBytes)};
  std::unique_ptr<leveldb::DB> db_;
  bool broken_ = false;

  mutable Mutex mutex_;  // not held while the disk is written
  CondVar changed_;
  std::deque<Pending*> queue_ ABSL_GUARDED_BY(mutex_);
  std::map<std::string, std::shared_ptr<const SnapshotRow>> rows_ ABSL_GUARDED_BY(mutex_);
  std::set<std::pair<std::string, std::string>> by_parent_ ABSL_GUARDED_BY(mutex_);  // (parent, key)
  std::multiset<uint64_t> ids_ ABSL_GUARDED_BY(mutex_);  // multi: callers may give ids as they like
  std::set<std::string> uncertain_ ABSL_GUARDED_BY(mutex_);

  Mutex id_mutex_ ABSL_ACQUIRED_BEFORE(mutex_);
  uint64_t next_id_ ABSL_GUARDED_BY(id_mutex_) = 1;
  uint64_t reserved_end_ ABSL_GUARDED_BY(id_mutex_) = 1;
};

}  // namespace

absl::StatusOr<std::unique_ptr<MetadataStore>> MetadataStore::Open(const std::string& folder,
                                                                   uint64_t lock_wait_nanos,
                                                                   FaultPoints* faults, LoopWatch* watch) {
  auto store = std::make_unique<LevelStore>(folder, faults, watch);
  HF_RETURN_IF_ERROR(store->Start(lock_wait_nanos));
  return std::unique_ptr<MetadataStore>(std::move(store));
}

}  // namespace holdfast::metadata
