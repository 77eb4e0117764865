#include "supervisor/vault.h"

#include <poll.h>

#include <charconv>
#include <utility>

namespace holdfast::supervisor {

absl::StatusOr<IdFile> IdFile::Open(const std::string& path, uint64_t block) {
  uint64_t next = 1;
  if (PathExists(path)) {
    HF_ASSIGN_OR_RETURN(std::string text, ReadFile(path));
    if (!text.empty() && text.back() == '\n') text.pop_back();
    auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), next);
    if (error != std::errc() || end != text.data() + text.size() || next == 0) {
      return DataLoss(path + " does not hold a number; restore it, or write one higher than any mount id ever used");
    }
  }
  return IdFile(path, next, block);
}

absl::StatusOr<uint64_t> IdFile::Next() {
  if (next_ == end_) {
    HF_RETURN_IF_ERROR(WriteFileAtomic(path_, std::to_string(end_ + block_) + "\n"));
    end_ += block_;
  }
  return next_++;
}

absl::StatusOr<uint64_t> Vault::Allocate(const std::string& path, std::string blob, uint64_t caller) {
  for (const auto& [id, mount] : mounts_) {
    if (mount.path == path && mount.state != MountState::kDetached) {
      return AlreadyExists(path + " is mounted already, id " + std::to_string(id));
    }
  }
  HF_ASSIGN_OR_RETURN(uint64_t id, ids_.Next());
  Mount& mount = mounts_[id];
  mount.id = id;
  mount.path = path;
  mount.blob = std::move(blob);
  mount.caller = caller;
  return id;
}

void Vault::SetLive(uint64_t id, SharedFd device, std::string init_request, std::string init_reply) {
  auto it = mounts_.find(id);
  if (it == mounts_.end()) return;
  it->second.state = MountState::kLive;
  it->second.device = std::move(device);
  it->second.init_request = std::move(init_request);
  it->second.init_reply = std::move(init_reply);
}

absl::Status Vault::SetBlob(uint64_t id, std::string blob) {
  auto it = mounts_.find(id);
  if (it == mounts_.end()) return NotFound("no mount " + std::to_string(id));
  it->second.blob = std::move(blob);
  return absl::OkStatus();
}

void Vault::SetDetached(uint64_t id) {
  auto it = mounts_.find(id);
  if (it != mounts_.end()) it->second.state = MountState::kDetached;
}

void Vault::Forget(uint64_t id) { mounts_.erase(id); }

const Mount* Vault::Find(uint64_t id) const {
  auto it = mounts_.find(id);
  return it == mounts_.end() ? nullptr : &it->second;
}

std::vector<const Mount*> Vault::Page(uint64_t after, size_t limit, bool* more) const {
  std::vector<const Mount*> page;
  *more = false;
  for (auto it = mounts_.upper_bound(after); it != mounts_.end(); ++it) {
    if (it->second.state == MountState::kMounting) continue;
    if (page.size() == limit) {
      *more = true;
      break;
    }
    page.push_back(&it->second);
  }
  return page;
}

std::vector<const Mount*> Vault::All() const {
  std::vector<const Mount*> all;
  for (const auto& [id, mount] : mounts_) all.push_back(&mount);
  return all;
}

bool Vault::MountingForOthers(uint64_t generation) const {
  for (const auto& [id, mount] : mounts_) {
    if (mount.state == MountState::kMounting && mount.caller != generation && !mount.abandoned) return true;
  }
  return false;
}

void Vault::AbandonMountingOfOthers(uint64_t generation) {
  for (auto& [id, mount] : mounts_) {
    if (mount.state == MountState::kMounting && mount.caller != generation) mount.abandoned = true;
  }
}

std::vector<uint64_t> Vault::TakeGone() {
  std::vector<pollfd> polls;
  std::vector<uint64_t> ids;
  for (const auto& [id, mount] : mounts_) {
    if (mount.state == MountState::kMounting) continue;
    polls.push_back({.fd = mount.device->get(), .events = 0, .revents = 0});
    ids.push_back(id);
  }
  std::vector<uint64_t> gone;
  if (polls.empty() || poll(polls.data(), polls.size(), 0) <= 0) return gone;
  for (size_t i = 0; i < polls.size(); ++i) {
    if ((polls[i].revents & (POLLERR | POLLNVAL)) == 0) continue;
    gone.push_back(ids[i]);
    mounts_.erase(ids[i]);
  }
  return gone;
}

}  // namespace holdfast::supervisor
