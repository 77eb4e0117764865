// READs whose content is not on disk: made into records, fetched, answered (DESIGN 4.3).
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <string>
#include <utility>

#include "common/log.h"
#include "glog/logging.h"
#include "worker/fuse/server_core.h"

namespace holdfast::fuse {
namespace {

constexpr uint64_t kAdoptedGraceNanos = 10'000'000'000;

// The same content with one byte changed: what a test asks for at the fault points of wrong bytes.
layer::ReadResult Spoiled(const layer::ReadResult& content) {
  auto bytes = std::make_shared<std::string>(content.length, '\0');
  if (!CopyContent(content, bytes->data()) || bytes->empty()) return content;
  (*bytes)[bytes->size() / 2] = static_cast<char>((*bytes)[bytes->size() / 2] ^ 0x20);
  layer::ReadResult result;
  result.length = content.length;
  result.segments.push_back({nullptr, 0, bytes, 0, content.length});
  return result;
}

}  // namespace

bool ServerCore::WrongBytes(bool captured) const {
  if (options_.faults == nullptr) return false;
  if (!PassFault(options_.faults, "fuse.wrong_bytes").ok()) return true;
  return on_trial() && !captured && !PassFault(options_.faults, "fuse.trial_wrong_bytes").ok();
}

void ServerCore::Read(Exchange& x, uint64_t nodeid, uint64_t offset, uint64_t size) {
  std::optional<layer::ReadResult> content = x.layer->ReadNow(nodeid, offset, size);
  if (content && content->length == size) {
    if (WrongBytes(x.capture != nullptr)) content = Spoiled(*content);
    if (x.pipe->SendContent(x.target(), x.unique, *content) == SendResult::kSent) {
      if (x.capture != nullptr) return;
      if (x.adopted) adopted_++;
      return CountAnswer();
    }
    if (x.capture == nullptr) x.layer->Distrust(nodeid, offset, size);
  }
  if (x.capture != nullptr) {
    x.capture->not_on_disk = true;
    return;
  }
  MakeRecord(x, nodeid, offset, size);
}

void ServerCore::MakeRecord(Exchange& x, uint64_t nodeid, uint64_t offset, uint64_t size) {
  std::optional<uint32_t> index = records_.Take();
  if (!index) {  // cannot be: reading stops before the table is full
    LOG(ERROR) << "fuse.table_full mount=" << x.mount->id();
    return ReplyError(x, EIO);
  }
  uint64_t now = options_.clock->BootNanos();
  PendingRead read{ledger_, *index,   x.unique, nodeid, offset, size, now + options_.miss_timeout_nanos,
                   now,     x.adopted};
  hf_record* record = ledger_->record(*index);
  record->mount_id = x.mount->id();
  record->unique = x.unique;
  record->nodeid = nodeid;
  record->offset = offset;
  record->size = static_cast<uint32_t>(size);
  record->crc = RecordCrc(*record);
  Shared(record->deadline_ns).store(read.deadline_nanos, std::memory_order_relaxed);
  Shared(record->marks).store(0, std::memory_order_relaxed);
  record->strikes = 0;
  StoreState(record, {HF_RECORD_PENDING, generation32_});
  (void)PassFault(options_.faults, "fuse.record_filled");
  pending_++;
  Mount::Added added = x.mount->AddPending(read);
  switch (added) {
    case Mount::Added::kDuplicate:  // an older ledger's record of the same request is being answered
    case Mount::Added::kDuplicateInterrupted:  // and nobody waits for it
      pending_--;
      FreeRecord(read);
      if (added == Mount::Added::kDuplicateInterrupted) AnswerPending(*x.mount, x.unique, EINTR, x.pipe);
      return;
    case Mount::Added::kInterrupted:
      Shared(record->marks).fetch_or(HF_MARK_INTERRUPTED, std::memory_order_acq_rel);
      return AnswerPending(*x.mount, x.unique, EINTR, x.pipe);
    case Mount::Added::kWaits:
      x.waits = x.unique;
      return Throttle(*x.mount);
  }
}

void ServerCore::Fetch(const std::shared_ptr<Mount>& mount, const std::shared_ptr<layer::Layer>& layer,
                       uint64_t unique) {
  std::optional<PendingRead> read = mount->NextAttempt(unique, ++attempts_);
  if (!read) return;  // interrupted meanwhile
  layer->ReadAsync(read->nodeid, read->offset, read->size, read->deadline_nanos,
                   [weak = weak_from_this(), mount_id = mount->id(), unique,
                    attempt = read->attempt](absl::StatusOr<layer::ReadResult> result) {
                     if (auto core = weak.lock()) core->Fetched(mount_id, unique, attempt, result);
                   });
}

void ServerCore::Fetched(uint64_t mount_id, uint64_t unique, uint64_t attempt,
                         const absl::StatusOr<layer::ReadResult>& result) {
  std::shared_ptr<Mount> mount = FindMount(mount_id);
  if (mount == nullptr) return;
  Gate gate(this);
  if (!gate) return;  // parked: the record stays for whoever serves next
  std::optional<PendingRead> read = mount->FindPending(unique);
  // An error counts from the newest try only; bytes are the same from any.
  if (!read || (!result.ok() && read->attempt != attempt)) return;
  read = mount->TakePending(unique);
  if (!read) return;
  BorrowedPipe pipe(this);
  Exchange x;
  x.strikes[0] = &read->ledger->record(read->record)->strikes;
  ExchangeScope scope(&x);
  if (on_trial()) NoteTouched(mount_id, read->nodeid);
  if (!result.ok()) {
    LOG_EVERY_T(WARNING, 1) << "fuse.read_failed mount=" << mount_id << " layer=" << mount->description()
                            << " node=" << read->nodeid << " offset=" << read->offset
                            << " size=" << read->size << " error=" << LogValue(result.status().ToString());
    pipe.get()->SendError(mount->device(), unique, EIO);
    return FinishPending(*mount, *read, EIO);
  }
  SendPending(mount, *read, *result, pipe.get());
}

// Answers a READ that was taken from the mount's table. Content that turns out damaged is fetched again once.
void ServerCore::SendPending(const std::shared_ptr<Mount>& mount, const PendingRead& read,
                             const layer::ReadResult& content, ReplyPipe* pipe) {
  if (content.length == read.size) {
    SendResult sent = WrongBytes(/*captured=*/false)
                          ? pipe->SendContent(mount->device(), read.unique, Spoiled(content))
                          : pipe->SendContent(mount->device(), read.unique, content);
    if (sent == SendResult::kSent) return FinishPending(*mount, read, 0);
  }
  absl::StatusOr<std::shared_ptr<layer::Layer>> layer = mount->GetLayer(*options_.clock);
  if (layer.ok() && content.length == read.size && read.tries < 2) {
    (*layer)->Distrust(read.nodeid, read.offset, read.size);
    if (!IsDuplicate(mount->AddPending(read))) return Fetch(mount, *layer, read.unique);
  }
  LOG(ERROR) << "fuse.content_damaged mount=" << mount->id() << " layer=" << mount->description()
             << " node=" << read.nodeid << " offset=" << read.offset << " size=" << read.size;
  pipe->SendError(mount->device(), read.unique, EIO);
  FinishPending(*mount, read, EIO);
}

void ServerCore::TakeUp(const std::shared_ptr<Mount>& mount, uint64_t unique, ReplyPipe* pipe) {
  // Time that it waited for this does not count either.
  std::optional<PendingRead> read = mount->Renew(unique, AdoptedDeadline());
  if (!read) return;
  if ((Shared(read->ledger->record(read->record)->marks).load(std::memory_order_acquire) &
       HF_MARK_INTERRUPTED) != 0) {
    return AnswerPending(*mount, unique, EINTR, pipe);
  }
  Exchange x;
  x.strikes[0] = &read->ledger->record(read->record)->strikes;
  ExchangeScope scope(&x);
  if (on_trial()) NoteTouched(mount->id(), read->nodeid);
  absl::StatusOr<std::shared_ptr<layer::Layer>> layer = mount->GetLayer(*options_.clock);
  const layer::NodeRecord* node = layer.ok() ? (*layer)->index().node(read->nodeid) : nullptr;
  bool sane = node != nullptr && (node->mode & S_IFMT) == S_IFREG && read->offset <= node->size &&
              read->size <= node->size - read->offset;
  if (!sane) {
    LOG(ERROR) << "fuse.record_refused mount=" << mount->id() << " node=" << read->nodeid
               << " offset=" << read->offset;
    return AnswerPending(*mount, unique, EIO, pipe);
  }
  std::optional<layer::ReadResult> content = (*layer)->ReadNow(read->nodeid, read->offset, read->size);
  if (!content) return Fetch(mount, *layer, unique);
  if ((read = mount->TakePending(unique))) SendPending(mount, *read, *content, pipe);
}

void ServerCore::AnswerPending(Mount& mount, uint64_t unique, int error, ReplyPipe* pipe) {
  std::optional<PendingRead> read = mount.TakePending(unique);
  if (!read) return;
  pipe->SendError(mount.device(), unique, error);
  FinishPending(mount, *read, error);
}

void ServerCore::FinishPending(Mount& mount, const PendingRead& read, int error) {
  FreeRecord(read);
  pending_--;
  if (error == EIO) errors_++;
  if (error == EINTR) interrupted_++;
  if (read.adopted) adopted_++;
  Shared(ledger_->header()->requests_answered).fetch_add(1, std::memory_order_relaxed);
  if (options_.trace != nullptr) {
    options_.trace->Record("fuse.read_miss",
                           "mount=" + std::to_string(mount.id()) + " layer=" + mount.description() +
                               " node=" + std::to_string(read.nodeid) +
                               " offset=" + std::to_string(read.offset) +
                               " size=" + std::to_string(read.size) + " error=" + std::to_string(error),
                           options_.clock->BootNanos() - read.since_nanos);
  }
  Unthrottle(mount);
}

void ServerCore::FreeRecord(const PendingRead& read) {
  RecordState expected{HF_RECORD_PENDING, generation32_};
  // Refused when another generation has adopted it: then it is that one's to free.
  if (!ChangeState(read.ledger->record(read.record), &expected, {})) return;
  if (read.ledger == ledger_) records_.Put(read.record);
}

uint64_t ServerCore::AdoptedDeadline() const {
  // Time during which nobody served must not count against the reader.
  return options_.clock->BootNanos() + std::min(options_.miss_timeout_nanos, kAdoptedGraceNanos);
}

}  // namespace holdfast::fuse
