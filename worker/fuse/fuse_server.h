// Serves all mounts of this worker: takes FUSE requests through the ledger, answers from layers
// (DESIGN 4.2, 4.3), and lets a build prove itself before and while it serves (4.4).
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
#include <string_view>
#include <vector>

#include "common/clock.h"
#include "common/fault.h"
#include "common/io.h"
#include "common/loop_watch.h"
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
  // Read from AddMount on, also before Start: a private mount on which a candidate is tried. The others stay
  // unread.
  bool serve_now = false;
  // Opens the layer on the mount's first request, on a thread of the server or in Start. Other requests of
  // the mount wait for it, and walks of ledgers may, so it must not wait for the network.
  // An error makes the mount answer EIO (logged once) and is tried again after a second.
  std::function<absl::StatusOr<std::shared_ptr<layer::Layer>>()> open_layer;
};

struct ServerOptions {
  uint64_t generation = 0;
  std::string build;  // of this worker; what HF_PROBE_LIVE answers
  int threads = 2;    // <= HF_LEDGER_SLOTS. The last slot is for adopted requests: one thread less than slots
  uint64_t miss_timeout_nanos = 60'000'000'000;  // then EIO
  uint32_t max_pending_per_mount = 128;          // max_background + 64; at it the mount leaves the epoll
  uint64_t entry_ttl_seconds = 86400;
  std::string drop_caches = "/proc/sys/vm/drop_caches";  // for ForgetCached
  const Clock* clock = Clock::Real();
  // AdoptLedger met a mount that is not here: adds it, if it exists. Called on no lock. A mount that was
  // still being made when others with a higher id were listed comes like that.
  std::function<void()> find_mounts;
  TraceRing* trace = nullptr;
  LoopWatch* watch = nullptr;     // sees whether adopted requests are taken up
  FaultPoints* faults = nullptr;  // fuse.*, see docs/FAILURES.md
};

struct ServerStats {
  uint64_t requests = 0;             // received since start
  uint64_t pending = 0;              // records waiting now
  uint64_t adopted = 0;              // requests of earlier generations answered by this one
  uint64_t interrupted = 0;          // answered EINTR
  uint64_t errors = 0;               // answered EIO
  uint64_t dropped = 0;              // of older ledgers: bad CRC, unknown mount
  uint64_t reading_since_nanos = 0;  // CLOCK_BOOTTIME: from then on all mounts are read; 0 = never so far
  uint64_t poisoned = 0;             // of older ledgers: answered EIO because they had ended two workers
};

// A request and the digest of its answer (SampleRequest in handover.capnp).
struct Sample {
  uint64_t mount_id = 0;
  std::string request;       // the kernel's bytes, header included
  std::string reply_digest;  // SHA-256, 32 bytes
};

class FuseServer {
 public:
  virtual ~FuseServer() = default;  // parks first
  static absl::StatusOr<std::unique_ptr<FuseServer>> Create(const ServerOptions& options,
                                                            LedgerHandle own_ledger);

  // Takes a mount. Its requests are read once the server is started (at once if it is, or with serve_now) and
  // not parked; until then it is in no epoll and costs nothing, neither here nor in the kernel.
  virtual absl::Status AddMount(MountSpec spec) = 0;
  // The connection is gone: forget it. Pending records of it are dropped.
  virtual void RemoveMount(uint64_t mount_id) = 0;
  // Called on a pool thread when the kernel says that a connection ended (ENODEV).
  virtual void OnMountEnded(std::function<void(uint64_t mount_id)> callback) = 0;

  // Adopts every unanswered request of another generation's ledger: drains its pipes, takes its slots and
  // records. On return they are claimed; a thread of the server takes them up, one after the other, from
  // Start on, and answers them. Call after AddMount of all mounts, and again when the owner's exit is proven
  // (`final_walk`): nothing can be left behind by a thread of the dying worker. Returns how many were taken.
  // Requests of unknown mounts or with a bad CRC are dropped, logged and counted, never guessed at. A request
  // that was executed when its worker crashed, or for more than a second when its worker was killed because
  // it hung (`owner_hung`), has a strike. Requests with strikes are executed one at a time and with nothing
  // beside them: in Start before anything is read, by a started server after the others. With two strikes
  // they get EIO. The deadline of a READ that waits to be taken up is put off while others are.
  virtual absl::StatusOr<uint64_t> AdoptLedger(uint64_t generation, LedgerHandle ledger, bool final_walk,
                                               bool owner_hung) = 0;
  // Nothing unanswered is left in that generation's ledger, and nothing can come: it was walked finally, too.
  // Its mapping and pipes are then given up. An empty ledger whose owner may live, even parked, is not
  // drained.
  virtual bool Drained(uint64_t generation) const = 0;

  // Starts the pool, reads all mounts; begins to take up what was adopted.
  virtual void Start() = 0;
  // Stops reading and answering; on return no thread holds a request, and all unanswered ones are in the
  // ledger. Fetches that finish later only fill the cache.
  virtual void Park() = 0;
  // Reads again; unanswered records of the own ledger, and of adopted ones, are taken up. Ends a trial. Also
  // without a Park before it.
  virtual void Resume() = 0;

  // For so long, or until it parks, the pool's threads are urgent (common/urgency.h): something else will
  // take processors, and whoever reads shall not wait for it. Called again it begins anew; 0 ends it; parked,
  // it is nothing. Waits for nobody.
  virtual void Hurry(uint64_t nanos) = 0;

  // On trial the kernel is told to keep nothing: times-to-live are 0, nothing stays over a close. Every node
  // answered for is noted in `touched` (schema/touched.h) before the answer is sent; an invalid descriptor is
  // no log. Before Start. After an error there is no trial.
  virtual absl::Status BeginTrial(UniqueFd touched) = 0;
  virtual void EndTrial() = 0;
  // A worker on trial has ended and is not to be believed: makes the kernel forget attributes, listings and
  // content of every node it noted in `touched`; without a readable log, or when it overflowed, of all nodes
  // of all mounts. Pages that a READ is filling now are waited for, so at worst this takes the READs' time
  // limit. Names need nothing, for they were given no time-to-live, but absent ones: an overlay remembers
  // that a layer did not have them, for ever. If the log has such an answer, the kernel is asked to drop all
  // dentries and inodes that are not in use, of the whole machine: there is no narrower way. Returns how many
  // nodes the kernel was told of. May be repeated. Needs a running pool, and a thread that is none of it.
  // FailedPrecondition: not started, or parked.
  virtual absl::StatusOr<uint64_t> ForgetCached(UniqueFd touched) = 0;

  // Up to `limit` requests with the digests of their answers, spread over mounts, the most recent of each
  // first: those the kernel sent, and then some made up from the indexes. Only such as can be answered from
  // this disk; nothing is fetched. Reads what it digests: not for an event loop.
  virtual std::vector<Sample> Samples(size_t limit, uint64_t deadline_boot_nanos) = 0;
  // Executes a request as if the kernel had sent it, answers nobody and returns the digest of the answer. In
  // every state, also before Start and parked. NotFound: unknown mount. Unavailable: its content is not on
  // this disk (nothing is fetched, no record is made). InvalidArgument: not a request that Samples returns.
  virtual absl::StatusOr<std::string> Replay(uint64_t mount_id, std::string_view request) = 0;

  // Mounts that are not read just now because as many of their READs wait as may. Cheap; waits for nobody.
  virtual std::vector<uint64_t> HeldBack() const = 0;

  virtual ServerStats stats() const = 0;
};

// Installs handlers for fatal signals that record, in the ledger, the signal and the slot the thread was
// executing, then let the process die as before. Once per process, after Create.
void InstallCrashRecorder(FuseServer* server);

}  // namespace holdfast::fuse
