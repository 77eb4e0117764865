// holdfastctl's end of schema/control.capnp as plain structs. Blocking, single-threaded.
// Errors: Unavailable when nothing answers on the socket, PermissionDenied when it is not for this user (both
// exit code 3); else what the supervisor said.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "common/io.h"
#include "common/status.h"
#include "schema/admin_types.h"

namespace holdfast::ctl {

struct WorkerStatus {
  uint64_t generation = 0;
  uint32_t pid = 0;
  std::string role, build, executable;
  int64_t started_wall_nanos = 0;
  uint64_t requests_received = 0, requests_answered = 0;
};

struct SwapStep {
  std::string name;
  uint64_t nanos = 0;
  std::string detail;
};

struct SwapStatus {
  std::string kind, result, from_build, to_build;
  int64_t finished_wall_nanos = 0;
  uint64_t pause_nanos = 0, requests_carried_over = 0;
  std::vector<SwapStep> steps;
};

struct SupervisorStatus {
  std::string build, phase, state_dir;
  uint32_t pid = 0;
  int64_t started_wall_nanos = 0;
  std::vector<WorkerStatus> workers;
  uint64_t mounts_live = 0, mounts_detached = 0, crashes = 0, carried_over_total = 0, swaps = 0;
  SwapStatus last_swap;
  std::vector<std::string> warnings;
  // Empty or 0 from a supervisor that does not know them yet; then `spare` is empty, too.
  uint64_t hangs = 0, probation_seconds = 0, supervisor_restarts = 0;
  std::string last_good, spare, state_source, last_death;
  int64_t last_death_wall_nanos = 0;
  bool fd_store = false;
  std::vector<SwapStep> in_progress;
};

struct RollbackCheck {
  bool ready = false;
  std::string executable, reason;
};

struct MountInfo {
  uint64_t mount_id = 0;
  std::string state, path;
  // From the worker's blob; empty when it cannot be read.
  std::string layer_digest, image, index_digest;
  uint64_t snapshot_id = 0;
  std::string blob, init_reply;  // as the supervisor keeps them
};

struct LedgerFd {
  uint64_t generation = 0;
  UniqueFd memory;
  bool owner_exited = false;
};

using admin::LayerInfo;
using admin::SnapshotInfo;
using admin::WorkerStats;

struct TraceEntry {
  int64_t wall_nanos = 0;
  uint64_t duration_nanos = 0;
  std::string event, detail;
};

struct UpgradeResult {
  SwapStatus swap;
  bool changed = false;
};

// Called as a step of a swap begins (`done` false) and when it has ended well.
using OnStep = std::function<void(const SwapStep& step, bool done)>;

class ControlClient {
 public:
  virtual ~ControlClient() = default;
  static absl::StatusOr<std::unique_ptr<ControlClient>> Connect(const std::string& socket_path);

  virtual absl::StatusOr<SupervisorStatus> Status() = 0;
  virtual absl::StatusOr<std::vector<MountInfo>> Mounts() = 0;
  virtual absl::StatusOr<std::vector<LedgerFd>> Ledgers() = 0;
  // The next four ask the running worker: FailedPrecondition while none runs.
  virtual absl::StatusOr<std::vector<LayerInfo>> Layers() = 0;
  virtual absl::StatusOr<std::vector<SnapshotInfo>> Snapshots() = 0;
  virtual absl::StatusOr<WorkerStats> Stats() = 0;
  virtual absl::StatusOr<std::vector<TraceEntry>> Trace(uint32_t limit) = 0;
  // Both return when the swap is over, however long it takes; `on_step` may be null.
  virtual absl::StatusOr<UpgradeResult> Upgrade(const std::string& worker_path, bool force,
                                                const OnStep& on_step = nullptr) = 0;
  virtual absl::StatusOr<SwapStatus> Rollback(const OnStep& on_step = nullptr) = 0;
  // Starts the build that a rollback would bring back, to see that it still can be. DeadlineExceeded after 6
  // s, Unimplemented when the supervisor is too old.
  virtual absl::StatusOr<RollbackCheck> CheckRollback() = 0;
  // On the private instance of a drill: the layer of `like` once more, under the folder drill/<name>, and
  // with an image reference that leads nowhere, so that nothing can be fetched. Its path.
  virtual absl::StatusOr<std::string> MountPrivate(const std::string& name, const MountInfo& like) = 0;
};

}  // namespace holdfast::ctl
