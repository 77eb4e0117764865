// For tests: a LayerMounter that mounts a tmpfs with one file per layer. Calls can be made to fail or to
// hang. Everything is unmounted by the destructor. Thread-safe.
#pragma once

#include <fcntl.h>
#include <sys/mount.h>
#include <unistd.h>

#include <chrono>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "common/io.h"
#include "common/mutex.h"
#include "worker/snapshot/layer_mounter.h"

namespace holdfast::snapshot {

class FakeMounter final : public LayerMounter {
 public:
  ~FakeMounter() override {
    for (const auto& [id, folder] : mounted_) umount2(folder.c_str(), MNT_DETACH);
  }

  absl::StatusOr<MountedLayer> Mount(const LayerRequest& request, uint64_t snapshot_id,
                                     const std::string& folder, const std::vector<ParentLayer>& parents,
                                     uint64_t) override {
    MutexLock lock(&mutex_);
    requests_.push_back(request);
    parents_ = parents;
    changed_.SignalAll();
    while (hang_) changed_.Wait(&mutex_);
    if (auto it = failures_.find(request.image_ref); it != failures_.end()) return it->second;
    HF_RETURN_IF_ERROR(MountLocked(request.layer_digest, snapshot_id, folder));
    return MountedLayer{"index-of-" + request.layer_digest, 4711};
  }

  absl::Status Remount(const std::string& layer_digest, const std::string&, const std::string&, uint64_t,
                       uint64_t snapshot_id, const std::string& folder) override {
    MutexLock lock(&mutex_);
    remounts_++;
    if (!remount_failure_.ok()) return remount_failure_;
    return MountLocked(layer_digest, snapshot_id, folder);
  }

  bool IsMounted(uint64_t snapshot_id) const override {
    MutexLock lock(&mutex_);
    return mounted_.count(snapshot_id) != 0;
  }

  absl::Status Unmount(uint64_t snapshot_id, bool* still_used) override {
    MutexLock lock(&mutex_);
    unmounts_++;
    changed_.SignalAll();
    if (unmount_failures_ > 0) return unmount_failures_--, ErrnoStatus(EBUSY, "umount");
    *still_used = false;
    auto it = mounted_.find(snapshot_id);
    if (it == mounted_.end()) return absl::OkStatus();
    if (umount2(it->second.c_str(), MNT_DETACH) != 0) return ErrnoStatus(errno, "umount");
    mounted_.erase(it);
    return absl::OkStatus();
  }

  void Usage(const std::string&, const std::string&, uint64_t* bytes, uint64_t* inodes) override {
    *bytes = 1234;
    *inodes = 5;
  }

  void Hang(bool on) {
    MutexLock lock(&mutex_);
    hang_ = on;
    changed_.SignalAll();
  }
  void FailImage(const std::string& image_ref, absl::Status status) {
    MutexLock lock(&mutex_);
    failures_[image_ref] = std::move(status);
  }
  void FailRemounts(absl::Status status) {
    MutexLock lock(&mutex_);
    remount_failure_ = std::move(status);
  }
  void FailUnmounts(int count) {
    MutexLock lock(&mutex_);
    unmount_failures_ = count;
  }
  // As after a start of the machine: nothing is mounted any more.
  void LoseAll() {
    MutexLock lock(&mutex_);
    for (const auto& [id, folder] : mounted_) umount2(folder.c_str(), MNT_DETACH);
    mounted_.clear();
  }
  // False after 20 s.
  bool WaitForRequests(size_t count) {
    auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    MutexLock lock(&mutex_);
    while (requests_.size() < count) {
      if (!changed_.WaitUntil(&mutex_, deadline)) return false;
    }
    return true;
  }
  bool WaitForUnmounts(int count) {
    auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    MutexLock lock(&mutex_);
    while (unmounts_ < count) {
      if (!changed_.WaitUntil(&mutex_, deadline)) return false;
    }
    return true;
  }
  std::vector<LayerRequest> requests() const {
    MutexLock lock(&mutex_);
    return requests_;
  }
  std::vector<ParentLayer> parents() const {
    MutexLock lock(&mutex_);
    return parents_;
  }
  size_t mounted() const {
    MutexLock lock(&mutex_);
    return mounted_.size();
  }
  int remounts() const {
    MutexLock lock(&mutex_);
    return remounts_;
  }

 private:
  absl::Status MountLocked(const std::string& digest, uint64_t id, const std::string& folder)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (mount("tmpfs", folder.c_str(), "tmpfs", 0, "size=64k,mode=0755,uid=12,gid=34") != 0) {
      return ErrnoStatus(errno, "mount " + folder);
    }
    mounted_[id] = folder;
    HF_ASSIGN_OR_RETURN(UniqueFd fd, OpenFile(folder + "/served", O_WRONLY | O_CREAT, 0644));
    return PwriteFull(fd.get(), digest.data(), digest.size(), 0);
  }

  mutable Mutex mutex_;
  CondVar changed_;
  bool hang_ ABSL_GUARDED_BY(mutex_) = false;
  int remounts_ ABSL_GUARDED_BY(mutex_) = 0;
  int unmounts_ ABSL_GUARDED_BY(mutex_) = 0;
  int unmount_failures_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::Status remount_failure_ ABSL_GUARDED_BY(mutex_);
  std::map<std::string, absl::Status> failures_ ABSL_GUARDED_BY(mutex_);
  std::map<uint64_t, std::string> mounted_ ABSL_GUARDED_BY(mutex_);
  std::vector<LayerRequest> requests_ ABSL_GUARDED_BY(mutex_);
  std::vector<ParentLayer> parents_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace holdfast::snapshot
