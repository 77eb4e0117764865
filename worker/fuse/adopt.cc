// Taking over the unanswered requests of an older ledger (DESIGN 4.3).
//
// A record stays where it is: the successor puts its generation into it and answers it from there, so at
// every moment it exists in one ledger, whoever dies. A slot's request is executed from a copy; if it has to
// wait it gets a record in the own ledger before its slot is given up. While the old owner may still live (no
// final walk) slots are left as they are: a dying thread may still fill one, and a request answered twice
// does no harm, one overlooked does.
#include <linux/fuse.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>

#include "common/crc32c.h"
#include "glog/logging.h"
#include "worker/fuse/server_core.h"

namespace holdfast::fuse {

// A request found in a slot, copied out; zero bytes follow it.
struct RecoveredRequest {
  uint32_t slot = 0;
  uint64_t mount_id = 0;
  uint32_t strikes = 0;
  std::vector<uint8_t> bytes;
  uint32_t length = 0;

  fuse_in_header header() const {
    fuse_in_header in;
    memcpy(&in, bytes.data(), sizeof in);
    return in;
  }
  bool NeedsAnswer() const {
    uint32_t opcode = header().opcode;
    return opcode != FUSE_FORGET && opcode != FUSE_BATCH_FORGET && opcode != FUSE_INTERRUPT;
  }
};

namespace {

constexpr uint32_t kPoisonStrikes = 2;

enum class Recovery { kNone, kLater, kBad, kRequest };

// Moves what a dead thread left in its pipe to where it belongs in its slot. The first word of the request
// was zeroed before the splice, and a pipe buffer is either still in the pipe or wholly in the slot, so the
// length says what is missing. kRequest: the slot is complete, and (`by_us`) we alone have read it.
Recovery DrainPipe(const LedgerView& view, uint32_t index, uint32_t* length, bool* by_us) {
  hf_slot* slot = view.slot(index);
  auto& length_word = *reinterpret_cast<uint32_t*>(slot->request);
  int in_pipe = 0;
  if (ioctl(view.pipe_read(index), FIONREAD, &in_pipe) != 0) return Recovery::kBad;
  uint32_t had = Shared(length_word).load(std::memory_order_acquire);
  auto left = static_cast<uint32_t>(in_pipe);
  if (had > HF_LEDGER_REQUEST_BYTES || left > HF_LEDGER_REQUEST_BYTES || (had != 0 && left > had))
    return Recovery::kBad;
  uint32_t at = had == 0 ? 0 : had - left;
  *by_us = at == 0 && left > 0;
  while (left > 0) {
    ssize_t n = read(view.pipe_read(index), slot->request + at, left);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return Recovery::kLater;  // its dying owner has just read it
    at += static_cast<uint32_t>(n);
    left -= static_cast<uint32_t>(n);
  }
  *length = Shared(length_word).load(std::memory_order_acquire);
  if (*length == 0) return Recovery::kNone;
  return *length == at ? Recovery::kRequest : Recovery::kBad;
}

bool Sane(const RecoveredRequest& request) {
  if (request.length < sizeof(fuse_in_header) || request.length > HF_LEDGER_REQUEST_BYTES) return false;
  fuse_in_header in = request.header();
  return in.len == request.length && in.opcode != 0;
}

Recovery RecoverRequest(const LedgerView& view, uint32_t index, bool final_walk, RecoveredRequest* out) {
  hf_slot* slot = view.slot(index);
  uint32_t state = Shared(slot->state).load(std::memory_order_acquire);
  if (state == HF_SLOT_FREE) return Recovery::kNone;
  out->slot = index;
  out->mount_id = Shared(slot->mount_id).load(std::memory_order_acquire);
  out->strikes = Shared(slot->strikes).load(std::memory_order_relaxed);
  uint64_t received = Shared(slot->received_ns).load(std::memory_order_acquire);
  uint32_t crc = 0;
  if (state == HF_SLOT_RECEIVING) {
    bool by_us = false;
    Recovery drained = DrainPipe(view, index, &out->length, &by_us);
    if (drained != Recovery::kRequest)
      return drained == Recovery::kNone && !final_walk ? Recovery::kLater : drained;
    if (!by_us && !final_walk) return Recovery::kLater;  // a living thread may be in the middle of copying it
  } else if (state == HF_SLOT_EXECUTING) {
    out->length = slot->length;
    crc = slot->crc;
  } else {
    return Recovery::kBad;
  }
  if (out->length > HF_LEDGER_REQUEST_BYTES) return Recovery::kBad;
  out->bytes.assign(HF_LEDGER_REQUEST_BYTES + 64, 0);
  memcpy(out->bytes.data(), slot->request, out->length);
  if (state == HF_SLOT_RECEIVING) return Sane(*out) ? Recovery::kRequest : Recovery::kBad;
  // A living owner may have gone on to its next request while we copied.
  // (The addition of nothing keeps the copy before the look.)
  bool same = Shared(slot->state).fetch_add(0, std::memory_order_acq_rel) == state &&
              Shared(slot->mount_id).load(std::memory_order_acquire) == out->mount_id &&
              Shared(slot->received_ns).load(std::memory_order_acquire) == received;
  if (!same && !final_walk) return Recovery::kLater;
  return same && Sane(*out) && Crc32c(out->bytes.data(), out->length) == crc ? Recovery::kRequest
                                                                             : Recovery::kBad;
}

// Suspects of a crash last, each alone; INTERRUPTs after the requests they mean.
int Order(const RecoveredRequest& request) {
  if (request.header().opcode == FUSE_INTERRUPT) return 1;
  return request.strikes > 0 ? 2 : 0;
}

}  // namespace

absl::StatusOr<uint64_t> ServerCore::AdoptLedger(uint64_t generation, LedgerHandle handle, bool final_walk) {
  if (generation == options_.generation) return InvalidArgument("a worker does not adopt its own ledger");
  MutexLock walk(&adopt_mutex_);
  Gate gate(this);
  if (!gate) return FailedPrecondition("parked");
  uint64_t start = options_.clock->BootNanos();
  std::shared_ptr<OldLedger> old;
  {
    MutexLock lock(&old_mutex_);
    auto it = old_.find(generation);
    if (it != old_.end()) old = it->second;
  }
  if (old == nullptr) {
    old = std::make_shared<OldLedger>();
    HF_ASSIGN_OR_RETURN(old->view, LedgerView::Map(std::move(handle), generation));
    MutexLock lock(&old_mutex_);
    old_[generation] = old;
    drained_.erase(generation);
  }
  BorrowedPipe pipe(this);
  uint64_t taken = AdoptRecords(old->view, final_walk, pipe.get());
  taken += AdoptSlots(*old, final_walk, pipe.get());
  {
    MutexLock lock(&old_mutex_);
    if (final_walk) old->walked_finally = true;
  }
  uint64_t nanos = options_.clock->BootNanos() - start;
  LOG(INFO) << "fuse.adopted generation=" << generation << " final=" << final_walk << " taken=" << taken
            << " us=" << nanos / 1000;
  if (options_.trace != nullptr) {
    options_.trace->Record(
        "fuse.adopt", "generation=" + std::to_string(generation) + " taken=" + std::to_string(taken), nanos);
  }
  return taken;
}

bool ServerCore::Drained(uint64_t generation) {
  MutexLock lock(&old_mutex_);
  if (drained_.contains(generation)) return true;
  auto it = old_.find(generation);
  if (it == old_.end() || !it->second->walked_finally || !it->second->view->Empty()) return false;
  drained_.insert(generation);
  old_.erase(it);
  return true;
}

std::vector<std::shared_ptr<LedgerView>> ServerCore::OldLedgers() const {
  MutexLock lock(&old_mutex_);
  std::vector<std::shared_ptr<LedgerView>> views;
  for (const auto& [generation, old] : old_) views.push_back(old->view);
  return views;
}

void ServerCore::Dropped(uint64_t generation, uint64_t mount_id, const char* why) {
  dropped_++;
  LOG(ERROR) << "fuse.request_dropped generation=" << generation << " mount=" << mount_id << " why=\"" << why
             << '"';
}

uint64_t ServerCore::AdoptRecords(const std::shared_ptr<LedgerView>& view, bool final_walk, ReplyPipe* pipe) {
  uint64_t taken = 0;
  for (uint32_t i = 0, end = view->high_water(); i < end; i++) {
    if (AdoptRecord(view, i, final_walk, pipe)) taken++;
  }
  return taken;
}

bool ServerCore::AdoptRecord(const std::shared_ptr<LedgerView>& view, uint32_t index, bool final_walk,
                             ReplyPipe* pipe) {
  hf_record* record = view->record(index);
  RecordState state = LoadState(record);
  if (state.state == HF_RECORD_FILLING && final_walk)
    ChangeState(record, &state, {});  // its slot has the request
  if (state.state != HF_RECORD_PENDING) return false;
  // Taken first and looked at then: its owner may still be dying, and answer and refill it under our eyes.
  bool ours_before = state.owner == generation32_;
  if (!ChangeState(record, &state, {HF_RECORD_PENDING, generation32_}))
    return false;  // answered this instant
  state.owner = generation32_;
  hf_record copy;
  memcpy(&copy, record, sizeof copy);
  PendingRead read{view,           index,     copy.unique, copy.nodeid,
                   copy.offset,    copy.size, 0,           options_.clock->BootNanos(),
                   view != ledger_};
  std::shared_ptr<Mount> mount = FindMount(copy.mount_id);
  const char* refused = RecordCrc(copy) != copy.crc ? "bad CRC"
                        : mount == nullptr          ? "unknown mount"
                                                    : nullptr;
  if (refused != nullptr) {
    if (!ChangeState(record, &state, {})) return false;
    if (view == ledger_) records_.Put(index);
    Dropped(view->generation(), copy.mount_id, refused);
    return false;
  }
  if (ours_before && mount->FindPending(copy.unique)) return false;
  read.deadline_nanos = AdoptedDeadline(Shared(record->deadline_ns).load(std::memory_order_relaxed));
  Shared(record->deadline_ns).store(read.deadline_nanos, std::memory_order_relaxed);
  pending_++;
  if (mount->AddPending(read) == Mount::Added::kDuplicate) {
    pending_--;
    FreeRecord(read);  // the same request waits in another ledger already
    return false;
  }
  TakeUp(mount, read.unique, pipe);
  Throttle(*mount);
  return true;
}

uint64_t ServerCore::AdoptSlots(OldLedger& old, bool final_walk, ReplyPipe* pipe) {
  const LedgerView& view = *old.view;
  std::vector<RecoveredRequest> requests;
  for (uint32_t i = 0; i < view.slot_count(); i++) {
    RecoveredRequest request;
    Recovery found = RecoverRequest(view, i, final_walk, &request);
    if (found == Recovery::kRequest) {
      requests.push_back(std::move(request));
    } else if (found == Recovery::kBad && final_walk) {
      Dropped(view.generation(), request.mount_id, "bad CRC or length");
    }
  }
  std::stable_sort(requests.begin(), requests.end(),
                   [](const auto& a, const auto& b) { return Order(a) < Order(b); });
  uint64_t taken = 0;
  for (const RecoveredRequest& request : requests) {
    uint64_t unique = request.header().unique;
    auto known = old.taken_slots.find(request.slot);
    if (known != old.taken_slots.end() && known->second == unique) continue;
    if (AdoptRequest(request, view.slot(request.slot), pipe)) taken++;
    old.taken_slots[request.slot] = unique;
  }
  if (final_walk) {
    for (uint32_t i = 0; i < view.slot_count(); i++) {
      Shared(view.slot(i)->state).store(HF_SLOT_FREE, std::memory_order_release);
    }
  }
  return taken;
}

bool ServerCore::AdoptRequest(const RecoveredRequest& request, hf_slot* slot, ReplyPipe* pipe) {
  std::shared_ptr<Mount> mount = FindMount(request.mount_id);
  if (mount == nullptr || ready_session_.load() == nullptr) {
    Dropped(slot->owner_generation, request.mount_id, "unknown mount");
    return false;
  }
  fuse_in_header in = request.header();
  Exchange x;
  x.core = this;
  x.mount = mount.get();
  x.pipe = pipe;
  x.unique = in.unique;
  x.opcode = in.opcode;
  x.slot = slot;
  x.adopted = true;
  if (request.strikes >= kPoisonStrikes && request.NeedsAnswer()) {
    LOG(ERROR) << "fuse.poison mount=" << request.mount_id << " layer=" << mount->description()
               << " opcode=" << in.opcode << " node=" << in.nodeid << " strikes=" << request.strikes;
    ReplyError(x, EIO);
    return true;
  }
  mount->BeginExecute(in.unique, &slot->marks);
  Execute(x, request.bytes.data(), request.length);
  mount->EndExecute(in.unique);
  if (x.waits) Fetch(mount, x.layer, *x.waits);
  return request.NeedsAnswer() && !x.duplicate;
}

}  // namespace holdfast::fuse
