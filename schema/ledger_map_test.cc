#include "schema/ledger_map.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "gtest/gtest.h"

namespace holdfast {
namespace {

constexpr int kReadWrite = PROT_READ | PROT_WRITE;

absl::StatusCode Refusal(int memory) { return LedgerMap::MapGiven(memory, PROT_READ).status().code(); }

TEST(LedgerMapTest, TheHeaderStatesTheFrozenLayoutAndTheMemoryCannotBeResized) {
  UniqueFd memory = LedgerMap::Make(42).value();
  LedgerMap map = LedgerMap::MapGiven(memory.get(), PROT_READ).value();
  EXPECT_EQ(map.header()->magic, HF_LEDGER_MAGIC);
  EXPECT_EQ(map.header()->version, HF_LEDGER_VERSION);
  EXPECT_EQ(map.header()->header_size, sizeof(hf_ledger_header));
  EXPECT_EQ(map.header()->total_size, uint64_t{HF_LEDGER_TOTAL_SIZE});
  EXPECT_EQ(map.generation(), 42u);
  EXPECT_EQ(map.slot_count(), HF_LEDGER_SLOTS);
  EXPECT_EQ(map.record_count(), HF_LEDGER_RECORDS);
  EXPECT_EQ(map.high_water(), 0u);
  const auto* base = reinterpret_cast<const char*>(map.header());
  EXPECT_EQ(reinterpret_cast<const char*>(map.slot(3)) - base,
            HF_LEDGER_SLOT_OFFSET + 3 * HF_LEDGER_SLOT_STRIDE);
  EXPECT_EQ(reinterpret_cast<const char*>(map.record(HF_LEDGER_RECORDS)) - base, HF_LEDGER_TOTAL_SIZE);
  EXPECT_NE(ftruncate(memory.get(), 0), 0);
  EXPECT_NE(ftruncate(memory.get(), HF_LEDGER_TOTAL_SIZE * 2), 0);
}

TEST(LedgerMapTest, WhoMadeItFindsEverythingWhateverItsHeaderSays) {
  UniqueFd memory = LedgerMap::Make(7).value();
  LedgerMap theirs = LedgerMap::MapGiven(memory.get(), kReadWrite).value();
  theirs.slot(2)->strikes = 5;
  theirs.record(9)->nodeid = 6;
  theirs.header()->magic = 0;
  theirs.header()->generation = 8;
  theirs.header()->slot_count = theirs.header()->record_count = UINT32_MAX;
  theirs.header()->slot_offset = theirs.header()->record_offset = UINT64_MAX;
  theirs.header()->record_high_water = UINT32_MAX;
  LedgerMap made = LedgerMap::MapMade(memory.get(), 7).value();
  for (const LedgerMap* map : {&made, &theirs}) {
    EXPECT_EQ(map->slot(2)->strikes, 5u);
    EXPECT_EQ(map->record(9)->nodeid, 6u);
    EXPECT_EQ(map->generation(), 7u);
    EXPECT_EQ(map->slot_count(), HF_LEDGER_SLOTS);
    EXPECT_EQ(map->high_water(), HF_LEDGER_RECORDS);
  }
}

TEST(LedgerMapTest, WhoMadeItRefusesMemoryThatCouldBeTruncatedOrHasAnotherSize) {
  UniqueFd memory(memfd_create("unsealed", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  ASSERT_EQ(ftruncate(memory.get(), HF_LEDGER_TOTAL_SIZE), 0);
  EXPECT_EQ(LedgerMap::MapMade(memory.get(), 1).status().code(), absl::StatusCode::kDataLoss);
  ASSERT_EQ(ftruncate(memory.get(), HF_LEDGER_TOTAL_SIZE - 1), 0);
  ASSERT_EQ(fcntl(memory.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL), 0);
  EXPECT_EQ(LedgerMap::MapMade(memory.get(), 1).status().code(), absl::StatusCode::kDataLoss);
  EXPECT_TRUE(LedgerMap::MapMade(LedgerMap::Make(1)->get(), 1).ok());
}

TEST(LedgerMapTest, MemoryThatIsNoLedgerIsRefused) {
  UniqueFd memory = LedgerMap::Make(7).value();
  LedgerMap map = LedgerMap::MapGiven(memory.get(), kReadWrite).value();
  map.header()->record_count = HF_LEDGER_RECORDS + 1;
  EXPECT_EQ(Refusal(memory.get()), absl::StatusCode::kDataLoss);
  map.header()->record_count = HF_LEDGER_RECORDS;
  map.header()->slot_offset = HF_LEDGER_TOTAL_SIZE - 8;
  EXPECT_EQ(Refusal(memory.get()), absl::StatusCode::kDataLoss);
  map.header()->slot_offset = ~uint64_t{7};
  EXPECT_EQ(Refusal(memory.get()), absl::StatusCode::kDataLoss);
  map.header()->slot_offset = HF_LEDGER_SLOT_OFFSET;
  EXPECT_EQ(Refusal(memory.get()), absl::StatusCode::kOk);
  map.header()->version = 2;
  EXPECT_EQ(Refusal(memory.get()), absl::StatusCode::kDataLoss);
  map.header()->version = HF_LEDGER_VERSION;
  map.header()->magic++;
  EXPECT_EQ(Refusal(memory.get()), absl::StatusCode::kDataLoss);
  UniqueFd tiny(memfd_create("tiny", MFD_CLOEXEC));
  ASSERT_EQ(ftruncate(tiny.get(), 10), 0);
  EXPECT_EQ(Refusal(tiny.get()), absl::StatusCode::kDataLoss);
}

}  // namespace
}  // namespace holdfast
