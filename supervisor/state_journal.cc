#include "supervisor/state_journal.h"

#include <capnp/message.h>
#include <capnp/serialize.h>

#include <cstring>
#include <utility>

#include "absl/strings/numbers.h"
#include "common/log.h"
#include "glog/logging.h"
#include "schema/vault_state.capnp.h"

namespace holdfast::supervisor {
namespace {

constexpr char kMachineKey[] = "machine";

std::string Key(char kind, uint64_t number) { return std::string(1, kind) + "/" + std::to_string(number); }

kj::ArrayPtr<const kj::byte> Bytes(const std::string& text) {
  return kj::arrayPtr(reinterpret_cast<const kj::byte*>(text.data()), text.size());
}

std::string String(capnp::Data::Reader data) {
  return {reinterpret_cast<const char*>(data.begin()), data.size()};
}

std::string Encode(capnp::MallocMessageBuilder& message) {
  auto words = capnp::messageToFlatArray(message);
  auto bytes = words.asBytes();
  return {reinterpret_cast<const char*>(bytes.begin()), bytes.size()};
}

template <typename List, typename Range>
void FillNumbers(List list, const Range& numbers) {
  unsigned i = 0;
  for (uint64_t number : numbers) list.set(i++, number);
}

schema::SavedMount::State Convert(const Mount& mount) {
  if (mount.unmounting) return schema::SavedMount::State::UNMOUNTING;
  if (mount.state == MountState::kMounting) return schema::SavedMount::State::MOUNTING;
  if (mount.state == MountState::kLive) return schema::SavedMount::State::LIVE;
  return schema::SavedMount::State::DETACHED;
}

Mount Decode(schema::SavedMount::Reader in) {
  Mount mount;
  mount.id = in.getMountId();
  mount.path = in.getPath().cStr();
  mount.blob = String(in.getBlob());
  mount.init_request = String(in.getInitRequest());
  mount.init_reply = String(in.getInitReply());
  mount.caller = in.getCaller();
  mount.unmounting = in.getState() == schema::SavedMount::State::UNMOUNTING;
  mount.state = MountState::kLive;
  if (in.getState() == schema::SavedMount::State::MOUNTING) mount.state = MountState::kMounting;
  if (in.getState() == schema::SavedMount::State::DETACHED) mount.state = MountState::kDetached;
  return mount;
}

SavedWorker Decode(schema::SavedWorker::Reader in) {
  return {.generation = in.getGeneration(),
          .start_ticks = in.getStartTicks(),
          .capabilities = in.getCapabilities(),
          .pid = static_cast<pid_t>(in.getPid()),
          .token = in.getToken().cStr(),
          .executable = in.getExecutable().cStr(),
          .build = in.getBuild().cStr(),
          .started_wall_nanos = in.getStartedWallNanos(),
          .killed = in.getKilled(),
          .retired = in.getRetired()};
}

SavedLedger Decode(schema::SavedLedger::Reader in) {
  SavedLedger ledger{
      .generation = in.getGeneration(), .owner_exited = in.getOwnerExited(), .owner_hung = in.getOwnerHung()};
  for (uint64_t inode : in.getPipeInodes()) ledger.pipe_inodes.push_back(inode);
  return ledger;
}

SavedMachine Decode(schema::SavedMachine::Reader in) {
  SavedMachine machine{.phase = in.getPhase().cStr(),
                       .running = in.getRunning().cStr(),
                       .previous = in.getPrevious().cStr(),
                       .last_good = in.getLastGood().cStr(),
                       .running_build = in.getRunningBuild().cStr(),
                       .vault_id = String(in.getVaultId()),
                       .owner = in.getOwner(),
                       .successor = in.getSuccessor(),
                       .trial_generation = in.getTrialGeneration(),
                       .probation = in.getProbation(),
                       .restarts = in.getRestarts(),
                       .crashes = in.getCrashes(),
                       .hangs = in.getHangs(),
                       .swaps = in.getSwaps(),
                       .carried_over = in.getCarriedOver()};
  for (uint64_t generation : in.getHolders()) machine.holders.insert(generation);
  return machine;
}

// Cap'n Proto checks every pointer; what is wrong is thrown.
template <typename Schema>
auto DecodeValue(const std::string& value) {
  auto words = kj::heapArray<capnp::word>(value.size() / sizeof(capnp::word));  // aligned
  memcpy(words.begin(), value.data(), words.asBytes().size());
  capnp::FlatArrayMessageReader reader(words);
  return Decode(reader.getRoot<Schema>());
}

void DecodeRecord(const std::string& key, const std::string& value, SavedState* state) {
  if (key == kMachineKey) state->machine = DecodeValue<schema::SavedMachine>(value);
  uint64_t number = 0;
  if (key.size() < 3 || key[1] != '/' || !absl::SimpleAtoi(key.substr(2), &number)) return;
  if (key[0] == 'm') state->mounts[number] = DecodeValue<schema::SavedMount>(value);
  if (key[0] == 'w') state->workers[number] = DecodeValue<schema::SavedWorker>(value);
  if (key[0] == 'l') state->ledgers[number] = DecodeValue<schema::SavedLedger>(value);
}

}  // namespace

std::string FdName(FdKind kind, uint64_t number) {
  std::string digits;
  for (; number != 0; number /= 36) digits += "0123456789abcdefghijklmnopqrstuvwxyz"[number % 36];
  digits += static_cast<char>(kind);
  return {digits.rbegin(), digits.rend()};
}

absl::StatusOr<SavedState> DecodeState(const DurableMap& map) {
  SavedState state;
  if (map.all().count(kMachineKey) == 0) return DataLoss("the saved state does not say who owns what");
  for (const auto& [key, value] : map.all()) {
    try {
      DecodeRecord(key, value, &state);
    } catch (const kj::Exception& exception) {
      return DataLoss("record " + key + " of the saved state: " + exception.getDescription().cStr());
    }
  }
  return state;
}

void StateJournal::Put(const std::string& key, std::string_view value) {
  absl::Status status = map_ ? map_->Put(key, value) : absl::OkStatus();
  if (!status.ok()) LOG(ERROR) << "event=state key=" << key << " error=" << LogValue(status.ToString());
}

void StateJournal::Erase(const std::string& key) {
  absl::Status status = map_ ? map_->Erase(key) : absl::OkStatus();
  if (!status.ok()) LOG(ERROR) << "event=state key=" << key << " error=" << LogValue(status.ToString());
}

SharedFd StateJournal::ReadOnlyState() const {
  if (!map_) return nullptr;
  auto file = map_->OpenReadOnly();
  return file.ok() ? std::make_shared<UniqueFd>(std::move(*file)) : nullptr;
}

void StateJournal::SaveMount(const Mount& mount) {
  capnp::MallocMessageBuilder message;
  auto out = message.initRoot<schema::SavedMount>();
  out.setMountId(mount.id);
  out.setState(Convert(mount));
  out.setPath(mount.path.c_str());
  out.setBlob(Bytes(mount.blob));
  out.setInitRequest(Bytes(mount.init_request));
  out.setInitReply(Bytes(mount.init_reply));
  out.setCaller(mount.caller);
  Put(Key('m', mount.id), Encode(message));
}

void StateJournal::ForgetMount(uint64_t mount_id) {
  Erase(Key('m', mount_id));
  store_->Remove(FdName(FdKind::kMount, mount_id));
}

void StateJournal::SaveLedger(const Ledger& ledger, bool is_new) {
  capnp::MallocMessageBuilder message;
  auto out = message.initRoot<schema::SavedLedger>();
  auto inodes = ledger.PipeInodes();
  out.setGeneration(ledger.generation());
  FillNumbers(out.initPipeInodes(static_cast<unsigned>(inodes.size())), inodes);
  out.setOwnerExited(ledger.owner_exited);
  out.setOwnerHung(ledger.owner_hung);
  Put(Key('l', ledger.generation()), Encode(message));
  if (is_new) PushLedger(ledger, store_);
}

void StateJournal::PushLedger(const Ledger& ledger, FdStore* store) {
  std::vector<SharedFd> ends;
  for (const Pipe& pipe : ledger.pipes()) {
    ends.push_back(pipe.read_end);
    ends.push_back(pipe.write_end);
  }
  store->Push(FdName(FdKind::kLedger, ledger.generation()), {ledger.memory()});
  store->Push(FdName(FdKind::kPipes, ledger.generation()), std::move(ends));
}

void StateJournal::ForgetLedger(uint64_t generation) {
  Erase(Key('l', generation));
  store_->Remove(FdName(FdKind::kLedger, generation));
  store_->Remove(FdName(FdKind::kPipes, generation));
}

void StateJournal::SaveWorker(const SavedWorker& worker) {
  capnp::MallocMessageBuilder message;
  auto out = message.initRoot<schema::SavedWorker>();
  out.setGeneration(worker.generation);
  out.setPid(static_cast<uint32_t>(worker.pid));
  out.setStartTicks(worker.start_ticks);
  out.setToken(worker.token.c_str());
  out.setExecutable(worker.executable.c_str());
  out.setBuild(worker.build.c_str());
  out.setCapabilities(worker.capabilities);
  out.setStartedWallNanos(worker.started_wall_nanos);
  out.setKilled(worker.killed);
  out.setRetired(worker.retired);
  Put(Key('w', worker.generation), Encode(message));
}

void StateJournal::ForgetWorker(uint64_t generation) {
  Erase(Key('w', generation));
  store_->Remove(FdName(FdKind::kWorker, generation));
}

void StateJournal::SaveMachine(const SavedMachine& machine) {
  capnp::MallocMessageBuilder message;
  auto out = message.initRoot<schema::SavedMachine>();
  out.setPhase(machine.phase.c_str());
  out.setOwner(machine.owner);
  out.setSuccessor(machine.successor);
  FillNumbers(out.initHolders(static_cast<unsigned>(machine.holders.size())), machine.holders);
  out.setRunning(machine.running.c_str());
  out.setPrevious(machine.previous.c_str());
  out.setLastGood(machine.last_good.c_str());
  out.setTrialGeneration(machine.trial_generation);
  out.setProbation(machine.probation);
  out.setVaultId(Bytes(machine.vault_id));
  out.setRestarts(machine.restarts);
  out.setCrashes(machine.crashes);
  out.setHangs(machine.hangs);
  out.setSwaps(machine.swaps);
  out.setCarriedOver(machine.carried_over);
  out.setRunningBuild(machine.running_build.c_str());
  Put(kMachineKey, Encode(message));
}

void StateJournal::PushState() {
  auto file = map_ ? DupFd(map_->file()) : absl::StatusOr<UniqueFd>(NotFound("no state"));
  if (file.ok()) store_->Push(kStateFd, {std::make_shared<UniqueFd>(std::move(*file))});
}

}  // namespace holdfast::supervisor
