#include "worker/fuse/ledger_view.h"

#include <fcntl.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <set>
#include <utility>

#include "gtest/gtest.h"
#include "worker/fuse/fuse_bench.h"

namespace holdfast::fuse {
namespace {

TEST(LedgerViewTest, AFreshLedgerIsEmpty) {
  Bench bench;
  auto view = LedgerView::Map(DupLedger(bench.MakeLedger(7)), 7);
  ASSERT_TRUE(view.ok()) << view.status();
  EXPECT_TRUE((*view)->Empty());
  EXPECT_EQ((*view)->slot_count(), HF_LEDGER_SLOTS);
  EXPECT_EQ((*view)->record_count(), HF_LEDGER_RECORDS);
  EXPECT_NE(fcntl((*view)->pipe_read(0), F_GETFL) & O_NONBLOCK, 0);
}

TEST(LedgerViewTest, AnotherGenerationsLedgerAndOneThatLacksPipesAreRefused) {
  Bench bench;
  Bench::Ledger& ledger = bench.MakeLedger(7);
  EXPECT_EQ(LedgerView::Map(DupLedger(ledger), 8).status().code(), absl::StatusCode::kDataLoss);
  LedgerHandle handle = DupLedger(ledger);
  handle.pipes.pop_back();
  EXPECT_EQ(LedgerView::Map(std::move(handle), 7).status().code(), absl::StatusCode::kInvalidArgument);
  ledger.header->magic++;
  EXPECT_EQ(LedgerView::Map(DupLedger(ledger), 7).status().code(), absl::StatusCode::kDataLoss);
}

TEST(LedgerViewTest, TheCrcOfARecordCoversWhatIdentifiesTheRead) {
  hf_record record{};
  uint32_t crc = RecordCrc(record);
  for (uint64_t* field : {&record.mount_id, &record.unique, &record.nodeid, &record.offset}) {
    *field ^= 1;
    EXPECT_NE(RecordCrc(record), crc);
    *field ^= 1;
  }
  record.size ^= 1;
  EXPECT_NE(RecordCrc(record), crc);
  record.size ^= 1;
  record.marks = HF_MARK_INTERRUPTED;
  record.deadline_ns = 5;
  EXPECT_EQ(RecordCrc(record), crc);
}

class RecordAllocatorTest : public testing::Test {
 protected:
  Bench bench_;
  Bench::Ledger& ledger_ = bench_.MakeLedger(1);
  std::shared_ptr<LedgerView> view_ = *LedgerView::Map(DupLedger(ledger_), 1);
  RecordAllocator records_{view_};
};

TEST_F(RecordAllocatorTest, TheLowestFreeRecordIsTakenFirst) {
  EXPECT_EQ(records_.Take(), 0u);
  EXPECT_EQ(records_.Take(), 1u);
  EXPECT_EQ(records_.Take(), 2u);
  EXPECT_EQ(ledger_.header->record_high_water, 3u);
  StoreState(view_->record(2), {});
  records_.Put(2);
  StoreState(view_->record(0), {});
  records_.Put(0);
  EXPECT_EQ(records_.Take(), 0u);
  EXPECT_EQ(records_.Take(), 2u);
  EXPECT_EQ(records_.Take(), 3u);
  EXPECT_EQ(records_.used(), 4u);
}

TEST_F(RecordAllocatorTest, AFullTableGivesNothing) {
  for (uint32_t i = 0; i < HF_LEDGER_RECORDS; i++) ASSERT_TRUE(records_.Take());
  EXPECT_FALSE(records_.Take());
}

TEST_F(RecordAllocatorTest, RebuildKeepsWhatWaitsAndFreesWhatWasBeingFilled) {
  for (int i = 0; i < 3; i++) ASSERT_TRUE(records_.Take());
  StoreState(view_->record(1), {HF_RECORD_PENDING, 9});
  StoreState(view_->record(2), {});
  records_.Rebuild();
  EXPECT_EQ(records_.used(), 1u);
  EXPECT_EQ(records_.Take(), 0u);
  EXPECT_EQ(records_.Take(), 2u);
  EXPECT_EQ(LoadState(view_->record(1)).owner, 9u);
}

TEST_F(RecordAllocatorTest, AStateChangesOnlyFromWhatWasExpected) {
  StoreState(view_->record(0), {HF_RECORD_PENDING, 4});
  RecordState expected{HF_RECORD_PENDING, 3};
  EXPECT_FALSE(ChangeState(view_->record(0), &expected, {HF_RECORD_FREE, 0}));
  EXPECT_EQ(expected.owner, 4u);
  EXPECT_TRUE(ChangeState(view_->record(0), &expected, {HF_RECORD_FREE, 0}));
  EXPECT_EQ(ledger_.record(0)->state, uint32_t{HF_RECORD_FREE});
}

TEST(FuseServerCreateTest, AThreadNeedsASlot) {
  Bench bench;
  ServerOptions options;
  options.generation = 1;
  options.threads = HF_LEDGER_SLOTS + 1;
  EXPECT_EQ(FuseServer::Create(options, DupLedger(bench.MakeLedger(1))).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(FuseServerTest, ADeviceThatGivesNothingHasNotEnded) {
  Bench bench;
  Bench::Ledger& ledger = bench.MakeLedger(1);
  ServerOptions options;
  options.generation = 1;
  options.threads = 1;
  auto server = FuseServer::Create(options, DupLedger(ledger));
  ASSERT_TRUE(server.ok()) << server.status();
  int ends[2];
  ASSERT_EQ(pipe2(ends, O_NONBLOCK | O_CLOEXEC), 0);
  close(ends[1]);  // readable for ever, and every splice moves 0 bytes
  MountSpec spec;
  spec.mount_id = 1;
  spec.device.Reset(ends[0]);
  spec.init_request = bench.Mount().init_request;
  spec.open_layer = []() -> absl::StatusOr<std::shared_ptr<layer::Layer>> { return Internal("never"); };
  ASSERT_TRUE((*server)->AddMount(std::move(spec)).ok());
  std::atomic<bool> ended{false};
  (*server)->OnMountEnded([&](uint64_t) { ended = true; });
  (*server)->Start();
  // At its third beat the only thread has been through two turns.
  std::set<uint64_t> beats;
  EXPECT_TRUE(Eventually([&] {
    beats.insert(Shared(ledger.header->loop_heartbeat_ns).load());
    return ended || beats.size() >= 4;
  }));
  EXPECT_FALSE(ended);
}

TEST(FuseServerCreateTest, AMountWhoseSavedInitIsNoneIsRefused) {
  Bench bench;
  ServerOptions options;
  options.generation = 1;
  auto server = FuseServer::Create(options, DupLedger(bench.MakeLedger(1)));
  ASSERT_TRUE(server.ok()) << server.status();
  for (const std::string& init : {std::string(), std::string(104, 'x')}) {
    MountSpec spec;
    spec.mount_id = 1;
    spec.device.Reset(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
    spec.init_request = init;
    spec.open_layer = []() -> absl::StatusOr<std::shared_ptr<layer::Layer>> { return Internal("never"); };
    EXPECT_EQ((*server)->AddMount(std::move(spec)).code(), absl::StatusCode::kInvalidArgument);
  }
}

}  // namespace
}  // namespace holdfast::fuse
