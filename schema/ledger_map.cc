#include "schema/ledger_map.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <string>
#include <utility>

#include "common/sealed_memory.h"

namespace holdfast {
namespace {

static_assert(std::endian::native == std::endian::little, "the ledger is little-endian");

constexpr uint32_t kMostSlots = 1024;

hf_ledger_header FreshHeader(uint64_t generation) {
  hf_ledger_header header{};
  header.magic = HF_LEDGER_MAGIC;
  header.version = HF_LEDGER_VERSION;
  header.header_size = sizeof header;
  header.total_size = HF_LEDGER_TOTAL_SIZE;
  header.generation = generation;
  header.slot_count = HF_LEDGER_SLOTS;
  header.slot_stride = HF_LEDGER_SLOT_STRIDE;
  header.slot_offset = HF_LEDGER_SLOT_OFFSET;
  header.record_count = HF_LEDGER_RECORDS;
  header.record_stride = sizeof(hf_record);
  header.record_offset = HF_LEDGER_RECORD_OFFSET;
  return header;
}

bool Inside(uint64_t offset, uint64_t count, uint64_t stride, uint64_t least, uint64_t total) {
  if (stride < least || stride > HF_LEDGER_TOTAL_SIZE || count > HF_LEDGER_RECORDS || offset % 8 != 0 ||
      stride % 8 != 0) {
    return false;
  }
  return offset <= total && count * stride <= total - offset;
}

}  // namespace

fuse_in_header RequestHeader(const hf_slot& slot) {
  fuse_in_header header;
  memcpy(&header, slot.request, sizeof header);
  return header;
}

void LedgerMap::Unmap::operator()(uint8_t* base) const { munmap(base, size); }

absl::StatusOr<UniqueFd> LedgerMap::Make(uint64_t generation) {
  HF_ASSIGN_OR_RETURN(UniqueFd memory, MakeSealedMemory("holdfast-ledger", HF_LEDGER_TOTAL_SIZE));
  const hf_ledger_header header = FreshHeader(generation);
  HF_RETURN_IF_ERROR(PwriteFull(memory.get(), &header, sizeof header, 0));
  return memory;
}

absl::StatusOr<LedgerMap> LedgerMap::Map(int memory, uint64_t size, int protection) {
  void* base = mmap(nullptr, size, protection, MAP_SHARED, memory, 0);
  if (base == MAP_FAILED) return ErrnoStatus(errno, "mapping a ledger");
  return LedgerMap(static_cast<uint8_t*>(base), size);
}

absl::StatusOr<LedgerMap> LedgerMap::MapMade(int memory, uint64_t generation) {
  struct stat info;
  const int seals = fcntl(memory, F_GET_SEALS);
  if (fstat(memory, &info) != 0 || info.st_size != HF_LEDGER_TOTAL_SIZE || seals < 0 ||
      (seals & F_SEAL_SHRINK) == 0) {
    return DataLoss("it is no ledger");
  }
  HF_ASSIGN_OR_RETURN(LedgerMap map, Map(memory, HF_LEDGER_TOTAL_SIZE, PROT_READ));
  map.layout_ = FreshHeader(generation);
  return map;
}

absl::StatusOr<LedgerMap> LedgerMap::MapGiven(int memory, int protection) {
  struct stat info;
  if (fstat(memory, &info) != 0) return ErrnoStatus(errno, "a ledger's size");
  const auto size = static_cast<uint64_t>(info.st_size);
  if (size < sizeof(hf_ledger_header)) return DataLoss("too small for a ledger");
  HF_ASSIGN_OR_RETURN(LedgerMap map, Map(memory, size, protection));
  hf_ledger_header& layout = map.layout_;
  memcpy(&layout, map.header(), offsetof(hf_ledger_header, reserved0));
  if (layout.magic != HF_LEDGER_MAGIC) return DataLoss("wrong magic");
  if (layout.version != HF_LEDGER_VERSION) return DataLoss("version " + std::to_string(layout.version));
  if (layout.total_size > size || layout.slot_count > kMostSlots ||
      !Inside(layout.slot_offset, layout.slot_count, layout.slot_stride, sizeof(hf_slot), size) ||
      !Inside(layout.record_offset, layout.record_count, layout.record_stride, sizeof(hf_record), size)) {
    return DataLoss("its layout does not fit its size");
  }
  return map;
}

hf_slot* LedgerMap::slot(uint32_t index) const {
  return reinterpret_cast<hf_slot*>(base_.get() + layout_.slot_offset +
                                    uint64_t{index} * layout_.slot_stride);
}

hf_record* LedgerMap::record(uint32_t index) const {
  return reinterpret_cast<hf_record*>(base_.get() + layout_.record_offset +
                                      uint64_t{index} * layout_.record_stride);
}

uint32_t LedgerMap::high_water() const {
  return std::min(Load(header()->record_high_water), layout_.record_count);
}

bool LedgerMap::SlotIsUnanswered(uint32_t index, int pipe) const {
  const uint32_t state = Load(slot(index)->state);
  if (state != HF_SLOT_RECEIVING) return state == HF_SLOT_EXECUTING;
  int in_pipe = 0;
  ioctl(pipe, FIONREAD, &in_pipe);
  return in_pipe > 0 || Load(LengthWord(slot(index))) != 0;
}

}  // namespace holdfast
