// Rows of the saved state as bytes that were once released: every later supervisor must read them, and find
// in them what was meant (schema/README.md). tests/golden/vault_state holds one file a release, a line a row:
// its key, its value in hex. Files are never changed; when a record has grown a further file is added, with a
// test of its own. (StateJournalTest looks at what today's supervisor writes.)
#include <capnp/dynamic.h>
#include <capnp/serialize.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_split.h"
#include "common/io.h"
#include "gtest/gtest.h"
#include "schema/rpc.h"
#include "schema/vault_state.capnp.h"
#include "supervisor/state_journal.h"

namespace holdfast::supervisor {
namespace {

using Rows = std::multimap<std::string, std::string>;

std::string Folder() {
  const char* source = std::getenv("HOLDFAST_SOURCE");
  EXPECT_NE(source, nullptr);
  return std::string(source == nullptr ? "." : source) + "/tests/golden/vault_state";
}

Rows Golden(const std::string& file) {
  Rows rows;
  const std::string text = ReadFile(Folder() + "/" + file).value();
  for (const auto& line : absl::StrSplit(text, '\n', absl::SkipEmpty())) {
    std::pair<std::string, std::string> row = absl::StrSplit(line, ' ');
    rows.emplace(row.first, absl::HexStringToBytes(row.second));
  }
  return rows;
}

std::vector<uint64_t> Numbers(capnp::List<uint64_t>::Reader list) {
  std::vector<uint64_t> numbers;
  for (uint64_t number : list) numbers.push_back(number);
  return numbers;
}

absl::StatusOr<SavedState> Decode(const Rows& rows) {
  DurableMap map = DurableMap::Create("golden").value();
  for (const auto& [key, value] : rows) EXPECT_TRUE(map.Put(key, value).ok()) << key;
  return DecodeState(map);
}

TEST(StateGoldenTest, RowsOfTheFirstReleaseStillMeanWhatTheyMeant) {
  const Rows rows = Golden("1.txt");
  ASSERT_EQ(rows.size(), 8u);
  absl::StatusOr<SavedState> state = Decode(rows);
  ASSERT_TRUE(state.ok()) << state.status();

  EXPECT_STREQ(state->machine->getPhase().cStr(), "committing");
  EXPECT_EQ(state->machine->getOwner(), 3u);
  EXPECT_EQ(state->machine->getSuccessor(), 4u);
  EXPECT_EQ(Numbers(state->machine->getHolders()), (std::vector<uint64_t>{3, 4}));
  EXPECT_STREQ(state->machine->getRunning().cStr(), "abc");
  EXPECT_STREQ(state->machine->getPrevious().cStr(), "def");
  EXPECT_STREQ(state->machine->getLastGood().cStr(), "ghi");
  EXPECT_EQ(state->machine->getTrialGeneration(), 4u);
  EXPECT_TRUE(state->machine->getProbation());
  EXPECT_EQ(String(state->machine->getVaultId()), std::string("\0\1\xff", 3) + std::string(13, '\2'));
  EXPECT_EQ(state->machine->getRestarts(), 11u);
  EXPECT_EQ(state->machine->getCrashes(), 12u);
  EXPECT_EQ(state->machine->getHangs(), 13u);
  EXPECT_EQ(state->machine->getSwaps(), 14u);
  EXPECT_EQ(state->machine->getCarriedOver(), 15u);
  EXPECT_STREQ(state->machine->getRunningBuild().cStr(), "worker 1");

  ASSERT_EQ(state->mounts.size(), 4u);
  const Mount& live = state->mounts.at(9);
  EXPECT_EQ(live.id, 9u);
  EXPECT_EQ(live.path, "/state/mounts/9");
  EXPECT_EQ(live.blob, std::string("bl\0b", 4));
  EXPECT_EQ(live.init_request, std::string("\0request", 8));
  EXPECT_EQ(live.init_reply, std::string("reply\0", 6));
  EXPECT_EQ(live.caller, 3u);
  EXPECT_EQ(live.state, MountState::kLive);
  EXPECT_FALSE(live.unmounting);
  EXPECT_EQ(state->mounts.at(10).state, MountState::kMounting);
  EXPECT_TRUE(state->mounts.at(11).unmounting);
  EXPECT_EQ(state->mounts.at(12).state, MountState::kDetached);

  ASSERT_EQ(state->workers.size(), 2u);
  const schema::SavedWorker::Reader worker = *state->workers.at(3);
  EXPECT_EQ(worker.getGeneration(), 3u);
  EXPECT_EQ(worker.getPid(), 42u);
  EXPECT_EQ(worker.getStartTicks(), 7u);
  EXPECT_STREQ(worker.getToken().cStr(), "secret");
  EXPECT_STREQ(worker.getExecutable().cStr(), "abc");
  EXPECT_STREQ(worker.getBuild().cStr(), "worker 1");
  EXPECT_EQ(worker.getCapabilities(), 0x8000'0000'0000'0021u);
  EXPECT_EQ(worker.getStartedWallNanos(), -5);
  EXPECT_TRUE(worker.getKilled());
  EXPECT_TRUE(worker.getRetired());
  EXPECT_FALSE(state->workers.at(4)->getKilled());
  EXPECT_FALSE(state->workers.at(4)->getRetired());

  ASSERT_EQ(state->ledgers.size(), 1u);
  const schema::SavedLedger::Reader ledger = *state->ledgers.at(3);
  EXPECT_EQ(ledger.getGeneration(), 3u);
  EXPECT_EQ(Numbers(ledger.getPipeInodes()), (std::vector<uint64_t>{1001, 1002, 0xffff'ffff'ffff'fff0}));
  EXPECT_TRUE(ledger.getOwnerExited());
  EXPECT_TRUE(ledger.getOwnerHung());
}

TEST(StateGoldenTest, RowsOfTheSecondReleaseStillMeanWhatTheyMeant) {
  absl::StatusOr<SavedState> state = Decode(Golden("2.txt"));
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_EQ(state->machine->getOwner(), 4u);
  EXPECT_STREQ(state->machine->getSwapKind().cStr(), "upgrade");
  EXPECT_EQ(state->machine->getSwapGeneration(), 4u);
}

// Everything that could be refused when it is read: texts, data, lists.
size_t ReadPointers(const SavedState& state) {
  auto machine = *state.machine;
  size_t bytes = machine.getPhase().size() + machine.getRunning().size() + machine.getPrevious().size() +
                 machine.getLastGood().size() + machine.getSwapKind().size() +
                 machine.getRunningBuild().size() + machine.getVaultId().size() +
                 Numbers(machine.getHolders()).size();
  for (const auto& [generation, worker] : state.workers)
    bytes += worker->getToken().size() + worker->getExecutable().size() + worker->getBuild().size();
  for (const auto& [generation, ledger] : state.ledgers) bytes += Numbers(ledger->getPipeInodes()).size();
  return bytes;
}

TEST(StateGoldenTest, AFlippedBitIsDataLossOrAnotherValueThatCanBeReadButNeverAnException) {
  const Rows rows = Golden("1.txt");
  DurableMap map = DurableMap::Create("flipped").value();
  for (const auto& [key, value] : rows) ASSERT_TRUE(map.Put(key, value).ok()) << key;
  size_t refused = 0, read = 0;
  for (const auto& [key, value] : rows) {
    for (size_t bit = 0; bit < value.size() * 8; ++bit) {
      std::string flipped = value;
      flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << bit % 8));
      ASSERT_TRUE(map.Put(key, flipped).ok());
      absl::StatusOr<SavedState> state = DecodeState(map);
      if (!state.ok()) {
        ASSERT_EQ(state.status().code(), absl::StatusCode::kDataLoss) << key << " bit " << bit;
        ASSERT_NE(state.status().message().find(key), std::string::npos) << state.status();
        ++refused;
        continue;
      }
      ASSERT_NO_THROW(read += ReadPointers(*state)) << key << " bit " << bit;
    }
    ASSERT_TRUE(map.Put(key, value).ok());
  }
  EXPECT_GT(refused, 100u);
  EXPECT_GT(read, 100u);
}

// Names of the fields that are not at their default in one of these rows.
std::set<std::string> FieldsSet(capnp::StructSchema schema, const Rows& rows, const std::string& prefix) {
  std::set<std::string> fields;
  for (const auto& [key, value] : rows) {
    if (key.rfind(prefix, 0) != 0) continue;
    auto words = kj::heapArray<capnp::word>(value.size() / sizeof(capnp::word));
    memcpy(words.begin(), value.data(), words.asBytes().size());
    capnp::FlatArrayMessageReader message(words);
    auto record = message.getRoot<capnp::DynamicStruct>(schema);
    for (auto field : schema.getFields()) {
      if (record.has(field, capnp::HasMode::NON_DEFAULT)) fields.insert(field.getProto().getName().cStr());
    }
  }
  return fields;
}

TEST(StateGoldenTest, EveryFieldOfEveryRecordHasReleasedBytes) {
  Rows rows;
  for (const auto& entry : std::filesystem::directory_iterator(Folder()))
    rows.merge(Golden(entry.path().filename().string()));
  const std::map<std::string, capnp::StructSchema> records = {
      {"m/", capnp::Schema::from<schema::SavedMount>()},
      {"w/", capnp::Schema::from<schema::SavedWorker>()},
      {"l/", capnp::Schema::from<schema::SavedLedger>()},
      {"machine", capnp::Schema::from<schema::SavedMachine>()}};
  for (const auto& [prefix, schema] : records) {
    const std::set<std::string> set = FieldsSet(schema, rows, prefix);
    for (auto field : schema.getFields()) {
      const std::string name = field.getProto().getName().cStr();
      EXPECT_EQ(set.count(name), 1u) << "no golden row has " << schema.getShortDisplayName().cStr() << "."
                                     << name << "; add a file to tests/golden/vault_state";
    }
  }
}

}  // namespace
}  // namespace holdfast::supervisor
