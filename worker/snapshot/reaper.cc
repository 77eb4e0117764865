#include "worker/snapshot/reaper.h"

#include <algorithm>

#include "common/log.h"
#include "glog/logging.h"

namespace holdfast::snapshot {
namespace {

constexpr std::chrono::milliseconds kFirstPause{500};
constexpr std::chrono::milliseconds kLongestPause{600'000};

}  // namespace

Reaper::Reaper(const Folders* folders, LayerMounter* mounter, std::function<FolderUse(uint64_t)> use,
               TraceRing* trace, FaultPoints* faults)
    : folders_(folders), mounter_(mounter), use_(std::move(use)), trace_(trace), faults_(faults) {
  MutexLock lock(&join_mutex_);
  thread_ = std::thread([this] { Run(); });
}

Reaper::~Reaper() { Stop(); }

void Reaper::Stop() {
  stopping_ = true;
  {
    MutexLock lock(&mutex_);
    changed_.SignalAll();
  }
  MutexLock lock(&join_mutex_);
  if (thread_.joinable()) thread_.join();
}

void Reaper::Schedule(uint64_t id) {
  MutexLock lock(&mutex_);
  items_[id] = {std::chrono::steady_clock::now(), kFirstPause};
  changed_.SignalAll();
}

absl::Status Reaper::Sweep(std::chrono::milliseconds wait) {
  Time start = std::chrono::steady_clock::now();
  HF_ASSIGN_OR_RETURN(std::vector<uint64_t> ids, folders_->Ids());
  std::vector<uint64_t> garbage;
  for (uint64_t id : ids) {
    if (use_(id) == FolderUse::kGarbage) garbage.push_back(id);
  }
  MutexLock lock(&mutex_);
  for (uint64_t id : garbage) items_.insert({id, {start, kFirstPause}});
  for (auto& [id, item] : items_) {
    item.due = std::min(item.due, start);
    item.asked = start;
  }
  changed_.SignalAll();
  while (!stopping_ && !AllTriedSince(start)) {
    if (!changed_.WaitUntil(&mutex_, start + wait)) break;
  }
  return absl::OkStatus();
}

bool Reaper::AllTriedSince(Time start) const {
  return std::all_of(items_.begin(), items_.end(),
                     [start](const auto& item) { return item.second.tried >= start; });
}

void Reaper::Run() {
  MutexLock lock(&mutex_);
  while (!stopping_) {
    auto next = std::min_element(items_.begin(), items_.end(),
                                 [](const auto& a, const auto& b) { return a.second.due < b.second.due; });
    if (next == items_.end()) {
      changed_.Wait(&mutex_);
      continue;
    }
    Time now = std::chrono::steady_clock::now();
    if (next->second.due > now) {
      changed_.WaitUntil(&mutex_, next->second.due);
      continue;
    }
    uint64_t id = next->first;
    mutex_.Unlock();
    bool done = Done(id);
    mutex_.Lock();
    // Only this thread erases, so the item is still there.
    auto item = items_.find(id);
    if (done) {
      items_.erase(item);
    } else {
      item->second.tried = now;
      // A sweep that came during this try wants another one.
      bool asked_again = item->second.asked > now;
      item->second.due = std::chrono::steady_clock::now();
      if (!asked_again) item->second.due += item->second.pause;
      item->second.pause = std::min(item->second.pause * 2, kLongestPause);
    }
    changed_.SignalAll();
  }
}

bool Reaper::Done(uint64_t id) {
  switch (use_(id)) {
    case FolderUse::kHasRow:
      return true;
    case FolderUse::kBeingCreated:
      return false;
    case FolderUse::kGarbage:
      break;
  }
  TraceSpan span(trace_, "snapshot.cleanup", "id=" + std::to_string(id));
  absl::Status status = Delete(id);
  if (!status.ok()) {
    span.AddDetail("error=" + LogValue(FromAbsl(status.message())));
    LOG_IF(WARNING, !stopping_) << "snapshot.cleanup_failed id=" << id
                                << " error=" << LogValue(FromAbsl(status.message()));
  }
  return status.ok();
}

absl::Status Reaper::Delete(uint64_t id) {
  if (mounter_->IsMounted(id)) {
    bool still_used = false;
    HF_RETURN_IF_ERROR(mounter_->Unmount(id, &still_used));
    LOG(INFO) << "snapshot.unmounted id=" << id << " still_used=" << still_used;
  }
  HF_RETURN_IF_ERROR(PassFault(faults_, "snapshot.cleanup.before_delete"));
  return RemoveFolder(folders_->Folder(id), stopping_);
}

}  // namespace holdfast::snapshot
