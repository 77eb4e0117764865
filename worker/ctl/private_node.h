// A second holdfast on this machine for `drill`: the running supervisor's executable and the running
// worker's, on a folder of their own with copies of a few layers. Its mounts are seen by nobody but the
// drill, and nothing it does can reach the node's mounts, containers, files or network (its layers name an
// image that leads nowhere).
//
// End() leaves no process, mount or folder. It may be called from any thread and more than once; the rest
// belongs to one thread. When this process is killed, the private supervisor is told to end by the kernel
// (PR_SET_PDEATHSIG), and the next drill removes the folder.
#pragma once

#include <sys/types.h>

#include <memory>
#include <string>
#include <vector>

#include "common/mutex.h"
#include "common/process.h"
#include "worker/ctl/control_client.h"

namespace holdfast::ctl {

class PrivateNode {
 public:
  // What it is made like.
  struct Origin {
    std::string state_dir;    // its folder is made below, on the same file system
    std::string runtime_dir;  // likewise, for its sockets
    pid_t supervisor = 0;
    std::string executable;  // SHA-256 of the worker's private copy
  };
  static absl::StatusOr<std::unique_ptr<PrivateNode>> Create(const Origin& origin);
  ~PrivateNode();
  PrivateNode(const PrivateNode&) = delete;
  PrivateNode& operator=(const PrivateNode&) = delete;

  const std::string& folder() const { return folder_; }
  // Copies `names` (relative to the state folder) from the node. What is read meanwhile may grow, not shrink.
  absl::Status CopyFolders(const std::vector<std::string>& names);
  // A copy of the worker with a few bytes appended: the same program under another digest.
  absl::StatusOr<std::string> CopyWorker(const std::string& name);
  // Starts the supervisor, and waits until its first worker serves.
  absl::Status Start();
  absl::StatusOr<std::unique_ptr<ControlClient>> Connect() const;
  // Sends a signal to a worker of this node; refuses any other process.
  absl::Status Signal(pid_t worker, int signal) const;
  // The last lines of its log.
  std::string LogTail() const;

  void End();

 private:
  PrivateNode(Origin origin, std::string folder, std::string runtime)
      : origin_(std::move(origin)), folder_(std::move(folder)), runtime_(std::move(runtime)) {}
  absl::Status Spawn();
  std::vector<pid_t> Workers() const;  // all processes of this node's executables

  const Origin origin_;
  const std::string folder_, runtime_;
  UniqueFd lock_;  // held for our life: the folder is not stale
  Mutex mutex_;
  Process supervisor_ ABSL_GUARDED_BY(mutex_);
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace holdfast::ctl
