// The composition root against a supervisor made of variables: real ledgers, a real FUSE server over mounts
// that never ask, real stores.
#include "worker/app/worker.h"

#include <fcntl.h>
#include <linux/fuse.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <functional>
#include <future>
#include <set>
#include <string>
#include <thread>

#include "common/clock.h"
#include "common/io.h"
#include "common/urgency.h"
#include "gtest/gtest.h"
#include "schema/ledger_map.h"
#include "schema/touched.h"
#include "worker/fuse/ledger_view.h"
#include "worker/handover/mount_blob.h"

namespace holdfast::app {
namespace {

using AfterLoss = handover::WorkerActions::AfterLoss;

constexpr uint64_t kAll = handover::kCapServeReads | handover::kCapMetadataHandover | handover::kCapPrepare |
                          handover::kCapTrial | handover::kCapHealth | handover::kCapReattach;
constexpr uint64_t kFirstProtocol = handover::kCapServeReads | handover::kCapMetadataHandover;

bool WaitUntil(const std::function<bool()>& condition) {
  const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > give_up) return false;
    std::this_thread::yield();
  }
  return true;
}

UniqueFd Memory(size_t size) {
  UniqueFd memory(memfd_create("test", MFD_CLOEXEC));
  EXPECT_EQ(ftruncate(memory.get(), static_cast<off_t>(size)), 0);
  return memory;
}

// A ledger as the supervisor makes it.
handover::OldLedger MakeLedger(uint64_t generation) {
  handover::OldLedger ledger;
  ledger.generation = generation;
  ledger.memory = LedgerMap::Make(generation).value();
  for (uint32_t i = 0; i < HF_LEDGER_SLOTS; ++i) {
    int fds[2];
    EXPECT_EQ(pipe2(fds, O_CLOEXEC | O_NONBLOCK), 0);
    ledger.pipes.push_back({UniqueFd(fds[0]), UniqueFd(fds[1])});
  }
  return ledger;
}

std::string InitRequest() {
  struct {
    fuse_in_header header;
    fuse_init_in init;
  } request{};
  request.header.len = sizeof request;
  request.header.opcode = FUSE_INIT;
  request.header.unique = 2;
  request.init.major = FUSE_KERNEL_VERSION;
  request.init.minor = 31;
  return std::string(static_cast<const char*>(static_cast<const void*>(&request)), sizeof request);
}

// What the supervisor holds; the worker's link reads it.
struct Vault {
  Mutex mutex;
  std::vector<uint64_t> mounts ABSL_GUARDED_BY(mutex);
  std::vector<uint64_t> asked_after ABSL_GUARDED_BY(mutex);
  std::vector<uint64_t> old_ledgers ABSL_GUARDED_BY(mutex);
  std::atomic<bool> open{false};  // the worker takes calls
  std::atomic<bool> lost{false};
  uint64_t next_mount = 0;                  // what a mount gets; 0: none can be made
  std::atomic<bool> asked_urgently{false};  // the last who asked for mounts
  std::atomic<int> ledgers_asked{0};
  std::optional<handover::OldLedger> with_requests ABSL_GUARDED_BY(mutex);  // given out once
  UniqueFd device;

  handover::MountEntry Entry(uint64_t id) {
    handover::MountEntry entry;
    entry.mount_id = id;
    entry.path = "/mount/" + std::to_string(id);
    entry.device = std::move(*DupFd(device.get()));
    entry.init_request = InitRequest();
    handover::MountBlob blob;
    blob.layer_digest = "sha256:" + std::string(64, 'a');
    blob.index_digest = std::string(64, 'b');
    blob.numbering_version = 1;
    blob.image_ref = "localhost/x:1";
    blob.snapshot_id = id;
    entry.blob = handover::EncodeMountBlob(blob);
    return entry;
  }
  void Put(uint64_t first, uint64_t last) {
    MutexLock lock(&mutex);
    for (uint64_t id = first; id <= last; ++id) mounts.push_back(id);
    std::sort(mounts.begin(), mounts.end());
  }
  std::vector<uint64_t> Asked() {
    MutexLock lock(&mutex);
    return asked_after;
  }
};

class FakeLink final : public handover::SupervisorLink {
 public:
  FakeLink(Vault* vault, handover::Welcome welcome) : vault_(*vault), welcome_(std::move(welcome)) {}
  handover::Welcome* welcome() override { return &welcome_; }
  void Start(handover::WorkerActions*, handover::AdminActions*) override { vault_.open = true; }
  absl::StatusOr<std::vector<handover::MountEntry>> ListMounts(uint64_t after) override {
    if (vault_.lost) return Unavailable("the supervisor is gone");
    vault_.asked_urgently = IsUrgent();
    std::vector<uint64_t> ids;
    {
      MutexLock lock(&vault_.mutex);
      vault_.asked_after.push_back(after);
      ids = vault_.mounts;
    }
    std::vector<handover::MountEntry> entries;
    for (uint64_t id : ids) {
      if (id > after) entries.push_back(vault_.Entry(id));
    }
    return entries;
  }
  absl::StatusOr<std::vector<handover::OldLedger>> OldLedgers() override {
    if (vault_.lost) return Unavailable("the supervisor is gone");
    vault_.ledgers_asked++;
    std::vector<handover::OldLedger> ledgers;
    MutexLock lock(&vault_.mutex);
    for (uint64_t generation : vault_.old_ledgers) ledgers.push_back(MakeLedger(generation));
    if (vault_.with_requests) ledgers.push_back(*std::exchange(vault_.with_requests, std::nullopt));
    return ledgers;
  }
  absl::Status Drained(uint64_t) override { return absl::OkStatus(); }
  bool lost() const override { return vault_.lost; }
  absl::StatusOr<handover::MountEntry> Mount(const std::string& path, const handover::InitOptions&,
                                             const std::string& blob) override {
    if (vault_.next_mount == 0) return Unavailable("the supervisor is gone");
    handover::MountEntry entry = vault_.Entry(std::exchange(vault_.next_mount, 0));
    entry.path = path;
    entry.blob = blob;
    return entry;
  }
  absl::StatusOr<handover::MountState> Unmount(uint64_t) override { return Unavailable("gone"); }

 private:
  Vault& vault_;
  handover::Welcome welcome_;
};

std::set<std::string> Tasks() {
  std::set<std::string> tasks;
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) tasks.insert(task.path());
  return tasks;
}
// Before any worker: the first thread, and one that ThreadSanitizer keeps from the first other one on, with
// all signals blocked.
const std::set<std::string> tasks_before = (std::thread([] {}).join(), Tasks());

class WorkerTest : public ::testing::Test {
 protected:
  WorkerTest() {
    int fds[2];
    EXPECT_EQ(pipe2(fds, O_CLOEXEC | O_NONBLOCK), 0);
    vault_.device = UniqueFd(fds[0]);
    keep_open_ = UniqueFd(fds[1]);
    options_.oom_score_file = dir_.path() + "/oom_score_adj";
    EXPECT_TRUE(WriteFileAtomic(options_.oom_score_file, "-900").ok());
    options_.api_wait_nanos = 0;
    options_.refresh_nanos = 3'600'000'000'000;  // not in these tests, but for one
    options_.exit = [this](int code) {
      exit_code_ = code;
      ends_++;
    };
  }
  ~WorkerTest() override { worker_.reset(); }

  // So that another can be started in its place.
  void End() {
    worker_.reset();
    unlink((dir_.path() + "/snapshotter.sock").c_str());
    MutexLock lock(&vault_.mutex);
    vault_.asked_after.clear();
    vault_.mounts.clear();
  }
  void Start(uint64_t capabilities = kAll) {
    ASSERT_NO_FATAL_FAILURE(Connect(capabilities));
    absl::Status running = worker_->Run(std::move(link_));
    ASSERT_TRUE(running.ok()) << running;
  }
  void Connect(uint64_t capabilities = kAll) {
    auto worker = Worker::Create(options_);
    ASSERT_TRUE(worker.ok()) << worker.status();
    worker_ = std::move(*worker);
    handover::Welcome welcome;
    welcome.capabilities = capabilities;
    welcome.generation = 2;
    welcome.vault_id = std::string(32, '1');
    handover::OldLedger own = MakeLedger(2);
    welcome.ledger = std::move(own.memory);
    welcome.request_pipes = std::move(own.pipes);
    welcome.snapshot_listener = Listen();
    welcome.state_dir = dir_.path() + "/state";
    welcome.runtime_dir = dir_.path();
    if ((capabilities & handover::kCapReattach) != 0) {
      welcome.state = Memory(4096);
      welcome.control_socket = dir_.path() + "/control.sock";
    }
    link_ = std::make_unique<FakeLink>(&vault_, std::move(welcome));
  }
  UniqueFd Listen() {
    UniqueFd listener(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    strncpy(address.sun_path, (dir_.path() + "/snapshotter.sock").c_str(), sizeof address.sun_path - 1);
    EXPECT_EQ(bind(listener.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
    EXPECT_EQ(listen(listener.get(), 4), 0);
    return listener;
  }
  std::vector<uint64_t> Held() {
    std::vector<uint64_t> ids;
    while (true) {
      auto page = worker_->HeldMounts(ids.empty() ? 0 : ids.back());
      EXPECT_TRUE(page.ok()) << page.status();
      for (const auto& mount : page->elements) {
        EXPECT_TRUE(mount.device.valid());
        ids.push_back(mount.mount_id);
      }
      if (!page->more) return ids;
    }
  }
  AfterLoss Lose() {
    vault_.lost = true;
    return worker_->SupervisorLost();
  }
  std::string OomScore() { return ReadFile(options_.oom_score_file).value(); }

  TempDir dir_;
  UniqueFd keep_open_;
  Vault vault_;
  Worker::Options options_;
  std::atomic<int> exit_code_{-1}, ends_{0};
  std::unique_ptr<handover::SupervisorLink> link_;  // until it is given to the worker
  UrgentTime urgency_;
  std::unique_ptr<Worker> worker_;
};

TEST_F(WorkerTest, APreparedWorkerAsksOnlyForWhatIsNewWhenItIsToldToServe) {
  for (uint64_t mounts : {70, 1000}) {
    SCOPED_TRACE(mounts);
    vault_.Put(1, mounts);
    {
      MutexLock lock(&vault_.mutex);
      vault_.old_ledgers = {1};
    }
    Start();
    ASSERT_TRUE(worker_->Prepare().ok());
    EXPECT_EQ(vault_.Asked(), std::vector<uint64_t>({0}));
    EXPECT_EQ(OomScore(), "-900") << "it does not serve yet";
    vault_.Put(mounts + 1, mounts + 2);
    const auto begin = std::chrono::steady_clock::now();
    ASSERT_TRUE(worker_->Serve({}).ok());
    const auto took = std::chrono::steady_clock::now() - begin;
    RecordProperty("serve_us_" + std::to_string(mounts),
                   static_cast<int>(std::chrono::duration_cast<std::chrono::microseconds>(took).count()));
    std::vector<uint64_t> asked = vault_.Asked();
    ASSERT_GE(asked.size(), 2u);
    EXPECT_EQ(asked[1], mounts);
    EXPECT_EQ(Held().size(), mounts + 2);
    EXPECT_EQ(OomScore().substr(0, 1), "0");
    // A mount that was being made when Prepare asked got an id below others: a full walk follows.
    ASSERT_TRUE(WaitUntil([&] { return vault_.Asked().size() >= 3; }));
    EXPECT_EQ(vault_.Asked()[2], 0u);
    End();
    ASSERT_TRUE(WriteFileAtomic(options_.oom_score_file, "-900").ok());
  }
}

TEST_F(WorkerTest, WhatComesWithTheCallToServeIsNotAskedFor) {
  for (const uint64_t last : {uint64_t{4}, uint64_t{5}}) {
    SCOPED_TRACE(last);
    vault_.Put(1, 4);
    Start();
    ASSERT_TRUE(worker_->Prepare().ok());
    if (last == 5) vault_.Put(5, 5);
    vault_.ledgers_asked = 0;
    handover::ServeOrder order;
    order.takeover.emplace().last_mount = last;
    order.takeover->ledgers.push_back(MakeLedger(1));
    ASSERT_TRUE(worker_->Serve(std::move(order)).ok());
    EXPECT_EQ(vault_.ledgers_asked, 0);
    const std::vector<uint64_t> asked = vault_.Asked();  // a full walk may have followed
    EXPECT_EQ(std::count(asked.begin(), asked.end(), 4u), last == 5) << "only if there is a mount to ask for";
    EXPECT_EQ(Held().size(), last);
    auto ledgers = worker_->HeldLedgers(0);
    ASSERT_TRUE(ledgers.ok()) << ledgers.status();
    EXPECT_EQ(ledgers->elements.size(), 2u) << "that one, and its own";
    End();
  }
}

// The disk on which the layer's index lies does not answer: opening it waits until somebody writes to it.
TEST_F(WorkerTest, ItServesThoughALayerThatADeadWorkersReadNeedsDoesNotOpen) {
  const std::string folder = dir_.path() + "/state/" + kLayersFolder + "/" + std::string(64, 'a');
  const std::string index = folder + "/" + std::string(64, 'b') + ".idx";
  ASSERT_TRUE(MakeDirs(folder).ok());
  ASSERT_EQ(mkfifo(index.c_str(), 0600), 0);
  vault_.Put(1, 2);
  Start();
  handover::ServeOrder order;
  order.takeover.emplace().last_mount = 2;
  handover::OldLedger ledger = MakeLedger(1);
  hf_record record{};
  record.state = HF_RECORD_PENDING;
  record.owner_generation = 1;
  record.mount_id = 1;
  record.unique = 10;
  record.nodeid = 2;
  record.size = 4096;
  record.crc = fuse::RecordCrc(record);
  ASSERT_TRUE(PwriteFull(ledger.memory.get(), &record, sizeof record, HF_LEDGER_RECORD_OFFSET).ok());
  const uint32_t used = 1;
  ASSERT_TRUE(
      PwriteFull(ledger.memory.get(), &used, sizeof used, offsetof(hf_ledger_header, record_high_water))
          .ok());
  const UniqueFd memory = *DupFd(ledger.memory.get());
  auto state = [&memory] {
    uint32_t now = 0;
    EXPECT_EQ(pread(memory.get(), &now, sizeof now, HF_LEDGER_RECORD_OFFSET),
              static_cast<ssize_t>(sizeof now));
    return now;
  };
  order.takeover->ledgers.push_back(std::move(ledger));
  ASSERT_TRUE(worker_->Serve(std::move(order)).ok());
  EXPECT_TRUE(WaitUntil([&] { return worker_->Ping().loop == "fuse-take-up"; })) << "the hang watch sees it";
  EXPECT_EQ(state(), uint32_t{HF_RECORD_PENDING});
  UniqueFd writer(open(index.c_str(), O_WRONLY | O_NONBLOCK | O_CLOEXEC));
  ASSERT_TRUE(writer.valid()) << "nobody opens it";
  writer.Reset();
  EXPECT_TRUE(WaitUntil([&] { return state() == HF_RECORD_FREE; })) << "answered: it is no index";
  EXPECT_TRUE(WaitUntil([&] { return worker_->Ping().loop != "fuse-take-up"; }));
}

TEST_F(WorkerTest, AMountWithALowIdThatAppearsAfterPrepareIsServedAllTheSame) {
  vault_.Put(5, 9);
  Start();
  ASSERT_TRUE(worker_->Prepare().ok());
  vault_.Put(3, 3);
  ASSERT_TRUE(worker_->Serve({}).ok());
  EXPECT_TRUE(WaitUntil([&] { return Held() == std::vector<uint64_t>({3, 5, 6, 7, 8, 9}); }));
}

TEST_F(WorkerTest, ARequestOfAMountThatAppearedWithALowIdIsNotDropped) {
  for (const bool handed : {true, false}) {
    SCOPED_TRACE(handed);
    vault_.Put(5, 9);
    Start();
    ASSERT_TRUE(worker_->Prepare().ok());
    // It was being made when Prepare asked, and a READ of it waits in a dead worker's ledger.
    vault_.Put(3, 3);
    handover::OldLedger ledger = MakeLedger(1);
    hf_record record{};
    record.state = HF_RECORD_PENDING;
    record.owner_generation = 1;
    record.mount_id = 3;
    record.unique = 42;
    record.nodeid = 1;
    record.size = 4096;
    record.crc = fuse::RecordCrc(record);
    EXPECT_TRUE(PwriteFull(ledger.memory.get(), &record, sizeof record, HF_LEDGER_RECORD_OFFSET).ok());
    const uint32_t high_water = 1;
    EXPECT_TRUE(PwriteFull(ledger.memory.get(), &high_water, sizeof high_water,
                           offsetof(hf_ledger_header, record_high_water))
                    .ok());
    handover::ServeOrder order;
    if (handed) {
      order.takeover.emplace().last_mount = 9;
      order.takeover->ledgers.push_back(std::move(ledger));
    } else {
      MutexLock lock(&vault_.mutex);
      vault_.with_requests = std::move(ledger);
    }
    ASSERT_TRUE(worker_->Serve(std::move(order)).ok());
    auto ledgers = worker_->HeldLedgers(0);
    ASSERT_TRUE(ledgers.ok()) << ledgers.status();
    const int own = ledgers->elements.back().memory.get();
    EXPECT_TRUE(WaitUntil([&] {
      uint64_t answered = 0;
      return PreadFull(own, &answered, sizeof answered, offsetof(hf_ledger_header, requests_answered)).ok() &&
             answered == 1;
    })) << "with EIO, for there is no such layer; not thrown away";
    EXPECT_EQ(Held(), std::vector<uint64_t>({3, 5, 6, 7, 8, 9}));
    End();
  }
}

TEST_F(WorkerTest, AWorkerThatWaitsToServeTakesNewMountsAsTheyCome) {
  options_.refresh_nanos = 1;
  vault_.Put(1, 2);
  Start();
  const size_t asked = vault_.Asked().size();
  EXPECT_EQ(asked, 0u) << "not before it is told to prepare";
  ASSERT_TRUE(worker_->Prepare().ok());
  vault_.Put(5, 6);
  EXPECT_TRUE(WaitUntil([&] { return Held() == std::vector<uint64_t>({1, 2, 5, 6}); }));
  EXPECT_TRUE(WaitUntil([&] { return vault_.Asked().back() == 6; })) << "only for what is new";
}

TEST_F(WorkerTest, AWorkerThatWaitsToServeLetsGoOfAMountThatWentAsItWasAdded) {
  options_.refresh_nanos = 1;
  options_.sync_every_refresh = 3;
  vault_.Put(1, 3);
  Start();
  ASSERT_TRUE(worker_->Prepare().ok());
  ASSERT_EQ(Held(), std::vector<uint64_t>({1, 2, 3}));
  {
    MutexLock lock(&vault_.mutex);
    std::erase(vault_.mounts, 2);  // and MountsGone came before
  }
  EXPECT_TRUE(WaitUntil([&] { return Held() == std::vector<uint64_t>({1, 3}); }));
}

TEST_F(WorkerTest, TheSnapshotsApiStartsOnceReadsAreServed) {
  options_.api_wait_nanos = 3'600'000'000'000;
  vault_.Put(1, 3);
  Connect();
  std::atomic<bool> running{false};
  std::thread run([&] {
    EXPECT_TRUE(worker_->Run(std::move(link_)).ok());
    running = true;
  });
  EXPECT_TRUE(WaitUntil([&] { return vault_.open.load(); }));
  EXPECT_FALSE(running);
  EXPECT_TRUE(worker_->Serve({}).ok());
  run.join();
  EXPECT_TRUE(worker_->TakeMetadata().ok());
}

TEST_F(WorkerTest, UnderASupervisorOfTheFirstProtocolItServesAndEndsAsBefore) {
  vault_.Put(1, 3);
  Start(kFirstProtocol);
  ASSERT_TRUE(worker_->Serve({}).ok());
  EXPECT_EQ(vault_.Asked(), std::vector<uint64_t>({0}));
  ASSERT_TRUE(worker_->TakeMetadata().ok());
  EXPECT_EQ(Lose(), AfterLoss::kServeOn);
  EXPECT_FALSE(*worker_->Reattaching()) << "the metadata is given up";
  EXPECT_EQ(worker_->HeldListener().status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(ends_, 0) << "its mounts are read on";
  worker_->MountsGone({1, 2, 3});
  EXPECT_TRUE(WaitUntil([&] { return ends_ > 0; }));
  EXPECT_EQ(exit_code_, 0);
}

TEST_F(WorkerTest, WhoNeverServedEndsWithItsSupervisor) {
  vault_.Put(1, 3);
  Start();
  ASSERT_TRUE(worker_->Prepare().ok());
  EXPECT_EQ(ends_, 0);
  Lose();
  EXPECT_EQ(exit_code_, 0);
  EXPECT_GE(ends_, 1);
}

TEST_F(WorkerTest, AServingWorkerKeepsTheMetadataAndLooksForTheNextSupervisor) {
  vault_.Put(1, 450);
  {
    MutexLock lock(&vault_.mutex);
    vault_.old_ledgers = {1};
  }
  Start();
  ASSERT_TRUE(worker_->Serve({}).ok());
  ASSERT_TRUE(worker_->TakeMetadata().ok());
  EXPECT_EQ(Lose(), AfterLoss::kReattach);
  EXPECT_TRUE(*worker_->Reattaching());
  EXPECT_EQ(ends_, 0);
  EXPECT_EQ(Held().size(), 450u) << "in pages";
  auto ledgers = worker_->HeldLedgers(0);
  ASSERT_TRUE(ledgers.ok()) << ledgers.status();
  ASSERT_EQ(ledgers->elements.size(), 2u);
  EXPECT_EQ(ledgers->elements[0].generation, 1u);
  EXPECT_EQ(ledgers->elements[1].generation, 2u) << "its own";
  EXPECT_EQ(ledgers->elements[1].pipes.size(), HF_LEDGER_SLOTS);
  struct stat held, own;
  auto listener = worker_->HeldListener();
  ASSERT_TRUE(listener.ok()) << listener.status();
  EXPECT_EQ(fstat(listener->get(), &held), 0);
  EXPECT_TRUE(S_ISSOCK(held.st_mode));
  EXPECT_EQ(fstat(ledgers->elements[1].memory.get(), &own), 0);
  EXPECT_EQ(own.st_size, HF_LEDGER_TOTAL_SIZE);
  // The next one takes it, and tells it to go on. It is the owner still.
  vault_.lost = false;
  worker_->Reattached(std::string(32, '2'));
  EXPECT_TRUE(worker_->Resume().ok());
  EXPECT_TRUE(worker_->TakeMetadata().ok()) << "again";
  EXPECT_EQ(Lose(), AfterLoss::kReattach);
  // A refusal leaves an orphan.
  worker_->ReattachRefused(InvalidArgument("unknown token"));
  EXPECT_FALSE(*worker_->Reattaching());
  EXPECT_FALSE(worker_->HeldListener().ok());
  EXPECT_EQ(ends_, 0);
  vault_.lost = false;
  EXPECT_EQ(Lose(), AfterLoss::kServeOn) << "nobody else is asked";
}

TEST_F(WorkerTest, WithoutMountsItWaitsForASupervisorOnlySoLong) {
  options_.orphan_limit_nanos = 300'000'000;
  Start();
  ASSERT_TRUE(worker_->Serve({}).ok());
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_EQ(Lose(), AfterLoss::kReattach);
  EXPECT_TRUE(WaitUntil([&] { return ends_ > 0; }));
  EXPECT_GE(std::chrono::steady_clock::now() - begin, std::chrono::milliseconds(300));
  EXPECT_EQ(exit_code_, 0);
}

TEST_F(WorkerTest, AParkedWorkerReadsAgainWhenItsSupervisorDies) {
  vault_.Put(1, 2);
  Start();
  ASSERT_TRUE(worker_->Serve({}).ok());
  ASSERT_TRUE(worker_->TakeMetadata().ok());
  ASSERT_TRUE(worker_->Park().ok());
  EXPECT_EQ(Lose(), AfterLoss::kReattach);
  EXPECT_TRUE(*worker_->Reattaching());
  // ForgetCached is refused while parked: it reads.
  EXPECT_TRUE(worker_->Distrust(3, UniqueFd(), std::string(32, '3')).ok());
}

TEST_F(WorkerTest, ATrialBeginsWithItsLogAndEndsInServingAsUsual) {
  vault_.Put(1, 2);
  Start();
  ASSERT_TRUE(worker_->Prepare().ok());
  EXPECT_FALSE(worker_->Serve({.trial = true, .touched = Memory(100), .takeover = {}}).ok())
      << "a log of the wrong size";
  UniqueFd touched = Memory(HF_TOUCHED_TOTAL_SIZE);
  hf_touched_header header{};
  header.magic = HF_TOUCHED_MAGIC;
  header.version = HF_TOUCHED_VERSION;
  header.header_size = sizeof header;
  header.entry_stride = sizeof(hf_touched_entry);
  header.capacity = HF_TOUCHED_ENTRIES;
  ASSERT_TRUE(PwriteFull(touched.get(), &header, sizeof header, 0).ok());
  absl::Status serving = worker_->Serve({.trial = true, .touched = std::move(touched), .takeover = {}});
  ASSERT_TRUE(serving.ok()) << serving;
  ASSERT_TRUE(worker_->TakeMetadata().ok());
  ASSERT_TRUE(worker_->EndTrial().ok());
  ASSERT_TRUE(worker_->Park().ok());
  ASSERT_TRUE(worker_->Resume().ok());
}

TEST_F(WorkerTest, PrivateMountsAreNotMissedInTheVaultsListAndGoWhenTold) {
  vault_.Put(1, 2);
  Start();
  ASSERT_TRUE(worker_->Prepare().ok());
  std::vector<handover::MountEntry> canaries;
  canaries.push_back(vault_.Entry(90));
  ASSERT_TRUE(worker_->AddMounts(std::move(canaries)).ok());
  ASSERT_TRUE(worker_->Prepare().ok()) << "again";
  EXPECT_EQ(Held(), std::vector<uint64_t>({1, 2, 90}));
  worker_->MountsGone({90});
  EXPECT_EQ(Held(), std::vector<uint64_t>({1, 2}));
}

TEST_F(WorkerTest, OnlyTheWorkerOfADrillMountsForHoldfastctl) {
  const std::string blob = vault_.Entry(1).blob;
  vault_.next_mount = 70;
  Start();
  ASSERT_TRUE(worker_->Serve({}).ok());
  const absl::Status refused = worker_->MountPrivate("0", blob).status();
  EXPECT_NE(FromAbsl(refused.message()).find("only the private instance of a drill"), std::string::npos);
  End();
  options_.drill = true;
  Start();
  ASSERT_TRUE(worker_->Serve({}).ok());
  EXPECT_FALSE(worker_->MountPrivate("../0", blob).ok());
  EXPECT_FALSE(worker_->MountPrivate("", blob).ok());
  auto path = worker_->MountPrivate("0", blob);
  ASSERT_TRUE(path.ok()) << path.status();
  EXPECT_EQ(*path, dir_.path() + "/state/drill/0");
  EXPECT_TRUE(PathExists(*path));
  EXPECT_EQ(Held(), std::vector<uint64_t>({70}));
  EXPECT_FALSE(worker_->MountPrivate("1", blob).ok()) << "the supervisor refuses";
  EXPECT_EQ(Held(), std::vector<uint64_t>({70}));
}

TEST_F(WorkerTest, AReplayOfAnUnknownMountIsSkippedAndOneThatDiffersIsNamed) {
  vault_.Put(1, 1);
  Start();
  ASSERT_TRUE(worker_->Prepare().ok());
  fuse_in_header request{};
  request.len = sizeof request + sizeof(fuse_getattr_in);
  request.opcode = FUSE_GETATTR;
  request.unique = 4;
  request.nodeid = 1;
  std::string bytes(static_cast<const char*>(static_cast<const void*>(&request)), sizeof request);
  bytes.append(sizeof(fuse_getattr_in), '\0');
  auto result = worker_->Replay({{77, bytes, std::string(32, 'x')}, {1, bytes, std::string(32, 'x')}});
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->skipped, 1u);
  EXPECT_EQ(result->different, std::vector<uint32_t>({1})) << "its layer is not there: EIO is another answer";
}

TEST_F(WorkerTest, AWorkerThatWaitsToServeLooksNeitherOldNorHeldBack) {
  Start();
  ASSERT_TRUE(worker_->Prepare().ok());
  handover::Health health = worker_->Ping();
  EXPECT_LT(health.loop_age_nanos, 5'000'000'000u);
  EXPECT_TRUE(health.held_back.empty());
}

// In a child, whose table of descriptors is as small as that of a program that has just been started.
TEST_F(WorkerTest, TheTableOfDescriptorsHasItsSizeBeforeThereAreThreads) {
  auto size = [] {
    const std::string status = ReadFile("/proc/self/status").value_or("");
    const size_t at = status.find("FDSize:");
    return at == std::string::npos ? 0 : std::stoi(status.substr(at + 7));
  };
  const pid_t child = fork();
  if (child == 0) {
    alarm(30);
    const int before = size();
    auto worker = Worker::Create(options_);
    _exit(!worker.ok() ? 1 : before == 0 || before >= 4096 ? 2 : size() >= 4096 ? 0 : 3);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

int UrgentThreads() {
  int urgent = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/task")) {
    urgent += IsUrgent(std::stoi(entry.path().filename()));
  }
  return urgent;
}

TEST_F(WorkerTest, WhatReadsWaitForIsUrgentAndSoonAfterItNoThreadIs) {
  vault_.Put(1, 1);
  options_.urgency = &urgency_;
  Start();
  EXPECT_EQ(UrgentThreads(), 0) << "nobody waits for a worker that is ready";
  ASSERT_TRUE(worker_->Serve({}).ok());
  // Where the kernel refuses it, to serve works all the same.
  const bool permitted = std::async(std::launch::async, [] { return BecomeUrgent().ok(); }).get();
  EXPECT_EQ(vault_.asked_urgently, permitted);
  while (UrgentThreads() != 0) usleep(1000);
}

TEST_F(WorkerTest, WhileASwapIsAheadOnlyThoseWhoExecuteRequestsAreUrgent) {
  vault_.Put(1, 1);
  options_.config.fuse.threads = 3;
  Start();
  ASSERT_TRUE(worker_->Serve({}).ok());
  const bool permitted = std::async(std::launch::async, [] { return BecomeUrgent().ok(); }).get();
  // What was urgent to serve is so for 0.2 s more.
  EXPECT_TRUE(WaitUntil([&] { return UrgentThreads() == 0; }));
  worker_->SwapAhead(/*over=*/false);
  EXPECT_TRUE(WaitUntil([&] { return UrgentThreads() == (permitted ? 3 : 0); }))
      << "also those that just begin";
  worker_->SwapAhead(/*over=*/true);
  EXPECT_EQ(UrgentThreads(), 0);
}

TEST_F(WorkerTest, NoThreadHidesFromTheSignalThatShowsItsStack) {
  vault_.Put(1, 1);
  Start();
  ASSERT_TRUE(worker_->Serve({}).ok());
  ASSERT_TRUE(worker_->TakeMetadata().ok());
  int threads = 0;
  for (const std::string& task : Tasks()) {
    if (tasks_before.contains(task) && !task.ends_with("/" + std::to_string(getpid()))) continue;
    // A thread that is just being made has every signal blocked until it runs (pthread_create(3) of glibc).
    const uint64_t deadline = Clock::Real()->BootNanos() + 10'000'000'000;
    std::string status;
    bool hides = true, alive = true;
    while (alive && hides && Clock::Real()->BootNanos() < deadline) {
      status = ReadFile(task + "/status").value_or("");
      const size_t at = status.find("SigBlk:\t");
      alive = at != std::string::npos;  // else it has just ended
      if (!alive) break;
      hides = (std::stoull(status.substr(at + 8), nullptr, 16) & (uint64_t{1} << (SIGQUIT - 1))) != 0;
      if (hides) std::this_thread::yield();
    }
    if (!alive) continue;
    threads++;
    EXPECT_FALSE(hides) << status;
  }
  EXPECT_GT(threads, 10);
}

TEST_F(WorkerTest, EveryStepOfTheProtocolHasAFaultPoint) {
  options_.fault_spec =
      "worker.register=eio;worker.prepare=eio;worker.samples=eio;worker.replay=eio;worker.add_mounts=eio;"
      "worker.end_trial=eio;worker.distrust=eio;worker.resume=eio;worker.reattach=eio;worker.serve=eio;"
      "worker.park=eio;worker.take_metadata=eio;worker.yield_metadata=eio";
  Start();
  EXPECT_FALSE(worker_->BeforeRegister().ok());
  EXPECT_FALSE(worker_->Prepare().ok());
  EXPECT_FALSE(worker_->Samples(1).ok());
  EXPECT_FALSE(worker_->Replay({}).ok());
  EXPECT_FALSE(worker_->AddMounts({}).ok());
  EXPECT_FALSE(worker_->EndTrial().ok());
  EXPECT_FALSE(worker_->Distrust(1, UniqueFd(), std::string(32, '1')).ok());
  EXPECT_FALSE(worker_->Resume().ok());
  EXPECT_FALSE(worker_->Reattaching().ok());
  EXPECT_FALSE(worker_->Serve({}).ok());
  EXPECT_FALSE(worker_->Park().ok());
  EXPECT_FALSE(worker_->TakeMetadata().ok());
  EXPECT_FALSE(worker_->YieldMetadata().ok());
}

}  // namespace
}  // namespace holdfast::app
