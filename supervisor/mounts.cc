// The supervisor's mounts: mount(2) and umount(2) on threads of their own, intents recorded before, and who
// is told when one is gone.
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/log.h"
#include "common/offload.h"
#include "glog/logging.h"
#include "supervisor/rpc.h"
#include "supervisor/supervisor.h"

namespace holdfast::supervisor {
namespace {

constexpr uint64_t kGonePollMillis = 1'000;
constexpr int kStoreMillis = 1'000;  // a busy service manager delays a mount this long, not longer

}  // namespace

void Supervisor::RequireOwner(Generation caller) const {
  KJ_REQUIRE(state_.holders.count(caller) != 0, "only the owner of the metadata may mount and unmount");
  KJ_REQUIRE(!stopping_, "the supervisor is shutting down");
}

kj::Promise<const Mount*> Supervisor::MountLayer(Generation caller, std::string path, InitOptions options,
                                                 std::string blob) {
  RequireOwner(caller);
  auto device = std::make_shared<UniqueFd>(OrThrow(OpenFuseDevice()));
  const uint64_t id = OrThrow(vault_.Allocate(path, std::move(blob), caller, device));
  using Result = absl::StatusOr<FuseInit>;
  auto mounted = Offload<Result>([this, name = FdName(FdKind::kMount, id), device, path, options] {
    store_->Push(name, {device});
    if (!store_->Flush(kStoreMillis)) LOG(WARNING) << "event=fd_store_slow name=" << name;
    PassFault(faults_, "supervisor.before_mount").IgnoreError();
    auto result = MountFuse(device->get(), state_dir_.get(), options_.state_dir, path, options);
    PassFault(faults_, "supervisor.after_mount").IgnoreError();
    return result;
  });
  return Keep(mounted.then([this, id](kj::Own<Result>&& r) { return FinishMount(id, std::move(*r)); }));
}

const Mount* Supervisor::FinishMount(uint64_t id, absl::StatusOr<FuseInit> result) {
  Mount* mount = vault_.Find(id);
  LOG(INFO) << "event=mount mount=" << id << " path=" << LogValue(mount->path)
            << " generation=" << mount->caller << " result=" << LogValue(result.status().ToString());
  if (!result.ok()) {
    vault_.Forget(id);
    Throw(result.status());
  }
  mount->state = MountState::kLive;
  mount->init_request = std::move(result->request);
  mount->init_reply = std::move(result->reply);
  vault_.Save(*mount);
  return mount;
}

kj::Promise<MountState> Supervisor::UnmountLayer(Generation caller, uint64_t mount_id) {
  RequireOwner(caller);
  Mount* mount = vault_.Find(mount_id);
  KJ_REQUIRE(mount != nullptr, "no such mount", mount_id);
  KJ_REQUIRE(mount->state != MountState::kMounting, "still being mounted", mount_id);
  // Not again: the path may be another mount's by now.
  if (mount->state == MountState::kDetached) return MountState::kDetached;
  mount->unmounting = true;
  vault_.Save(*mount);
  using Result = absl::StatusOr<bool>;
  auto unmounted = Offload<Result>([this, path = mount->path, device = mount->device] {
    PassFault(faults_, "supervisor.before_unmount").IgnoreError();
    auto result = UnmountFuse(path, device->get());
    PassFault(faults_, "supervisor.after_unmount").IgnoreError();
    return result;
  });
  return Keep(
      unmounted.then([this, mount_id](kj::Own<Result>&& gone) { return FinishUnmount(mount_id, *gone); }));
}

MountState Supervisor::FinishUnmount(uint64_t id, const absl::StatusOr<bool>& gone) {
  Mount* mount = vault_.Find(id);
  if (mount == nullptr) return MountState::kGone;
  mount->unmounting = false;
  if (gone.ok() && !*gone) mount->state = MountState::kDetached;
  if (!gone.ok() || !*gone) vault_.Save(*mount);
  if (!gone.ok()) Throw(gone.status());
  LOG(INFO) << "event=unmount mount=" << id << " path=" << LogValue(mount->path) << " in_use=" << !*gone;
  if (!*gone) return MountState::kDetached;
  vault_.Forget(id);
  NotifyGone({id});
  return MountState::kGone;
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
    KJ_IF_MAYBE (client, worker->client) {
      auto request = client->mountsGoneRequest();
      auto list = request.initMountIds(static_cast<unsigned>(ids.size()));
      for (unsigned i = 0; i < ids.size(); ++i) list.set(i, ids[i]);
      Ignore(request.send().ignoreResult());  // a dying worker need not know
    }
  }
}

kj::Promise<void> Supervisor::UnmountAll() {
  auto unmounted = Offload<int>([mounts = vault_.all()] {
    for (const auto& [id, mount] : mounts) {
      if (mount.state == MountState::kLive)
        UnmountFuse(mount.path, mount.device->get()).status().IgnoreError();
    }
    return 0;
  });
  return unmounted.then([this](kj::Own<int>&&) {
    NotifyGone(vault_.TakeGone());
    for (const auto& [id, mount] : vault_.all()) {
      LOG(WARNING) << "event=mount_lost mount=" << id << " path=" << LogValue(mount.path)
                   << " note=\"still in use; it ends with the last process that serves it\"";
    }
  });
}

}  // namespace holdfast::supervisor
