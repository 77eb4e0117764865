// Servers that die, park and succeed one another: every request is answered, with the right bytes, by whoever
// comes next.
#include <fcntl.h>
#include <linux/fuse.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstring>
#include <random>
#include <set>

#include "common/crc32c.h"
#include "gtest/gtest.h"
#include "worker/fuse/fuse_bench.h"
#include "worker/fuse/ledger_view.h"

namespace holdfast::fuse {
namespace {

constexpr uint64_t kMiB = 1 << 20;
enum Node : uint64_t { kMissing = 2, kStored, kFolder };

std::shared_ptr<FakeIndex> MakeIndex(uint64_t) {
  auto index = std::make_shared<FakeIndex>();
  index->Add(layer::kRootNode, "missing", S_IFREG | 0644, 16 * kMiB);
  index->Add(layer::kRootNode, "stored", S_IFREG | 0644, 16 * kMiB);
  index->Add(layer::kRootNode, "folder", S_IFDIR | 0755);
  return index;
}

uint64_t NanosSince(uint64_t boot_nanos) { return Clock::Real()->BootNanos() - boot_nanos; }

class FuseHandoverTest : public testing::Test {
 protected:
  ServerSetup NewSetup(uint64_t generation) {
    ServerSetup setup;
    setup.generation = generation;
    setup.index = MakeIndex;
    setup.prepare = [](uint64_t, FakeLayer& layer) { layer.Store(kStored, Stored::kFile); };
    return setup;
  }
  std::unique_ptr<ServerProcess> Start(const ServerSetup& setup, bool hold = false) {
    auto server = std::make_unique<ServerProcess>(bench_, setup);
    for (auto& [id, mount] : bench_.mounts) {
      if (hold) {
        EXPECT_EQ(server->Call("hold " + std::to_string(id) + " 1"), "ok");
      }
    }
    EXPECT_EQ(server->Call("start"), "ok");
    return server;
  }
  std::unique_ptr<ChildProcess> Reader(const std::function<int()>& body) {
    return std::make_unique<ChildProcess>([&] {
      bench_.CloseDevices();
      return body();
    });
  }
  std::unique_ptr<ChildProcess> MissReader(const std::string& root, uint64_t page) {
    return Reader([&] { return CheckFile(root + "/missing", kMissing, page * 4096, 4096, true); });
  }
  // Puts a request of the mount into slot 0 of a ledger, as a dead worker leaves it. `drained`: it was read
  // from the pipe.
  void LeaveInSlot(Bench::Ledger& ledger, const Bench::MountPoint& mount, bool drained) {
    hf_slot* slot = ledger.slot(0);
    ASSERT_TRUE(bench_.WaitReadable(mount, 5));
    memset(slot->request, 0, 4);
    slot->mount_id = mount.id;
    slot->owner_generation = static_cast<uint32_t>(ledger.map.generation());
    slot->received_ns = 1;
    slot->state = HF_SLOT_RECEIVING;
    ssize_t n = splice(mount.device.get(), nullptr, ledger.pipes[0].write_end.get(), nullptr, 32768,
                       SPLICE_F_NONBLOCK);
    ASSERT_GT(n, 0);
    if (!drained) return;
    ASSERT_EQ(read(ledger.pipes[0].read_end.get(), slot->request, HF_LEDGER_REQUEST_BYTES), n);
    slot->length = static_cast<uint32_t>(n);
    slot->crc = Crc32c(slot->request, slot->length);
    slot->state = HF_SLOT_EXECUTING;
  }

  Bench bench_;
};

TEST_F(FuseHandoverTest, RequestsThatADeadServerExecutedAreAnsweredByItsSuccessor) {
  std::string root = bench_.Mount().path;
  ServerSetup setup = NewSetup(1);
  setup.faults = "fuse.received=block@0";
  auto first = Start(setup);
  auto stat_reader = Reader([&] {
    struct stat st;
    return stat((root + "/folder").c_str(), &st) == 0 ? 0 : errno;
  });
  auto data_reader = Reader([&] { return CheckFile(root + "/stored", kStored, kMiB, kMiB, true); });
  ASSERT_EQ(first->Call("fired fuse.received 2"), "ok");
  first->Kill();
  auto second = Start(NewSetup(2));
  EXPECT_EQ(stat_reader->Wait(0), -1);
  EXPECT_EQ(second->Number("adopt 1 1"), 2u);
  EXPECT_EQ(stat_reader->Wait(10), 0);
  EXPECT_EQ(data_reader->Wait(10), 0);
  EXPECT_TRUE(Eventually([&] { return second->Number("drained 1") == 1; }));
  EXPECT_EQ(second->Stats()["adopted"], 2u);
}

TEST_F(FuseHandoverTest, ReadsThatWaitedInADeadServerAreAnsweredByItsSuccessor) {
  std::string root = bench_.Mount().path;
  auto first = Start(NewSetup(1), true);
  std::vector<std::unique_ptr<ChildProcess>> readers;
  for (uint64_t i = 0; i < 20; i++) readers.push_back(MissReader(root, i));
  ASSERT_TRUE(Eventually([&] { return first->Number("waiting 100") == 20; }));
  first->Kill();
  auto second = Start(NewSetup(2), true);
  EXPECT_EQ(second->Number("adopt 1 1"), 20u);
  EXPECT_EQ(second->Number("drained 1"), 0u);
  // The successor dies too, and the third finds them all in the first one's ledger.
  second->Kill();
  auto third = Start(NewSetup(3), true);
  EXPECT_EQ(third->Number("adopt 1 1") + third->Number("adopt 2 1"), 20u);
  EXPECT_EQ(third->Stats()["pending"], 20u);
  ASSERT_TRUE(Eventually([&] { return third->Number("waiting 100") == 20; }));
  ASSERT_EQ(third->Call("release 100"), "ok");
  for (auto& reader : readers) EXPECT_EQ(reader->Wait(10), 0);
  EXPECT_TRUE(Eventually([&] { return third->Number("drained 1") == 1 && third->Number("drained 2") == 1; }));
  EXPECT_EQ(third->Stats()["adopted"], 20u);
  EXPECT_EQ(third->Stats()["errors"], 0u);
}

TEST_F(FuseHandoverTest, KilledBetweenRecordAndSlotTheReadIsAnsweredOnce) {
  std::string root = bench_.Mount().path;
  ServerSetup setup = NewSetup(1);
  setup.faults = "fuse.record_filled=kill";
  setup.options.threads = 1;
  auto first = Start(setup);
  auto reader = MissReader(root, 3);
  ASSERT_EQ(first->process().Wait(10), 1000 + SIGKILL);
  EXPECT_EQ(bench_.ledgers[1]->record(0)->state, uint32_t{HF_RECORD_PENDING});
  auto second = Start(NewSetup(2), true);
  EXPECT_EQ(second->Number("adopt 1 1"), 1u);  // it is in the record and in the slot
  EXPECT_EQ(second->Stats()["pending"], 1u);
  ASSERT_TRUE(Eventually([&] { return second->Number("waiting 100") == 1; }));
  ASSERT_EQ(second->Call("release 100"), "ok");
  EXPECT_EQ(reader->Wait(10), 0);
  EXPECT_TRUE(Eventually([&] { return second->Number("drained 1") == 1; }));
}

TEST_F(FuseHandoverTest, KilledJustBeforeTheReplyLeavesNothingUnanswered) {
  std::string root = bench_.Mount().path;
  for (const char* point : {"fuse.before_reply", "fuse.before_splice_out"}) {
    uint64_t generation = bench_.ledgers.size() + 1;
    ServerSetup setup = NewSetup(generation);
    setup.faults = std::string(point) + "=kill@4";
    auto first = Start(setup);
    uint64_t offset = generation * kMiB;
    auto reader = Reader([&] { return CheckFile(root + "/stored", kStored, offset, kMiB, true); });
    auto missing = MissReader(root, generation);
    ASSERT_EQ(first->process().Wait(10), 1000 + SIGKILL) << point;
    auto second = Start(NewSetup(generation + 1));
    EXPECT_GE(second->Number("adopt " + std::to_string(generation) + " 1"), 1u);
    EXPECT_EQ(reader->Wait(10), 0) << point;
    EXPECT_EQ(missing->Wait(10), 0) << point;
  }
}

// A server dies with a READ that waits and one that is executed; its successor has claimed both.
class FuseTakeUpTest : public FuseHandoverTest {
 protected:
  void LeaveBoth() {
    MountFlags flags;
    flags.zero_open = true;  // once the first reader is there, all that a second one asks for is its READ
    left_ = bench_.Mount(flags).path;
    other_ = bench_.Mount().path;
    auto first = Start(NewSetup(1), true);
    waiting_ = MissReader(left_, 1);
    ASSERT_TRUE(Eventually([&] { return first->Number("waiting 100") == 1; }));
    ASSERT_EQ(first->Call("fault fuse.received=block@0"), "ok");
    executed_ = MissReader(left_, 2);
    ASSERT_EQ(first->Call("fired fuse.received 1"), "ok");
    first->Kill();
    ASSERT_EQ(ExecutingSlots().size(), 1u);
    fuse_in_header in;
    memcpy(&in, ExecutingSlots()[0]->request, sizeof in);
    ASSERT_EQ(in.opcode, uint32_t{FUSE_READ});
  }
  std::unique_ptr<ServerProcess> Successor(uint64_t generation, const std::string& faults) {
    ServerSetup setup = NewSetup(generation);
    setup.faults = faults;
    return std::make_unique<ServerProcess>(bench_, setup);
  }
  std::vector<hf_slot*> ExecutingSlots() {
    std::vector<hf_slot*> slots;
    for (uint32_t i = 0; i < HF_LEDGER_SLOTS; i++) {
      hf_slot* slot = bench_.ledgers[1]->slot(i);
      if (Shared(slot->state).load() == HF_SLOT_EXECUTING) slots.push_back(slot);
    }
    return slots;
  }

  std::string left_, other_;
  std::unique_ptr<ChildProcess> waiting_, executed_;
};

TEST_F(FuseTakeUpTest, TheStartWaitsForNothingThatADeadServerLeftAndOtherMountsAreRead) {
  ASSERT_NO_FATAL_FAILURE(LeaveBoth());
  auto second = Successor(2, "fuse.before_take_up=block");
  EXPECT_EQ(second->Number("adopt 1 0"), 2u);
  EXPECT_EQ(second->Number("adopt 1 1"), 0u) << "claimed already";
  EXPECT_EQ(second->Stats()["pending"], 1u);
  EXPECT_EQ(second->Number("fetches 100"), 0u);
  ASSERT_EQ(second->Call("start"), "ok");
  ASSERT_EQ(second->Call("fired fuse.before_take_up 1"), "ok");
  EXPECT_EQ(second->Number("adopt 1 1"), 0u) << "neither does a walk";
  EXPECT_EQ(MissReader(other_, 1)->Wait(10), 0);
  EXPECT_EQ(Reader([&] { return CheckFile(left_ + "/stored", kStored, 0, 4096, true); })->Wait(10), 0);
  EXPECT_EQ(waiting_->Wait(0), -1);
  EXPECT_EQ(executed_->Wait(0), -1);
  EXPECT_EQ(ExecutingSlots().size(), 1u) << "kept for a successor";
  EXPECT_EQ(second->Number("drained 1"), 0u);
  ASSERT_EQ(second->Call("unblock fuse.before_take_up"), "ok");
  EXPECT_EQ(waiting_->Wait(10), 0);
  EXPECT_EQ(executed_->Wait(10), 0);
  EXPECT_TRUE(Eventually([&] { return second->Number("drained 1") == 1; }));
  EXPECT_EQ(second->Stats()["adopted"], 2u);
}

TEST_F(FuseTakeUpTest, KilledBetweenClaimAndTakeUpItLeavesEverythingToItsSuccessor) {
  ASSERT_NO_FATAL_FAILURE(LeaveBoth());
  // Before the first of them, then before the second. (The slot's request has a record of its own then.)
  for (uint64_t generation : {2, 3}) {
    auto server = Successor(generation, "fuse.before_take_up=kill@" + std::to_string(generation - 1));
    for (uint64_t old = 1; old < generation; old++) server->Number("adopt " + std::to_string(old) + " 1");
    EXPECT_EQ(server->Call("hold 100 1"), "ok");
    server->Send("start");
    ASSERT_EQ(server->process().Wait(10), 1000 + SIGKILL) << generation;
    EXPECT_EQ(waiting_->Wait(0), -1);
    EXPECT_EQ(executed_->Wait(0), -1);
    EXPECT_EQ(ExecutingSlots().size(), generation == 2 ? 1u : 0u);
  }
  auto last = Successor(4, "");
  EXPECT_EQ(last->Number("adopt 1 1"), 1u);
  EXPECT_EQ(last->Number("adopt 2 1"), 0u);
  EXPECT_EQ(last->Number("adopt 3 1"), 1u);
  ASSERT_EQ(last->Call("start"), "ok");
  EXPECT_EQ(waiting_->Wait(10), 0);
  EXPECT_EQ(executed_->Wait(10), 0);
  EXPECT_TRUE(Eventually([&] { return last->Number("drained 1") == 1 && last->Number("drained 3") == 1; }));
  EXPECT_EQ(last->Stats()["errors"], 0u);
}

TEST_F(FuseTakeUpTest, WhoIsParkedWhileItTakesUpLeavesTheRestUntilItResumes) {
  ASSERT_NO_FATAL_FAILURE(LeaveBoth());
  for (const char* pass : {"1", "2"}) {
    bool none = *pass == '1';
    uint64_t generation = none ? 2 : 3;
    auto server = Successor(generation, std::string("fuse.before_take_up=block@") + pass);
    ASSERT_EQ(server->Call("hold 100 1"), "ok");
    EXPECT_EQ(server->Number("adopt 1 1"), 2u);
    ASSERT_EQ(server->Call("start"), "ok");
    ASSERT_EQ(server->Call("fired fuse.before_take_up 1"), "ok");
    ASSERT_EQ(server->Call("park"), "ok") << "it waits for one of them at most";
    ASSERT_EQ(server->Call("unblock fuse.before_take_up"), "ok");
    ASSERT_TRUE(Eventually([&] { return server->ThreadNamed("fuse-take-up") == -1; }));
    EXPECT_EQ(server->Number("fetches 100"), none ? 0u : 1u);
    EXPECT_EQ(ExecutingSlots().size(), none ? 1u : 0u);
    if (none) continue;  // it dies parked, and the next one finds both
    ASSERT_EQ(server->Call("hold 100 0"), "ok");
    ASSERT_EQ(server->Call("resume"), "ok");
    EXPECT_EQ(waiting_->Wait(10), 0);
    EXPECT_EQ(executed_->Wait(10), 0);
    EXPECT_TRUE(Eventually([&] { return server->Number("drained 1") == 1; }));
    EXPECT_EQ(server->Stats()["pending"], 0u);
  }
}

TEST_F(FuseTakeUpTest, AnInterruptFindsAReadThatIsClaimedAndNotTakenUp) {
  ASSERT_NO_FATAL_FAILURE(LeaveBoth());
  auto second = Successor(2, "fuse.before_take_up=block");
  ASSERT_EQ(second->Call("hold 100 1"), "ok");
  EXPECT_EQ(second->Number("adopt 1 1"), 2u);
  ASSERT_EQ(second->Call("start"), "ok");
  ASSERT_EQ(second->Call("fired fuse.before_take_up 1"), "ok");
  waiting_->Signal(SIGKILL);
  EXPECT_EQ(waiting_->Wait(5), 1000 + SIGKILL);
  executed_->Signal(SIGKILL);
  hf_slot* slot = ExecutingSlots().at(0);
  ASSERT_TRUE(Eventually([&] { return (Shared(slot->marks).load() & HF_MARK_INTERRUPTED) != 0; }));
  ASSERT_EQ(second->Call("unblock fuse.before_take_up"), "ok");
  EXPECT_EQ(executed_->Wait(5), 1000 + SIGKILL);
  EXPECT_TRUE(Eventually([&] { return second->Number("drained 1") == 1; }));
  EXPECT_EQ(second->Stats()["interrupted"], 2u);
}

TEST_F(FuseTakeUpTest, WhoIsEndedWhileItTakesUpLeavesTheRest) {
  ASSERT_NO_FATAL_FAILURE(LeaveBoth());
  auto second = Successor(2, "fuse.before_take_up=block@2");
  ASSERT_EQ(second->Call("hold 100 1"), "ok");
  EXPECT_EQ(second->Number("adopt 1 1"), 2u);
  ASSERT_EQ(second->Call("start"), "ok");
  ASSERT_EQ(second->Call("fired fuse.before_take_up 1"), "ok");
  second->Send("destroy");  // waits for the thread
  ASSERT_TRUE(Eventually([&] { return second->ThreadNamed("fuse-0") == -1; }))
      << "it is parked, its pool ended";
  second->Kill();
  auto third = Successor(3, "");
  EXPECT_EQ(third->Number("adopt 1 1") + third->Number("adopt 2 1"), 2u);
  ASSERT_EQ(third->Call("start"), "ok");
  for (auto* reader : {&waiting_, &executed_}) EXPECT_EQ((*reader)->Wait(10), 0);
}

// Of three READs the first is slow, until the others' time is up.
TEST_F(FuseTakeUpTest, ASlowTakeUpIsSeenAndMakesNoReadLateThatWaitsBehindIt) {
  std::string root = bench_.Mount().path;
  ServerSetup setup = NewSetup(1);
  setup.prepare = nullptr;
  setup.options.miss_timeout_nanos = 3'000'000'000;
  auto first = Start(setup, true);
  auto stored = Reader([&] { return CheckFile(root + "/stored", kStored, 0, 4096, true); });
  ASSERT_TRUE(Eventually([&] { return first->Number("waiting 100") == 1; }));
  auto second_read = MissReader(root, 1), third_read = MissReader(root, 2);
  ASSERT_TRUE(Eventually([&] { return first->Number("waiting 100") == 3; }));
  first->Kill();
  auto late = [&](uint32_t record) {
    return NanosSince(0) > Shared(bench_.ledgers[1]->record(record)->deadline_ns).load();
  };
  setup = NewSetup(2);
  setup.options.miss_timeout_nanos = 3'000'000'000;
  setup.faults = "fuse.before_reply=block;fuse.before_take_up=block@3";
  auto second = Start(setup);
  EXPECT_EQ(second->Call("hold 100 1"), "ok");
  EXPECT_EQ(second->Number("adopt 1 1"), 3u);
  ASSERT_EQ(second->Call("fired fuse.before_reply 1"), "ok");
  EXPECT_EQ(second->Call("atwork"), "ok fuse-take-up") << "the hang watch sees it";
  ASSERT_TRUE(Eventually([&] { return late(1) && late(2); })) << "here, too";
  ASSERT_EQ(second->Call("unblock fuse.before_reply"), "ok");
  ASSERT_EQ(second->Call("fired fuse.before_take_up 1"), "ok");
  EXPECT_EQ(stored->Wait(10), 0);
  EXPECT_EQ(second->Call("atwork"), "ok") << "it goes on";
  EXPECT_FALSE(late(1)) << "taken up";
  EXPECT_FALSE(late(2)) << "waiting behind it";
  ASSERT_TRUE(Eventually([&] { return late(2); }));
  ASSERT_EQ(second->Call("unblock fuse.before_take_up"), "ok");
  ASSERT_TRUE(Eventually([&] { return second->Number("waiting 100") == 2; }));
  ASSERT_EQ(second->Call("release 100"), "ok");
  EXPECT_EQ(second_read->Wait(10), 0);
  EXPECT_EQ(third_read->Wait(10), 0) << "it was not late when it was fetched";
  EXPECT_EQ(second->Stats()["errors"], 0u);
}

TEST_F(FuseTakeUpTest, WhatCrashedAServerIsExecutedBeforeThePoolStarts) {
  ASSERT_NO_FATAL_FAILURE(LeaveBoth());
  ExecutingSlots().at(0)->strikes = 1;
  auto second = Successor(2, "fuse.received=block");
  EXPECT_EQ(second->Number("adopt 1 1"), 2u);
  ASSERT_EQ(second->Call("begin"), "ok");
  ASSERT_EQ(second->Call("fired fuse.received 1"), "ok");
  auto other = MissReader(other_, 1);
  ASSERT_TRUE(bench_.WaitReadable(bench_.mounts[101], 5)) << "nobody reads";
  EXPECT_EQ(second->Number("fetches 100"), 0u);
  ASSERT_EQ(second->Call("unblock fuse.received"), "ok");
  for (auto* reader : {&waiting_, &executed_, &other}) EXPECT_EQ((*reader)->Wait(10), 0);
  EXPECT_TRUE(Eventually([&] { return second->Number("drained 1") == 1; }));
}

TEST_F(FuseHandoverTest, ARequestLeftInThePipeIsRecovered) {
  Bench::MountPoint& mount = bench_.Mount();
  Bench::Ledger& dead = bench_.MakeLedger(1);
  auto reader = Reader([&] { return CheckFile(mount.path + "/stored", kStored, 0, 4096, true); });
  LeaveInSlot(dead, mount, false);
  ASSERT_FALSE(HasFatalFailure());
  auto second = Start(NewSetup(2));
  EXPECT_EQ(second->Number("adopt 1 0"), 1u);  // taken at once, though its owner may live
  EXPECT_EQ(reader->Wait(10), 0);
  EXPECT_EQ(second->Number("drained 1"), 0u);
  EXPECT_EQ(second->Number("adopt 1 1"), 0u);
  EXPECT_EQ(second->Number("drained 1"), 1u);
}

TEST_F(FuseHandoverTest, ARequestReadFromThePipeButNotYetMarkedIsRecoveredOnceItsOwnerIsDead) {
  Bench::MountPoint& mount = bench_.Mount();
  Bench::Ledger& dead = bench_.MakeLedger(1);
  auto reader = Reader([&] { return CheckFile(mount.path + "/stored", kStored, 0, 4096, true); });
  LeaveInSlot(dead, mount, true);
  ASSERT_FALSE(HasFatalFailure());
  dead.slot(0)->state = HF_SLOT_RECEIVING;
  dead.slot(0)->crc = 0;
  auto second = Start(NewSetup(2));
  EXPECT_EQ(second->Number("adopt 1 0"), 0u);
  EXPECT_EQ(second->Number("adopt 1 1"), 1u);
  EXPECT_EQ(reader->Wait(10), 0);
}

TEST_F(FuseHandoverTest, ARequestWithABadCrcIsDroppedAndNeverAnswered) {
  Bench::MountPoint& mount = bench_.Mount();
  Bench::Ledger& dead = bench_.MakeLedger(1);
  auto reader = Reader([&] { return CheckFile(mount.path + "/stored", kStored, 0, 4096, true); });
  LeaveInSlot(dead, mount, true);
  ASSERT_FALSE(HasFatalFailure());
  dead.slot(0)->request[offsetof(fuse_in_header, nodeid)] ^= 1;
  hf_record* record = dead.record(0);
  record->mount_id = mount.id;
  record->unique = 1000;
  record->nodeid = kMissing;
  record->size = 4096;
  record->crc = 12345;
  record->owner_generation = 1;
  record->state = HF_RECORD_PENDING;
  dead.header->record_high_water = 1;
  auto second = Start(NewSetup(2));
  EXPECT_EQ(second->Number("adopt 1 1"), 0u);
  EXPECT_EQ(second->Stats()["dropped"], 2u);
  EXPECT_EQ(second->Number("drained 1"), 1u);
  EXPECT_EQ(reader->Wait(0.1), -1);
  second->Kill();
  bench_.CloseDevices();  // lets the reader go
  EXPECT_NE(reader->Wait(5), 0);
}

// The owner is not dead yet: it answers its reads and takes new ones into the same records.
TEST_F(FuseHandoverTest, RecordsThatALivingOwnerReusesAreAdoptedWholeOrNotAtAll) {
  constexpr uint32_t kRecords = 2;  // few, so that they are refilled while they are looked at
  Bench::MountPoint& mount = bench_.Mount();
  Bench::Ledger& old = bench_.MakeLedger(1);
  old.header->record_high_water = kRecords;
  auto owner = std::make_unique<ChildProcess>([&]() -> int {
    for (uint64_t n = 1;; n++) {
      hf_record* record = old.record(static_cast<uint32_t>(n % kRecords));
      RecordState state = LoadState(record);
      if (state.state == HF_RECORD_PENDING && (state.owner != 1 || !ChangeState(record, &state, {})))
        continue;
      state = {};
      if (!ChangeState(record, &state, {HF_RECORD_FILLING, 1})) continue;
      record->mount_id = mount.id;
      record->unique = n << 20;  // the kernel knows none of these
      record->nodeid = kStored;
      record->offset = n % 1000 * 4096;
      record->size = 4096;
      record->crc = RecordCrc(*record);
      record->deadline_ns = ~uint64_t{0};
      StoreState(record, {HF_RECORD_PENDING, 1});
    }
  });
  auto second = Start(NewSetup(2));
  uint64_t taken = 0;
  for (int i = 0; i < 3000; i++) taken += second->Number("adopt 1 0");
  EXPECT_GT(taken, 0u);
  EXPECT_EQ(second->Stats()["dropped"], 0u);
  owner->Kill();
  second->Number("adopt 1 1");
  EXPECT_TRUE(Eventually([&] { return second->Number("drained 1") == 1; }));
}

TEST_F(FuseHandoverTest, ARequestOfAnUnknownMountIsDropped) {
  Bench::MountPoint& mount = bench_.Mount();
  bench_.Mount();
  auto first = Start(NewSetup(1), true);
  auto reader = MissReader(mount.path, 1);
  ASSERT_TRUE(Eventually([&] { return first->Number("waiting 100") == 1; }));
  first->Kill();
  ServerSetup setup = NewSetup(2);
  setup.leave_out = {mount.id};
  auto second = Start(setup);
  EXPECT_EQ(second->Number("adopt 1 1"), 0u);
  EXPECT_EQ(second->Stats()["dropped"], 1u);
  EXPECT_EQ(second->Number("drained 1"), 1u);
  second->Kill();
  bench_.CloseDevices();
  EXPECT_NE(reader->Wait(5), 0);
}

TEST_F(FuseHandoverTest, AParkedServerLeavesItsReadsToItsSuccessorAndAnswersNothing) {
  std::string root = bench_.Mount().path;
  auto first = Start(NewSetup(1), true);
  auto early = MissReader(root, 1);
  ASSERT_TRUE(Eventually([&] { return first->Number("waiting 100") == 1; }));
  ASSERT_EQ(first->Call("park"), "ok");
  ASSERT_EQ(first->Call("release 100"), "ok");  // its fetch ends, which only fills the cache
  auto late = MissReader(root, 2);
  ASSERT_TRUE(bench_.WaitReadable(bench_.mounts[100], 5));
  EXPECT_EQ(early->Wait(0.1), -1);
  EXPECT_EQ(bench_.ledgers[1]->record(0)->state, uint32_t{HF_RECORD_PENDING});
  auto second = Start(NewSetup(2));
  EXPECT_EQ(second->Number("adopt 1 0"), 1u);
  // Again: harmless. The read is counted once more if its first answer is on the way just now; the kernel
  // refuses the second.
  EXPECT_LE(second->Number("adopt 1 0"), 1u);
  EXPECT_EQ(early->Wait(10), 0);
  EXPECT_EQ(late->Wait(10), 0);
  EXPECT_TRUE(Eventually([&] { return second->Stats()["pending"] == 0; }));
  EXPECT_EQ(second->Number("drained 1"), 0u) << "empty, but its owner may resume";
  EXPECT_EQ(first->Stats()["errors"], 0u);
  EXPECT_EQ(first->Call("destroy"), "ok");
  EXPECT_EQ(second->Number("adopt 1 1"), 0u);
  EXPECT_EQ(second->Number("drained 1"), 1u);
}

TEST_F(FuseHandoverTest, AServerThatResumesTakesUpItsOwnReadsEvenThoseASuccessorHadTaken) {
  std::string root = bench_.Mount().path;
  bench_.MakeLedger(2);  // before the first is forked, which adopts from it later
  auto first = Start(NewSetup(1), true);
  auto own = MissReader(root, 1);
  ASSERT_TRUE(Eventually([&] { return first->Number("waiting 100") == 1; }));
  ASSERT_EQ(first->Call("park"), "ok");
  auto second = Start(NewSetup(2), true);
  EXPECT_EQ(second->Number("adopt 1 0"), 1u);
  auto theirs = MissReader(root, 2);
  ASSERT_TRUE(Eventually([&] { return second->Number("waiting 100") == 2; }));
  second->Kill();  // the swap failed
  ASSERT_EQ(first->Call("resume"), "ok");
  EXPECT_EQ(first->Number("adopt 2 1"), 1u);
  EXPECT_EQ(first->Stats()["pending"], 2u);
  // Its own was asked for once more.
  ASSERT_TRUE(Eventually([&] { return first->Number("waiting 100") == 3; }));
  ASSERT_EQ(first->Call("release 100"), "ok");
  EXPECT_EQ(own->Wait(10), 0);
  EXPECT_EQ(theirs->Wait(10), 0);
  ASSERT_EQ(first->Call("hold 100 0"), "ok");
  EXPECT_EQ(MissReader(root, 3)->Wait(10), 0);
  EXPECT_EQ(first->Number("drained 2"), 1u);
}

TEST_F(FuseHandoverTest, AServerThatResumesStillOwesTheReadsItHadAdopted) {
  std::string root = bench_.Mount().path;
  auto first = Start(NewSetup(1), true);
  auto reader = MissReader(root, 1);
  ASSERT_TRUE(Eventually([&] { return first->Number("waiting 100") == 1; }));
  first->Kill();
  auto second = Start(NewSetup(2), true);
  EXPECT_EQ(second->Number("adopt 1 1"), 1u);
  ASSERT_TRUE(Eventually([&] { return second->Number("waiting 100") == 1; }));
  ASSERT_EQ(second->Call("park"), "ok");
  ASSERT_EQ(second->Call("release 100"), "ok");
  EXPECT_EQ(reader->Wait(0.1), -1);
  ASSERT_EQ(second->Call("resume"), "ok");
  ASSERT_TRUE(Eventually([&] { return second->Number("waiting 100") == 1; }));
  ASSERT_EQ(second->Call("release 100"), "ok");
  EXPECT_EQ(reader->Wait(10), 0);
  EXPECT_TRUE(Eventually([&] { return second->Number("drained 1") == 1; }));
}

TEST_F(FuseHandoverTest, AnInterruptedReadStaysInterruptedForTheSuccessor) {
  std::string root = bench_.Mount().path;
  auto first = Start(NewSetup(1), true);
  auto reader = MissReader(root, 1);
  ASSERT_TRUE(Eventually([&] { return first->Number("waiting 100") == 1; }));
  first->Kill();
  bench_.ledgers[1]->record(0)->marks = HF_MARK_INTERRUPTED;
  reader->Signal(SIGKILL);
  auto second = Start(NewSetup(2), true);
  EXPECT_EQ(second->Number("adopt 1 1"), 1u);
  EXPECT_EQ(reader->Wait(1), 1000 + SIGKILL);
  EXPECT_TRUE(Eventually([&] { return second->Stats()["interrupted"] == 1; }));
}

TEST_F(FuseHandoverTest, AnInterruptThatADeadServerHadReadIsHonoured) {
  Bench::MountPoint& mount = bench_.Mount();
  auto first = Start(NewSetup(1), true);
  auto reader = MissReader(mount.path, 1);
  ASSERT_TRUE(Eventually([&] { return first->Number("waiting 100") == 1; }));
  first->Kill();
  reader->Signal(SIGKILL);
  LeaveInSlot(*bench_.ledgers[1], mount, true);  // the INTERRUPT
  ASSERT_FALSE(HasFatalFailure());
  auto second = Start(NewSetup(2), true);
  EXPECT_EQ(second->Number("adopt 1 1"), 1u);
  EXPECT_EQ(reader->Wait(1), 1000 + SIGKILL);
}

TEST_F(FuseHandoverTest, AFatalSignalNamesItsSlotAndARequestThatKillsTwiceIsEio) {
  std::string root = bench_.Mount().path;
  ServerSetup setup = NewSetup(1);
  setup.faults = "fuse.received=block";
  setup.options.threads = 1;
  setup.record_crashes = true;
  auto first = Start(setup);
  auto reader = Reader([&] { return CheckFile(root + "/stored", kStored, 0, 4096, true); });
  ASSERT_EQ(first->Call("fired fuse.received 1"), "ok");
  syscall(SYS_tgkill, first->process().pid(), first->ThreadNamed("fuse-0"), SIGSEGV);
  EXPECT_EQ(first->process().Wait(10), 1000 + SIGSEGV);
  hf_ledger_header* header = bench_.ledgers[1]->header;
  EXPECT_EQ(header->exit_cause, uint32_t{HF_EXIT_FATAL_SIGNAL});
  EXPECT_EQ(header->exit_signal, uint32_t{SIGSEGV});
  EXPECT_EQ(header->exit_slot, 1u);
  EXPECT_EQ(bench_.ledgers[1]->slot(0)->strikes, 1u);

  setup.generation = 2;
  auto second = std::make_unique<ServerProcess>(bench_, setup);
  second->Send("adopt 1 1");
  second->Send("start");  // executes the suspect first, and blocks in it
  pid_t main_thread = second->process().pid();
  hf_slot* copy = bench_.ledgers[2]->slot(HF_LEDGER_SLOTS - 1);
  ASSERT_TRUE(Eventually([&] { return Shared(copy->state).load() == HF_SLOT_EXECUTING; }));
  ASSERT_TRUE(Eventually([&] {
    auto wchan = ReadFile("/proc/" + std::to_string(main_thread) + "/wchan");
    return wchan.ok() && wchan->find("futex") != std::string::npos;
  }));
  syscall(SYS_tgkill, main_thread, main_thread, SIGABRT);
  EXPECT_EQ(second->process().Wait(10), 1000 + SIGABRT);
  EXPECT_EQ(bench_.ledgers[1]->slot(0)->strikes, 2u);

  auto third = Start(NewSetup(3));
  EXPECT_EQ(third->Number("adopt 1 1"), 1u);
  EXPECT_EQ(reader->Wait(10), EIO);
  EXPECT_EQ(third->Number("adopt 2 1"), 0u);
}

TEST_F(FuseHandoverTest, ARequestThatTwoServersHungInIsEioThoughNeitherCrashed) {
  std::string root = bench_.Mount().path;
  ServerSetup setup = NewSetup(1);
  setup.faults = "fuse.stuck=block";
  setup.options.threads = 1;
  auto first = Start(setup);
  auto reader = Reader([&] { return CheckFile(root + "/stored", kStored, 0, 4096, true); });
  ASSERT_EQ(first->Call("fired fuse.stuck 1"), "ok");
  hf_slot* slot = bench_.ledgers[1]->slot(0);
  ASSERT_TRUE(Eventually([&] { return NanosSince(slot->received_ns) > 1'000'000'000; }));
  first->Kill();
  // It hangs in the successor, too, in the thread that adopts.
  ServerSetup second_setup = NewSetup(2);
  second_setup.faults = "fuse.received=block";
  auto second = std::make_unique<ServerProcess>(bench_, second_setup);
  EXPECT_EQ(second->Number("adopt 1 0 1"), 1u);
  EXPECT_EQ(slot->strikes, 1u);
  EXPECT_EQ(second->Number("adopt 1 1 1"), 0u);
  EXPECT_EQ(slot->strikes, 1u) << "counted once";
  second->Send("start");
  hf_slot* copy = bench_.ledgers[2]->slot(HF_LEDGER_SLOTS - 1);
  ASSERT_TRUE(Eventually([&] { return Shared(copy->state).load() == HF_SLOT_EXECUTING; }))
      << "the supervisor sees what it hangs in";
  EXPECT_EQ(copy->strikes, 1u);
  ASSERT_TRUE(Eventually([&] { return NanosSince(copy->received_ns) > 1'000'000'000; }));
  second->Kill();
  // The third is killed by the operator before it gets to it: no strike is added, none is lost.
  auto third = std::make_unique<ServerProcess>(bench_, NewSetup(3));
  EXPECT_EQ(third->Number("adopt 1 1 1"), 1u);
  EXPECT_EQ(third->Number("adopt 2 1 1"), 0u) << "a copy of it";
  EXPECT_EQ(copy->strikes, 2u);
  third->Kill();
  auto fourth = std::make_unique<ServerProcess>(bench_, NewSetup(4));
  EXPECT_EQ(fourth->Number("adopt 1 1 1"), 1u);
  EXPECT_EQ(fourth->Number("adopt 2 1 1"), 0u);
  EXPECT_EQ(fourth->Number("drained 1"), 0u);
  ASSERT_EQ(fourth->Call("start"), "ok");
  EXPECT_EQ(reader->Wait(10), EIO);
  EXPECT_EQ(fourth->Stats()["poisoned"], 1u);
  EXPECT_EQ(fourth->Number("drained 1"), 1u);
  EXPECT_EQ(fourth->Number("drained 2"), 1u);
  EXPECT_EQ(Reader([&] { return CheckFile(root + "/stored", kStored, 0, 4096, true); })->Wait(10), 0);
}

TEST_F(FuseHandoverTest, KillsFromOutsideNeverAddAStrikeHoweverOften) {
  std::string root = bench_.Mount().path;
  ServerSetup setup = NewSetup(1);
  setup.faults = "fuse.received=block@0";
  auto server = Start(setup);
  auto reader = Reader([&] { return CheckFile(root + "/stored", kStored, 0, 4096, true); });
  ASSERT_EQ(server->Call("fired fuse.received 1"), "ok");
  for (uint64_t generation = 2; generation <= 5; generation++) {
    server->Kill();
    ServerSetup next = NewSetup(generation);
    next.faults = "fuse.received=kill";  // while it executes what it adopts
    server = std::make_unique<ServerProcess>(bench_, next);
    server->Send("adopt 1 1");
    server->Send("start");
    ASSERT_EQ(server->process().Wait(10), 1000 + SIGKILL);
  }
  auto last = Start(NewSetup(6));
  for (uint64_t old = 1; old <= 5; old++)
    EXPECT_TRUE(last->Call("adopt " + std::to_string(old) + " 1").starts_with("ok"));
  EXPECT_EQ(reader->Wait(10), 0);
  EXPECT_EQ(last->Stats()["poisoned"], 0u);
}

TEST_F(FuseHandoverTest, WhatCrashedAServerIsExecutedAfterTheOthersAndAlone) {
  std::vector<std::string> roots;
  MountFlags flags;
  flags.zero_open = true;  // so no reader leaves a RELEASE behind, which would take the fault
  for (int i = 0; i < 3; i++) roots.push_back(bench_.Mount(flags).path);
  ServerSetup setup = NewSetup(1);
  setup.faults = "fuse.received=block@0";
  setup.options.threads = 3;
  auto first = Start(setup);
  auto reader = [&](size_t i) {
    return Reader([&, i] { return CheckFile(roots[i] + "/stored", kStored, 0, 4096, true); });
  };
  auto suspect = reader(0), innocent = reader(1);
  ASSERT_EQ(first->Call("fired fuse.received 2"), "ok");
  first->Kill();
  for (uint32_t i = 0; i < 3; i++) {
    hf_slot* slot = bench_.ledgers[1]->slot(i);
    if (slot->state == HF_SLOT_EXECUTING && slot->mount_id == 100) slot->strikes = 1;
  }
  // A server that serves already. The suspect is the first to pass here once the innocent one is done.
  auto second = Start(NewSetup(2));
  EXPECT_EQ(second->Number("adopt 1 0"), 2u);
  EXPECT_EQ(innocent->Wait(10), 0);
  EXPECT_EQ(suspect->Wait(10), 0);
  second->Kill();

  auto third = Start(NewSetup(3));
  ASSERT_EQ(third->Call("fault fuse.received=block"), "ok");
  third->Send("adopt 1 1");
  auto stuck_in = [&](uint64_t generation, uint64_t mount) {
    hf_slot* copy = bench_.ledgers[generation]->slot(HF_LEDGER_SLOTS - 1);
    return Eventually([&] {
      return Shared(copy->state).load() == HF_SLOT_EXECUTING && Shared(copy->mount_id).load() == mount;
    });
  };
  // The innocent copy comes first, beside the pool ...
  ASSERT_TRUE(stuck_in(3, 101));
  EXPECT_EQ(reader(2)->Wait(10), 0);
  third->Kill();
  auto fourth = Start(NewSetup(4));
  ASSERT_EQ(fourth->Call("fault fuse.received=block@2"), "ok");
  fourth->Send("adopt 1 1");
  // ... the suspect last, and while it executes nobody else does.
  ASSERT_TRUE(stuck_in(4, 100));
  auto other = reader(2);
  EXPECT_EQ(other->Wait(0.3), -1);
  fourth->Kill();
  auto fifth = Start(NewSetup(5));
  EXPECT_TRUE(fifth->Call("adopt 4 1").starts_with("ok"));
  EXPECT_EQ(other->Wait(10), 0);
}

TEST_F(FuseHandoverTest, ARecordThatWasAnsweredWhenItsServerCrashedCountsToo) {
  std::string root = bench_.Mount().path;
  auto first = Start(NewSetup(1), true);
  auto reader = MissReader(root, 1), other = MissReader(root, 2);
  ASSERT_TRUE(Eventually([&] { return first->Number("waiting 100") == 2; }));
  first->Kill();
  hf_record* guilty = bench_.ledgers[1]->record(0);
  bool is_first = guilty->offset == 4096;
  guilty->strikes = 2;
  auto second = Start(NewSetup(2));
  EXPECT_TRUE(second->Call("adopt 1 1").starts_with("ok"));
  EXPECT_EQ((is_first ? reader : other)->Wait(10), EIO);
  EXPECT_EQ((is_first ? other : reader)->Wait(10), 0);
  EXPECT_EQ(second->Stats()["poisoned"], 1u);
  EXPECT_TRUE(Eventually([&] { return second->Number("drained 1") == 1; }));
}

TEST_F(FuseHandoverTest, AnInterruptMarkInASlotCountsForTheSuccessorOnceTheReadWaits) {
  Bench::MountPoint& mount = bench_.Mount();
  ServerSetup setup = NewSetup(1);
  setup.faults = "fuse.record_filled=block";
  auto first = Start(setup, true);
  auto reader = MissReader(mount.path, 1);
  ASSERT_EQ(first->Call("fired fuse.record_filled 1"), "ok");
  uint64_t before = first->Stats()["requests"];
  reader->Signal(SIGKILL);
  ASSERT_TRUE(Eventually([&] { return first->Stats()["requests"] > before; }));
  first->Kill();
  auto second = Start(NewSetup(2), true);
  EXPECT_TRUE(second->Call("adopt 1 1").starts_with("ok"));
  EXPECT_EQ(reader->Wait(1), 1000 + SIGKILL);
}

TEST_F(FuseHandoverTest, AFullTableHoldsBackThoseWhoMissAndCachedReadsOfOthersGoOn) {
  constexpr uint32_t kRecords = 256;
  constexpr uint64_t kReaders = 160;  // more than half of the records, less than three quarters
  std::string a = bench_.Mount().path, b = bench_.Mount().path, c = bench_.Mount().path;
  bench_.MakeLedger(1).header->record_count = kRecords;
  ServerSetup setup = NewSetup(1);
  setup.options.max_pending_per_mount = 1000;
  auto server = Start(setup, true);
  std::vector<std::unique_ptr<ChildProcess>> readers;
  for (uint64_t i = 0; i < kReaders; i++) readers.push_back(MissReader(i % 2 == 0 ? a : b, i));
  ASSERT_TRUE(Eventually([&] { return server->Call("heldback") == "ok 100 101"; }));
  EXPECT_GE(server->Stats()["pending"], uint64_t{kRecords} / 2);
  // A mount that has nothing waiting is read, and may even miss once.
  for (int i = 0; i < 3; i++) {
    EXPECT_EQ(Reader([&] { return CheckFile(c + "/stored", kStored, 0, kMiB, true); })->Wait(5), 0);
  }
  auto miss = MissReader(c, 1);
  ASSERT_TRUE(Eventually([&] { return server->Number("waiting 102") == 1; }));
  EXPECT_EQ(server->Call("heldback"), "ok 100 101 102");
  for (const char* mount : {"100", "101", "102"}) {
    ASSERT_EQ(server->Call(std::string("hold ") + mount + " 0"), "ok");
    ASSERT_EQ(server->Call(std::string("release ") + mount), "ok");
  }
  EXPECT_EQ(miss->Wait(20), 0);
  for (auto& reader : readers) EXPECT_EQ(reader->Wait(20), 0);
  EXPECT_EQ(server->Stats()["errors"], 0u);
  EXPECT_TRUE(Eventually([&] { return server->Call("heldback") == "ok"; }));
}

TEST_F(FuseHandoverTest, ReadersSeeNoErrorWhileServersAreKilledAtRandom) {
  std::string root = bench_.Mount().path;
  constexpr int kReaders = 3;
  std::vector<std::unique_ptr<ChildProcess>> readers;
  int stop[2];
  ASSERT_EQ(pipe2(stop, O_CLOEXEC | O_NONBLOCK), 0);
  auto server = Start(NewSetup(1));
  for (int r = 0; r < kReaders; r++) {
    readers.push_back(Reader([&] {
      char byte;
      for (uint64_t i = 0;; i++) {
        if (read(stop[0], &byte, 1) == 1) return 0;
        bool missing = i % 2 == 0;
        uint64_t offset = (i * 7 + static_cast<uint64_t>(r)) % 240 * 65536;
        int result = CheckFile(root + (missing ? "/missing" : "/stored"), missing ? kMissing : kStored,
                               offset, 65536, true);
        if (result != 0) return result;
      }
    }));
  }
  std::mt19937 random(20240613);
  std::set<uint64_t> undrained;
  uint64_t adopted = 0;
  for (uint64_t generation = 1; generation <= 40; generation++) {
    bool spare =
        generation % 2 == 0;  // a successor that waits, and takes over while the dead one is still dying
    std::unique_ptr<ServerProcess> next;
    if (spare) {
      next = std::make_unique<ServerProcess>(bench_, NewSetup(generation + 1));
      ASSERT_TRUE(next->Stats().contains("pending"));
    }
    usleep(static_cast<useconds_t>(1000 + random() % 20000));  // the moment of the kill, not an ordering
    undrained.insert(generation);
    if (spare) {
      server->process().Signal(SIGKILL);
      adopted += next->Number("adopt " + std::to_string(generation) + " 0");
      ASSERT_EQ(next->Call("start"), "ok");
    }
    server->Kill();
    server = spare ? std::move(next) : Start(NewSetup(generation + 1));
    for (uint64_t old : undrained) adopted += server->Number("adopt " + std::to_string(old) + " 1");
    ASSERT_TRUE(Eventually([&] {
      std::erase_if(undrained,
                    [&](uint64_t old) { return server->Number("drained " + std::to_string(old)) == 1; });
      return undrained.empty();
    }));
    for (auto& reader : readers) ASSERT_EQ(reader->Wait(0), -1) << "generation " << generation;
  }
  EXPECT_GT(adopted, 0u);
  ASSERT_EQ(write(stop[1], "...", kReaders), kReaders);
  for (auto& reader : readers) EXPECT_EQ(reader->Wait(10), 0);
  close(stop[0]);
  close(stop[1]);
}

}  // namespace
}  // namespace holdfast::fuse
