#include "supervisor/vault.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "gtest/gtest.h"

namespace holdfast::supervisor {
namespace {

LedgerMap WorkersView(const Ledger& ledger) {
  return LedgerMap::MapGiven(ledger.memory()->get(), PROT_READ | PROT_WRITE).value();
}

TEST(LedgerStoreTest, APipeHoldsTheLargestRequest) {
  LedgerStore store;
  Ledger* ledger = store.Create(42).value();
  EXPECT_EQ(ledger->pipes().size(), size_t{HF_LEDGER_SLOTS});
  EXPECT_GE(fcntl(ledger->pipes()[0].read_end->get(), F_GETPIPE_SZ),
            static_cast<int>(HF_LEDGER_REQUEST_BYTES));
}

TEST(LedgerStoreTest, WhatIsExecutedAndWhatIsOverdueIsReadAsNumbersWhateverTheWorkerWrote) {
  LedgerStore store;
  Ledger* ledger = store.Create(5).value();
  LedgerMap view = WorkersView(*ledger);
  EXPECT_TRUE(ledger->ExecutingSlots().empty());
  view.slot(3)->state = HF_SLOT_EXECUTING;
  view.slot(3)->received_ns = 77;
  view.slot(3)->mount_id = 12;
  view.slot(3)->request[4] = 15;
  view.slot(4)->state = HF_SLOT_RECEIVING;
  auto slots = ledger->ExecutingSlots();
  ASSERT_EQ(slots.size(), 1u);
  EXPECT_EQ(slots[0].index, 3u);
  EXPECT_EQ(slots[0].opcode, 15u);
  EXPECT_EQ(slots[0].received_ns, 77u);
  EXPECT_EQ(slots[0].mount, 12u);
  auto record = [&](uint32_t index, uint32_t owner, uint64_t deadline) {
    view.record(index)->state = HF_RECORD_PENDING;
    view.record(index)->owner_generation = owner;
    view.record(index)->mount_id = index;
    view.record(index)->deadline_ns = deadline;
  };
  record(1, 5, 900);
  record(2, 5, 800);
  record(3, 5, 2'000);
  record(4, 4, 100);  // a successor's to answer, or nobody's
  auto overdue = [&](uint64_t generation, uint64_t now) {
    HangSample sample{.now_ns = now};
    ledger->FindOverdue(generation, &sample);
    return std::pair(sample.overdue_deadline_ns, sample.overdue_mount);
  };
  using Found = std::pair<uint64_t, uint64_t>;
  EXPECT_EQ(overdue(5, 1'000), Found()) << "never used, says the worker";
  view.header()->record_high_water = UINT32_MAX;
  view.header()->record_count = UINT32_MAX;
  view.header()->record_offset = UINT64_MAX;
  EXPECT_EQ(overdue(5, 1'000), Found(800, 2));
  EXPECT_EQ(overdue(5, 700), Found());
  EXPECT_EQ(overdue((uint64_t{1} << 32) + 4, 1'000), Found(100, 4));
  HangSample worse{.now_ns = 1'000, .overdue_deadline_ns = 700, .overdue_mount = 9};
  ledger->FindOverdue(5, &worse);
  EXPECT_EQ(worse.overdue_mount, 9u) << "of another ledger";
}

TEST(LedgerStoreTest, CountsSlotsPipesAndRecordsThatWaitForAnAnswer) {
  LedgerStore store;
  Ledger* ledger = store.Create(1).value();
  LedgerMap view = WorkersView(*ledger);
  EXPECT_EQ(ledger->CountUnanswered(), 0u);
  view.slot(0)->state = HF_SLOT_EXECUTING;
  view.slot(1)->state = HF_SLOT_RECEIVING;  // nothing in it yet
  EXPECT_EQ(ledger->CountUnanswered(), 1u);
  ASSERT_EQ(write(ledger->pipes()[1].write_end->get(), "x", 1), 1);
  EXPECT_EQ(ledger->CountUnanswered(), 2u);
  view.record(0)->state = HF_RECORD_FILLING;
  view.record(1)->state = HF_RECORD_PENDING;
  view.record(9)->state = HF_RECORD_PENDING;
  view.header()->record_high_water = 2;
  EXPECT_EQ(ledger->CountUnanswered(), 3u);
  EXPECT_EQ(store.CountUnanswered(1), 0u) << "others only";
  EXPECT_EQ(store.CountUnanswered(2), 3u);
}

TEST(LedgerStoreTest, AWorkerThatWritesNonsenseCannotMakeTheCountLeaveTheLedger) {
  LedgerStore store;
  Ledger* ledger = store.Create(1).value();
  LedgerMap view = WorkersView(*ledger);
  view.record(HF_LEDGER_RECORDS - 1)->state = HF_RECORD_PENDING;
  view.header()->record_high_water = 0xffffffff;
  view.header()->slot_count = 0xffffffff;
  view.header()->record_offset = ~uint64_t{0};
  EXPECT_EQ(ledger->CountUnanswered(), 1u);
}

TEST(LedgerStoreTest, ALedgerIsKeptUntilItIsDrainedAndItsOwnersExitIsProven) {
  LedgerStore store;
  WorkersView(*store.Create(1).value()).slot(3)->state = HF_SLOT_EXECUTING;
  store.Drained(1);
  EXPECT_NE(store.Find(1), nullptr) << "its owner may still write";
  store.OwnerExited(1);
  EXPECT_NE(store.Find(1), nullptr) << "a request is in it after all";
  EXPECT_TRUE(store.Find(1)->owner_exited);
  store.Drained(1);
  EXPECT_EQ(store.Find(1), nullptr);
  ASSERT_TRUE(store.Create(2).ok());
  store.OwnerExited(2);
  EXPECT_EQ(store.Find(2), nullptr) << "nothing was in it";
}

TEST(LedgerStoreTest, PagesLeaveTheCallersOwnLedgerOut) {
  LedgerStore store;
  for (uint64_t g = 1; g <= 10; ++g) ASSERT_TRUE(store.Create(g).ok());
  bool more = false;
  auto page = store.Page(0, 3, 7, &more);
  ASSERT_EQ(page.size(), 7u);
  EXPECT_TRUE(more);
  EXPECT_EQ(page.back()->generation(), 8u);
  page = store.Page(8, 3, 7, &more);
  EXPECT_EQ(page.size(), 2u);
  EXPECT_FALSE(more);
}

}  // namespace
}  // namespace holdfast::supervisor
