// The vault, what the supervisor holds across workers: every mount with what a worker needs to serve it, and
// the request ledgers (schema/ledger.h). Pure bookkeeping: interprets neither INIT bytes nor blobs, and reads
// what workers write into a ledger (LedgerMap::MapMade) as numbers only, never as an index.
//
// Used on the main thread only. A descriptor is shared by everything that may still send it; it is closed
// when its mount or ledger is gone and nobody sends it any more.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "common/id_file.h"
#include "common/io.h"
#include "common/status.h"
#include "schema/ledger_map.h"
#include "supervisor/hang_monitor.h"

namespace holdfast::supervisor {

enum class MountState { kMounting, kLive, kDetached, kGone };

struct Mount {
  uint64_t id = 0;
  MountState state = MountState::kMounting;
  std::string path{}, blob{};
  uint64_t caller = 0;      // generation that asked for it
  bool unmounting = false;  // umount(2) is about to be called
  SharedFd device{};
  std::string init_request{}, init_reply{};
};

class Ledger;

class StateJournal;

class Vault {
 public:
  // `journal`: null: nothing is recorded.
  explicit Vault(IdFile ids, StateJournal* journal = nullptr) : ids_(std::move(ids)), journal_(journal) {}

  // A new entry in state mounting. AlreadyExists while another mounting or live entry has the path.
  absl::StatusOr<uint64_t> Allocate(const std::string& path, std::string blob, uint64_t caller,
                                    SharedFd device = nullptr);
  // An entry of an earlier supervisor; is not recorded again.
  void Restore(Mount mount);
  // An id for a mount that is not kept here.
  absl::StatusOr<uint64_t> NextId() { return ids_.Next(); }
  // Null when unknown (never existed, or gone). Valid until the next change.
  Mount* Find(uint64_t id);
  // After a change of an entry.
  void Save(const Mount& mount);
  void Forget(uint64_t id);
  const std::map<uint64_t, Mount>& all() const { return mounts_; }
  // Live and detached entries with id > after, in order; *more says whether there are others.
  std::vector<const Mount*> Page(uint64_t after, size_t limit, bool* more) const;
  size_t Count(MountState state) const;
  // Mounts with a request that nobody has read.
  std::vector<uint64_t> Readable() const;
  // Forgets and returns the entries whose descriptor polls POLLERR: their superblock exists no more.
  std::vector<uint64_t> TakeGone();

 private:
  // The entries whose descriptor polls one of `wanted`. No epoll: it would be woken by every request.
  std::vector<uint64_t> Polled(short events, short wanted) const;
  IdFile ids_;
  StateJournal* const journal_;
  std::map<uint64_t, Mount> mounts_;
};

struct Pipe {
  SharedFd read_end, write_end;
};
class Ledger {
 public:
  static absl::StatusOr<std::unique_ptr<Ledger>> Create(uint64_t generation);
  // One of an earlier supervisor. DataLoss when `memory` is no ledger, or could be truncated under us, or a
  // pipe is missing. `pipe_inodes`: one a slot, in order; `pipe_ends`: both ends of all, in any order.
  static absl::StatusOr<std::unique_ptr<Ledger>> Restore(uint64_t generation, UniqueFd memory,
                                                         const std::vector<uint64_t>& pipe_inodes,
                                                         std::vector<UniqueFd> pipe_ends);

  uint64_t generation() const { return map_.generation(); }
  const SharedFd& memory() const { return memory_; }
  const std::vector<Pipe>& pipes() const { return pipes_; }  // one a slot, O_NONBLOCK
  std::vector<uint64_t> PipeInodes() const;

  // Requests that a successor would have to answer now.
  uint64_t CountUnanswered() const;
  uint64_t received() const { return Load(map_.header()->requests_received); }
  uint64_t answered() const { return Load(map_.header()->requests_answered); }

  // For the hang monitor. heartbeat: of the pool, 0 when that build has none.
  uint64_t heartbeat() const { return Load(map_.header()->loop_heartbeat_ns); }
  std::vector<ExecutingSlot> ExecutingSlots() const;
  // Notes the pending record that is longest past its deadline, of those that `generation` must answer, if
  // longer than the one noted.
  void FindOverdue(uint64_t generation, HangSample* sample) const;

  bool owner_exited = false;
  bool owner_hung = false;  // it was killed because it hung

 private:
  Ledger(UniqueFd memory, LedgerMap map)
      : memory_(std::make_shared<UniqueFd>(std::move(memory))), map_(std::move(map)) {}

  const SharedFd memory_;
  const LedgerMap map_;
  std::vector<Pipe> pipes_;
};

class LedgerStore {
 public:
  explicit LedgerStore(StateJournal* journal = nullptr) : journal_(journal) {}

  absl::StatusOr<Ledger*> Create(uint64_t generation);
  // One of an earlier supervisor; is not recorded again, but dropped at once if nobody needs it.
  void Restore(std::unique_ptr<Ledger> ledger);
  Ledger* Find(uint64_t generation) const;  // null when unknown or dropped
  // With generation > after, but not `except`, in order; at most `limit`.
  std::vector<Ledger*> Page(uint64_t after, uint64_t except, size_t limit, bool* more) const;

  std::vector<const Ledger*> all() const;
  void OwnerExited(uint64_t generation);
  // A worker says that nothing unanswered is left. Not final before the owner's exit is proven.
  void Drained(uint64_t generation);
  uint64_t CountUnanswered(uint64_t except) const;

 private:
  void Drop(uint64_t generation);

  StateJournal* const journal_;
  std::map<uint64_t, std::unique_ptr<Ledger>> ledgers_;
};

}  // namespace holdfast::supervisor
