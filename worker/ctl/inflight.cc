#include "worker/ctl/inflight.h"

#include <linux/fuse.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "schema/ledger.h"

namespace holdfast::ctl {
namespace {

template <typename T>
T LoadAtomic(const T* word) {
  return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

template <typename T>
const T* At(std::string_view ledger, uint64_t offset) {
  return static_cast<const T*>(static_cast<const void*>(ledger.data() + offset));
}

// [offset, offset + count * stride) lies inside, and an element fits its stride.
bool TableFits(std::string_view ledger, uint64_t offset, uint64_t count, uint64_t stride, uint64_t element) {
  if (count > 1u << 24 || stride < element || stride > 1u << 24 || offset % 8 != 0 || stride % 8 != 0)
    return false;
  return offset <= ledger.size() && count * stride <= ledger.size() - offset;
}

uint64_t Before(uint64_t earlier, uint64_t later) { return later > earlier ? later - earlier : 0; }

bool ReadSlot(const hf_slot* slot, uint64_t now, InflightRequest* out) {
  if (LoadAtomic(&slot->state) != HF_SLOT_EXECUTING) return false;
  fuse_in_header header;
  memcpy(&header, slot->request, sizeof header);
  out->executing = true;
  out->mount_id = LoadAtomic(&slot->mount_id);
  out->owner_generation = LoadAtomic(&slot->owner_generation);
  out->unique = header.unique;
  out->nodeid = header.nodeid;
  out->opcode = header.opcode;
  out->age_nanos = Before(LoadAtomic(&slot->received_ns), now);
  out->interrupted = (LoadAtomic(&slot->marks) & HF_MARK_INTERRUPTED) != 0;
  if (header.opcode == FUSE_READ && LoadAtomic(&slot->length) >= sizeof header + sizeof(fuse_read_in)) {
    fuse_read_in read;
    memcpy(&read, slot->request + sizeof header, sizeof read);
    out->offset = read.offset;
    out->size = read.size;
  }
  return true;
}

bool ReadRecord(const hf_record* record, uint64_t now, InflightRequest* out) {
  if (LoadAtomic(&record->state) != HF_RECORD_PENDING) return false;
  out->mount_id = LoadAtomic(&record->mount_id);
  out->owner_generation = LoadAtomic(&record->owner_generation);
  out->unique = LoadAtomic(&record->unique);
  out->nodeid = LoadAtomic(&record->nodeid);
  out->offset = LoadAtomic(&record->offset);
  out->size = LoadAtomic(&record->size);
  out->opcode = FUSE_READ;
  out->left_nanos = Before(now, LoadAtomic(&record->deadline_ns));
  out->interrupted = (LoadAtomic(&record->marks) & HF_MARK_INTERRUPTED) != 0;
  return true;
}

}  // namespace

absl::StatusOr<std::vector<InflightRequest>> ReadLedger(std::string_view ledger, uint64_t now_boot_nanos) {
  if (ledger.size() < sizeof(hf_ledger_header)) return DataLoss("ledger: too short");
  const auto* header = At<hf_ledger_header>(ledger, 0);
  if (header->magic != HF_LEDGER_MAGIC || header->version != HF_LEDGER_VERSION) {
    return DataLoss("ledger: not version 1");
  }
  if (!TableFits(ledger, header->slot_offset, header->slot_count, header->slot_stride, sizeof(hf_slot)) ||
      !TableFits(ledger, header->record_offset, header->record_count, header->record_stride,
                 sizeof(hf_record))) {
    return DataLoss("ledger: its tables lie outside of it");
  }
  std::vector<InflightRequest> found;
  auto keep = [&](bool used, InflightRequest& request) {
    if (!used) return;
    request.ledger_generation = header->generation;
    found.push_back(request);
  };
  for (uint64_t i = 0; i < header->slot_count; ++i) {
    InflightRequest request;
    keep(ReadSlot(At<hf_slot>(ledger, header->slot_offset + i * header->slot_stride), now_boot_nanos,
                  &request),
         request);
  }
  const uint64_t used = std::min(header->record_count, LoadAtomic(&header->record_high_water));
  for (uint64_t i = 0; i < used; ++i) {
    InflightRequest request;
    keep(ReadRecord(At<hf_record>(ledger, header->record_offset + i * header->record_stride), now_boot_nanos,
                    &request),
         request);
  }
  return found;
}

absl::StatusOr<std::vector<InflightRequest>> ReadLedgerFd(int fd, uint64_t now_boot_nanos) {
  struct stat st;
  if (fstat(fd, &st) != 0) return ErrnoStatus(errno, "stat ledger");
  if (st.st_size <= 0) return DataLoss("ledger: empty");
  const auto size = static_cast<size_t>(st.st_size);
  void* memory = mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) return ErrnoStatus(errno, "map ledger");
  auto found = ReadLedger(std::string_view(static_cast<const char*>(memory), size), now_boot_nanos);
  munmap(memory, size);
  return found;
}

}  // namespace holdfast::ctl
