#include "worker/fuse/ledger_view.h"

#include <fcntl.h>
#include <sys/mman.h>

#include <cerrno>
#include <cstddef>
#include <string>

#include "common/crc32c.h"

namespace holdfast::fuse {
namespace {

static_assert(offsetof(hf_record, owner_generation) == offsetof(hf_record, state) + 4);

uint64_t& StateWord(hf_record* record) { return *reinterpret_cast<uint64_t*>(&record->state); }
uint64_t Pack(RecordState s) { return s.state | (uint64_t{s.owner} << 32); }
RecordState Unpack(uint64_t word) { return {static_cast<uint32_t>(word), static_cast<uint32_t>(word >> 32)}; }

// The pipes may be read by a dying owner and by its successor at once: neither may wait for bytes that the
// other took.
absl::Status SetNonBlocking(int fd) {
  int flags = fcntl(fd, F_GETFL);
  if (flags < 0) return ErrnoStatus(errno, "request pipe");
  if ((flags & O_NONBLOCK) == 0 && fcntl(fd, F_SETFL, flags | O_NONBLOCK) != 0) {
    return ErrnoStatus(errno, "request pipe: O_NONBLOCK");
  }
  return absl::OkStatus();
}

}  // namespace

RecordState LoadState(hf_record* record) {
  return Unpack(Shared(StateWord(record)).load(std::memory_order_acquire));
}

void StoreState(hf_record* record, RecordState state) {
  Shared(StateWord(record)).store(Pack(state), std::memory_order_release);
}

bool ChangeState(hf_record* record, RecordState* expected, RecordState wanted) {
  uint64_t word = Pack(*expected);
  if (Shared(StateWord(record)).compare_exchange_strong(word, Pack(wanted), std::memory_order_acq_rel))
    return true;
  *expected = Unpack(word);
  return false;
}

uint32_t RecordCrc(const hf_record& record) {
  constexpr size_t kBegin = offsetof(hf_record, mount_id), kEnd = offsetof(hf_record, crc);
  static_assert(kEnd - kBegin == 36, "mount_id, unique, nodeid, offset, size lie side by side");
  return Crc32c(reinterpret_cast<const uint8_t*>(&record) + kBegin, kEnd - kBegin);
}

absl::StatusOr<std::shared_ptr<LedgerView>> LedgerView::Map(LedgerHandle handle, uint64_t generation) {
  const std::string name = "ledger of generation " + std::to_string(generation);
  auto map = MapGiven(handle.memory.get(), PROT_READ | PROT_WRITE);
  if (!map.ok()) return Annotate(map.status(), name);
  if (map->generation() != generation) {
    return DataLoss(name + ": it belongs to " + std::to_string(map->generation()));
  }
  if (handle.pipes.size() < map->slot_count()) return InvalidArgument(name + ": fewer pipes than slots");
  for (uint32_t i = 0; i < map->slot_count(); i++) {
    HF_RETURN_IF_ERROR(SetNonBlocking(handle.pipes[i].read_end.get()));
    HF_RETURN_IF_ERROR(SetNonBlocking(handle.pipes[i].write_end.get()));
  }
  return std::shared_ptr<LedgerView>(new LedgerView(*std::move(map), std::move(handle)));
}

bool LedgerView::Empty() const {
  for (uint32_t i = 0; i < slot_count(); i++) {
    if (Load(slot(i)->state) != HF_SLOT_FREE) return false;
  }
  for (uint32_t i = 0, end = high_water(); i < end; i++) {
    if (LoadState(record(i)).state != HF_RECORD_FREE) return false;
  }
  return true;
}

std::optional<uint32_t> RecordAllocator::Take() {
  MutexLock lock(&mutex_);
  while (true) {
    uint32_t index = 0;
    if (!free_.empty()) {
      index = free_.top();
      free_.pop();
    } else if (next_ < ledger_->record_count()) {
      index = next_++;
      Shared(ledger_->header()->record_high_water).store(next_, std::memory_order_release);
    } else {
      return std::nullopt;
    }
    RecordState state = LoadState(ledger_->record(index));
    if (state.state != HF_RECORD_FREE) continue;
    if (!ChangeState(ledger_->record(index), &state,
                     {HF_RECORD_FILLING, static_cast<uint32_t>(ledger_->generation())})) {
      continue;
    }
    used_.fetch_add(1, std::memory_order_relaxed);
    return index;
  }
}

void RecordAllocator::Put(uint32_t index) {
  MutexLock lock(&mutex_);
  free_.push(index);
  used_.fetch_sub(1, std::memory_order_relaxed);
}

void RecordAllocator::Rebuild() {
  MutexLock lock(&mutex_);
  free_ = {};
  next_ = ledger_->high_water();
  uint32_t used = 0;
  for (uint32_t i = 0; i < next_; i++) {
    RecordState state = LoadState(ledger_->record(i));
    if (state.state == HF_RECORD_FILLING) StoreState(ledger_->record(i), {});
    if (state.state == HF_RECORD_PENDING) {
      used++;
    } else {
      free_.push(i);
    }
  }
  used_.store(used, std::memory_order_relaxed);
}

}  // namespace holdfast::fuse
