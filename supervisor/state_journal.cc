#include "supervisor/state_journal.h"

#include <capnp/serialize.h>

#include <cstring>
#include <utility>

#include "absl/strings/numbers.h"
#include "common/log.h"
#include "glog/logging.h"
#include "schema/rpc.h"

namespace holdfast::supervisor {
namespace {

constexpr char kMachineKey[] = "machine";

std::string Key(char kind, uint64_t number) { return std::string(1, kind) + "/" + std::to_string(number); }

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

// Of a record: what `use` makes of it. Cap'n Proto checks a field when it is read, and throws.
template <typename Schema, typename Use>
auto Decoded(const std::string& value, Use use) {
  auto words = kj::heapArray<capnp::word>(value.size() / sizeof(capnp::word));  // aligned
  memcpy(words.begin(), value.data(), words.asBytes().size());
  return use(capnp::FlatArrayMessageReader(words).getRoot<Schema>());
}

// A copy of its own, of which all fields are read here, so that none throws later.
template <typename Schema>
kj::Own<typename Schema::Reader> Read(const std::string& value) {
  return Decoded<Schema>(value, [](typename Schema::Reader record) {
    kj::str(record);
    return capnp::clone(record);
  });
}

void DecodeRecord(const std::string& key, const std::string& value, SavedState* state) {
  if (key == kMachineKey) state->machine = Read<schema::SavedMachine>(value);
  uint64_t number = 0;
  if (key.size() < 3 || key[1] != '/' || !absl::SimpleAtoi(key.substr(2), &number)) return;
  if (key[0] == 'm') state->mounts[number] = Decoded<schema::SavedMount>(value, Decode);
  if (key[0] == 'w') state->workers[number] = Read<schema::SavedWorker>(value);
  if (key[0] == 'l') state->ledgers[number] = Read<schema::SavedLedger>(value);
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

void StateJournal::Put(const std::string& key, capnp::MessageBuilder* record) {
  auto words = capnp::messageToFlatArray(*record);
  auto value = words.asChars();
  absl::Status status = map_ ? map_->Put(key, {value.begin(), value.size()}) : absl::OkStatus();
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
  Put(Key('m', mount.id), &message);
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
  auto list = out.initPipeInodes(static_cast<unsigned>(inodes.size()));
  for (unsigned i = 0; i < list.size(); ++i) list.set(i, inodes[i]);
  out.setOwnerExited(ledger.owner_exited);
  out.setOwnerHung(ledger.owner_hung);
  Put(Key('l', ledger.generation()), &message);
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

void StateJournal::SaveWorker(uint64_t generation, capnp::MessageBuilder* record) {
  Put(Key('w', generation), record);
}

void StateJournal::ForgetWorker(uint64_t generation) {
  Erase(Key('w', generation));
  store_->Remove(FdName(FdKind::kWorker, generation));
}

void StateJournal::SaveMachine(capnp::MessageBuilder* record) { Put(kMachineKey, record); }

void StateJournal::PushState() {
  auto file = map_ ? DupFd(map_->file()) : absl::StatusOr<UniqueFd>(NotFound("no state"));
  if (file.ok()) store_->Push(kStateFd, {std::make_shared<UniqueFd>(std::move(*file))});
}

}  // namespace holdfast::supervisor
