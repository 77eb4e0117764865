// What the next supervisor needs, kept outside this process: records in a durable map (values:
// schema/vault_state.capnp) and descriptors in the fd store. Every record is written before the action that
// it speaks of. Main thread only. A write that fails (no memory left) is logged; this process goes on.
#pragma once

#include <capnp/message.h>

#include <cstdint>
#include <map>
#include <optional>
#include <string>

#include "common/durable_map.h"
#include "common/fd_store.h"
#include "schema/vault_state.capnp.h"
#include "supervisor/vault.h"

namespace holdfast::supervisor {

// Names in the fd store: at most 8 characters up to 36^7 numbers.
inline constexpr char kStateFd[] = "state";
inline constexpr char kSnapshotFd[] = "snap";
inline constexpr char kControlFd[] = "ctl";
enum class FdKind : char { kMount = 'm', kLedger = 'l', kPipes = 'p', kWorker = 'w' };
std::string FdName(FdKind kind, uint64_t number);

// What an earlier supervisor wrote; each reader owns its record. All fields have been read once, so none
// throws later. `machine` is set by DecodeState.
struct SavedState {
  kj::Own<schema::SavedMachine::Reader> machine;
  std::map<uint64_t, kj::Own<schema::SavedWorker::Reader>> workers;
  std::map<uint64_t, kj::Own<schema::SavedLedger::Reader>> ledgers;
  std::map<uint64_t, Mount> mounts;  // without devices
};

// DataLoss when a record cannot be read, or none of the machine is there. Records of unknown kinds are left.
absl::StatusOr<SavedState> DecodeState(const DurableMap& map);

class StateJournal {
 public:
  explicit StateJournal(FdStore* store) : store_(store) {}

  // Records go there from now on; before, nothing is recorded.
  void Use(DurableMap map) { map_ = std::move(map); }
  bool active() const { return map_.has_value(); }
  // For a worker, to bring to the next supervisor. Null when it cannot be opened.
  SharedFd ReadOnlyState() const;

  // Of vault and ledgers. Intents before the action: an entry that is being mounted, one that is about to be
  // unmounted.
  void SaveMount(const Mount& mount);
  void ForgetMount(uint64_t mount_id);
  void SaveLedger(const Ledger& ledger, bool is_new);
  void ForgetLedger(uint64_t generation);
  // `record`: filled in, as schema/vault_state.capnp has it.
  void SaveMachine(capnp::MessageBuilder* record);
  void SaveWorker(uint64_t generation, capnp::MessageBuilder* record);
  void ForgetWorker(uint64_t generation);
  // Everything that a fresh fd store shall keep, besides the listeners.
  void PushState();
  static void PushLedger(const Ledger& ledger, FdStore* store);

 private:
  void Put(const std::string& key, capnp::MessageBuilder* record);
  void Erase(const std::string& key);

  FdStore* const store_;
  std::optional<DurableMap> map_;
};

}  // namespace holdfast::supervisor
