// Taking over the unanswered requests of an older ledger (DESIGN 4.3).
//
// A record stays where it is: the successor puts its generation into it and answers it from there, so at
// every moment it exists in one ledger, whoever dies. A slot's request is executed from a copy; if it has to
// wait it gets a record in the own ledger before its slot is given up. While the old owner may still live (no
// final walk) slots are left as they are: a dying thread may still fill one, and a request answered twice
// does no harm, one overlooked does.
//
// Claimed first, taken up later. Claiming (AdoptLedger) costs microseconds: a record gets the successor's
// generation and its place in the mount's table, so that an INTERRUPT finds it; a slot's request is copied
// out. Taking up may open layers that are cold, on a disk that may be slow, so a thread of its own does it,
// one request after the other, while the pool reads all mounts. Who dies in between leaves everything in the
// ledgers.
#include <linux/fuse.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>
#include <thread>
#include <utility>

#include "common/crc32c.h"
#include "glog/logging.h"
#include "worker/fuse/crash_recorder.h"
#include "worker/fuse/server_core.h"

namespace holdfast::fuse {

fuse_in_header RecoveredRequest::header() const {
  fuse_in_header in;
  memcpy(&in, bytes.data(), sizeof in);
  return in;
}

bool RecoveredRequest::NeedsAnswer() const {
  uint32_t opcode = header().opcode;
  return opcode != FUSE_FORGET && opcode != FUSE_BATCH_FORGET && opcode != FUSE_INTERRUPT;
}

namespace {

constexpr uint32_t kPoisonStrikes = 2;
// What a thread of a hung worker has executed for longer is what it hung in.
constexpr uint64_t kHungInNanos = 1'000'000'000;
constexpr uint64_t kRenewNanos = 200'000'000;

enum class Recovery { kNone, kLater, kBad, kRequest };

// Moves what a dead thread left in its pipe to where it belongs in its slot. The first word of the request
// was zeroed before the splice, and a pipe buffer is either still in the pipe or wholly in the slot, so the
// length says what is missing. kRequest: the slot is complete, and (`by_us`) we alone have read it.
Recovery DrainPipe(const LedgerView& view, uint32_t index, uint32_t* length, bool* by_us) {
  hf_slot* slot = view.slot(index);
  int in_pipe = 0;
  if (ioctl(view.pipe_read(index), FIONREAD, &in_pipe) != 0) return Recovery::kBad;
  uint32_t had = Load(LengthWord(slot));
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
  *length = Load(LengthWord(slot));
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
  out->received_nanos = received;
  out->executing = state == HF_SLOT_EXECUTING;
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
  out->bytes.assign(out->length + 64, 0);
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

// INTERRUPTs after the requests they mean.
int Order(const RecoveredRequest& request) { return request.header().opcode == FUSE_INTERRUPT ? 1 : 0; }

// The slot's strikes, with the one for a hang added: once, however many successors look at it.
uint32_t StrikesOf(hf_slot* slot, bool hung_in) {
  if (hung_in && (Shared(slot->marks).fetch_or(HF_MARK_HANG_STRUCK, std::memory_order_acq_rel) &
                  HF_MARK_HANG_STRUCK) == 0) {
    return Shared(slot->strikes).fetch_add(1, std::memory_order_acq_rel) + 1;
  }
  return Shared(slot->strikes).load(std::memory_order_acquire);
}

}  // namespace

absl::StatusOr<uint64_t> ServerCore::AdoptLedger(uint64_t generation, LedgerHandle handle, bool final_walk,
                                                 bool owner_hung) {
  if (generation == options_.generation) return InvalidArgument("a worker does not adopt its own ledger");
  uint64_t start = options_.clock->BootNanos(), taken = 0;
  HF_ASSIGN_OR_RETURN(std::shared_ptr<OldLedger> old, OpenOldLedger(generation, std::move(handle)));
  // What cannot be said whose it is would be dropped, and whoever asked would wait for ever.
  if (options_.find_mounts && NamesUnknownMount(*old->view)) options_.find_mounts();
  Walk walk(this);
  {
    Gate gate(this);
    if (!gate) return FailedPrecondition("parked");
    taken = Claim(*old, final_walk, owner_hung);
  }
  uint64_t nanos = options_.clock->BootNanos() - start;
  LOG(INFO) << "fuse.adopted generation=" << generation << " final=" << final_walk << " hung=" << owner_hung
            << " taken=" << taken << " suspects=" << suspects_.size() + suspect_records_.size()
            << " us=" << nanos / 1000;
  if (options_.trace != nullptr) {
    options_.trace->Record(
        "fuse.adopt", "generation=" + std::to_string(generation) + " taken=" + std::to_string(taken), nanos);
  }
  if (started_) StartTakeUp();
  return taken;
}

absl::StatusOr<std::shared_ptr<ServerCore::OldLedger>> ServerCore::OpenOldLedger(uint64_t generation,
                                                                                 LedgerHandle handle) {
  {
    MutexLock lock(&old_mutex_);
    auto it = old_.find(generation);
    if (it != old_.end()) return it->second;
  }
  auto old = std::make_shared<OldLedger>();
  HF_ASSIGN_OR_RETURN(old->view, LedgerView::Map(std::move(handle), generation));
  MutexLock lock(&old_mutex_);
  old_[generation] = old;
  drained_.erase(generation);
  return old;
}

bool ServerCore::NamesUnknownMount(const LedgerView& view) const {
  std::set<uint64_t> named;
  for (uint32_t i = 0; i < view.slot_count(); i++) {
    if (Load(view.slot(i)->state) != HF_SLOT_FREE) named.insert(Load(view.slot(i)->mount_id));
  }
  view.VisitPending([&](const hf_record* record) { named.insert(Load(record->mount_id)); });
  return std::any_of(named.begin(), named.end(), [this](uint64_t id) { return FindMount(id) == nullptr; });
}

uint64_t ServerCore::Claim(OldLedger& old, bool final_walk, bool owner_hung) {
  uint64_t taken = ClaimRecords(old.view, final_walk);
  taken += ClaimSlots(old, final_walk, owner_hung);
  std::stable_sort(claimed_requests_.begin(), claimed_requests_.end(),
                   [](const auto& a, const auto& b) { return Order(a) < Order(b); });
  MutexLock lock(&old_mutex_);
  if (final_walk) old.walked_finally = true;
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

uint64_t ServerCore::ClaimRecords(const std::shared_ptr<LedgerView>& view, bool final_walk) {
  uint64_t taken = 0;
  for (uint32_t i = 0, end = view->high_water(); i < end; i++) {
    hf_record* record = view->record(i);
    if (LoadState(record).state == HF_RECORD_PENDING && Shared(record->strikes).load() > 0) {
      suspect_records_.push_back({view, i});
      continue;
    }
    std::optional<ClaimedRead> claimed = ClaimRecord(view, i, final_walk);
    if (!claimed) continue;
    claimed_reads_.push_back(*std::move(claimed));
    taken++;
  }
  return taken;
}

std::optional<ServerCore::ClaimedRead> ServerCore::ClaimRecord(const std::shared_ptr<LedgerView>& view,
                                                               uint32_t index, bool final_walk) {
  hf_record* record = view->record(index);
  RecordState state = LoadState(record);
  if (state.state == HF_RECORD_FILLING && final_walk)
    ChangeState(record, &state, {});  // its slot has the request
  if (state.state != HF_RECORD_PENDING) return std::nullopt;
  // Taken first and looked at then: its owner may still be dying, and answer and refill it under our eyes.
  bool ours_before = state.owner == generation32_;
  if (!ChangeState(record, &state, {HF_RECORD_PENDING, generation32_}))
    return std::nullopt;  // answered this instant
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
    if (!ChangeState(record, &state, {})) return std::nullopt;
    if (view == ledger_) records_.Put(index);
    Dropped(view->generation(), copy.mount_id, refused);
    return std::nullopt;
  }
  if (ours_before && mount->FindPending(copy.unique)) return std::nullopt;
  read.deadline_nanos =
      std::max(Shared(record->deadline_ns).load(std::memory_order_relaxed), AdoptedDeadline());
  Shared(record->deadline_ns).store(read.deadline_nanos, std::memory_order_relaxed);
  pending_++;
  if (IsDuplicate(mount->AddPending(read))) {
    pending_--;
    FreeRecord(read);  // the same request waits in another ledger already
    return std::nullopt;
  }
  Throttle(*mount);
  return ClaimedRead{std::move(mount), copy.unique, copy.nodeid, copy.strikes};
}

uint64_t ServerCore::ClaimSlots(OldLedger& old, bool final_walk, bool owner_hung) {
  const LedgerView& view = *old.view;
  uint64_t now = options_.clock->BootNanos(), taken = 0;
  for (uint32_t i = 0; i < view.slot_count(); i++) {
    RecoveredRequest request;
    Recovery found = RecoverRequest(view, i, final_walk, &request);
    if (found == Recovery::kRequest) {
      bool hung_in = owner_hung && request.executing && now > request.received_nanos + kHungInNanos;
      request.strikes = StrikesOf(view.slot(i), hung_in);
      request.view = old.view;
      if (ClaimRequest(old, std::move(request))) taken++;
    } else if (found == Recovery::kBad && final_walk) {
      Dropped(view.generation(), request.mount_id, "bad CRC or length");
    }
  }
  if (final_walk) {
    old.slots_of_the_dead = true;
    for (uint32_t i = 0; i < view.slot_count(); i++) FreeSlot(old, i);
  }
  return taken;
}

// Whether somebody is to be answered who did not count yet.
bool ServerCore::ClaimRequest(OldLedger& old, RecoveredRequest request) {
  const uint64_t unique = request.header().unique;
  auto [known, is_new] = old.taken_slots.try_emplace(request.slot, unique);
  if (!is_new && known->second == unique) return false;
  known->second = unique;
  std::shared_ptr<Mount> mount = FindMount(request.mount_id);
  if (mount == nullptr || ready_session_.load() == nullptr) {
    Dropped(request.view->generation(), request.mount_id, "unknown mount");
    return false;
  }
  bool counts = request.NeedsAnswer() && !mount->FindPending(unique);  // else its record counted
  if (request.strikes > 0 && request.NeedsAnswer()) {
    Suspect& suspect = known_suspects_[{request.mount_id, unique}];
    if (suspect.executed) return false;
    counts = suspect.strikes == 0;
    suspect.strikes = std::max(suspect.strikes, request.strikes);
    mount->BeginExecute(unique, &request.view->slot(request.slot)->marks);
    suspects_.push_back(std::move(request));
    return counts;
  }
  // An INTERRUPT finds it from now on.
  mount->BeginExecute(unique, &request.view->slot(request.slot)->marks);
  claimed_requests_.push_back(std::move(request));
  return counts;
}

bool ServerCore::NothingClaimed() const {
  return claimed_requests_.empty() && claimed_reads_.empty() && suspects_.empty() && suspect_records_.empty();
}

void ServerCore::StartTakeUp() {
  if (taking_up_ || NothingClaimed()) return;
  if (take_up_thread_.joinable()) take_up_thread_.join();  // it has ended, and takes no lock any more
  taking_up_ = true;
  take_up_thread_ = std::thread([this] { TakeUpThread(); });
}

void ServerCore::TakeUpThread() {
  pthread_setname_np(pthread_self(), "fuse-take-up");
  AlternateStack stack;
  ReplyPipe pipe(options_.faults);
  const uint64_t start = options_.clock->BootNanos();
  uint64_t count = 0;
  for (bool more = true; more;) {
    (void)PassFault(options_.faults, "fuse.before_take_up");
    // The pool's threads first: while a takeover runs in real time, nothing else would make us give way.
    std::this_thread::yield();
    MutexLock walk(&adopt_mutex_);
    while (walkers_ > 0) walk_ended_.Wait(&adopt_mutex_);
    more = TakeUpNext(&pipe);
    if (more) count++;
    more = more && !NothingClaimed();
    taking_up_ = more;
  }
  LOG(INFO) << "fuse.taken_up count=" << count << " us=" << (options_.clock->BootNanos() - start) / 1000;
}

// False when parked: what is left stays here for Resume, and in the ledgers for a successor.
bool ServerCore::TakeUpNext(ReplyPipe* pipe) {
  Gate gate(this);  // one request each: who parks does not wait for all of them
  if (!gate) return false;
  RenewDeadlines();
  LoopWatch::Turn turn(take_up_loop_.get());
  if (!claimed_requests_.empty()) {
    RecoveredRequest request = std::move(claimed_requests_.front());
    claimed_requests_.pop_front();
    // A copy of a suspect is executed as one, or was.
    if (!known_suspects_.contains({request.mount_id, request.header().unique}))
      ExecuteRecovered(request, pipe);
    FreeSlotOf(request);
  } else if (!claimed_reads_.empty()) {
    ClaimedRead read = std::move(claimed_reads_.front());
    claimed_reads_.pop_front();
    TakeUp(read.mount, read.unique, pipe);
  } else {
    RunSuspect(pipe);
  }
  return true;
}

// Of READs that wait to be taken up: as long as one after the other is, nothing hangs, and none of them is
// late. Behind one that hangs they become overdue, which the supervisor sees.
void ServerCore::RenewDeadlines() {
  const uint64_t now = options_.clock->BootNanos();
  if (now < next_renewal_nanos_) return;
  next_renewal_nanos_ = now + kRenewNanos;
  for (const ClaimedRead& read : claimed_reads_) read.mount->Renew(read.unique, AdoptedDeadline());
}

// A request that may have ended a worker: executed with nothing beside it, so that the next death, too,
// points at one request only.
void ServerCore::RunSuspect(ReplyPipe* pipe) {
  Alone alone(this);
  if (!suspects_.empty()) {
    RecoveredRequest request = std::move(suspects_.front());
    suspects_.pop_front();
    Suspect& suspect = known_suspects_[{request.mount_id, request.header().unique}];
    if (!std::exchange(suspect.executed, true)) {  // else it is a copy
      request.strikes = suspect.strikes;
      LOG(WARNING) << "fuse.suspect generation=" << request.view->generation() << " slot=" << request.slot
                   << " mount=" << request.mount_id << " opcode=" << request.header().opcode
                   << " node=" << request.header().nodeid << " strikes=" << request.strikes;
      ExecuteRecovered(request, pipe);
    }
    return FreeSlotOf(request);
  }
  if (suspect_records_.empty()) return;
  SuspectRecord suspect = std::move(suspect_records_.front());
  suspect_records_.pop_front();
  LOG(WARNING) << "fuse.suspect generation=" << suspect.view->generation() << " record=" << suspect.index;
  std::optional<ClaimedRead> read = ClaimRecord(suspect.view, suspect.index, /*final_walk=*/false);
  if (!read) return;
  if (Poisoned(*read->mount, FUSE_READ, read->nodeid, read->strikes)) {
    AnswerPending(*read->mount, read->unique, EIO, pipe);
  } else {
    TakeUp(read->mount, read->unique, pipe);
  }
}

void ServerCore::RunSuspects() {
  if (suspects_.empty() && suspect_records_.empty()) return;
  BorrowedPipe pipe(this);
  while (!suspects_.empty() || !suspect_records_.empty()) {
    Gate gate(this);
    if (!gate) return;
    RunSuspect(pipe.get());
  }
}

// A slot of a ledger whose owner is dead, unless a request that was claimed from it still waits: it is kept
// for a successor in case that we die before or over it.
void ServerCore::FreeSlot(const OldLedger& old, uint32_t slot) {
  auto waits = [&](const std::deque<RecoveredRequest>& requests) {
    return std::any_of(requests.begin(), requests.end(), [&](const RecoveredRequest& request) {
      return request.view == old.view && request.slot == slot;
    });
  };
  if (!old.slots_of_the_dead || waits(claimed_requests_) || waits(suspects_)) return;
  Shared(old.view->slot(slot)->state).store(HF_SLOT_FREE, std::memory_order_release);
}

void ServerCore::FreeSlotOf(const RecoveredRequest& request) {
  std::shared_ptr<OldLedger> old;
  {
    MutexLock lock(&old_mutex_);
    auto it = old_.find(request.view->generation());
    if (it != old_.end()) old = it->second;
  }
  if (old != nullptr) FreeSlot(*old, request.slot);
}

bool ServerCore::Poisoned(Mount& mount, uint32_t opcode, uint64_t nodeid, uint32_t strikes) {
  if (strikes < kPoisonStrikes) return false;
  LOG(ERROR) << "fuse.poison mount=" << mount.id() << " layer=" << mount.description() << " opcode=" << opcode
             << " node=" << nodeid << " strikes=" << strikes << " answer=EIO";
  poisoned_++;
  return true;
}

// Its unique was noted as executing when it was claimed.
void ServerCore::ExecuteRecovered(const RecoveredRequest& request, ReplyPipe* pipe) {
  hf_slot* origin = request.view->slot(request.slot);
  std::shared_ptr<Mount> mount = FindMount(request.mount_id);
  if (mount == nullptr) return;  // gone since, and nobody waits
  fuse_in_header in = request.header();
  Exchange x;
  x.core = this;
  x.mount = mount.get();
  x.pipe = pipe;
  x.unique = in.unique;
  x.opcode = in.opcode;
  x.adopted = true;
  if (request.NeedsAnswer() && Poisoned(*mount, in.opcode, in.nodeid, request.strikes)) {
    ReplyError(x, EIO);
    return mount->EndExecute(in.unique);
  }
  // A copy in our own ledger says what we execute: to the supervisor, should it take too long, and to our
  // successor.
  uint32_t index = ledger_->slot_count() - 1;
  hf_slot* copy = ledger_->slot(index);
  copy->mount_id = request.mount_id;
  copy->owner_generation = generation32_;
  Shared(copy->strikes).store(request.strikes);
  Shared(copy->marks).store(Shared(origin->marks).load() & HF_MARK_INTERRUPTED);
  Shared(copy->received_ns).store(options_.clock->BootNanos());
  memcpy(copy->request, request.bytes.data(), request.length);
  copy->length = request.length;
  copy->crc = Crc32c(copy->request, request.length);
  Shared(copy->state).store(HF_SLOT_EXECUTING, std::memory_order_release);
  x.strikes[0] = &copy->strikes;
  x.strikes[1] = &origin->strikes;
  x.own_slot = index + 1;
  Execute(x, request.bytes.data(), request.length);
  mount->EndExecute(in.unique);
  Shared(copy->state).store(HF_SLOT_FREE, std::memory_order_release);
  if (x.waits) Fetch(mount, x.layer, *x.waits);
}

}  // namespace holdfast::fuse
