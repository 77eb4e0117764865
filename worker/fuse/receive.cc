// The pool: takes requests from the kernel into the ledger and executes them (DESIGN 4.3, "the life of a
// request" in schema/ledger.h).
#include <fcntl.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>

#include "common/crc32c.h"
#include "glog/logging.h"
#include "worker/fuse/crash_recorder.h"
#include "worker/fuse/server_core.h"

namespace holdfast::fuse {
namespace {

constexpr uint64_t kTickNanos = 200'000'000;
constexpr int kIdleMillis = 1000;  // heartbeat of an idle pool
constexpr int kThrottledMillis = 200;
constexpr int kInterruptsATick = 256;

bool ReadPipe(int fd, uint8_t* out, size_t size) {
  size_t done = 0;
  while (done < size) {
    ssize_t n = read(fd, out + done, size - done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    done += static_cast<size_t>(n);
  }
  return true;
}

}  // namespace

void ServerCore::Beat() {
  const uint64_t now = options_.clock->BootNanos();
  Shared(ledger_->header()->loop_heartbeat_ns).store(now, std::memory_order_relaxed);
  urgent_pool_.Passed(now);
}

void ServerCore::Hurry(uint64_t nanos) {
  if (nanos == 0) return urgent_pool_.End();
  if (!parked_) urgent_pool_.Begin(options_.clock->BootNanos() + nanos);
}

void ServerCore::PoolThread(uint32_t slot_index) {
  pthread_setname_np(pthread_self(), ("fuse-" + std::to_string(slot_index)).c_str());
  AlternateStack stack;
  ReplyPipe pipe(options_.faults);
  urgent_pool_.Join();
  while (!stop_) {
    WaitWhileParked();
    epoll_event event{};
    int timeout = throttled_mounts_ > 0 ? kThrottledMillis : kIdleMillis;
    int n = epoll_wait(epoll_.get(), &event, 1, timeout);
    Beat();
    if (stop_) break;
    if (n == 1) Turn(slot_index, event.data.u64, &pipe);
    if (throttled_mounts_ > 0) Tick(slot_index, &pipe);
  }
}

// A mount at its cap is not read, but readers of it that are killed must go: the kernel hands out INTERRUPTs
// before anything else, so read those now and then. One request that is no INTERRUPT may come in with them;
// it is served as any other.
void ServerCore::Tick(uint32_t slot_index, ReplyPipe* pipe) {
  uint64_t now = options_.clock->BootNanos(), due = next_tick_nanos_;
  if (now < due || !next_tick_nanos_.compare_exchange_strong(due, now + kTickNanos)) return;
  for (const auto& mount : AllMounts()) {
    {
      MutexLock lock(&mount->mutex);
      if (!mount->throttled) continue;
    }
    Unthrottle(*mount);
    Received got = Received::kInterrupt;
    for (int i = 0; i < kInterruptsATick && got == Received::kInterrupt; i++) {
      Gate gate(this);
      if (!gate || TableNearlyFull()) break;
      {
        MutexLock lock(&mount->mutex);
        if (!mount->throttled) break;
      }
      got = ReceiveAndExecute(slot_index, mount, pipe);
    }
    if (got == Received::kEnded || got == Received::kBroken) MountEnded(*mount, got == Received::kEnded);
  }
}

void ServerCore::Turn(uint32_t slot_index, uint64_t mount_id, ReplyPipe* pipe) {
  if (mount_id == kWakeToken) return Woken();
  std::shared_ptr<Mount> mount = FindMount(mount_id);
  if (mount == nullptr) return;
  Received got = Received::kNothing;
  {
    Gate gate(this);
    if (!gate) return;
    if (TableFull()) return Throttle(*mount);
    got = ReceiveAndExecute(slot_index, mount, pipe);
  }
  if (got == Received::kEnded || got == Received::kBroken) MountEnded(*mount, got == Received::kEnded);
}

void ServerCore::MountEnded(Mount& mount, bool report) {
  {
    MutexLock lock(&mount.mutex);
    if (mount.ended) return;
    mount.ended = true;
    HoldBack(mount, false);
  }
  UpdateArmed(mount);
  if (!report) return;
  std::function<void(uint64_t)> callback;
  {
    MutexLock lock(&mounts_mutex_);
    callback = on_ended_;
  }
  if (callback) callback(mount.id());
}

// Takes one request into the slot. On kRequest the slot is EXECUTING.
ServerCore::Received ServerCore::ReceiveInto(uint32_t slot_index, Mount& mount, hf_slot* slot) {
  Shared(LengthWord(slot)).store(0, std::memory_order_release);
  slot->mount_id = mount.id();
  slot->owner_generation = generation32_;
  slot->strikes = 0;
  Shared(slot->marks).store(0, std::memory_order_relaxed);
  slot->received_ns = options_.clock->BootNanos();
  Shared(slot->state).store(HF_SLOT_RECEIVING, std::memory_order_release);
  ssize_t n = splice(mount.device(), nullptr, ledger_->pipe_write(slot_index), nullptr,
                     HF_LEDGER_REQUEST_BYTES, SPLICE_F_NONBLOCK);
  if (n <= 0) {
    int error = n == 0 ? EAGAIN : errno;  // nothing moved, which says nothing of the connection
    // ENOENT: the request was withdrawn at that moment; EIO: it was too large, the kernel has ended it.
    if (error == EAGAIN || error == EINTR || error == ENOENT || error == EIO || error == ENOMEM)
      return Received::kNothing;
    if (error != ENODEV && error != ECONNABORTED) {
      // Never taken for an end: whoever closes the descriptor of a living mount breaks its containers.
      LOG(ERROR) << "fuse.receive_failed mount=" << mount.id() << " layer=" << mount.description()
                 << " errno=" << error;
      return Received::kBroken;
    }
    return Received::kEnded;
  }
  auto length = static_cast<uint32_t>(n);
  const auto* in = reinterpret_cast<const fuse_in_header*>(slot->request);
  if (!ReadPipe(ledger_->pipe_read(slot_index), slot->request, length) || length < sizeof *in ||
      in->len != length) {
    LOG(ERROR) << "fuse.request_lost mount=" << mount.id() << " bytes=" << n;
    return Received::kNothing;
  }
  if (length < HF_LEDGER_REQUEST_BYTES) slot->request[length] = 0;
  slot->length = length;
  slot->crc = Crc32c(slot->request, length);
  Shared(slot->state).store(HF_SLOT_EXECUTING, std::memory_order_release);
  requests_++;
  Shared(ledger_->header()->requests_received).fetch_add(1, std::memory_order_relaxed);
  return Received::kRequest;
}

ServerCore::Received ServerCore::ReceiveAndExecute(uint32_t slot_index, const std::shared_ptr<Mount>& mount,
                                                   ReplyPipe* pipe) {
  hf_slot* slot = ledger_->slot(slot_index);
  const auto* in = reinterpret_cast<const fuse_in_header*>(slot->request);
  mount->BeginReceive();
  Received got = ReceiveInto(slot_index, *mount, slot);
  mount->EndReceive(got == Received::kRequest ? in->unique : 0, &slot->marks);
  Exchange x;
  if (got == Received::kRequest) {
    sampler_.Offer(mount->id(), mount->seen, in->opcode, slot->request, slot->length, slot->received_ns);
    x.core = this;
    x.mount = mount.get();
    x.pipe = pipe;
    x.unique = in->unique;
    x.opcode = in->opcode;
    x.strikes[0] = &slot->strikes;
    x.own_slot = slot_index + 1;
    (void)PassFault(options_.faults, "fuse.stuck");
    Execute(x, slot->request, slot->length);
    mount->EndExecute(x.unique);
    if (in->opcode == FUSE_INTERRUPT || in->opcode == FUSE_FORGET || in->opcode == FUSE_BATCH_FORGET) {
      got = Received::kInterrupt;
    }
  }
  Shared(slot->state).store(HF_SLOT_FREE, std::memory_order_release);
  if (x.waits) Fetch(mount, x.layer, *x.waits);
  return got;
}

void ServerCore::Execute(Exchange& x, const uint8_t* request, uint32_t length) {
  ExchangeScope scope(&x);
  absl::Status fault = x.capture == nullptr ? PassFault(options_.faults, "fuse.received") : absl::OkStatus();
  switch (x.opcode) {
    case FUSE_FORGET:
    case FUSE_BATCH_FORGET:
    case FUSE_NOTIFY_REPLY:
    case FUSE_INIT:  // the supervisor answers it; after that the kernel sends none
      return CountAnswer();
    case FUSE_INTERRUPT: {
      if (length >= sizeof(fuse_in_header) + sizeof(fuse_interrupt_in)) {
        fuse_interrupt_in target;
        memcpy(&target, request + sizeof(fuse_in_header), sizeof target);
        HandleInterrupt(x, target.unique);
      }
      return CountAnswer();
    }
    case FUSE_DESTROY:  // libfuse would take it as the end of the session, which serves the other mounts too
      return ReplyError(x, 0);
    default:
      break;
  }
  if (!fault.ok()) return ReplyError(x, StatusErrno(fault));
  NoteTouched(x, reinterpret_cast<const fuse_in_header*>(request)->nodeid);
  absl::StatusOr<std::shared_ptr<layer::Layer>> layer = x.mount->GetLayer(*options_.clock);
  if (!layer.ok()) return ReplyError(x, EIO);
  x.layer = *std::move(layer);
  ready_session_.load()->Process(request, length);
}

void ServerCore::HandleInterrupt(Exchange& x, uint64_t target) {
  switch (x.mount->Interrupt(target)) {
    case Mount::Interrupted::kPending:
      return AnswerPending(*x.mount, target, EINTR, x.pipe);
    case Mount::Interrupted::kMaybeArriving:
      // The kernel sends it again; by then the target is known. A replayed INTERRUPT is never answered.
      if (!x.adopted) x.pipe->SendError(x.mount->device(), x.unique, EAGAIN);
      return;
    case Mount::Interrupted::kExecuting:
    case Mount::Interrupted::kUnknown:
      return;
  }
}

void ServerCore::CountAnswer() {
  Shared(ledger_->header()->requests_answered).fetch_add(1, std::memory_order_relaxed);
}

void ServerCore::ReplyError(Exchange& x, int error) {
  fuse_out_header header{};
  header.len = sizeof header;
  header.error = -error;
  header.unique = x.unique;
  iovec part{&header, sizeof header};
  ReplyParts(x, &part, 1);
}

void ServerCore::ReplyParts(Exchange& x, const iovec* parts, int count) {
  if (x.mount == nullptr) return;  // the reply to the replayed INIT
  if (x.capture != nullptr) return x.pipe->SendMemory(x.target(), parts, count);
  if (reinterpret_cast<const fuse_out_header*>(parts[0].iov_base)->error == -EIO) errors_++;
  x.pipe->SendMemory(x.mount->device(), parts, count);
  if (x.adopted) adopted_++;
  CountAnswer();
}

}  // namespace holdfast::fuse
