// The worker's end of the supervisor protocol (schema/handover.capnp) as plain C++: no Cap'n Proto type
// leaves the .cc.
//
// Threads: Connect starts one thread that runs the RPC event loop and never blocks; calls of the supervisor
// (WorkerActions) run one after the other on a second thread, calls of holdfastctl (AdminActions) on a third.
// The methods of SupervisorLink block their caller, are thread-safe and must not be called from within
// `ping`.
//
// How it fails: when the connection ends the supervisor is gone. Every call then returns Unavailable, `lost`
// runs once on the action thread, and reads go on: they need no supervisor.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "common/io.h"
#include "common/status.h"
#include "common/trace.h"
#include "schema/admin_types.h"

namespace holdfast::handover {

inline constexpr int kSupervisorFd = 3;  // where the supervisor leaves its socket (handover.capnp)

struct PipePair {
  UniqueFd read_end, write_end;
};

struct OldLedger {
  uint64_t generation = 0;
  UniqueFd memory;
  std::vector<PipePair> pipes;
  bool owner_exited = false;  // no thread of it can still write
};

enum class MountState { kMounting, kLive, kDetached, kGone };

struct MountEntry {
  uint64_t mount_id = 0;
  MountState state = MountState::kLive;
  std::string path;
  UniqueFd device;
  std::string init_request, init_reply;
  std::string blob;
};

// See InitOptions in handover.capnp.
struct InitOptions {
  uint64_t flags = 0;
  uint16_t max_background = 64;
  uint16_t congestion_threshold = 48;
  uint16_t max_pages = 256;
  uint32_t max_stack_depth = 0;
  uint32_t read_ahead_kib = 0;
};

struct Welcome {
  uint64_t capabilities = 0;
  uint64_t generation = 0;
  std::string vault_id;  // 32 hex digits
  UniqueFd ledger;
  std::vector<PipePair> request_pipes;
  UniqueFd snapshot_listener;
  std::string state_dir, runtime_dir;
};

// Mounts as the rest of the worker sees them; the supervisor's are real, a test's need not be.
class MountVault {
 public:
  virtual ~MountVault() = default;
  virtual absl::StatusOr<MountEntry> Mount(const std::string& path, const InitOptions& options,
                                           const std::string& blob) = 0;
  virtual absl::StatusOr<MountState> Unmount(uint64_t mount_id) = 0;
};

// What the supervisor asks of a worker; the comments in handover.capnp (interface Worker) are the contract.
class WorkerActions {
 public:
  virtual ~WorkerActions() = default;
  virtual absl::Status Serve() = 0;
  virtual absl::Status OwnerExited(uint64_t generation) = 0;
  virtual absl::Status TakeMetadata() = 0;
  virtual absl::Status Park() = 0;
  virtual absl::Status Resume() = 0;
  virtual absl::Status YieldMetadata() = 0;
  virtual absl::Status Retire() = 0;
  virtual void MountsGone(const std::vector<uint64_t>& mount_ids) = 0;
  virtual void SupervisorLost() = 0;
  // On the event loop's thread: must not block. Age of the pool's last turn.
  virtual uint64_t PingLoopAgeNanos() = 0;
};

using admin::LayerInfo;
using admin::SnapshotInfo;
using admin::WorkerStats;

class AdminActions {
 public:
  virtual ~AdminActions() = default;
  virtual std::vector<LayerInfo> Layers() = 0;
  virtual std::vector<SnapshotInfo> Snapshots() = 0;
  virtual WorkerStats Stats() = 0;
  virtual std::vector<TraceEvent> Trace(uint32_t limit) = 0;
};

class SupervisorLink : public MountVault {
 public:
  // Takes the connected socket, registers with `token` (raw bytes) and returns once welcomed.
  static absl::StatusOr<std::unique_ptr<SupervisorLink>> Connect(UniqueFd socket, const std::string& token,
                                                                 const std::string& build);
  // Ends the threads; calls of the supervisor that were not begun are refused.
  ~SupervisorLink() override = default;

  // The descriptors may be moved out, before Start.
  virtual Welcome* welcome() = 0;
  // From now on the calls of the other side are carried out; until then they wait. Both outlive the link.
  virtual void Start(WorkerActions* actions, AdminActions* admin) = 0;

  virtual absl::StatusOr<std::vector<MountEntry>> ListMounts() = 0;  // all pages
  virtual absl::StatusOr<std::vector<OldLedger>> OldLedgers() = 0;
  virtual absl::Status Drained(uint64_t generation) = 0;
  virtual bool lost() const = 0;
};

}  // namespace holdfast::handover
