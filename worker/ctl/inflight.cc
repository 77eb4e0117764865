#include "worker/ctl/inflight.h"

#include <linux/fuse.h>
#include <sys/mman.h>

#include <cstring>

#include "schema/ledger_map.h"

namespace holdfast::ctl {
namespace {

uint64_t Before(uint64_t earlier, uint64_t later) { return later > earlier ? later - earlier : 0; }

InflightRequest ReadSlot(const hf_slot& slot, uint64_t now) {
  const fuse_in_header header = RequestHeader(slot);
  InflightRequest out;
  out.executing = true;
  out.mount_id = Load(slot.mount_id);
  out.owner_generation = Load(slot.owner_generation);
  out.unique = header.unique;
  out.nodeid = header.nodeid;
  out.opcode = header.opcode;
  out.age_nanos = Before(Load(slot.received_ns), now);
  out.interrupted = (Load(slot.marks) & HF_MARK_INTERRUPTED) != 0;
  if (header.opcode == FUSE_READ && Load(slot.length) >= sizeof header + sizeof(fuse_read_in)) {
    fuse_read_in read;
    memcpy(&read, slot.request + sizeof header, sizeof read);
    out.offset = read.offset;
    out.size = read.size;
  }
  return out;
}

InflightRequest ReadRecord(const hf_record& record, uint64_t now) {
  InflightRequest out;
  out.mount_id = Load(record.mount_id);
  out.owner_generation = Load(record.owner_generation);
  out.unique = Load(record.unique);
  out.nodeid = Load(record.nodeid);
  out.offset = Load(record.offset);
  out.size = Load(record.size);
  out.opcode = FUSE_READ;
  out.left_nanos = Before(now, Load(record.deadline_ns));
  out.interrupted = (Load(record.marks) & HF_MARK_INTERRUPTED) != 0;
  return out;
}

}  // namespace

absl::StatusOr<std::vector<InflightRequest>> ReadLedgerFd(int ledger, uint64_t now_boot_nanos) {
  auto map = LedgerMap::MapGiven(ledger, PROT_READ);
  if (!map.ok()) return Annotate(map.status(), "ledger");
  std::vector<InflightRequest> found;
  auto keep = [&](InflightRequest request) {
    request.ledger_generation = map->generation();
    found.push_back(request);
  };
  map->VisitExecuting([&](uint32_t, const hf_slot* slot) { keep(ReadSlot(*slot, now_boot_nanos)); });
  map->VisitPending([&](const hf_record* record) { keep(ReadRecord(*record, now_boot_nanos)); });
  return found;
}

}  // namespace holdfast::ctl
