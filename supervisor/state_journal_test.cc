#include "supervisor/state_journal.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <functional>

#include "absl/strings/escaping.h"
#include "common/process.h"
#include "gtest/gtest.h"
#include "schema/handover.capnp.h"
#include "schema/rpc.h"
#include "supervisor/recovery.h"

namespace holdfast::supervisor {
namespace {

class NoStore final : public FdStore {
 public:
  bool enabled() const override { return false; }
  void Push(const std::string& name, std::vector<SharedFd>) override { pushed.push_back(name); }
  void Remove(const std::string& name) override { removed.push_back(name); }
  bool Flush(int) override { return true; }
  std::optional<std::string> Warning() const override { return std::nullopt; }
  std::vector<std::string> pushed, removed;
};

Mount SomeMount(uint64_t id) {
  return {.id = id,
          .state = MountState::kLive,
          .path = "/state/mounts/" + std::to_string(id),
          .blob = std::string("bl\0b", 4),
          .caller = 3,
          .init_request = "request",
          .init_reply = "reply"};
}

void FillWorker(uint64_t generation, schema::SavedWorker::Builder out) {
  out.setGeneration(generation);
  out.setPid(42);
  out.setStartTicks(7);
  out.setToken("secret");
  out.setExecutable("abc");
  out.setBuild("worker 1");
  out.setCapabilities(schema::CAP_REATTACH);
  out.setStartedWallNanos(-5);
}

void FillMachine(schema::SavedMachine::Builder out) {
  out.setPhase("running");
  out.setOwner(3);
  out.setSuccessor(4);
  out.initHolders(1).set(0, 3);
  out.setRunning("abc");
  out.setPrevious("def");
  out.setLastGood("ghi");
  out.setTrialGeneration(4);
  out.setProbation(true);
  out.setVaultId(Bytes(std::string(16, '\1')));
  out.setRestarts(1);
  out.setCrashes(2);
  out.setHangs(1);
  out.setSwaps(5);
  out.setCarriedOver(6);
  out.setRunningBuild("worker 1");
}

class StateJournalTest : public ::testing::Test {
 protected:
  StateJournalTest() {
    DurableMap map = DurableMap::Create("test").value();
    file_ = DupFd(map.file()).value();
    journal_.Use(std::move(map));
    capnp::MallocMessageBuilder record;
    FillMachine(record.initRoot<schema::SavedMachine>());
    journal_.SaveMachine(&record);
  }
  void SaveWorker(uint64_t generation) {
    capnp::MallocMessageBuilder record;
    FillWorker(generation, record.initRoot<schema::SavedWorker>());
    journal_.SaveWorker(generation, &record);
  }
  SavedState Load() { return DecodeState(DurableMap::Open(file_.get()).value()).value(); }

  NoStore store_;
  StateJournal journal_{&store_};
  UniqueFd file_;
};

TEST_F(StateJournalTest, WhatWasSavedIsWhatTheNextSupervisorFinds) {
  Mount detached = SomeMount(2);
  detached.state = MountState::kDetached;
  Mount unmounting = SomeMount(3);
  unmounting.unmounting = true;
  Mount mounting = SomeMount(4);
  mounting.state = MountState::kMounting;
  for (const Mount& mount : {SomeMount(1), detached, unmounting, mounting}) journal_.SaveMount(mount);
  SaveWorker(3);
  auto ledger = Ledger::Create(3).value();
  journal_.SaveLedger(*ledger, true);
  SavedState state = Load();
  EXPECT_EQ(state.mounts.at(1).blob, std::string("bl\0b", 4));
  EXPECT_EQ(state.mounts.at(1).init_request, "request");
  EXPECT_EQ(state.mounts.at(1).init_reply, "reply");
  EXPECT_EQ(state.mounts.at(1).state, MountState::kLive);
  EXPECT_EQ(state.mounts.at(2).state, MountState::kDetached);
  EXPECT_TRUE(state.mounts.at(3).unmounting);
  EXPECT_EQ(state.mounts.at(4).state, MountState::kMounting);
  EXPECT_STREQ(state.workers.at(3)->getToken().cStr(), "secret");
  EXPECT_EQ(state.workers.at(3)->getPid(), 42u);
  EXPECT_EQ(state.workers.at(3)->getStartedWallNanos(), -5);
  std::vector<uint64_t> inodes;
  for (uint64_t inode : state.ledgers.at(3)->getPipeInodes()) inodes.push_back(inode);
  EXPECT_EQ(inodes, ledger->PipeInodes());
  ASSERT_EQ(state.machine->getHolders().size(), 1u);
  EXPECT_EQ(state.machine->getHolders()[0], 3u);
  EXPECT_EQ(String(state.machine->getVaultId()), std::string(16, '\1'));
  EXPECT_EQ(state.machine->getCarriedOver(), 6u);
  journal_.ForgetMount(1);
  journal_.ForgetWorker(3);
  journal_.ForgetLedger(3);
  state = Load();
  EXPECT_EQ(state.mounts.size(), 3u);
  EXPECT_TRUE(state.workers.empty());
  EXPECT_TRUE(state.ledgers.empty());
  EXPECT_EQ(store_.pushed, (std::vector<std::string>{"l3", "p3"}));
  EXPECT_EQ(store_.removed, (std::vector<std::string>{"m1", "w3", "l3", "p3"}));
}

// What this build writes; that it reads what each release has written: state_golden_test.cc.
TEST_F(StateJournalTest, GoldenBytesOfEveryRecord) {
  journal_.SaveMount(SomeMount(9));
  SaveWorker(3);
  DurableMap map = DurableMap::Open(file_.get()).value();
  EXPECT_EQ(absl::BytesToHexString(map.all().at("m/9")),
            "000000000d00000000000000030004000900000000000000010000000000000003000000000000000d00000082000000"
            "1100000022000000110000003a000000110000002a0000002f73746174652f6d6f756e74732f3900626c006200000000"
            "72657175657374007265706c79000000");
  EXPECT_EQ(absl::BytesToHexString(map.all().at("w/3")),
            "000000000d000000000000000500030003000000000000002a0000000000000007000000000000002000000000000000"
            "fbffffffffffffff090000003a0000000900000022000000090000004a00000073656372657400006162630000000000"
            "776f726b657220310000000000000000");
  EXPECT_EQ(absl::BytesToHexString(map.all().at("machine")),
            "000000001c000000000000000a0008000300000000000000040000000000000004000000000000000100000000000000"
            "010000000000000002000000000000000100000000000000050000000000000006000000000000000000000000000000"
            "1d000000420000001d0000000d0000001d000000220000001d000000220000001d000000220000001d00000082000000"
            "210000004a000000000000000000000072756e6e696e6700030000000000000061626300000000006465660000000000"
            "676869000000000001010101010101010101010101010101776f726b657220310000000000000000");
}

TEST_F(StateJournalTest, RecordsOfUnknownKindsAreLeftAndDamagedOnesAreToldByName) {
  DurableMap map = DurableMap::Open(file_.get()).value();
  ASSERT_TRUE(map.Put("x/1", "from a newer build").ok());
  EXPECT_TRUE(DecodeState(map).ok());
  ASSERT_TRUE(map.Put("m/5", "short").ok());
  auto broken = DecodeState(map);
  EXPECT_EQ(broken.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_NE(broken.status().message().find("m/5"), std::string::npos);
  EXPECT_EQ(DecodeState(DurableMap::Create("empty").value()).status().code(), absl::StatusCode::kDataLoss);
}

TEST(FdNameTest, NamesAreShortAndDiffer) {
  EXPECT_EQ(FdName(FdKind::kMount, 1), "m1");
  EXPECT_EQ(FdName(FdKind::kMount, 35), "mz");
  EXPECT_EQ(FdName(FdKind::kMount, 36), "m10");
  EXPECT_LE(FdName(FdKind::kPipes, 78'364'164'095).size(), 8u);
}

using FillSavedWorker = std::function<void(schema::SavedWorker::Builder)>;

kj::Own<schema::SavedWorker::Reader> SomeWorker(uint64_t generation, const FillSavedWorker& change = {}) {
  capnp::MallocMessageBuilder record;
  auto worker = record.initRoot<schema::SavedWorker>();
  FillWorker(generation, worker);
  if (change) change(worker);
  return capnp::clone(worker.asReader());
}

// Of workers 1 and 2. `change`: what is special about worker 1.
SavedState StateWith(uint64_t owner, uint64_t successor, const std::vector<uint64_t>& holders,
                     const FillSavedWorker& change = {}) {
  capnp::MallocMessageBuilder record;
  auto machine = record.initRoot<schema::SavedMachine>();
  machine.setOwner(owner);
  machine.setSuccessor(successor);
  machine.setHolders(kj::arrayPtr(holders.data(), holders.size()));
  SavedState state;
  state.machine = capnp::clone(machine.asReader());
  state.workers[1] = SomeWorker(1, change);
  state.workers[2] = SomeWorker(2);
  return state;
}

TEST(ChooseOwnerTest, TheHolderOfTheMetadataElseTheOwnerAndOnlyOneThatCanComeBack) {
  EXPECT_EQ(ChooseOwner(StateWith(1, 0, {1}), {1}), 1u);
  EXPECT_EQ(ChooseOwner(StateWith(1, 2, {1}), {1, 2}), 1u) << "an upgrade before its commit";
  EXPECT_EQ(ChooseOwner(StateWith(1, 2, {2}), {1, 2}), 2u) << "in its commit";
  EXPECT_EQ(ChooseOwner(StateWith(1, 2, {2}), {1}), 1u) << "in its commit, the new one dead";
  EXPECT_EQ(ChooseOwner(StateWith(1, 2, {}), {1, 2}), 1u) << "yielded, nobody has taken it";
  EXPECT_EQ(ChooseOwner(StateWith(0, 2, {1}), {1, 2}), 0u) << "a crash, the dying one still there";
  EXPECT_EQ(ChooseOwner(StateWith(0, 2, {2}), {2}), 2u) << "a crash, the new one commits";
  EXPECT_EQ(ChooseOwner(StateWith(1, 0, {1}), {}), 0u);
  auto old_build = [](auto worker) { worker.setCapabilities(schema::CAP_SERVE_READS); };
  EXPECT_EQ(ChooseOwner(StateWith(1, 0, {1}, old_build), {1}), 0u);
  auto killed = [](auto worker) { worker.setKilled(true); };
  EXPECT_EQ(ChooseOwner(StateWith(1, 0, {1}, killed), {1}), 0u);
  auto retired = [](auto worker) { worker.setRetired(true); };
  EXPECT_EQ(ChooseOwner(StateWith(1, 0, {1}, retired), {1}), 0u);
}

TEST(RestoreMountsTest, OnlyWhatHasADeviceIsServed) {
  SavedState state;
  state.mounts[1] = SomeMount(1);
  state.mounts[2] = SomeMount(2);  // its descriptor is no /dev/fuse
  state.mounts[3] = SomeMount(3);  // none
  StoredFds fds;
  fds["m1"].emplace_back(open("/dev/fuse", O_RDWR | O_CLOEXEC));  // not mounted: it polls POLLERR
  fds["m2"].emplace_back(open("/dev/null", O_RDWR | O_CLOEXEC));
  RestoredMounts restored = RestoreMounts(state, 0, std::nullopt, &fds);
  EXPECT_TRUE(restored.served.empty());
  EXPECT_EQ(restored.lost, (std::vector<uint64_t>{1, 2, 3}));
  EXPECT_TRUE(restored.paths.empty());
}

TEST(LivingWorkersTest, TheFileIsMadeWithItsFolderAndThenNeedsNoMoreSpace) {
  TempDir dir;
  const std::string path = dir.path() + "/supervisor/workers";
  const uint64_t ticks = ProcessStartTicks(getpid()).value();
  ASSERT_TRUE(WriteLivingWorkers(path, {}).ok());
  struct stat first, second;
  ASSERT_EQ(stat(path.c_str(), &first), 0);
  ASSERT_TRUE(WriteLivingWorkers(path, {{1, ticks, getpid()}, {2, ticks, getpid()}}).ok());
  EXPECT_EQ(ReadLivingWorkers(path).size(), 2u);
  ASSERT_TRUE(WriteLivingWorkers(path, {{3, ticks, getpid()}}).ok());
  ASSERT_EQ(stat(path.c_str(), &second), 0);
  EXPECT_EQ(first.st_ino, second.st_ino);
  EXPECT_EQ(first.st_blocks, second.st_blocks);
  ASSERT_EQ(ReadLivingWorkers(path).size(), 1u);
  EXPECT_EQ(ReadLivingWorkers(path)[0].generation, 3u);
}

TEST(LivingWorkersTest, OnlyProcessesThatStillRunAreListed) {
  TempDir dir;
  std::string path = dir.path() + "/workers";
  EXPECT_TRUE(ReadLivingWorkers(path).empty());
  uint64_t ticks = ProcessStartTicks(getpid()).value();
  ASSERT_TRUE(WriteLivingWorkers(path, {{1, ticks, getpid()}, {2, ticks + 1, getpid()}}).ok());
  auto living = ReadLivingWorkers(path);
  ASSERT_EQ(living.size(), 1u) << "a pid that was reused is another process";
  EXPECT_EQ(living[0].generation, 1u);
  std::string text = ReadFile(path).value();
  ASSERT_TRUE(WriteFileAtomic(path, "another-boot" + text.substr(text.find('\n'))).ok());
  EXPECT_TRUE(ReadLivingWorkers(path).empty());
}

class LedgerRestoreTest : public ::testing::Test {
 protected:
  static std::vector<UniqueFd> Ends(const Ledger& ledger) {
    std::vector<UniqueFd> ends;
    for (const Pipe& pipe : ledger.pipes()) {
      ends.push_back(DupFd(pipe.write_end->get()).value());
      ends.insert(ends.begin(), DupFd(pipe.read_end->get()).value());
    }
    return ends;
  }
  std::unique_ptr<Ledger> ledger_ = Ledger::Create(5).value();
};

TEST_F(LedgerRestoreTest, PipesFindTheirSlotsWhateverTheirOrder) {
  auto again =
      Ledger::Restore(5, DupFd(ledger_->memory()->get()).value(), ledger_->PipeInodes(), Ends(*ledger_));
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ((*again)->PipeInodes(), ledger_->PipeInodes());
  ASSERT_EQ(write(ledger_->pipes()[3].write_end->get(), "x", 1), 1);
  char byte = 0;
  EXPECT_EQ(read((*again)->pipes()[3].read_end->get(), &byte, 1), 1);
}

TEST_F(LedgerRestoreTest, WhatIsIncompleteOrCouldShrinkIsRefused) {
  auto restore = [&](UniqueFd memory, std::vector<UniqueFd> ends) {
    return Ledger::Restore(5, std::move(memory), ledger_->PipeInodes(), std::move(ends)).status().code();
  };
  auto memory = [&] { return DupFd(ledger_->memory()->get()).value(); };
  EXPECT_EQ(restore(memory(), {}), absl::StatusCode::kDataLoss);
  auto ends = Ends(*ledger_);
  ends.pop_back();
  EXPECT_EQ(restore(memory(), std::move(ends)), absl::StatusCode::kDataLoss);
  EXPECT_EQ(restore(UniqueFd(), Ends(*ledger_)), absl::StatusCode::kDataLoss);
  TempDir dir;
  UniqueFd file = OpenFile(dir.path() + "/file", O_RDWR | O_CREAT).value();
  ASSERT_EQ(ftruncate(file.get(), HF_LEDGER_TOTAL_SIZE), 0);
  EXPECT_EQ(restore(std::move(file), Ends(*ledger_)), absl::StatusCode::kDataLoss) << "not sealed";
}

}  // namespace
}  // namespace holdfast::supervisor
