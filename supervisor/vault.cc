#include "supervisor/vault.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "common/sealed_memory.h"

namespace holdfast::supervisor {
namespace {

constexpr size_t kOpcodeOffset = 4;  // in the kernel's request header
constexpr int kPipeBytes = 65'536;   // 16 buffers: the 32 KiB of a slot, however the kernel splits them

template <typename T>
T Load(const void* address) {
  return __atomic_load_n(static_cast<const T*>(address), __ATOMIC_ACQUIRE);
}

absl::StatusOr<Pipe> MakePipe() {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0) return ErrnoStatus(errno, "pipe");
  Pipe pipe{std::make_shared<UniqueFd>(ends[0]), std::make_shared<UniqueFd>(ends[1])};
  if (fcntl(ends[0], F_SETPIPE_SZ, kPipeBytes) < 0) return ErrnoStatus(errno, "F_SETPIPE_SZ");
  return pipe;
}

void FillHeader(hf_ledger_header* header, uint64_t generation) {
  header->magic = HF_LEDGER_MAGIC;
  header->version = HF_LEDGER_VERSION;
  header->header_size = sizeof(hf_ledger_header);
  header->total_size = HF_LEDGER_TOTAL_SIZE;
  header->generation = generation;
  header->slot_count = HF_LEDGER_SLOTS;
  header->slot_stride = HF_LEDGER_SLOT_STRIDE;
  header->slot_offset = HF_LEDGER_SLOT_OFFSET;
  header->record_count = HF_LEDGER_RECORDS;
  header->record_stride = sizeof(hf_record);
  header->record_offset = HF_LEDGER_RECORD_OFFSET;
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
  if (recorder_ != nullptr) recorder_->SaveMount(mount);
}

void Vault::Forget(uint64_t id) {
  mounts_.erase(id);
  if (recorder_ != nullptr) recorder_->ForgetMount(id);
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

absl::StatusOr<std::unique_ptr<Ledger>> Ledger::Map(uint64_t generation, SharedFd memory) {
  void* base = mmap(nullptr, HF_LEDGER_TOTAL_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, memory->get(), 0);
  if (base == MAP_FAILED) return ErrnoStatus(errno, "mapping a ledger");
  return std::unique_ptr<Ledger>(new Ledger(generation, std::move(memory), static_cast<char*>(base)));
}

absl::StatusOr<std::unique_ptr<Ledger>> Ledger::Create(uint64_t generation) {
  HF_ASSIGN_OR_RETURN(UniqueFd memory, MakeSealedMemory("holdfast-ledger", HF_LEDGER_TOTAL_SIZE));
  HF_ASSIGN_OR_RETURN(std::unique_ptr<Ledger> ledger,
                      Map(generation, std::make_shared<UniqueFd>(std::move(memory))));
  FillHeader(reinterpret_cast<hf_ledger_header*>(ledger->base_), generation);
  for (uint32_t i = 0; i < HF_LEDGER_SLOTS; ++i) {
    HF_ASSIGN_OR_RETURN(Pipe pipe, MakePipe());
    ledger->pipes_.push_back(std::move(pipe));
  }
  return ledger;
}

absl::StatusOr<std::unique_ptr<Ledger>> Ledger::Restore(uint64_t generation, UniqueFd memory,
                                                        const std::vector<uint64_t>& pipe_inodes,
                                                        std::vector<UniqueFd> pipe_ends) {
  struct stat info;
  int seals = fcntl(memory.get(), F_GET_SEALS);
  if (fstat(memory.get(), &info) != 0 || info.st_size != HF_LEDGER_TOTAL_SIZE || seals < 0 ||
      (seals & F_SEAL_SHRINK) == 0) {
    return DataLoss("it is no ledger");
  }
  HF_ASSIGN_OR_RETURN(std::unique_ptr<Ledger> ledger,
                      Map(generation, std::make_shared<UniqueFd>(std::move(memory))));
  if (pipe_inodes.size() != HF_LEDGER_SLOTS) return DataLoss("it is not known which pipes belong to it");
  ledger->pipes_.resize(HF_LEDGER_SLOTS);
  for (UniqueFd& end : pipe_ends) {
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

Ledger::~Ledger() { munmap(base_, HF_LEDGER_TOTAL_SIZE); }

const char* Ledger::SlotAt(uint32_t index) const {
  return base_ + HF_LEDGER_SLOT_OFFSET + size_t{index} * HF_LEDGER_SLOT_STRIDE;
}

const char* Ledger::RecordAt(uint32_t index) const {
  return base_ + HF_LEDGER_RECORD_OFFSET + size_t{index} * sizeof(hf_record);
}

uint32_t Ledger::RecordsUsed() const {
  return std::min(Load<uint32_t>(base_ + offsetof(hf_ledger_header, record_high_water)), HF_LEDGER_RECORDS);
}

bool Ledger::SlotIsUnanswered(uint32_t index) const {
  const char* slot = SlotAt(index);
  auto state = Load<uint32_t>(slot + offsetof(hf_slot, state));
  if (state == HF_SLOT_EXECUTING) return true;
  if (state != HF_SLOT_RECEIVING) return false;
  int in_pipe = 0;
  ioctl(pipes_[index].read_end->get(), FIONREAD, &in_pipe);
  return in_pipe > 0 || Load<uint32_t>(slot + offsetof(hf_slot, request)) != 0;
}

uint64_t Ledger::CountUnanswered() const {
  uint64_t count = 0;
  for (uint32_t i = 0; i < HF_LEDGER_SLOTS; ++i) count += SlotIsUnanswered(i) ? 1 : 0;
  for (uint32_t i = 0, used = RecordsUsed(); i < used; ++i) {
    count += Load<uint32_t>(RecordAt(i) + offsetof(hf_record, state)) == HF_RECORD_PENDING ? 1 : 0;
  }
  return count;
}

std::vector<ExecutingSlot> Ledger::ExecutingSlots() const {
  std::vector<ExecutingSlot> slots;
  for (uint32_t i = 0; i < HF_LEDGER_SLOTS; ++i) {
    const char* slot = SlotAt(i);
    if (Load<uint32_t>(slot + offsetof(hf_slot, state)) != HF_SLOT_EXECUTING) continue;
    slots.push_back({i, Load<uint32_t>(slot + offsetof(hf_slot, request) + kOpcodeOffset),
                     Load<uint64_t>(slot + offsetof(hf_slot, received_ns)),
                     Load<uint64_t>(slot + offsetof(hf_slot, mount_id))});
  }
  return slots;
}

uint64_t Ledger::OverdueDeadline(uint64_t generation, uint64_t now, uint64_t* mount) const {
  uint64_t earliest = 0;
  for (uint32_t i = 0, used = RecordsUsed(); i < used; ++i) {
    const char* record = RecordAt(i);
    if (Load<uint32_t>(record + offsetof(hf_record, state)) != HF_RECORD_PENDING) continue;
    auto owner = Load<uint32_t>(record + offsetof(hf_record, owner_generation));
    auto deadline = Load<uint64_t>(record + offsetof(hf_record, deadline_ns));
    if (owner != static_cast<uint32_t>(generation) || deadline >= now) continue;
    if (earliest != 0 && deadline >= earliest) continue;
    earliest = deadline;
    *mount = Load<uint64_t>(record + offsetof(hf_record, mount_id));
  }
  return earliest;
}

uint64_t Ledger::Counter(size_t offset) const { return Load<uint64_t>(base_ + offset); }

absl::StatusOr<Ledger*> LedgerStore::Create(uint64_t generation) {
  HF_ASSIGN_OR_RETURN(auto ledger, Ledger::Create(generation));
  if (recorder_ != nullptr) recorder_->SaveLedger(*ledger, true);
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
  if (recorder_ != nullptr) recorder_->ForgetLedger(generation);
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
  if (recorder_ != nullptr) recorder_->SaveLedger(*ledger, false);
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
