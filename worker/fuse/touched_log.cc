#include "worker/fuse/touched_log.h"

#include <sys/mman.h>
#include <sys/stat.h>

#include <cerrno>
#include <string>

#include "worker/fuse/ledger_view.h"

namespace holdfast::fuse {

absl::StatusOr<std::unique_ptr<TouchedLog>> TouchedLog::Map(const UniqueFd& memory) {
  struct stat st;
  if (fstat(memory.get(), &st) != 0) return ErrnoStatus(errno, "log of touched nodes");
  auto size = static_cast<uint64_t>(st.st_size);
  if (size < sizeof(hf_touched_header)) return DataLoss("log of touched nodes: too small");
  void* base = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, memory.get(), 0);
  if (base == MAP_FAILED) return ErrnoStatus(errno, "log of touched nodes: mmap");
  std::unique_ptr<TouchedLog> log(new TouchedLog());
  log->base_ = static_cast<uint8_t*>(base);
  log->size_ = size;
  const hf_touched_header& h = *log->header();
  if (h.magic != HF_TOUCHED_MAGIC) return DataLoss("log of touched nodes: wrong magic");
  if (h.version != HF_TOUCHED_VERSION)
    return DataLoss("log of touched nodes: version " + std::to_string(h.version));
  log->header_size_ = h.header_size;
  log->stride_ = h.entry_stride;
  log->capacity_ = h.capacity;
  if (log->header_size_ < sizeof h || log->stride_ < sizeof(hf_touched_entry) || log->header_size_ % 8 != 0 ||
      log->stride_ % 8 != 0 || log->header_size_ > size ||
      uint64_t{log->capacity_} * log->stride_ > size - log->header_size_) {
    return DataLoss("log of touched nodes: its layout does not fit its size");
  }
  return log;
}

TouchedLog::~TouchedLog() {
  if (base_ != nullptr) munmap(base_, size_);
}

void TouchedLog::Note(uint64_t mount_id, uint64_t nodeid) {
  if (overflowed_ || !noted_[mount_id].insert(nodeid).second) return;
  uint64_t index = Shared(header()->count).fetch_add(1, std::memory_order_acq_rel);
  if (index >= capacity_) {
    overflowed_ = true;
    return;
  }
  hf_touched_entry* e = entry(index);
  Shared(e->nodeid).store(nodeid, std::memory_order_relaxed);
  Shared(e->mount_id).store(mount_id, std::memory_order_release);
}

std::optional<std::map<uint64_t, std::set<uint64_t>>> TouchedLog::Nodes() const {
  uint64_t count = Shared(header()->count).load(std::memory_order_acquire);
  if (count > capacity_) return std::nullopt;
  std::map<uint64_t, std::set<uint64_t>> nodes;
  for (uint64_t i = 0; i < count; i++) {
    uint64_t mount_id = Shared(entry(i)->mount_id).load(std::memory_order_acquire);
    if (mount_id != 0) nodes[mount_id].insert(Shared(entry(i)->nodeid).load(std::memory_order_relaxed));
  }
  return nodes;
}

}  // namespace holdfast::fuse
