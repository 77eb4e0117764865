// The server behind fuse_server.h. Kept by std::shared_ptr, because completions of the layers may come after
// the server is gone: they hold a weak_ptr.
//
// Files: server_core.cc (set-up, mounts, parking, trial), receive.cc (the pool), pending.cc (READs that
// wait), adopt.cc (older ledgers), replay.cc (samples and replays), forget.cc (the kernel's caches),
// operations.cc (the file system). Locks: README.md.
#pragma once

#include <linux/fuse.h>

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string_view>
#include <thread>
#include <unordered_map>
#include <vector>

#include "common/mutex.h"
#include "common/urgency.h"
#include "worker/fuse/exchange.h"
#include "worker/fuse/fuse_server.h"
#include "worker/fuse/ledger_view.h"
#include "worker/fuse/mount.h"
#include "worker/fuse/operations.h"
#include "worker/fuse/reply_pipe.h"
#include "worker/fuse/sampler.h"
#include "worker/fuse/touched_log.h"

namespace holdfast::fuse {

inline constexpr uint64_t kWakeToken = ~uint64_t{0};  // of wake_ in the epoll, where mounts have their ids

// A request found in a slot of an older ledger, copied out; zero bytes follow it.
struct RecoveredRequest {
  std::shared_ptr<LedgerView> view;
  uint32_t slot = 0;
  uint64_t mount_id = 0;
  uint32_t strikes = 0;
  uint64_t received_nanos = 0;
  bool executing = false;  // else it was still being received
  std::vector<uint8_t> bytes;
  uint32_t length = 0;

  fuse_in_header header() const;
  bool NeedsAnswer() const;
};

class ServerCore : public std::enable_shared_from_this<ServerCore> {
 public:
  ServerCore(const ServerOptions& options, std::shared_ptr<LedgerView> ledger);
  absl::Status Initialize();
  void Shutdown();  // parks, ends the pool; called once, before the last owner lets go

  absl::Status AddMount(MountSpec spec);
  void RemoveMount(uint64_t mount_id);
  void OnMountEnded(std::function<void(uint64_t)> callback);
  absl::StatusOr<uint64_t> AdoptLedger(uint64_t generation, LedgerHandle handle, bool final_walk,
                                       bool owner_hung);
  bool Drained(uint64_t generation);
  void Start();
  void Park();
  void Resume();
  void Hurry(uint64_t nanos);
  absl::Status BeginTrial(UniqueFd touched);
  void EndTrial();
  absl::StatusOr<uint64_t> ForgetCached(UniqueFd touched);
  std::vector<Sample> Samples(size_t limit, uint64_t deadline_boot_nanos);
  absl::StatusOr<std::string> Replay(uint64_t mount_id, std::string_view request);
  std::vector<uint64_t> HeldBack() const;
  ServerStats stats() const;

  const ServerOptions& options() const { return options_; }
  const LedgerView& ledger() const { return *ledger_; }

  // For operations.cc: answers a READ of a regular file of `layer`, or makes a record of it. Offset and size
  // lie in the file.
  void Read(Exchange& x, uint64_t nodeid, uint64_t offset, uint64_t size);
  void ReplyError(Exchange& x, int error);
  // For libfuse's replies.
  void ReplyParts(Exchange& x, const iovec* parts, int count);

  bool on_trial() const { return on_trial_.load(std::memory_order_acquire); }
  // On trial: what is about to be answered makes the kernel know this node. Before the answer is sent.
  void NoteTouched(const Exchange& x, uint64_t nodeid) {
    if (on_trial() && x.capture == nullptr) NoteTouched(x.mount->id(), nodeid);
  }

 private:
  // While one is held, Park waits. Refused once parked.
  class Gate {
   public:
    explicit Gate(ServerCore* core) : core_(core), open_(core->Enter()) {}
    ~Gate() {
      if (open_) core_->Leave();
    }
    Gate(const Gate&) = delete;
    Gate& operator=(const Gate&) = delete;
    explicit operator bool() const { return open_; }

   private:
    ServerCore* const core_;
    const bool open_;
  };
  // Holds adopt_mutex_. The thread that takes up lets it go before each of its requests.
  class ABSL_SCOPED_LOCKABLE Walk {
   public:
    explicit Walk(ServerCore* core) ABSL_EXCLUSIVE_LOCK_FUNCTION(core->adopt_mutex_);
    ~Walk() ABSL_UNLOCK_FUNCTION();
    Walk(const Walk&) = delete;
    Walk& operator=(const Walk&) = delete;

   private:
    ServerCore* const core_;
  };
  // While one lives, no other thread is inside a Gate. The caller is inside one, and holds adopt_mutex_.
  class Alone {
   public:
    explicit Alone(ServerCore* core);
    ~Alone();
    Alone(const Alone&) = delete;
    Alone& operator=(const Alone&) = delete;

   private:
    ServerCore* const core_;
  };
  // A pipe from the free list for as long as one reply takes.
  class BorrowedPipe {
   public:
    explicit BorrowedPipe(ServerCore* core);
    ~BorrowedPipe();
    BorrowedPipe(const BorrowedPipe&) = delete;
    BorrowedPipe& operator=(const BorrowedPipe&) = delete;
    ReplyPipe* get() const { return pipe_.get(); }

   private:
    ServerCore* const core_;
    std::unique_ptr<ReplyPipe> pipe_;
  };
  struct OldLedger {
    std::shared_ptr<LedgerView> view;
    // slot -> unique that was executed while its owner might still live
    std::map<uint32_t, uint64_t> taken_slots;
    bool walked_finally = false;
    bool slots_of_the_dead = false;  // its slots were walked after its owner's exit
  };
  // A record that was executed when its worker crashed.
  struct SuspectRecord {
    std::shared_ptr<LedgerView> view;
    uint32_t index = 0;
  };
  // A dead worker's READ whose record is ours and stands in its mount's table.
  struct ClaimedRead {
    std::shared_ptr<Mount> mount;
    uint64_t unique = 0, nodeid = 0;
    uint32_t strikes = 0;
  };
  enum class Received { kNothing, kRequest, kInterrupt, kEnded, kBroken };

  // server_core.cc
  bool Enter();
  void Leave();
  std::shared_ptr<Mount> FindMount(uint64_t mount_id) const;
  std::vector<std::shared_ptr<Mount>> AllMounts() const;
  void UpdateArmed(Mount& mount);
  void WakePool();  // each of its threads looks at parked_ and stop_
  void Woken();
  void WaitWhileParked();
  void StartPool();
  void HoldBack(Mount& mount, bool hold) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mount.mutex);
  void NoteTouched(uint64_t mount_id, uint64_t nodeid);
  void Throttle(Mount& mount);    // stop reading it when it is at its cap
  void Unthrottle(Mount& mount);  // read it again when it has drained

  // receive.cc
  void PoolThread(uint32_t slot_index);
  void Beat();
  void Tick(uint32_t slot_index, ReplyPipe* pipe);
  void Turn(uint32_t slot_index, uint64_t mount_id, ReplyPipe* pipe);
  Received ReceiveAndExecute(uint32_t slot_index, const std::shared_ptr<Mount>& mount, ReplyPipe* pipe);
  Received ReceiveInto(uint32_t slot_index, Mount& mount, hf_slot* slot);
  // Executes a request that lies in `request`, followed by at least one zero byte.
  void Execute(Exchange& x, const uint8_t* request, uint32_t length);
  void HandleInterrupt(Exchange& x, uint64_t target);
  void MountEnded(Mount& mount, bool report);
  void CountAnswer();
  // How many READs of one mount may wait now: fewer once the table is half full, so that the rest of it is
  // there for the mounts that have none waiting.
  uint32_t PendingLimit() const;
  bool TableFull() const;        // no mount may be read
  bool TableNearlyFull() const;  // a mount held back is not even looked at for INTERRUPTs

  // pending.cc
  void MakeRecord(Exchange& x, uint64_t nodeid, uint64_t offset, uint64_t size);
  void Fetch(const std::shared_ptr<Mount>& mount, const std::shared_ptr<layer::Layer>& layer,
             uint64_t unique);
  void Fetched(uint64_t mount_id, uint64_t unique, uint64_t attempt,
               const absl::StatusOr<layer::ReadResult>& result);
  void SendPending(const std::shared_ptr<Mount>& mount, const PendingRead& read,
                   const layer::ReadResult& content, ReplyPipe* pipe);
  uint64_t AdoptedDeadline() const;  // the earliest of a READ that is adopted or taken up now
  void AnswerPending(Mount& mount, uint64_t unique, int error, ReplyPipe* pipe);
  // Tries the cache, then fetches.
  void TakeUp(const std::shared_ptr<Mount>& mount, uint64_t unique, ReplyPipe* pipe);
  void FinishPending(Mount& mount, const PendingRead& read, int error);
  void FreeRecord(const PendingRead& read);
  // Fault points of tests: a content or a name that is wrong.
  bool WrongBytes(bool captured) const;

  // adopt.cc
  // The older ledger, mapped when it is new here.
  absl::StatusOr<std::shared_ptr<OldLedger>> OpenOldLedger(uint64_t generation, LedgerHandle handle);
  bool NamesUnknownMount(const LedgerView& view) const;
  uint64_t Claim(OldLedger& old, bool final_walk, bool owner_hung)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(adopt_mutex_);
  uint64_t ClaimRecords(const std::shared_ptr<LedgerView>& view, bool final_walk)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(adopt_mutex_);
  std::optional<ClaimedRead> ClaimRecord(const std::shared_ptr<LedgerView>& view, uint32_t index,
                                         bool final_walk) ABSL_EXCLUSIVE_LOCKS_REQUIRED(adopt_mutex_);
  uint64_t ClaimSlots(OldLedger& old, bool final_walk, bool owner_hung)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(adopt_mutex_);
  bool ClaimRequest(OldLedger& old, RecoveredRequest request) ABSL_EXCLUSIVE_LOCKS_REQUIRED(adopt_mutex_);
  bool NothingClaimed() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(adopt_mutex_);
  // A thread answers what was claimed, suspects last, and ends.
  void StartTakeUp() ABSL_EXCLUSIVE_LOCKS_REQUIRED(adopt_mutex_);
  void TakeUpThread();
  bool TakeUpNext(ReplyPipe* pipe) ABSL_EXCLUSIVE_LOCKS_REQUIRED(adopt_mutex_);
  void RenewDeadlines() ABSL_EXCLUSIVE_LOCKS_REQUIRED(adopt_mutex_);
  void RunSuspect(ReplyPipe* pipe) ABSL_EXCLUSIVE_LOCKS_REQUIRED(adopt_mutex_);  // inside a Gate
  void RunSuspects() ABSL_EXCLUSIVE_LOCKS_REQUIRED(adopt_mutex_);
  void ExecuteRecovered(const RecoveredRequest& request, ReplyPipe* pipe)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(adopt_mutex_);
  void FreeSlot(const OldLedger& old, uint32_t slot) ABSL_EXCLUSIVE_LOCKS_REQUIRED(adopt_mutex_);
  void FreeSlotOf(const RecoveredRequest& request) ABSL_EXCLUSIVE_LOCKS_REQUIRED(adopt_mutex_);
  bool Poisoned(Mount& mount, uint32_t opcode, uint64_t nodeid, uint32_t strikes);
  std::vector<std::shared_ptr<LedgerView>> OldLedgers() const;

  // replay.cc
  absl::StatusOr<std::string> Replay(const std::shared_ptr<Mount>& mount, std::string_view request,
                                     int* error);
  // forget.cc
  uint64_t ForgetNode(Mount& mount, uint64_t nodeid);
  void DropDentries();

  void Dropped(uint64_t generation, uint64_t mount_id, const char* why);

  const ServerOptions options_;
  const uint32_t generation32_;
  const std::shared_ptr<LedgerView> ledger_;
  RecordAllocator records_;
  UniqueFd epoll_, wake_;

  mutable Mutex mounts_mutex_;
  std::unordered_map<uint64_t, std::shared_ptr<Mount>> mounts_ ABSL_GUARDED_BY(mounts_mutex_);
  std::function<void(uint64_t)> on_ended_ ABSL_GUARDED_BY(mounts_mutex_);

  Mutex session_mutex_;
  std::unique_ptr<FuseSession> session_ ABSL_GUARDED_BY(session_mutex_);
  std::atomic<FuseSession*> ready_session_{nullptr};  // set once

  Mutex pipes_mutex_;
  std::vector<std::unique_ptr<ReplyPipe>> pipes_ ABSL_GUARDED_BY(pipes_mutex_);

  Mutex adopt_mutex_;  // one walk at a time, and no request is being taken up
  CondVar walk_ended_;
  std::atomic<int> walkers_{0};  // that have or want it
  // Claimed and not taken up yet; all of it lies in the ledgers, too.
  std::deque<RecoveredRequest> claimed_requests_ ABSL_GUARDED_BY(adopt_mutex_);
  std::deque<ClaimedRead> claimed_reads_ ABSL_GUARDED_BY(adopt_mutex_);
  std::deque<RecoveredRequest> suspects_ ABSL_GUARDED_BY(adopt_mutex_);
  std::deque<SuspectRecord> suspect_records_ ABSL_GUARDED_BY(adopt_mutex_);
  // The thread has not looked at the lists for the last time.
  bool taking_up_ ABSL_GUARDED_BY(adopt_mutex_) = false;
  std::thread take_up_thread_ ABSL_GUARDED_BY(adopt_mutex_);
  std::unique_ptr<LoopWatch::Loop> take_up_loop_;
  uint64_t next_renewal_nanos_ ABSL_GUARDED_BY(adopt_mutex_) = 0;
  struct Suspect {
    uint32_t strikes = 0;  // the most seen on any copy of the request
    bool executed = false;
  };
  // By mount and unique: a request may lie in the ledger of its first owner and in those of successors that
  // died over it.
  std::map<std::pair<uint64_t, uint64_t>, Suspect> known_suspects_ ABSL_GUARDED_BY(adopt_mutex_);
  mutable Mutex old_mutex_;
  std::map<uint64_t, std::shared_ptr<OldLedger>> old_ ABSL_GUARDED_BY(old_mutex_);
  std::set<uint64_t> drained_ ABSL_GUARDED_BY(old_mutex_);  // walked finally and found empty

  Mutex park_mutex_;
  CondVar park_changed_;
  std::atomic<int> busy_{0};
  std::atomic<bool> parked_{false};
  std::atomic<bool> alone_{false};  // one suspect is executed, all others wait
  std::atomic<bool> started_{false};
  std::atomic<bool> stop_{false};
  Mutex pool_mutex_;
  std::vector<std::thread> pool_ ABSL_GUARDED_BY(pool_mutex_);
  UrgentThreads urgent_pool_;  // in a hurry
  std::atomic<uint64_t> next_tick_nanos_{0};
  std::atomic<int> throttled_mounts_{0};
  mutable Mutex held_back_mutex_;
  std::set<uint64_t> held_back_ ABSL_GUARDED_BY(held_back_mutex_);

  std::atomic<bool> on_trial_{false};
  Mutex trial_mutex_;
  std::unique_ptr<TouchedLog> touched_ ABSL_GUARDED_BY(trial_mutex_);

  Sampler sampler_;

  std::atomic<uint64_t> requests_{0}, pending_{0}, adopted_{0}, interrupted_{0}, errors_{0}, dropped_{0},
      poisoned_{0};
  std::atomic<uint64_t> reading_since_nanos_{0};
  std::atomic<uint64_t> attempts_{0};  // ReadAsync calls
};

}  // namespace holdfast::fuse
