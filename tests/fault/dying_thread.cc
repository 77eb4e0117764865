#include "tests/fault/dying_thread.h"

#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>

#include "common/clock.h"
#include "common/crc32c.h"
#include "tests/fault/process.h"

namespace holdfast::test {
namespace {

constexpr uint32_t kFirstSlot = HF_LEDGER_SLOTS - 2;  // downwards; the last is for adopted requests

template <typename T>
void Publish(T* word, T value) {
  __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

// Which connection a /dev/fuse descriptor belongs to: the minor number of the mount's device.
unsigned ConnectionOf(pid_t pid, int fd) {
  auto info = ReadFile("/proc/" + std::to_string(pid) + "/fdinfo/" + std::to_string(fd));
  constexpr char kKey[] = "fuse_connection:";
  const size_t at = info.ok() ? info->find(kKey) : std::string::npos;
  return at == std::string::npos ? 0 : static_cast<unsigned>(atoi(info->c_str() + at + strlen(kKey)));
}

absl::StatusOr<LedgerMap> MapLedger(pid_t pid, uint64_t generation) {
  for (int fd : DescriptorsTo(pid, "/memfd:")) {
    HF_ASSIGN_OR_RETURN(UniqueFd memory, Borrow(pid, fd));
    auto map = LedgerMap::MapGiven(memory.get(), PROT_READ | PROT_WRITE);
    if (map.ok() && map->generation() == generation) return map;
  }
  return NotFound("no ledger of generation " + std::to_string(generation));
}

}  // namespace

absl::StatusOr<DyingThread> DyingThread::Of(pid_t pid, uint64_t generation,
                                            const std::vector<ctl::MountInfo>& mounts) {
  HF_ASSIGN_OR_RETURN(LedgerMap ledger, MapLedger(pid, generation));
  DyingThread thread(std::move(ledger));
  std::map<unsigned, uint64_t> ids;  // by connection
  // Not by stat: perhaps nobody answers just now.
  std::ifstream table("/proc/self/mountinfo");
  for (std::string line; std::getline(table, line);) {
    std::istringstream words(line);
    std::string id, parent, device, root, path;
    words >> id >> parent >> device >> root >> path;
    for (const ctl::MountInfo& mount : mounts) {
      if (mount.path != path) continue;
      ids[static_cast<unsigned>(atoi(device.c_str() + device.find(':') + 1))] = mount.mount_id;
    }
  }
  for (int fd : DescriptorsTo(pid, "/dev/fuse")) {
    auto mount = ids.find(ConnectionOf(pid, fd));
    if (mount == ids.end()) continue;
    HF_ASSIGN_OR_RETURN(UniqueFd device, Borrow(pid, fd));
    thread.devices_.emplace_back(mount->second, std::move(device));
  }
  if (thread.devices_.empty()) return NotFound("it has no device of a mount");
  return thread;
}

absl::Status DyingThread::TakeOne(int seconds) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0) return ErrnoStatus(errno, "pipe");
  const UniqueFd out(ends[0]), in(ends[1]);
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  uint32_t index = kFirstSlot;
  while (std::chrono::steady_clock::now() < deadline) {
    std::vector<pollfd> polls;
    for (const auto& [id, device] : devices_) polls.push_back({device.get(), POLLIN, 0});
    if (poll(polls.data(), polls.size(), 100) <= 0) continue;
    for (size_t i = 0; i < polls.size(); ++i) {
      if ((polls[i].revents & POLLIN) == 0) continue;
      hf_slot* slot = ledger_.slot(index);
      if (slot->state != HF_SLOT_FREE) return FailedPrecondition("the slot is in use");
      Publish(&LengthWord(slot), 0u);
      slot->mount_id = devices_[i].first;
      slot->owner_generation = static_cast<uint32_t>(ledger_.generation());
      slot->strikes = slot->marks = 0;
      slot->received_ns = Clock::Real()->BootNanos();
      Publish(&slot->state, static_cast<uint32_t>(HF_SLOT_RECEIVING));
      const ssize_t n =
          splice(polls[i].fd, nullptr, in.get(), nullptr, HF_LEDGER_REQUEST_BYTES, SPLICE_F_NONBLOCK);
      if (n <= 0 || read(out.get(), slot->request, static_cast<size_t>(n)) != n) {
        Publish(&slot->state, static_cast<uint32_t>(HF_SLOT_FREE));
        continue;
      }
      slot->length = static_cast<uint32_t>(n);
      slot->crc = Crc32c(slot->request, slot->length);
      Publish(&slot->state, static_cast<uint32_t>(HF_SLOT_EXECUTING));
      slot_ = slot;
      const uint32_t opcode = RequestHeader(*slot).opcode;
      what_ = "opcode " + std::to_string(opcode);
      const bool expects_answer =
          opcode != FUSE_FORGET && opcode != FUSE_BATCH_FORGET && opcode != FUSE_INTERRUPT;
      if (expects_answer) return absl::OkStatus();
      if (index-- == 0) return FailedPrecondition("nothing but FORGETs");
    }
  }
  return DeadlineExceeded("no request came");
}

bool DyingThread::Unanswered() const { return slot_ != nullptr && Load(slot_->state) == HF_SLOT_EXECUTING; }

}  // namespace holdfast::test
