#include "worker/fuse/server_core.h"

#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>

#include "glog/logging.h"

namespace holdfast::fuse {
namespace {

constexpr std::chrono::milliseconds kParkedBeat{1000};

thread_local Exchange* current_exchange = nullptr;
thread_local int gates = 0;  // that this thread is inside of

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
  take_up_loop_ = LoopWatch::Add(options_.watch, "fuse-take-up");
  Beat();
  return absl::OkStatus();
}

void ServerCore::Shutdown() {
  Park();
  stop_ = true;
  WakePool();
  std::vector<std::thread> pool;
  {
    MutexLock lock(&pool_mutex_);
    pool.swap(pool_);
  }
  for (std::thread& thread : pool) thread.join();
  std::thread take_up;
  {
    Walk walk(this);
    take_up.swap(take_up_thread_);
  }
  if (take_up.joinable()) take_up.join();
}

bool ServerCore::Enter() {
  while (true) {
    busy_.fetch_add(1);
    gates++;
    if (!parked_.load() && (!alone_.load() || gates > 1)) return true;
    Leave();
    if (parked_.load()) return false;
    MutexLock lock(&park_mutex_);
    while (alone_.load() && !parked_.load()) park_changed_.Wait(&park_mutex_);
  }
}

void ServerCore::Leave() {
  gates--;
  busy_.fetch_sub(1);
  if (!parked_.load() && !alone_.load()) return;
  MutexLock lock(&park_mutex_);
  park_changed_.SignalAll();
}

ServerCore::Walk::Walk(ServerCore* core) : core_(core) {
  core->walkers_++;
  core->adopt_mutex_.Lock();
}

ServerCore::Walk::~Walk() {
  core_->walkers_--;
  core_->walk_ended_.Signal();
  core_->adopt_mutex_.Unlock();
}

ServerCore::Alone::Alone(ServerCore* core) : core_(core) {
  core->alone_ = true;
  MutexLock lock(&core->park_mutex_);
  while (core->busy_.load() > gates) core->park_changed_.Wait(&core->park_mutex_);
}

ServerCore::Alone::~Alone() {
  core_->alone_ = false;
  MutexLock lock(&core_->park_mutex_);
  core_->park_changed_.SignalAll();
}

void ServerCore::Park() {
  parked_ = true;
  WakePool();  // it takes the mounts out of the epoll: our caller's readers wait, for the successor
  {
    MutexLock lock(&park_mutex_);
    while (busy_.load() != 0 && parked_) {  // not for ever should Resume overtake it
      park_changed_.WaitUntil(&park_mutex_, std::chrono::steady_clock::now() + std::chrono::milliseconds(50));
    }
  }
  urgent_pool_.End();
}

void ServerCore::WakePool() {
  uint64_t one = 1;
  (void)!write(wake_.get(), &one, sizeof one);
  MutexLock lock(&park_mutex_);
  park_changed_.SignalAll();
}

void ServerCore::Woken() {
  if (parked_ || stop_) return;  // the others must see it, too
  uint64_t wakes = 0;
  (void)!read(wake_.get(), &wakes, sizeof wakes);
  if (parked_ || stop_) WakePool();  // that was a new one
}

void ServerCore::WaitWhileParked() {
  if (!parked_) return;
  for (const auto& mount : AllMounts()) UpdateArmed(*mount);
  MutexLock lock(&park_mutex_);
  while (parked_ && !stop_) {
    park_changed_.WaitUntil(&park_mutex_, std::chrono::steady_clock::now() + kParkedBeat);
    Beat();
  }
}

void ServerCore::Resume() {
  EndTrial();
  if (!parked_) return Start();  // nobody else has answered our READs
  Park();                        // if one is under way, it must end first
  // What the server knew of its pending READs is read anew from the ledger: a successor may have answered
  // some.
  for (const auto& mount : AllMounts()) {
    pending_ -= mount->TakeAllPending().size();
    MutexLock lock(&mount->mutex);
    HoldBack(*mount, false);
  }
  records_.Rebuild();
  {
    // Still parked: nobody makes or answers records meanwhile.
    Walk walk(this);
    claimed_reads_.clear();
    suspect_records_.clear();
    ClaimRecords(ledger_, false);
    for (const auto& view : OldLedgers()) ClaimRecords(view, false);
  }
  parked_ = false;
  {
    MutexLock lock(&park_mutex_);
    park_changed_.SignalAll();
  }
  Start();
}

void ServerCore::Start() {
  Walk walk(this);
  Beat();  // the last one of a worker that waited to serve may be hours old
  RunSuspects();
  started_ = true;
  StartPool();
  for (const auto& mount : AllMounts()) UpdateArmed(*mount);
  reading_since_nanos_ = options_.clock->BootNanos();
  StartTakeUp();
}

void ServerCore::StartPool() {
  MutexLock lock(&pool_mutex_);
  if (!pool_.empty() || stop_) return;
  // The last slot is for adopted requests.
  uint32_t threads = std::min(static_cast<uint32_t>(options_.threads), ledger_->slot_count() - 1);
  for (uint32_t i = 0; i < threads; i++) {
    pool_.emplace_back([this, i] { PoolThread(i); });
  }
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
    sampler_.SetMounts(mounts_.size());
  }
  if (mount->serve_now()) StartPool();
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
    sampler_.SetMounts(mounts_.size());
  }
  {
    MutexLock lock(&mount->mutex);
    mount->ended = true;
    HoldBack(*mount, false);
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
  bool wanted = (started_ || mount.serve_now()) && !parked_ && !mount.ended && !mount.throttled;
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
    if (mount.PendingLocked() < PendingLimit() && !TableFull()) return;
    HoldBack(mount, true);
  }
  UpdateArmed(mount);
}

void ServerCore::Unthrottle(Mount& mount) {
  {
    MutexLock lock(&mount.mutex);
    if (!mount.throttled || TableFull() || mount.PendingLocked() > PendingLimit() / 2) return;
    HoldBack(mount, false);
  }
  UpdateArmed(mount);
}

void ServerCore::HoldBack(Mount& mount, bool hold) {
  if (mount.throttled == hold) return;
  mount.throttled = hold;
  throttled_mounts_ += hold ? 1 : -1;
  MutexLock lock(&held_back_mutex_);
  if (hold) {
    held_back_.insert(mount.id());
  } else {
    held_back_.erase(mount.id());
  }
}

std::vector<uint64_t> ServerCore::HeldBack() const {
  MutexLock lock(&held_back_mutex_);
  return {held_back_.begin(), held_back_.end()};
}

bool ServerCore::TableFull() const {
  // What is left suffices for every thread that may hold a request, and for an adopted ledger's slots.
  return records_.used() + 4 * HF_LEDGER_SLOTS >= ledger_->record_count();
}

bool ServerCore::TableNearlyFull() const { return records_.used() >= ledger_->record_count() / 4 * 3; }

uint32_t ServerCore::PendingLimit() const {
  return records_.used() < ledger_->record_count() / 2 ? options_.max_pending_per_mount : 1;
}

absl::Status ServerCore::BeginTrial(UniqueFd touched) {
  if (started_) return FailedPrecondition("a trial begins before the server is started");
  std::unique_ptr<TouchedLog> log;
  if (touched.valid()) {
    HF_ASSIGN_OR_RETURN(log, TouchedLog::Map(touched));
  }
  MutexLock lock(&trial_mutex_);
  touched_ = std::move(log);
  on_trial_ = true;
  return absl::OkStatus();
}

void ServerCore::EndTrial() {
  MutexLock lock(&trial_mutex_);
  on_trial_ = false;
  touched_.reset();
}

void ServerCore::NoteTouched(uint64_t mount_id, uint64_t nodeid) {
  MutexLock lock(&trial_mutex_);
  if (touched_ != nullptr) touched_->Note(mount_id, nodeid);
}

ServerStats ServerCore::stats() const {
  ServerStats s;
  s.requests = requests_;
  s.pending = pending_;
  s.adopted = adopted_;
  s.interrupted = interrupted_;
  s.errors = errors_;
  s.dropped = dropped_;
  s.poisoned = poisoned_;
  s.reading_since_nanos = reading_since_nanos_;
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
