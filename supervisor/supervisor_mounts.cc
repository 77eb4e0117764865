// Supervisor: mounting, unmounting, and noticing that a mount is gone.
#include <utility>

#include "common/log.h"
#include "glog/logging.h"
#include "supervisor/supervisor.h"

namespace holdfast::supervisor {
namespace {

constexpr uint64_t kSettlePollMillis = 5;
constexpr uint64_t kGonePollMillis = 1'000;

[[noreturn]] void Throw(const absl::Status& status) {
  kj::throwFatalException(KJ_EXCEPTION(FAILED, std::string(FromAbsl(status.message()))));
  __builtin_unreachable();
}

}  // namespace

void Supervisor::RequireOwner(Generation caller) const {
  KJ_REQUIRE(state_.holders.count(caller) != 0, "only the owner of the metadata may mount and unmount");
  KJ_REQUIRE(!stopping_, "the supervisor is shutting down");
}

kj::Promise<const Mount*> Supervisor::MountLayer(Generation caller, std::string path, InitOptions options,
                                                 std::string blob) {
  RequireOwner(caller);
  auto id = vault_.Allocate(path, std::move(blob), caller);
  if (!id.ok()) Throw(id.status());
  using Result = absl::StatusOr<FuseMount>;
  auto mounted = offload_.Run<Result>([fd = state_dir_.get(), state_dir = options_.state_dir, path, options] {
    return MountFuse(fd, state_dir, path, options);
  });
  // Kept in the vault whether or not the caller lives to see it.
  auto done = mounted.then([this, mount_id = *id](kj::Own<Result>&& result) { FinishMount(mount_id, std::move(*result)); }).fork();
  tasks_.add(done.addBranch().catch_([](kj::Exception&&) {}));  // the caller is told
  return done.addBranch().then([this, mount_id = *id]() -> const Mount* {
    const Mount* mount = vault_.Find(mount_id);
    KJ_REQUIRE(mount != nullptr, "the mount is gone already");
    return mount;
  });
}

void Supervisor::FinishMount(uint64_t id, absl::StatusOr<FuseMount> result) {
  const Mount* entry = vault_.Find(id);
  if (!result.ok()) {
    LOG(ERROR) << "event=mount_failed mount=" << id << " path=" << LogValue(entry->path)
               << " error=" << LogValue(result.status().ToString());
    vault_.Forget(id);
    Throw(result.status());
  }
  auto device = std::make_shared<UniqueFd>(std::move(result->device));
  bool abandoned = entry->abandoned;
  std::string path = entry->path;
  if (abandoned) {
    LOG(WARNING) << "event=mount_abandoned mount=" << id << " path=" << LogValue(path);
    vault_.Forget(id);
    tasks_.add(offload_.Run<int>([path, device] { return UnmountFuse(path, device->get()).ok() ? 0 : 1; }).ignoreResult());
    return;
  }
  vault_.SetLive(id, std::move(device), std::move(result->init_request), std::move(result->init_reply));
  LOG(INFO) << "event=mounted mount=" << id << " path=" << LogValue(path) << " generation=" << entry->caller;
}

kj::Promise<MountState> Supervisor::UnmountLayer(Generation caller, uint64_t mount_id) {
  RequireOwner(caller);
  const Mount* mount = vault_.Find(mount_id);
  KJ_REQUIRE(mount != nullptr, "no such mount", mount_id);
  KJ_REQUIRE(mount->state != MountState::kMounting, "still being mounted", mount_id);
  if (mount->state == MountState::kDetached) return MountState::kDetached;  // the path may be another mount's by now
  using Result = absl::StatusOr<bool>;
  auto done = offload_.Run<Result>([path = mount->path, device = mount->device] {
                        return UnmountFuse(path, device->get());
                      })
                  .then([this, mount_id](kj::Own<Result>&& gone) { return FinishUnmount(mount_id, *gone); })
                  .fork();
  tasks_.add(done.addBranch().ignoreResult().catch_([](kj::Exception&&) {}));  // the caller is told
  return done.addBranch();
}

MountState Supervisor::FinishUnmount(uint64_t id, const absl::StatusOr<bool>& gone) {
  if (!gone.ok()) Throw(gone.status());
  if (vault_.Find(id) == nullptr) return MountState::kGone;
  LOG(INFO) << "event=unmounted mount=" << id << " path=" << LogValue(vault_.Find(id)->path) << " in_use=" << !*gone;
  if (!*gone) {
    vault_.SetDetached(id);
    return MountState::kDetached;
  }
  vault_.Forget(id);
  NotifyGone({id});
  return MountState::kGone;
}

kj::Promise<void> Supervisor::MountsSettled(Generation caller) {
  if (state_.phase != Phase::kCommitting || caller != state_.successor) return kj::READY_NOW;
  return WaitSettled(caller, clock_->BootNanos() + kMountSettleMillis * 1'000'000);
}

kj::Promise<void> Supervisor::WaitSettled(Generation caller, uint64_t deadline_boot_nanos) {
  if (!vault_.MountingForOthers(caller)) return kj::READY_NOW;
  if (clock_->BootNanos() > deadline_boot_nanos) {
    vault_.AbandonMountingOfOthers(caller);
    return kj::READY_NOW;
  }
  return timer_.afterDelay(kSettlePollMillis * kj::MILLISECONDS).then([this, caller, deadline_boot_nanos] {
    return WaitSettled(caller, deadline_boot_nanos);
  });
}

// By polling: a /dev/fuse descriptor in an epoll would wake us for every request (handover-pitfalls 12).
kj::Promise<void> Supervisor::WatchMounts() {
  return timer_.afterDelay(kGonePollMillis * kj::MILLISECONDS).then([this] {
    NotifyGone(vault_.TakeGone());
    return WatchMounts();
  });
}

void Supervisor::NotifyGone(const std::vector<uint64_t>& ids) {
  if (ids.empty()) return;
  for (uint64_t id : ids) LOG(INFO) << "event=mount_gone mount=" << id;
  for (auto& [generation, worker] : workers_) {
    KJ_IF_MAYBE(client, worker->client) {
      auto request = client->mountsGoneRequest();
      auto list = request.initMountIds(static_cast<unsigned>(ids.size()));
      for (unsigned i = 0; i < ids.size(); ++i) list.set(i, ids[i]);
      tasks_.add(request.send().ignoreResult().catch_([](kj::Exception&&) {}));  // a dying worker need not know
    }
  }
}

kj::Promise<void> Supervisor::UnmountAll() {
  kj::Vector<kj::Promise<void>> jobs;
  for (const Mount* mount : vault_.All()) {
    if (mount->state != MountState::kLive) continue;
    using Result = absl::StatusOr<bool>;
    jobs.add(offload_.Run<Result>([path = mount->path, device = mount->device] {
                       return UnmountFuse(path, device->get());
                     })
                 .then([this, id = mount->id](kj::Own<Result>&& gone) { FinishUnmount(id, *gone); })
                 .catch_([id = mount->id](kj::Exception&& exception) {
                   LOG(ERROR) << "event=unmount_failed mount=" << id
                              << " error=" << LogValue(exception.getDescription().cStr());
                 }));
  }
  return kj::joinPromises(jobs.releaseAsArray()).then([this] {
    for (const Mount* mount : vault_.All()) {
      LOG(WARNING) << "event=mount_lost mount=" << mount->id << " path=" << LogValue(mount->path)
                   << " note=\"still in use; it ends with this process\"";
    }
  });
}

std::string Supervisor::WhyInUse() const {
  auto mounts = ReadMountInfo();
  for (const Mount* mount : vault_.All()) {
    if (mount->state == MountState::kDetached) return mount->path + " is unmounted, but a container still uses it";
    if (!mounts.ok() || UsedByOverlay(*mounts, mount->path)) return mount->path + " is used by a container";
  }
  return "";
}

}  // namespace holdfast::supervisor
