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

  EXPECT_EQ(state->machine.phase, "committing");
  EXPECT_EQ(state->machine.owner, 3u);
  EXPECT_EQ(state->machine.successor, 4u);
  EXPECT_EQ(state->machine.holders, (std::set<uint64_t>{3, 4}));
  EXPECT_EQ(state->machine.running, "abc");
  EXPECT_EQ(state->machine.previous, "def");
  EXPECT_EQ(state->machine.last_good, "ghi");
  EXPECT_EQ(state->machine.trial_generation, 4u);
  EXPECT_TRUE(state->machine.probation);
  EXPECT_EQ(state->machine.vault_id, std::string("\0\1\xff", 3) + std::string(13, '\2'));
  EXPECT_EQ(state->machine.restarts, 11u);
  EXPECT_EQ(state->machine.crashes, 12u);
  EXPECT_EQ(state->machine.hangs, 13u);
  EXPECT_EQ(state->machine.swaps, 14u);
  EXPECT_EQ(state->machine.carried_over, 15u);
  EXPECT_EQ(state->machine.running_build, "worker 1");

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
  const SavedWorker& worker = state->workers.at(3);
  EXPECT_EQ(worker.generation, 3u);
  EXPECT_EQ(worker.pid, 42);
  EXPECT_EQ(worker.start_ticks, 7u);
  EXPECT_EQ(worker.token, "secret");
  EXPECT_EQ(worker.executable, "abc");
  EXPECT_EQ(worker.build, "worker 1");
  EXPECT_EQ(worker.capabilities, 0x8000'0000'0000'0021u);
  EXPECT_EQ(worker.started_wall_nanos, -5);
  EXPECT_TRUE(worker.killed);
  EXPECT_TRUE(worker.retired);
  EXPECT_FALSE(state->workers.at(4).killed);
  EXPECT_FALSE(state->workers.at(4).retired);

  ASSERT_EQ(state->ledgers.size(), 1u);
  const SavedLedger& ledger = state->ledgers.at(3);
  EXPECT_EQ(ledger.generation, 3u);
  EXPECT_EQ(ledger.pipe_inodes, (std::vector<uint64_t>{1001, 1002, 0xffff'ffff'ffff'fff0}));
  EXPECT_TRUE(ledger.owner_exited);
  EXPECT_TRUE(ledger.owner_hung);
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
