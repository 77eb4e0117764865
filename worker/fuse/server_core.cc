#include "worker/fuse/server_core.h"

#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>

#include "glog/logging.h"

namespace holdfast::fuse {
namespace {

constexpr uint64_t kWakeToken = ~uint64_t{0};

thread_local Exchange* current_exchange = nullptr;

}  // namespace

Exchange* CurrentExchange() { return current_exchange; }
ExchangeScope::ExchangeScope(Exchange* exchange) : before_(current_exchange) { current_exchange = exchange; }
ExchangeScope::~ExchangeScope() { current_exchange = before_; }

ServerCore::ServerCore(const ServerOptions& options, std::shared_ptr<LedgerView> ledger)
    : options_(options),
      generation32_(static_cast<uint32_t>(options.generation)),
      ledger_(std::move(ledger)),
      records_(ledger_) {}

absl::Status ServerCore::Initialize() {
  epoll_.Reset(epoll_create1(EPOLL_CLOEXEC));
  if (!epoll_.valid()) return ErrnoStatus(errno, "epoll_create1");
  wake_.Reset(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!wake_.valid()) return ErrnoStatus(errno, "eventfd");
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = kWakeToken;
  if (epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, wake_.get(), &event) != 0)
    return ErrnoStatus(errno, "epoll_ctl");
  Beat();
  return absl::OkStatus();
}

void ServerCore::Shutdown() {
  Park();
  stop_ = true;
  uint64_t one = 1;
  (void)!write(wake_.get(), &one, sizeof one);
  for (std::thread& thread : pool_) thread.join();
  pool_.clear();
}

bool ServerCore::Enter() {
  busy_.fetch_add(1);
  if (!parked_.load()) return true;
  Leave();
  return false;
}

void ServerCore::Leave() {
  if (busy_.fetch_sub(1) != 1 || !parked_.load()) return;
  MutexLock lock(&park_mutex_);
  park_changed_.SignalAll();
}

void ServerCore::Park() {
  parked_ = true;
  for (const auto& mount : AllMounts()) UpdateArmed(*mount);
  MutexLock lock(&park_mutex_);
  while (busy_.load() != 0) {
    park_changed_.WaitUntil(&park_mutex_, std::chrono::steady_clock::now() + std::chrono::milliseconds(50));
  }
}

void ServerCore::Resume() {
  // What the server knew of its pending READs is read anew from the ledger: a successor may have answered
  // some.
  for (const auto& mount : AllMounts()) {
    pending_ -= mount->TakeAllPending().size();
    MutexLock lock(&mount->mutex);
    if (mount->throttled) throttled_mounts_--;
    mount->throttled = false;
  }
  records_.Rebuild();
  parked_ = false;
  {
    Gate gate(this);
    if (!gate) return;
    BorrowedPipe pipe(this);
    AdoptRecords(ledger_, false, pipe.get());
    for (const auto& view : OldLedgers()) AdoptRecords(view, false, pipe.get());
  }
  for (const auto& mount : AllMounts()) UpdateArmed(*mount);
}

void ServerCore::Start() {
  if (started_.exchange(true)) return;
  for (int i = 0; i < options_.threads; i++) {
    pool_.emplace_back([this, i] { PoolThread(static_cast<uint32_t>(i)); });
  }
  for (const auto& mount : AllMounts()) UpdateArmed(*mount);
}

absl::Status ServerCore::AddMount(MountSpec spec) {
  if (!spec.device.valid() || !spec.open_layer || spec.mount_id == 0 || spec.mount_id == kWakeToken) {
    return InvalidArgument("mount without descriptor, layer or id");
  }
  // Set once by the supervisor for all who share the description; a blocking read would tie a pool thread to
  // one mount.
  int flags = fcntl(spec.device.get(), F_GETFL);
  if (flags < 0) return ErrnoStatus(errno, "mount descriptor");
  if ((flags & O_NONBLOCK) == 0) return FailedPrecondition("the mount's descriptor is not O_NONBLOCK");
  {
    MutexLock lock(&session_mutex_);
    if (session_ == nullptr) {
      HF_ASSIGN_OR_RETURN(session_, FuseSession::Create(spec.init_request));
      ready_session_ = session_.get();
    }
  }
  auto mount = std::make_shared<Mount>(std::move(spec));
  {
    MutexLock lock(&mounts_mutex_);
    if (!mounts_.emplace(mount->id(), mount).second) {
      return AlreadyExists("mount " + std::to_string(mount->id()) + " is being served already");
    }
  }
  UpdateArmed(*mount);
  return absl::OkStatus();
}

void ServerCore::RemoveMount(uint64_t mount_id) {
  std::shared_ptr<Mount> mount;
  {
    MutexLock lock(&mounts_mutex_);
    auto it = mounts_.find(mount_id);
    if (it == mounts_.end()) return;
    mount = it->second;
    mounts_.erase(it);
  }
  {
    MutexLock lock(&mount->mutex);
    mount->ended = true;
    if (mount->throttled) throttled_mounts_--;
    mount->throttled = false;
  }
  UpdateArmed(*mount);
  for (const PendingRead& read : mount->TakeAllPending()) {
    pending_--;
    FreeRecord(read);
  }
}

void ServerCore::OnMountEnded(std::function<void(uint64_t)> callback) {
  MutexLock lock(&mounts_mutex_);
  on_ended_ = std::move(callback);
}

std::shared_ptr<Mount> ServerCore::FindMount(uint64_t mount_id) const {
  MutexLock lock(&mounts_mutex_);
  auto it = mounts_.find(mount_id);
  return it == mounts_.end() ? nullptr : it->second;
}

std::vector<std::shared_ptr<Mount>> ServerCore::AllMounts() const {
  MutexLock lock(&mounts_mutex_);
  std::vector<std::shared_ptr<Mount>> all;
  all.reserve(mounts_.size());
  for (const auto& [id, mount] : mounts_) all.push_back(mount);
  return all;
}

void ServerCore::UpdateArmed(Mount& mount) {
  MutexLock lock(&mount.mutex);
  bool wanted = started_ && !parked_ && !mount.ended && !mount.throttled;
  if (wanted == mount.armed) return;
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = mount.id();
  if (epoll_ctl(epoll_.get(), wanted ? EPOLL_CTL_ADD : EPOLL_CTL_DEL, mount.device(), &event) != 0) {
    PLOG(ERROR) << "fuse.epoll_failed mount=" << mount.id();
    return;
  }
  mount.armed = wanted;
}

void ServerCore::Throttle(Mount& mount) {
  {
    MutexLock lock(&mount.mutex);
    if (mount.throttled || mount.ended) return;
    if (mount.PendingLocked() < options_.max_pending_per_mount && !TableFull()) return;
    mount.throttled = true;
    throttled_mounts_++;
  }
  UpdateArmed(mount);
}

void ServerCore::Unthrottle(Mount& mount) {
  {
    MutexLock lock(&mount.mutex);
    if (!mount.throttled || TableFull() || mount.PendingLocked() > options_.max_pending_per_mount / 2) return;
    mount.throttled = false;
    throttled_mounts_--;
  }
  UpdateArmed(mount);
}

bool ServerCore::TableFull() const {
  // What is left suffices for every thread that may hold a request, and for an adopted ledger's slots.
  return records_.used() + 4 * HF_LEDGER_SLOTS >= ledger_->record_count();
}

ServerStats ServerCore::stats() const {
  ServerStats s;
  s.requests = requests_;
  s.pending = pending_;
  s.adopted = adopted_;
  s.interrupted = interrupted_;
  s.errors = errors_;
  s.dropped = dropped_;
  return s;
}

ServerCore::BorrowedPipe::BorrowedPipe(ServerCore* core) : core_(core) {
  MutexLock lock(&core->pipes_mutex_);
  if (core->pipes_.empty()) {
    pipe_ = std::make_unique<ReplyPipe>(core->options_.faults);
  } else {
    pipe_ = std::move(core->pipes_.back());
    core->pipes_.pop_back();
  }
}

ServerCore::BorrowedPipe::~BorrowedPipe() {
  MutexLock lock(&core_->pipes_mutex_);
  core_->pipes_.push_back(std::move(pipe_));
}

}  // namespace holdfast::fuse
