#include "supervisor/vault.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "supervisor/state_journal.h"

namespace holdfast::supervisor {
namespace {

constexpr int kPipeBytes = 65'536;  // 16 buffers: the 32 KiB of a slot, however the kernel splits them

absl::StatusOr<Pipe> MakePipe() {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0) return ErrnoStatus(errno, "pipe");
  Pipe pipe{std::make_shared<UniqueFd>(ends[0]), std::make_shared<UniqueFd>(ends[1])};
  if (fcntl(ends[0], F_SETPIPE_SZ, kPipeBytes) < 0) return ErrnoStatus(errno, "F_SETPIPE_SZ");
  return pipe;
}

}  // namespace

absl::StatusOr<uint64_t> Vault::Allocate(const std::string& path, std::string blob, uint64_t caller,
                                         SharedFd device) {
  for (const auto& [id, mount] : mounts_) {
    if (mount.path == path && mount.state != MountState::kDetached) {
      return AlreadyExists(path + " is mounted already, id " + std::to_string(id));
    }
  }
  HF_ASSIGN_OR_RETURN(uint64_t id, ids_.Next());
  mounts_[id] = {
      .id = id, .path = path, .blob = std::move(blob), .caller = caller, .device = std::move(device)};
  Save(mounts_[id]);
  return id;
}

void Vault::Restore(Mount mount) { mounts_[mount.id] = std::move(mount); }

void Vault::Save(const Mount& mount) {
  if (journal_ != nullptr) journal_->SaveMount(mount);
}

void Vault::Forget(uint64_t id) {
  mounts_.erase(id);
  if (journal_ != nullptr) journal_->ForgetMount(id);
}

Mount* Vault::Find(uint64_t id) {
  auto it = mounts_.find(id);
  return it == mounts_.end() ? nullptr : &it->second;
}

std::vector<const Mount*> Vault::Page(uint64_t after, size_t limit, bool* more) const {
  std::vector<const Mount*> page;
  *more = false;
  for (auto it = mounts_.upper_bound(after); it != mounts_.end(); ++it) {
    if (it->second.state == MountState::kMounting) continue;
    if ((*more = page.size() == limit)) break;
    page.push_back(&it->second);
  }
  return page;
}

size_t Vault::Count(MountState state) const {
  return static_cast<size_t>(std::count_if(mounts_.begin(), mounts_.end(),
                                           [&](const auto& entry) { return entry.second.state == state; }));
}

std::vector<uint64_t> Vault::Polled(short events, short wanted) const {
  std::vector<pollfd> polls;
  std::vector<uint64_t> ids, found;
  for (const auto& [id, mount] : mounts_) {
    if (mount.state == MountState::kMounting) continue;
    polls.push_back({.fd = mount.device->get(), .events = events, .revents = 0});
    ids.push_back(id);
  }
  if (polls.empty() || poll(polls.data(), polls.size(), 0) <= 0) return found;
  for (size_t i = 0; i < polls.size(); ++i) {
    if ((polls[i].revents & wanted) != 0) found.push_back(ids[i]);
  }
  return found;
}

std::vector<uint64_t> Vault::Readable() const { return Polled(POLLIN, POLLIN); }

std::vector<uint64_t> Vault::TakeGone() {
  std::vector<uint64_t> gone = Polled(0, POLLERR | POLLNVAL);
  for (uint64_t id : gone) Forget(id);
  return gone;
}

absl::StatusOr<std::unique_ptr<Ledger>> Ledger::Create(uint64_t generation) {
  HF_ASSIGN_OR_RETURN(UniqueFd memory, LedgerMap::Make(generation));
  HF_ASSIGN_OR_RETURN(LedgerMap map, LedgerMap::MapMade(memory.get(), generation));
  std::unique_ptr<Ledger> ledger(new Ledger(std::move(memory), std::move(map)));
  for (uint32_t i = 0; i < HF_LEDGER_SLOTS; ++i) {
    HF_ASSIGN_OR_RETURN(Pipe pipe, MakePipe());
    ledger->pipes_.push_back(std::move(pipe));
  }
  return ledger;
}

absl::StatusOr<std::unique_ptr<Ledger>> Ledger::Restore(uint64_t generation, UniqueFd memory,
                                                        const std::vector<uint64_t>& pipe_inodes,
                                                        std::vector<UniqueFd> pipe_ends) {
  HF_ASSIGN_OR_RETURN(LedgerMap map, LedgerMap::MapMade(memory.get(), generation));
  std::unique_ptr<Ledger> ledger(new Ledger(std::move(memory), std::move(map)));
  if (pipe_inodes.size() != HF_LEDGER_SLOTS) return DataLoss("it is not known which pipes belong to it");
  ledger->pipes_.resize(HF_LEDGER_SLOTS);
  for (UniqueFd& end : pipe_ends) {
    struct stat info;
    if (fstat(end.get(), &info) != 0 || !S_ISFIFO(info.st_mode)) continue;
    auto slot = std::find(pipe_inodes.begin(), pipe_inodes.end(), info.st_ino);
    if (slot == pipe_inodes.end()) continue;
    Pipe& pipe = ledger->pipes_[static_cast<size_t>(slot - pipe_inodes.begin())];
    bool read_end = (fcntl(end.get(), F_GETFL) & O_ACCMODE) == O_RDONLY;
    (read_end ? pipe.read_end : pipe.write_end) = std::make_shared<UniqueFd>(std::move(end));
  }
  for (const Pipe& pipe : ledger->pipes_) {
    if (pipe.read_end == nullptr || pipe.write_end == nullptr) return DataLoss("a request pipe is missing");
  }
  return ledger;
}

std::vector<uint64_t> Ledger::PipeInodes() const {
  std::vector<uint64_t> inodes;
  for (const Pipe& pipe : pipes_) {
    struct stat info {};
    fstat(pipe.read_end->get(), &info);
    inodes.push_back(info.st_ino);
  }
  return inodes;
}

uint64_t Ledger::CountUnanswered() const {
  uint64_t count = 0;
  for (uint32_t i = 0; i < map_.slot_count(); ++i) {
    count += map_.SlotIsUnanswered(i, pipes_[i].read_end->get()) ? 1 : 0;
  }
  map_.VisitPending([&](const hf_record*) { ++count; });
  return count;
}

std::vector<ExecutingSlot> Ledger::ExecutingSlots() const {
  std::vector<ExecutingSlot> slots;
  map_.VisitExecuting([&](uint32_t index, const hf_slot* slot) {
    slots.push_back({index, RequestHeader(*slot).opcode, Load(slot->received_ns), Load(slot->mount_id)});
  });
  return slots;
}

void Ledger::FindOverdue(uint64_t generation, HangSample* sample) const {
  map_.VisitPending([&](const hf_record* record) {
    const uint64_t deadline = Load(record->deadline_ns);
    const uint64_t noted = sample->overdue_deadline_ns;
    if (Load(record->owner_generation) != static_cast<uint32_t>(generation)) return;
    if (deadline >= (noted != 0 ? noted : sample->now_ns)) return;
    sample->overdue_deadline_ns = deadline;
    sample->overdue_mount = Load(record->mount_id);
  });
}

absl::StatusOr<Ledger*> LedgerStore::Create(uint64_t generation) {
  HF_ASSIGN_OR_RETURN(auto ledger, Ledger::Create(generation));
  if (journal_ != nullptr) journal_->SaveLedger(*ledger, true);
  return (ledgers_[generation] = std::move(ledger)).get();
}

void LedgerStore::Restore(std::unique_ptr<Ledger> ledger) {
  uint64_t generation = ledger->generation();
  bool needed = !ledger->owner_exited || ledger->CountUnanswered() != 0;
  ledgers_[generation] = std::move(ledger);
  if (!needed) Drop(generation);
}

void LedgerStore::Drop(uint64_t generation) {
  ledgers_.erase(generation);
  if (journal_ != nullptr) journal_->ForgetLedger(generation);
}

Ledger* LedgerStore::Find(uint64_t generation) const {
  auto it = ledgers_.find(generation);
  return it == ledgers_.end() ? nullptr : it->second.get();
}

std::vector<Ledger*> LedgerStore::Page(uint64_t after, uint64_t except, size_t limit, bool* more) const {
  std::vector<Ledger*> page;
  *more = false;
  for (auto it = ledgers_.upper_bound(after); it != ledgers_.end(); ++it) {
    if (it->first == except) continue;
    if ((*more = page.size() == limit)) break;
    page.push_back(it->second.get());
  }
  return page;
}

std::vector<const Ledger*> LedgerStore::all() const {
  std::vector<const Ledger*> ledgers;
  for (const auto& [generation, ledger] : ledgers_) ledgers.push_back(ledger.get());
  return ledgers;
}

void LedgerStore::OwnerExited(uint64_t generation) {
  Ledger* ledger = Find(generation);
  if (ledger == nullptr) return;
  ledger->owner_exited = true;
  if (ledger->CountUnanswered() == 0) return Drop(generation);
  if (journal_ != nullptr) journal_->SaveLedger(*ledger, false);
}

void LedgerStore::Drained(uint64_t generation) {
  Ledger* ledger = Find(generation);
  if (ledger != nullptr && ledger->owner_exited) Drop(generation);
}

uint64_t LedgerStore::CountUnanswered(uint64_t except) const {
  uint64_t count = 0;
  for (const auto& [generation, ledger] : ledgers_) {
    if (generation != except) count += ledger->CountUnanswered();
  }
  return count;
}

}  // namespace holdfast::supervisor
