// One mount as the server sees it: its descriptor, its layer, which requests execute and which READs wait for
// content.
//
// Locks: `mutex` guards everything that changes; it is held for a few instructions, never over I/O (but for
// EPOLL_CTL). Kept by std::shared_ptr: a thread that holds a request keeps its mount and descriptor alive.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "common/mutex.h"
#include "worker/fuse/fuse_server.h"
#include "worker/fuse/ledger_view.h"
#include "worker/fuse/sampler.h"

namespace holdfast::fuse {

// A READ that waits for content; the record in `ledger` says the same for a successor.
struct PendingRead {
  std::shared_ptr<LedgerView> ledger;
  uint32_t record = 0;
  uint64_t unique = 0, nodeid = 0, offset = 0, size = 0;
  uint64_t deadline_nanos = 0;
  uint64_t since_nanos = 0;
  bool adopted = false;
  uint64_t attempt = 0;  // number of its last ReadAsync: an error counts only from that one
  int tries = 0;
};

class Mount {
 public:
  explicit Mount(MountSpec spec) : spec_(std::move(spec)) {}
  uint64_t id() const { return spec_.mount_id; }
  int device() const { return spec_.device.get(); }
  const MountFlags& flags() const { return spec_.flags; }
  const std::string& description() const { return spec_.description; }
  bool serve_now() const { return spec_.serve_now; }

  Sampler::Seen seen;

  // The layer, opened on the first call. Threads that come meanwhile wait for it (a local file is mapped);
  // after a failure the error holds for a second.
  absl::StatusOr<std::shared_ptr<layer::Layer>> GetLayer(const Clock& clock);

  // A thread is about to splice from the device / has a request of it, `unique` (0: got none).
  void BeginReceive();
  void EndReceive(uint64_t unique, uint32_t* marks);
  void BeginExecute(uint64_t unique, uint32_t* marks);
  void EndExecute(uint64_t unique);

  enum class Added { kWaits, kInterrupted, kDuplicate, kDuplicateInterrupted };
  // Registers a READ that waits. ...Interrupted: its INTERRUPT came while it executed (it is registered all
  // the same).
  Added AddPending(const PendingRead& read);
  // Whoever takes it answers it.
  std::optional<PendingRead> TakePending(uint64_t unique);
  std::optional<PendingRead> FindPending(uint64_t unique);
  // Its deadline, in its record too, is `earliest` or later. nullopt when it was answered meanwhile.
  std::optional<PendingRead> Renew(uint64_t unique, uint64_t earliest);
  // Notes one more ReadAsync, numbered `attempt`; nullopt when it was answered meanwhile.
  std::optional<PendingRead> NextAttempt(uint64_t unique, uint64_t attempt);
  std::vector<PendingRead> TakeAllPending();
  size_t pending();

  enum class Interrupted { kPending, kExecuting, kMaybeArriving, kUnknown };
  // Where the target of an INTERRUPT is. kExecuting: its slot is marked now.
  Interrupted Interrupt(uint64_t target);

  // The epoll side; the server decides (ServerCore::UpdateArmed).
  Mutex mutex;
  bool armed ABSL_GUARDED_BY(mutex) = false;
  bool throttled ABSL_GUARDED_BY(mutex) =
      false;                                  // at its cap, or the table is full: not read until it drains
  bool ended ABSL_GUARDED_BY(mutex) = false;  // connection gone, or removed
  size_t PendingLocked() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) { return pending_.size(); }

 private:
  struct Executing {
    uint64_t unique;
    uint32_t* marks;
  };

  MountSpec spec_;
  CondVar layer_changed_;
  bool opening_ ABSL_GUARDED_BY(mutex) = false;
  std::shared_ptr<layer::Layer> layer_ ABSL_GUARDED_BY(mutex);
  absl::Status open_error_ ABSL_GUARDED_BY(mutex);
  uint64_t open_again_nanos_ ABSL_GUARDED_BY(mutex) = 0;
  std::unordered_map<uint64_t, PendingRead> pending_ ABSL_GUARDED_BY(mutex);
  std::vector<Executing> executing_ ABSL_GUARDED_BY(mutex);
  int receiving_ ABSL_GUARDED_BY(mutex) = 0;
};

inline bool IsDuplicate(Mount::Added added) {
  return added == Mount::Added::kDuplicate || added == Mount::Added::kDuplicateInterrupted;
}

}  // namespace holdfast::fuse
