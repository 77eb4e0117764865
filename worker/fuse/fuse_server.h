// Serves all mounts of this worker: takes FUSE requests through the ledger, answers from layers
// (DESIGN 4.2, 4.3).
//
// Threads: `threads` pool threads share one epoll over all mounts; none of them ever waits for the network. A
// READ whose content is missing becomes a pending record; the layer's completion thread answers it. INTERRUPT
// marks a record, which is then answered EINTR. Ownership: dups of the /dev/fuse descriptors, this worker's
// ledger mapping and pipes, mappings of adopted old ledgers. Locks: see README.md. Thread safety: all
// methods.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "common/clock.h"
#include "common/fault.h"
#include "common/io.h"
#include "common/status.h"
#include "common/trace.h"
#include "worker/layer/layer.h"

namespace holdfast::fuse {

struct PipePair {
  UniqueFd read_end, write_end;
};

struct LedgerHandle {
  UniqueFd memory;              // memfd laid out as schema/ledger.h
  std::vector<PipePair> pipes;  // one a slot, in order
};

struct MountFlags {          // fixed for the mount's life (kept in its blob)
  bool no_xattrs = false;    // answer ENOSYS to GETXATTR, an empty list to LISTXATTR
  bool zero_open = false;    // answer ENOSYS to OPEN (OPENDIR always)
  bool opaque_user = false;  // opaque mark as user.overlay.opaque
};

struct MountSpec {
  uint64_t mount_id = 0;
  UniqueFd device;
  std::string init_request;  // header included, as the kernel sent it
  MountFlags flags;
  std::string description;  // layer digest, for the log
  // Opens the layer on the mount's first request; called once, off no lock, on a pool thread or in
  // AdoptLedger/Resume. Other requests of the mount wait for it, so it must not wait for the network. An
  // error makes the mount answer EIO (logged once) and is tried again after a second.
  std::function<absl::StatusOr<std::shared_ptr<layer::Layer>>()> open_layer;
};

struct ServerOptions {
  uint64_t generation = 0;
  int threads = 2;                               // <= HF_LEDGER_SLOTS
  uint64_t miss_timeout_nanos = 60'000'000'000;  // then EIO
  uint32_t max_pending_per_mount = 128;          // max_background + 64; at it the mount leaves the epoll
  uint64_t entry_ttl_seconds = 86400;
  const Clock* clock = Clock::Real();
  TraceRing* trace = nullptr;
  FaultPoints* faults = nullptr;  // fuse.received, fuse.record_filled, fuse.before_reply,
                                  // fuse.before_splice_out: kill and block; the first also fails
};

struct ServerStats {
  uint64_t requests = 0;     // received since start
  uint64_t pending = 0;      // records waiting now
  uint64_t adopted = 0;      // requests of earlier generations answered by this one
  uint64_t interrupted = 0;  // answered EINTR
  uint64_t errors = 0;       // answered EIO
  uint64_t dropped = 0;      // of older ledgers: bad CRC, unknown mount
};

class FuseServer {
 public:
  virtual ~FuseServer() = default;  // parks first
  static absl::StatusOr<std::unique_ptr<FuseServer>> Create(const ServerOptions& options,
                                                            LedgerHandle own_ledger);

  // Begins to serve a mount (from any state but parked: its requests are read at once).
  virtual absl::Status AddMount(MountSpec spec) = 0;
  // The connection is gone: forget it. Pending records of it are dropped.
  virtual void RemoveMount(uint64_t mount_id) = 0;
  // Called on a pool thread when the kernel says that a connection ended (ENODEV).
  virtual void OnMountEnded(std::function<void(uint64_t mount_id)> callback) = 0;

  // Adopts every unanswered request of another generation's ledger: drains its pipes, takes its slots and
  // records and answers them. Call after AddMount of all mounts, and again when the owner's exit is proven
  // (`final_walk`): nothing can be left behind by a thread of the dying worker. Returns how many were taken.
  // Requests of unknown mounts or with a bad CRC are dropped, logged and counted, never guessed at.
  virtual absl::StatusOr<uint64_t> AdoptLedger(uint64_t generation, LedgerHandle ledger, bool final_walk) = 0;
  // Nothing unanswered is left in that generation's ledger, and nothing can come: it was walked finally, too.
  // Its mapping and pipes are then given up. An empty ledger whose owner may live, even parked, is not
  // drained.
  virtual bool Drained(uint64_t generation) const = 0;

  virtual void Start() = 0;  // start the pool
  // Stops reading and answering; on return no thread holds a request, and all unanswered ones are in the
  // ledger. Fetches that finish later only fill the cache.
  virtual void Park() = 0;
  // Reads again; unanswered records of the own ledger, and of adopted ones, are taken up.
  virtual void Resume() = 0;

  virtual ServerStats stats() const = 0;
};

// Installs handlers for fatal signals that record, in the ledger, the signal and the slot the thread was
// executing, then let the process die as before. Once per process, after Create.
void InstallCrashRecorder(FuseServer* server);

}  // namespace holdfast::fuse
