// What the next supervisor needs, kept outside this process: records in a durable map (values:
// schema/vault_state.capnp) and descriptors in the fd store. Every record is written before the action that
// it speaks of. Main thread only. A write that fails (no memory left) is logged; this process goes on.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "common/durable_map.h"
#include "common/fd_store.h"
#include "supervisor/vault.h"

namespace holdfast::supervisor {

// Names in the fd store: at most 8 characters up to 36^7 numbers.
inline constexpr char kStateFd[] = "state";
inline constexpr char kSnapshotFd[] = "snap";
inline constexpr char kControlFd[] = "ctl";
enum class FdKind : char { kMount = 'm', kLedger = 'l', kPipes = 'p', kWorker = 'w' };
std::string FdName(FdKind kind, uint64_t number);

// SavedWorker, SavedLedger, SavedMachine of schema/vault_state.capnp.
struct SavedWorker {
  uint64_t generation = 0, start_ticks = 0, capabilities = 0;
  pid_t pid = 0;
  std::string token{}, executable{}, build{};
  int64_t started_wall_nanos = 0;
  bool killed = false, retired = false;
};

struct SavedLedger {
  uint64_t generation = 0;
  std::vector<uint64_t> pipe_inodes{};
  bool owner_exited = false, owner_hung = false;
};

struct SavedMachine {
  std::string phase{}, running{}, previous{}, last_good{}, running_build{}, vault_id{};
  uint64_t owner = 0, successor = 0, trial_generation = 0;
  std::set<uint64_t> holders{};
  bool probation = false;
  uint64_t restarts = 0, crashes = 0, hangs = 0, swaps = 0, carried_over = 0;
};

struct SavedState {
  SavedMachine machine;
  std::map<uint64_t, SavedWorker> workers;
  std::map<uint64_t, SavedLedger> ledgers;
  std::map<uint64_t, Mount> mounts;  // without devices
};

// DataLoss when a record cannot be read, or none of the machine is there. Records of unknown kinds are left.
absl::StatusOr<SavedState> DecodeState(const DurableMap& map);

class StateJournal final : public VaultRecorder {
 public:
  explicit StateJournal(FdStore* store) : store_(store) {}

  // Records go there from now on; before, nothing is recorded.
  void Use(DurableMap map) { map_ = std::move(map); }
  bool active() const { return map_.has_value(); }
  // For a worker, to bring to the next supervisor. Null when it cannot be opened.
  SharedFd ReadOnlyState() const;

  void SaveMount(const Mount& mount) override;
  void ForgetMount(uint64_t mount_id) override;
  void SaveLedger(const Ledger& ledger, bool is_new) override;
  void ForgetLedger(uint64_t generation) override;
  void SaveWorker(const SavedWorker& worker);
  void ForgetWorker(uint64_t generation);
  void SaveMachine(const SavedMachine& machine);
  // Everything that a fresh fd store shall keep, besides the listeners.
  void PushState();
  static void PushLedger(const Ledger& ledger, FdStore* store);

 private:
  void Put(const std::string& key, std::string_view value);
  void Erase(const std::string& key);

  FdStore* const store_;
  std::optional<DurableMap> map_;
};

}  // namespace holdfast::supervisor
