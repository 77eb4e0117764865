// The lazy half of Prepare: makes the target of a layer a committed snapshot that is served over FUSE. Holds
// no lock that any other call wants while it waits for the network.
//
// The mounter runs on a thread of its own: a mounter that overruns its deadline is left behind (its late
// result is undone), so containerd always gets its answer in time. Thread safety: all methods. The destructor
// waits for the mounter's calls that were left behind.
#pragma once

#include <memory>
#include <string>

#include "common/mutex.h"
#include "worker/snapshot/claims.h"
#include "worker/snapshot/creating_ids.h"
#include "worker/snapshot/folders.h"
#include "worker/snapshot/labels.h"
#include "worker/snapshot/parents.h"
#include "worker/snapshot/reaper.h"
#include "worker/snapshot/snapshotter.h"

namespace holdfast::snapshot {

// The parts that the snapshotter and its lazy half share.
struct Parts {
  const Options* options;
  metadata::MetadataStore* store;
  LayerMounter* mounter;
  const Folders* folders;
  Claims* claims;
  CreatingIds* creating;
  Parents* parents;
  Reaper* reaper;
};

class RemotePreparer {
 public:
  explicit RemotePreparer(const Parts& parts) : parts_(parts) {}
  ~RemotePreparer();

  // AlreadyExists: the target is there now, lazy or not. Aborted: Abort was called. OK: it cannot be lazy
  // (the reason is logged), prepare an ordinary snapshot.
  absl::Status Prepare(const std::string& key, const std::string& parent, const Labels& labels);
  // Makes every Prepare that waits, and every later one that would, return Aborted. What is left behind then
  // no longer uses the metadata store.
  void Abort();

 private:
  struct Flight;   // one (target, parent) being prepared
  struct Attempt;  // one call of the mounter
  enum class Target { kNone, kThere, kFromAnotherBlob };

  Target Find(const std::string& target, const std::string& parent,
              const std::vector<LayerRequest>& requests) const;
  absl::Status Try(const std::string& key, const std::string& parent, const Labels& labels, std::string* how);
  absl::Status WaitFor(const std::shared_ptr<Flight>& flight);
  // The leader's work; OK when the target is committed.
  absl::Status Lead(const std::string& parent, const Labels& labels,
                    const std::vector<LayerRequest>& requests, uint64_t deadline);
  // `left_behind`: the attempt goes on and cleans up after itself.
  absl::Status MountWithin(const std::shared_ptr<Attempt>& attempt, uint64_t deadline, bool* left_behind);
  void RunAttempt(const std::shared_ptr<Attempt>& attempt);
  absl::Status CommitTarget(const metadata::SnapshotRow& row);

  const Parts parts_;
  Mutex mutex_;
  CondVar changed_;
  bool aborted_ ABSL_GUARDED_BY(mutex_) = false;
  int running_attempts_ ABSL_GUARDED_BY(mutex_) = 0;
  std::map<std::pair<std::string, std::string>, std::shared_ptr<Flight>> flights_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace holdfast::snapshot
