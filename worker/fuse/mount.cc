#include "worker/fuse/mount.h"

#include <algorithm>

#include "common/log.h"
#include "glog/logging.h"

namespace holdfast::fuse {

absl::StatusOr<std::shared_ptr<layer::Layer>> Mount::GetLayer(const Clock& clock) {
  {
    MutexLock lock(&mutex);
    while (opening_) layer_changed_.Wait(&mutex);
    if (layer_) return layer_;
    if (!open_error_.ok() && clock.BootNanos() < open_again_nanos_) return open_error_;
    opening_ = true;
  }
  absl::StatusOr<std::shared_ptr<layer::Layer>> opened = spec_.open_layer();
  if (opened.ok() && *opened == nullptr) opened = Internal("open_layer returned nothing");
  MutexLock lock(&mutex);
  opening_ = false;
  layer_changed_.SignalAll();
  if (opened.ok()) {
    layer_ = *opened;
    open_error_ = absl::OkStatus();
  } else {
    if (open_error_.ok()) {
      LOG(ERROR) << "fuse.layer_not_opened mount=" << id() << " layer=" << description()
                 << " error=" << LogValue(opened.status().ToString());
    }
    open_error_ = opened.status();
    open_again_nanos_ = clock.BootNanos() + 1'000'000'000;
  }
  return opened;
}

void Mount::BeginReceive() {
  MutexLock lock(&mutex);
  receiving_++;
}

void Mount::EndReceive(uint64_t unique, uint32_t* marks) {
  MutexLock lock(&mutex);
  receiving_--;
  if (unique != 0) executing_.push_back({unique, marks});
}

void Mount::BeginExecute(uint64_t unique, uint32_t* marks) {
  MutexLock lock(&mutex);
  executing_.push_back({unique, marks});
}

void Mount::EndExecute(uint64_t unique) {
  MutexLock lock(&mutex);
  std::erase_if(executing_, [&](const Executing& e) { return e.unique == unique; });
}

Mount::Added Mount::AddPending(const PendingRead& read) {
  MutexLock lock(&mutex);
  bool added = pending_.emplace(read.unique, read).second;
  for (const Executing& e : executing_) {
    if (e.unique == read.unique &&
        (Shared(*e.marks).load(std::memory_order_acquire) & HF_MARK_INTERRUPTED) != 0) {
      return added ? Added::kInterrupted : Added::kDuplicateInterrupted;
    }
  }
  return added ? Added::kWaits : Added::kDuplicate;
}

std::optional<PendingRead> Mount::TakePending(uint64_t unique) {
  MutexLock lock(&mutex);
  auto it = pending_.find(unique);
  if (it == pending_.end()) return std::nullopt;
  PendingRead read = std::move(it->second);
  pending_.erase(it);
  return read;
}

std::optional<PendingRead> Mount::FindPending(uint64_t unique) {
  MutexLock lock(&mutex);
  auto it = pending_.find(unique);
  if (it == pending_.end()) return std::nullopt;
  return it->second;
}

std::optional<PendingRead> Mount::Renew(uint64_t unique, uint64_t earliest) {
  MutexLock lock(&mutex);
  auto it = pending_.find(unique);
  if (it == pending_.end()) return std::nullopt;
  PendingRead& read = it->second;
  if (read.deadline_nanos < earliest) {
    read.deadline_nanos = earliest;
    // Whoever frees the record takes the READ from here first, so it is still this READ's.
    Shared(read.ledger->record(read.record)->deadline_ns).store(earliest, std::memory_order_relaxed);
  }
  return read;
}

std::optional<PendingRead> Mount::NextAttempt(uint64_t unique, uint64_t attempt) {
  MutexLock lock(&mutex);
  auto it = pending_.find(unique);
  if (it == pending_.end()) return std::nullopt;
  it->second.attempt = attempt;
  it->second.tries++;
  return it->second;
}

std::vector<PendingRead> Mount::TakeAllPending() {
  MutexLock lock(&mutex);
  std::vector<PendingRead> all;
  all.reserve(pending_.size());
  for (auto& [unique, read] : pending_) all.push_back(std::move(read));
  pending_.clear();
  return all;
}

size_t Mount::pending() {
  MutexLock lock(&mutex);
  return pending_.size();
}

Mount::Interrupted Mount::Interrupt(uint64_t target) {
  MutexLock lock(&mutex);
  auto it = pending_.find(target);
  if (it != pending_.end()) {
    hf_record* record = it->second.ledger->record(it->second.record);
    Shared(record->marks).fetch_or(HF_MARK_INTERRUPTED, std::memory_order_acq_rel);
    return Interrupted::kPending;
  }
  for (const Executing& e : executing_) {
    if (e.unique != target) continue;
    Shared(*e.marks).fetch_or(HF_MARK_INTERRUPTED, std::memory_order_acq_rel);
    return Interrupted::kExecuting;
  }
  return receiving_ > 0 ? Interrupted::kMaybeArriving : Interrupted::kUnknown;
}

}  // namespace holdfast::fuse
