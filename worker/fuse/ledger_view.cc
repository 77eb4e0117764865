#include "worker/fuse/ledger_view.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <bit>
#include <cerrno>
#include <cstddef>
#include <string>

#include "common/crc32c.h"

namespace holdfast::fuse {
namespace {

static_assert(std::endian::native == std::endian::little, "the ledger is little-endian");
static_assert(offsetof(hf_record, owner_generation) == offsetof(hf_record, state) + 4);

uint64_t& StateWord(hf_record* record) { return *reinterpret_cast<uint64_t*>(&record->state); }
uint64_t Pack(RecordState s) { return s.state | (uint64_t{s.owner} << 32); }
RecordState Unpack(uint64_t word) { return {static_cast<uint32_t>(word), static_cast<uint32_t>(word >> 32)}; }

bool Inside(uint64_t offset, uint64_t count, uint64_t stride, uint64_t least, uint64_t total) {
  if (stride < least || stride > HF_LEDGER_TOTAL_SIZE || count > HF_LEDGER_RECORDS || offset % 8 != 0 ||
      stride % 8 != 0) {
    return false;
  }
  return offset <= total && count * stride <= total - offset;
}

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
  struct stat st;
  if (fstat(handle.memory.get(), &st) != 0) return ErrnoStatus(errno, name);
  auto size = static_cast<uint64_t>(st.st_size);
  if (size < sizeof(hf_ledger_header)) return DataLoss(name + ": too small");
  void* base = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, handle.memory.get(), 0);
  if (base == MAP_FAILED) return ErrnoStatus(errno, name + ": mmap");
  std::shared_ptr<LedgerView> view(new LedgerView());
  view->base_ = static_cast<uint8_t*>(base);
  view->size_ = size;
  view->handle_ = std::move(handle);
  const hf_ledger_header& h = *view->header();
  if (h.magic != HF_LEDGER_MAGIC) return DataLoss(name + ": wrong magic");
  if (h.version != HF_LEDGER_VERSION) return DataLoss(name + ": version " + std::to_string(h.version));
  if (h.generation != generation) return DataLoss(name + ": it belongs to " + std::to_string(h.generation));
  view->generation_ = generation;
  view->slot_count_ = h.slot_count;
  view->slot_stride_ = h.slot_stride;
  view->slot_offset_ = h.slot_offset;
  view->record_count_ = h.record_count;
  view->record_stride_ = h.record_stride;
  view->record_offset_ = h.record_offset;
  if (h.total_size > size || h.slot_count > 1024 ||
      !Inside(view->slot_offset_, view->slot_count_, view->slot_stride_, sizeof(hf_slot), size) ||
      !Inside(view->record_offset_, view->record_count_, view->record_stride_, sizeof(hf_record), size)) {
    return DataLoss(name + ": its layout does not fit its size");
  }
  if (view->handle_.pipes.size() < view->slot_count_)
    return InvalidArgument(name + ": fewer pipes than slots");
  for (uint32_t i = 0; i < view->slot_count_; i++) {
    HF_RETURN_IF_ERROR(SetNonBlocking(view->pipe_read(i)));
    HF_RETURN_IF_ERROR(SetNonBlocking(view->pipe_write(i)));
  }
  return view;
}

LedgerView::~LedgerView() {
  if (base_ != nullptr) munmap(base_, size_);
}

hf_ledger_header* LedgerView::header() const { return reinterpret_cast<hf_ledger_header*>(base_); }

hf_slot* LedgerView::slot(uint32_t index) const {
  return reinterpret_cast<hf_slot*>(base_ + slot_offset_ + uint64_t{index} * slot_stride_);
}

hf_record* LedgerView::record(uint32_t index) const {
  return reinterpret_cast<hf_record*>(base_ + record_offset_ + uint64_t{index} * record_stride_);
}

uint32_t LedgerView::high_water() const {
  return std::min(Shared(header()->record_high_water).load(std::memory_order_acquire), record_count_);
}

bool LedgerView::Empty() const {
  for (uint32_t i = 0; i < slot_count_; i++) {
    if (Shared(slot(i)->state).load(std::memory_order_acquire) != HF_SLOT_FREE) return false;
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
