#include "worker/snapshot/remote_prepare.h"

#include <algorithm>
#include <chrono>
#include <thread>

#include "common/log.h"
#include "glog/logging.h"

namespace holdfast::snapshot {
namespace {

std::chrono::steady_clock::time_point SteadyIn(uint64_t nanos) {
  return std::chrono::steady_clock::now() + std::chrono::nanoseconds(nanos);
}

absl::Status AbortedByHandover() { return absl::AbortedError("the worker is being replaced"); }

}  // namespace

struct RemotePreparer::Flight {
  bool done = false;
  absl::Status status;  // of the call that leads it
};

struct RemotePreparer::Attempt {
  // Set before the thread starts.
  std::vector<LayerRequest> requests;
  std::vector<ParentLayer> parents;
  std::unique_ptr<CreatingIds::Mark> mark;
  std::string folder;
  uint64_t deadline_boot_nanos = 0;
  // Guarded by the preparer's mutex_ from then on.
  bool done = false;
  bool abandoned = false;
  absl::Status status;
  MountedLayer layer;
  size_t used_request = 0;
};

RemotePreparer::~RemotePreparer() {
  MutexLock lock(&mutex_);
  while (running_attempts_ > 0) changed_.Wait(&mutex_);
}

void RemotePreparer::Abort() {
  MutexLock lock(&mutex_);
  aborted_ = true;
  changed_.SignalAll();
}

absl::Status RemotePreparer::Prepare(const std::string& key, const std::string& parent,
                                     const Labels& labels) {
  std::string how;
  uint64_t start = parts_.options->clock->BootNanos();
  absl::Status status = Try(key, parent, labels, &how);
  const std::string& target = LabelOr(labels, kTargetLabel);
  uint64_t millis = (parts_.options->clock->BootNanos() - start) / 1'000'000;
  if (absl::IsAborted(status)) return status;
  if (status.ok()) {
    LOG(INFO) << "snapshot.prepare_remote remote-snapshot-prepared=true key=" << LogValue(key)
              << " target=" << LogValue(target) << " parent=" << LogValue(parent) << " how=" << how
              << " ms=" << millis;
    return AlreadyExists("target snapshot " + target);
  }
  LOG(WARNING) << "snapshot.prepare_remote remote-snapshot-prepared=false key=" << LogValue(key)
               << " target=" << LogValue(target) << " parent=" << LogValue(parent)
               << " reason=" << LogValue(FromAbsl(status.message())) << " ms=" << millis;
  return absl::OkStatus();
}

// A row that another image's author had prepared under this chain id is not trusted for this one when it is
// of another blob, or was verified against another TOC: nothing else ties lazily read bytes to the blob.
RemotePreparer::Target RemotePreparer::Find(const std::string& target, const std::string& parent,
                                            const std::vector<LayerRequest>& requests) const {
  Target found = Target::kNone;
  for (const Row& row : parts_.store->ChildrenOf(parent)) {
    if (row->kind != metadata::Kind::kCommitted || LabelOr(row->labels, kTargetLabel) != target) continue;
    bool same_blob = row->lazy_digest.empty();
    for (const LayerRequest& request : requests) {
      same_blob = same_blob || (request.layer_digest == row->lazy_digest &&
                                request.toc_digest == LabelOr(row->labels, kTocDigestLabel));
    }
    if (!same_blob) return Target::kFromAnotherBlob;
    found = Target::kThere;
  }
  return found;
}

absl::Status RemotePreparer::Try(const std::string& key, const std::string& parent, const Labels& labels,
                                 std::string* how) {
  const std::string& target = LabelOr(labels, kTargetLabel);
  if (parent.empty() && !LabelOr(labels, kParentChainLabel).empty()) {
    return FailedPrecondition("layers are unpacked in parallel, the parent is not known yet");
  }
  absl::StatusOr<std::vector<LayerRequest>> requests = LayerRequestsFrom(labels, key);
  Target found = Find(target, parent, requests.ok() ? *requests : std::vector<LayerRequest>());
  *how = "reused";
  if (found == Target::kThere) return absl::OkStatus();
  if (found == Target::kFromAnotherBlob) return FailedPrecondition("the target is served from another blob");
  HF_RETURN_IF_ERROR(requests.status());

  std::shared_ptr<Flight> flight;
  bool leader = false;
  {
    MutexLock lock(&mutex_);
    if (aborted_) return AbortedByHandover();
    auto [it, inserted] = flights_.try_emplace({target, parent}, nullptr);
    if (inserted) it->second = std::make_shared<Flight>();
    flight = it->second;
    leader = inserted;
  }
  if (!leader) {
    HF_RETURN_IF_ERROR(WaitFor(flight));
    *how = "shared";
    if (Find(target, parent, *requests) == Target::kThere) return absl::OkStatus();
    return Unavailable("the same layer's preparation by another call left nothing to share");
  }
  *how = "mounted";
  absl::Status status = Find(target, parent, *requests) == Target::kThere
                            ? absl::OkStatus()  // committed between our first look and our turn
                            : Lead(parent, labels, *requests,
                                   parts_.options->clock->BootNanos() + parts_.options->lazy_deadline_nanos);
  MutexLock lock(&mutex_);
  flight->done = true;
  flight->status = status;
  flights_.erase({target, parent});
  changed_.SignalAll();
  return status;
}

absl::Status RemotePreparer::WaitFor(const std::shared_ptr<Flight>& flight) {
  auto deadline = SteadyIn(parts_.options->lazy_deadline_nanos);
  MutexLock lock(&mutex_);
  while (!flight->done) {
    if (aborted_) return AbortedByHandover();
    if (!changed_.WaitUntil(&mutex_, deadline)) {
      return DeadlineExceeded("the same layer's preparation by another call takes too long");
    }
  }
  return flight->status;
}

absl::Status RemotePreparer::Lead(const std::string& parent, const Labels& labels,
                                  const std::vector<LayerRequest>& requests, uint64_t deadline) {
  HF_ASSIGN_OR_RETURN(std::vector<Row> chain, parts_.parents->Chain(parent));
  metadata::SnapshotRow row;
  row.parent = parent;
  row.kind = metadata::Kind::kCommitted;
  row.labels = WithoutEmpty(labels);
  row.labels[kRemoteLabel] = kRemoteLabelValue;
  row.created_wall_nanos = row.updated_wall_nanos = parts_.options->clock->WallNanos();

  auto attempt = std::make_shared<Attempt>();
  do {  // an id whose folder was left behind by a lost store is skipped
    HF_ASSIGN_OR_RETURN(row.id, parts_.store->NextId());
    row.key = "remote/" + std::to_string(row.id);
    attempt->mark = std::make_unique<CreatingIds::Mark>(parts_.creating, row.id);
    absl::Status created = parts_.folders->Create(row, "");
    if (created.ok()) break;
    if (absl::IsAlreadyExists(created)) continue;
    attempt->mark.reset();
    parts_.reaper->Schedule(row.id);
    return created;
  } while (true);
  attempt->requests = requests;
  attempt->parents = parts_.parents->Describe(chain);
  attempt->folder = parts_.folders->Fs(row.id);
  attempt->deadline_boot_nanos = deadline;

  bool left_behind = false;
  absl::Status status = MountWithin(attempt, deadline, &left_behind);
  if (left_behind) return status;
  if (status.ok()) {
    const LayerRequest& used = requests[attempt->used_request];
    row.lazy_digest = used.layer_digest;
    row.lazy_image = used.image_ref;
    row.lazy_tenant = used.tenant;
    row.lazy_index = attempt->layer.index_sha256;
    row.lazy_blob_size = attempt->layer.blob_size;
    status = CommitTarget(row);
  }
  attempt->mark.reset();
  if (!status.ok()) parts_.reaper->Schedule(row.id);
  return status;
}

// Waits for the mounter until the deadline or an Abort; after either the attempt's thread owns the mark and
// cleans up.
absl::Status RemotePreparer::MountWithin(const std::shared_ptr<Attempt>& attempt, uint64_t deadline,
                                         bool* left_behind) {
  {
    MutexLock lock(&mutex_);
    running_attempts_++;
  }
  std::thread([this, attempt] { RunAttempt(attempt); }).detach();
  uint64_t now = parts_.options->clock->BootNanos();
  auto give_up = SteadyIn(deadline > now ? deadline - now : 0);
  MutexLock lock(&mutex_);
  while (!attempt->done) {
    bool in_time = aborted_ || changed_.WaitUntil(&mutex_, give_up);
    if (attempt->done) break;
    if (in_time && !aborted_) continue;
    attempt->abandoned = true;
    *left_behind = true;
    return aborted_ ? AbortedByHandover() : DeadlineExceeded("the layer was not there before the deadline");
  }
  return attempt->status;
}

void RemotePreparer::RunAttempt(const std::shared_ptr<Attempt>& attempt) {
  absl::Status status;
  MountedLayer layer;
  const uint64_t id = attempt->mark->id();
  size_t used = 0;
  for (size_t i = 0; i < attempt->requests.size(); i++) {
    if (i > 0 && parts_.options->clock->BootNanos() >= attempt->deadline_boot_nanos) break;
    absl::StatusOr<MountedLayer> mounted = parts_.mounter->Mount(
        attempt->requests[i], id, attempt->folder, attempt->parents, attempt->deadline_boot_nanos);
    status = mounted.status();
    used = i;
    if (!mounted.ok()) continue;
    layer = *mounted;
    break;
  }
  bool abandoned = false;
  {
    MutexLock lock(&mutex_);
    attempt->done = true;
    attempt->status = status;
    attempt->layer = layer;
    attempt->used_request = used;
    abandoned = attempt->abandoned;
    if (!abandoned) running_attempts_--;
    changed_.SignalAll();
  }
  // `this` may be gone from here on unless the attempt was abandoned: then its destructor still waits for us.
  if (!abandoned) return;
  LOG(INFO) << "snapshot.late_mount id=" << id << " ok=" << status.ok() << " undone=true";
  bool still_used = false;
  if (status.ok()) static_cast<void>(parts_.mounter->Unmount(id, &still_used));
  attempt->mark.reset();
  parts_.reaper->Schedule(id);
  MutexLock lock(&mutex_);
  running_attempts_--;
  changed_.SignalAll();
}

absl::Status RemotePreparer::CommitTarget(const metadata::SnapshotRow& row) {
  HF_RETURN_IF_ERROR(parts_.folders->Describe(row));
  HF_RETURN_IF_ERROR(PassFault(parts_.options->faults, "snapshot.remote.before_row"));
  {
    Claims::Hold hold = parts_.claims->Take({row.key}, {row.parent});
    // The network took its time: the parent may be gone by now.
    if (!row.parent.empty() && !parts_.store->Get(row.parent).has_value())
      return NotFound("parent " + row.parent);
    HF_RETURN_IF_ERROR(parts_.store->Apply({{row}, {}}));
  }
  return PassFault(parts_.options->faults, "snapshot.remote.after_row");
}

}  // namespace holdfast::snapshot
