// The memory of a request ledger (schema/ledger.h): makes it, maps it, finds slots and records in it. For all
// who have one: the supervisor, the worker, holdfastctl.
//
// Where things lie is settled when it is mapped, and kept here: other processes can write to the header, as
// to everything else, at any time. What they write later is a number, and moves no pointer. Thread safety:
// all functions; who reads a word that another process writes does it by Load or by an atomic of its own.
#pragma once

#include <linux/fuse.h>

#include <cstdint>
#include <memory>

#include "common/io.h"
#include "common/status.h"
#include "schema/ledger.h"

namespace holdfast {

// A word that another process may be changing, and then all that this process wrote before it.
template <typename T>
T Load(const T& word) {
  return __atomic_load_n(&word, __ATOMIC_ACQUIRE);
}

// The first word of the kernel's bytes: 0 while a slot that receives holds nothing.
inline uint32_t& LengthWord(hf_slot* slot) { return *reinterpret_cast<uint32_t*>(slot->request); }
// Of a slot in state EXECUTING: what its bytes begin with.
fuse_in_header RequestHeader(const hf_slot& slot);

class LedgerMap {
 public:
  // An empty ledger, of a size that nobody can change.
  static absl::StatusOr<UniqueFd> Make(uint64_t generation);

  // For who made it: to read only, and whatever its header says by now. DataLoss when it could be truncated
  // under us, or has another size.
  static absl::StatusOr<LedgerMap> MapMade(int memory, uint64_t generation);
  // For who got it: as its header says at this moment. DataLoss when that is not version 1, or does not fit
  // the memory's size. `protection` is mmap's.
  static absl::StatusOr<LedgerMap> MapGiven(int memory, int protection);

  hf_ledger_header* header() const { return reinterpret_cast<hf_ledger_header*>(base_.get()); }
  uint64_t generation() const { return layout_.generation; }
  uint32_t slot_count() const { return layout_.slot_count; }
  uint32_t record_count() const { return layout_.record_count; }
  hf_slot* slot(uint32_t index) const;
  hf_record* record(uint32_t index) const;
  // Records at and above it were never used.
  uint32_t high_water() const;

  // Whether a successor would have to answer what lies in the slot or in its pipe (the end to read from).
  bool SlotIsUnanswered(uint32_t index, int pipe) const;
  // What is being executed, as (index, slot), and the READs that wait, each as a record.
  template <typename Visit>
  void VisitExecuting(Visit visit) const {
    for (uint32_t i = 0; i < slot_count(); ++i) {
      if (Load(slot(i)->state) == HF_SLOT_EXECUTING) visit(i, slot(i));
    }
  }
  template <typename Visit>
  void VisitPending(Visit visit) const {
    for (uint32_t i = 0, used = high_water(); i < used; ++i) {
      if (Load(record(i)->state) == HF_RECORD_PENDING) visit(record(i));
    }
  }

 private:
  struct Unmap {
    uint64_t size;
    void operator()(uint8_t* base) const;
  };
  LedgerMap(uint8_t* base, uint64_t size) : base_(base, Unmap{size}) {}
  static absl::StatusOr<LedgerMap> Map(int memory, uint64_t size, int protection);

  std::unique_ptr<uint8_t, Unmap> base_;
  hf_ledger_header layout_{};  // of it, what stands before `reserved0`
};

}  // namespace holdfast
