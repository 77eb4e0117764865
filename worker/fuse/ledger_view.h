// A mapped ledger with its pipes: this worker's own, or an older generation's that it adopts from. What only
// a worker does with it is here: it writes states, and hands out records.
//
// Words that two processes see at once are only touched through Load and the functions below. Thread safety:
// all functions; the rules of who may write what are in schema/ledger.h. Errors: DataLoss for a memfd that is
// not a version 1 ledger of that generation.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <queue>
#include <utility>
#include <vector>

#include "common/mutex.h"
#include "common/status.h"
#include "schema/ledger_map.h"
#include "worker/fuse/fuse_server.h"

namespace holdfast::fuse {

// A word of shared memory as an atomic.
template <typename T>
std::atomic_ref<T> Shared(T& word) {
  static_assert(std::atomic_ref<T>::is_always_lock_free);
  return std::atomic_ref<T>(word);
}

// The state of a record and the generation that will answer it, changed together (one 64-bit word).
struct RecordState {
  uint32_t state = HF_RECORD_FREE;
  uint32_t owner = 0;
};
RecordState LoadState(hf_record* record);
void StoreState(hf_record* record, RecordState state);
// False, with `expected` updated, when the record is not in the state expected.
bool ChangeState(hf_record* record, RecordState* expected, RecordState wanted);

uint32_t RecordCrc(const hf_record& record);

class LedgerView : public LedgerMap {
 public:
  static absl::StatusOr<std::shared_ptr<LedgerView>> Map(LedgerHandle handle, uint64_t generation);

  int pipe_read(uint32_t slot) const { return handle_.pipes[slot].read_end.get(); }
  int pipe_write(uint32_t slot) const { return handle_.pipes[slot].write_end.get(); }

  // No record and no slot holds a request.
  bool Empty() const;

 private:
  LedgerView(LedgerMap map, LedgerHandle handle) : LedgerMap(std::move(map)), handle_(std::move(handle)) {}

  const LedgerHandle handle_;
};

// Hands out free records of the own ledger, lowest first, so that few pages of the memfd are ever touched.
class RecordAllocator {
 public:
  explicit RecordAllocator(std::shared_ptr<LedgerView> ledger) : ledger_(std::move(ledger)) { Rebuild(); }

  // A record in state FILLING; nullopt when the table is full.
  std::optional<uint32_t> Take();
  // The record is FREE again.
  void Put(uint32_t index);
  // Learns from the ledger what is free (a successor may have freed records of ours). Records being filled
  // are freed: call it only while no thread fills one.
  void Rebuild();
  uint32_t used() const { return used_.load(std::memory_order_relaxed); }

 private:
  const std::shared_ptr<LedgerView> ledger_;
  Mutex mutex_;
  std::priority_queue<uint32_t, std::vector<uint32_t>, std::greater<>> free_ ABSL_GUARDED_BY(mutex_);
  uint32_t next_ ABSL_GUARDED_BY(mutex_) = 0;  // never used so far
  std::atomic<uint32_t> used_{0};
};

}  // namespace holdfast::fuse
