#include "schema/ledger.h"

#include "gtest/gtest.h"

namespace {

// A released ledger is read by older and newer builds: these numbers never change.
TEST(LedgerAbiTest, TheLayoutIsFrozen) {
  EXPECT_EQ(offsetof(hf_ledger_header, generation), 24u);
  EXPECT_EQ(offsetof(hf_ledger_header, slot_offset), 40u);
  EXPECT_EQ(offsetof(hf_ledger_header, record_offset), 56u);
  EXPECT_EQ(offsetof(hf_ledger_header, requests_received), 128u);
  EXPECT_EQ(offsetof(hf_ledger_header, exit_cause), 152u);
  EXPECT_EQ(offsetof(hf_ledger_header, record_high_water), 164u);
  EXPECT_EQ(offsetof(hf_slot, state), 12u);
  EXPECT_EQ(offsetof(hf_slot, received_ns), 32u);
  EXPECT_EQ(offsetof(hf_slot, request), 64u);
  EXPECT_EQ(offsetof(hf_record, unique), 16u);
  EXPECT_EQ(offsetof(hf_record, crc), 44u);
  EXPECT_EQ(offsetof(hf_record, deadline_ns), 48u);
  EXPECT_EQ(offsetof(hf_record, strikes), 60u);
}

TEST(LedgerAbiTest, TheRegionsFollowEachOtherInWholePages) {
  EXPECT_GE(size_t{HF_LEDGER_SLOT_STRIDE}, sizeof(hf_slot));
  EXPECT_EQ(size_t{HF_LEDGER_SLOT_STRIDE} % HF_LEDGER_PAGE, 0u);
  EXPECT_EQ(size_t{HF_LEDGER_RECORD_OFFSET},
            size_t{HF_LEDGER_SLOT_OFFSET} + HF_LEDGER_SLOTS * size_t{HF_LEDGER_SLOT_STRIDE});
  EXPECT_EQ(size_t{HF_LEDGER_TOTAL_SIZE},
            size_t{HF_LEDGER_RECORD_OFFSET} + HF_LEDGER_RECORDS * sizeof(hf_record));
}

}  // namespace
