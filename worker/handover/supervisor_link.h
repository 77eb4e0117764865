// The worker's end of the supervisor protocol (schema/handover.capnp) as plain C++: no Cap'n Proto type
// leaves the .cc.
//
// Threads: Connect starts one thread that runs the RPC event loop and never blocks; calls of the supervisor
// (WorkerActions) run one after the other on a second thread, Distrust, which may wait long, on a third,
// calls of holdfastctl (AdminActions) on a fourth. The first is urgent (common/urgency.h), the second while
// reads wait for what it does. The methods of SupervisorLink block their caller, are
// thread-safe and must not be called from within `Ping` or `SwapAhead`.
//
// How it fails: when the connection ends the supervisor is gone. Every call then returns Unavailable, and
// SupervisorLost runs on the action thread; reads go on: they need no supervisor. If it says so, a further
// thread looks for the next supervisor (Control.reattach) until one takes or refuses this worker; after that
// everything goes on over the new connection, as if it were the first.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "common/io.h"
#include "common/status.h"
#include "common/trace.h"
#include "schema/admin_types.h"

namespace holdfast::handover {

inline constexpr int kSupervisorFd = 3;  // where the supervisor leaves its socket (handover.capnp)

// Moves the socket to a high number. A dying process closes its descriptors in the order of their numbers,
// but what ends with its last descriptor is ended in the reverse order: a socket at 3, by whose end the
// supervisor notices the death on kernels before 6.9, would be the last of all (docs/adr/0006). The link does
// it with each of its sockets that is not there yet.
void MoveUp(UniqueFd* socket);

// What was agreed on with the supervisor; handover.capnp tells what each bit means.
inline constexpr uint64_t kCapServeReads = 1;
inline constexpr uint64_t kCapMetadataHandover = 2;
inline constexpr uint64_t kCapPrepare = 4;
inline constexpr uint64_t kCapTrial = 8;
inline constexpr uint64_t kCapHealth = 16;
inline constexpr uint64_t kCapReattach = 32;

struct PipePair {
  UniqueFd read_end, write_end;
};

struct OldLedger {
  uint64_t generation = 0;
  UniqueFd memory;
  std::vector<PipePair> pipes;
  bool owner_exited = false;  // no thread of it can still write
  bool owner_hung = false;    // it was killed because it hung
};

// See Takeover in handover.capnp.
struct Takeover {
  uint64_t last_mount = 0;
  std::vector<OldLedger> ledgers;  // all of them
};

// What comes with the call to serve.
struct ServeOrder {
  bool trial = false;
  UniqueFd touched;                  // invalid: there is none
  std::optional<Takeover> takeover;  // none: ask for mounts and ledgers
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
  UniqueFd state;              // the supervisor's state, unread; stays here
  std::string control_socket;  // where the next supervisor can be found; "": nowhere
};

struct SampleRequest {
  uint64_t mount_id = 0;
  std::string request, reply_digest;
};
enum class SampleKind { kFile, kFolder, kAbsent };
struct SampleFile {
  uint64_t mount_id = 0;
  SampleKind kind = SampleKind::kFile;
  std::string path;  // bytes, relative to the mount's root
  uint64_t offset = 0, length = 0;
  std::string digest;  // raw SHA-256
};
struct SampleSet {
  std::vector<SampleRequest> requests;
  std::vector<SampleFile> files;
};
struct ReplayResult {
  std::vector<uint32_t> different;
  uint32_t skipped = 0;
};

struct Health {
  uint64_t loop_age_nanos = 0;
  std::string loop;
  std::vector<uint64_t> held_back;
};

struct HeldMount {
  uint64_t mount_id = 0;
  UniqueFd device;
};
template <typename T>
struct Page {
  std::vector<T> elements;
  bool more = false;
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
  virtual absl::Status Serve(ServeOrder order) = 0;
  virtual absl::Status OwnerExited(uint64_t generation) = 0;
  virtual absl::Status TakeMetadata() = 0;
  virtual absl::Status Park() = 0;
  virtual absl::Status Resume() = 0;
  virtual absl::Status YieldMetadata() = 0;
  virtual absl::Status Retire() = 0;
  virtual void MountsGone(const std::vector<uint64_t>& mount_ids) = 0;
  virtual absl::Status Prepare() = 0;
  virtual absl::StatusOr<SampleSet> Samples(uint32_t limit) = 0;
  virtual absl::StatusOr<ReplayResult> Replay(const std::vector<SampleRequest>& requests) = 0;
  virtual absl::Status AddMounts(std::vector<MountEntry> entries) = 0;
  virtual absl::Status EndTrial() = 0;
  // On a thread of its own, beside the others: the kernel may have to wait for pages that are being read.
  // `vault_id`: 32 hex digits.
  virtual absl::Status Distrust(uint64_t generation, UniqueFd touched, const std::string& vault_id) = 0;
  virtual absl::StatusOr<Page<HeldMount>> HeldMounts(uint64_t after) = 0;
  virtual absl::StatusOr<Page<OldLedger>> HeldLedgers(uint64_t after) = 0;
  virtual absl::StatusOr<UniqueFd> HeldListener() = 0;

  enum class AfterLoss { kServeOn, kReattach };
  // The connection has ended. kReattach: look for the next supervisor.
  virtual AfterLoss SupervisorLost() = 0;
  // On the thread that looks for the next supervisor, before each attempt: whether this worker holds the
  // metadata. An error: not now.
  virtual absl::StatusOr<bool> Reattaching() = 0;
  // The next supervisor has taken this worker; its calls follow. `vault_id`: 32 hex digits, "": as before.
  virtual void Reattached(const std::string& vault_id) = 0;
  // The next supervisor does not want this worker. None is looked for any more.
  virtual void ReattachRefused(const absl::Status& why) = 0;
  // On the event loop's thread, beside the others: must not block.
  virtual Health Ping() = 0;
  virtual void SwapAhead(bool over) = 0;
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
  virtual absl::StatusOr<std::string> MountPrivate(const std::string& name, const std::string& blob) = 0;
};

struct Identity {
  std::string token;  // raw bytes: proves which process the supervisor started
  std::string build;
  uint64_t capabilities = kCapServeReads | kCapMetadataHandover;
};

class SupervisorLink : public MountVault {
 public:
  // Takes the connected socket, registers and returns once welcomed.
  static absl::StatusOr<std::unique_ptr<SupervisorLink>> Connect(UniqueFd socket, const Identity& identity);
  // Ends the threads; calls of the supervisor that were not begun are refused.
  ~SupervisorLink() override = default;

  // The descriptors, `state` excepted, may be moved out, before Start.
  virtual Welcome* welcome() = 0;
  // From now on the calls of the other side are carried out; until then they wait. Both outlive the link.
  virtual void Start(WorkerActions* actions, AdminActions* admin) = 0;

  // All pages of the mounts with an id above `after`, in order.
  virtual absl::StatusOr<std::vector<MountEntry>> ListMounts(uint64_t after) = 0;
  virtual absl::StatusOr<std::vector<OldLedger>> OldLedgers() = 0;
  virtual absl::Status Drained(uint64_t generation) = 0;
  virtual bool lost() const = 0;
};

}  // namespace holdfast::handover
