// A build that is tried before it is believed: what it answers before and on trial, how it is compared with
// its predecessor, and that nothing of it is left in the kernel when it was wrong.
#include <dirent.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>
#include <set>

#include "common/testing/time_limit.h"
#include "glog/logging.h"
#include "gtest/gtest.h"
#include "schema/probe.h"
#include "worker/fuse/fuse_bench.h"
#include "worker/fuse/ledger_view.h"
#include "worker/fuse/touched_log.h"

namespace holdfast::fuse {
namespace {

constexpr uint64_t kMiB = 1 << 20;
constexpr uint64_t kRoot = layer::kRootNode;
enum Node : uint64_t { kMissing = 2, kStored, kOther, kFolder, kInFolder, kLink };

#define EXIT_UNLESS(condition) \
  if (!(condition)) return __LINE__ % 250 + 1

std::shared_ptr<FakeIndex> MakeIndex(uint64_t) {
  auto index = std::make_shared<FakeIndex>();
  index->Add(kRoot, "missing", S_IFREG | 0644, 16 * kMiB);
  index->Add(kRoot, "stored", S_IFREG | 0644, kMiB);
  index->Add(kRoot, "other", S_IFREG | 0644, kMiB);
  index->Add(kRoot, "folder", S_IFDIR | 0755);
  index->Add(kFolder, "in-folder", S_IFREG | 0644, 100);
  index->AddSymlink(kRoot, "link", "folder/in-folder");
  for (int i = 0; i < 50; i++) index->Add(kFolder, "name-" + std::to_string(i), S_IFREG | 0600, 1);
  index->SetXattr(kStored, "user.one", "value");
  return index;
}

void Prepare(uint64_t, FakeLayer& layer) {
  for (uint64_t node : {kStored, kOther, kInFolder}) layer.Store(node, Stored::kFile);
}

int CountNames(const std::string& path) {
  DIR* dir = opendir(path.c_str());
  if (dir == nullptr) return -errno;
  int names = 0;
  while (readdir(dir) != nullptr) names++;
  closedir(dir);
  return names;
}

class FuseTrialTest : public testing::Test {
 protected:
  static ServerSetup NewSetup(uint64_t generation, const std::string& faults = "") {
    ServerSetup setup;
    setup.generation = generation;
    setup.index = MakeIndex;
    setup.prepare = Prepare;
    setup.faults = faults;
    return setup;
  }
  std::unique_ptr<ServerProcess> Start(const ServerSetup& setup) {
    auto server = std::make_unique<ServerProcess>(bench_, setup);
    EXPECT_EQ(server->Call("start"), "ok");
    return server;
  }
  std::unique_ptr<ServerProcess> StartOnTrial(const ServerSetup& setup) {
    auto server = std::make_unique<ServerProcess>(bench_, setup);
    EXPECT_EQ(server->Call("trial 1"), "ok");
    EXPECT_EQ(server->Call("start"), "ok");
    return server;
  }
  std::unique_ptr<ChildProcess> Reader(const std::function<int()>& body) {
    return std::make_unique<ChildProcess>([&] {
      bench_.CloseDevices();
      return body();
    });
  }
  int Read(const std::function<int()>& body, double seconds = 20) { return Reader(body)->Wait(seconds); }
  std::map<uint64_t, std::set<uint64_t>> Touched() {
    auto log = TouchedLog::Map(bench_.touched);
    EXPECT_TRUE(log.ok()) << log.status();
    auto nodes = (*log)->Nodes();
    EXPECT_TRUE(nodes.has_value());
    return nodes.value_or(std::map<uint64_t, std::set<uint64_t>>());
  }

  Bench bench_;
};

// A container's programs read, list and map while the build on trial is wrong; it is ended, and its
// predecessor goes on.
class RollbackTest : public FuseTrialTest, public testing::WithParamInterface<bool> {
 protected:
  void SetUp() override {
    MountFlags flags;
    flags.zero_open = GetParam();
    bench_.Mount(flags);
    bench_.MakeLedger(2);  // before the first server is forked, which adopts from it later
    bench_.MakeTouched();
    first_ = Start(NewSetup(1));
    overlay_ = bench_.MountOverlay(bench_.mounts[100]);
    ASSERT_EQ(pipe2(wrong_seen_, O_CLOEXEC), 0);
    ASSERT_EQ(pipe2(rolled_back_, O_CLOEXEC), 0);
  }
  // In the reader.
  void SayAllWasWrong() { (void)!write(wrong_seen_[1], "x", 1); }
  void WaitForRollback() {
    char byte;
    (void)!read(rolled_back_[0], &byte, 1);
  }
  // Runs a reader over trial and rollback; what it ends with.
  int RunReader(const std::string& faults, const std::function<int()>& body) {
    EXPECT_EQ(first_->Call("park"), "ok");
    auto second = StartOnTrial(NewSetup(2, faults));
    auto reader = Reader(body);
    char byte;
    pollfd seen{wrong_seen_[0], POLLIN, 0};
    if (poll(&seen, 1, 10'000) != 1 || read(wrong_seen_[0], &byte, 1) != 1) return reader->Wait(0);
    second->Kill();
    EXPECT_EQ(first_->Call("resume"), "ok");
    auto adopted = first_->Call("adopt 2 1");
    EXPECT_TRUE(adopted.starts_with("ok")) << adopted;
    EXPECT_GT(first_->Number("forget 1"), 0u);
    EXPECT_EQ(write(rolled_back_[1], "x", 1), 1);
    return reader->Wait(20);
  }

  std::unique_ptr<ServerProcess> first_;
  std::string overlay_;
  int wrong_seen_[2], rolled_back_[2];
};
INSTANTIATE_TEST_SUITE_P(OpenedAndZeroOpen, RollbackTest, testing::Bool());

TEST_P(RollbackTest, WrongBytesAreGoneFromReadsAndMapsAlsoThroughAnOverlay) {
  {
    int result = RunReader("fuse.trial_wrong_bytes=wrong@0", [&] {
      std::string direct = bench_.mounts[100].path + "/stored", container = overlay_ + "/other";
      void* maps[2];
      int files[2];
      int i = 0;
      for (const std::string& path : {direct, container}) {
        files[i] = open(path.c_str(), O_RDONLY);
        EXIT_UNLESS(files[i] >= 0);
        maps[i] = mmap(nullptr, kMiB, PROT_READ, MAP_SHARED, files[i], 0);
        EXIT_UNLESS(maps[i] != MAP_FAILED);
        i++;
      }
      std::string stored = ContentBytes(kStored, 0, kMiB), other = ContentBytes(kOther, 0, kMiB);
      EXIT_UNLESS(memcmp(maps[0], stored.data(), kMiB) != 0);
      EXIT_UNLESS(memcmp(maps[1], other.data(), kMiB) != 0);
      EXIT_UNLESS(CheckFile(direct, kStored, 0, kMiB) == 200);
      EXIT_UNLESS(CheckFile(container, kOther, 0, kMiB) == 200);
      SayAllWasWrong();
      WaitForRollback();
      EXIT_UNLESS(memcmp(maps[0], stored.data(), kMiB) == 0);
      EXIT_UNLESS(memcmp(maps[1], other.data(), kMiB) == 0);
      std::string bytes(kMiB, '\0');
      EXIT_UNLESS(pread(files[0], bytes.data(), kMiB, 0) == static_cast<ssize_t>(kMiB) && bytes == stored);
      EXIT_UNLESS(pread(files[1], bytes.data(), kMiB, 0) == static_cast<ssize_t>(kMiB) && bytes == other);
      EXIT_UNLESS(CheckFile(direct, kStored, 0, kMiB) == 0);
      EXIT_UNLESS(CheckFile(container, kOther, 0, kMiB) == 0);
      return 0;
    });
    EXPECT_EQ(result, 0);
  }
}

TEST_P(RollbackTest, WrongListingsAndNamesAreGone) {
  EXPECT_EQ(RunReader("fuse.trial_wrong_listing=wrong@0;fuse.trial_wrong_enoent=wrong@0",
                      [&] {
                        std::string root = bench_.mounts[100].path;
                        struct stat st;
                        EXIT_UNLESS(CountNames(root) == 6);
                        EXIT_UNLESS(stat((root + "/stored").c_str(), &st) != 0 && errno == ENOENT);
                        SayAllWasWrong();
                        WaitForRollback();
                        EXIT_UNLESS(CountNames(root) == 7);
                        EXIT_UNLESS(stat((root + "/stored").c_str(), &st) == 0);
                        return 0;
                      }),
            0);
}

TEST_P(RollbackTest, WrongListingsAndNamesAreGoneThroughAnOverlay) {
  EXPECT_EQ(RunReader("fuse.trial_wrong_listing=wrong@0;fuse.trial_wrong_enoent=wrong@0",
                      [&] {
                        struct stat st;
                        EXIT_UNLESS(CountNames(overlay_) == 6);
                        EXIT_UNLESS(stat((overlay_ + "/stored").c_str(), &st) != 0 && errno == ENOENT);
                        SayAllWasWrong();
                        WaitForRollback();
                        EXIT_UNLESS(CountNames(overlay_) == 7);
                        EXIT_UNLESS(stat((overlay_ + "/stored").c_str(), &st) == 0);
                        return 0;
                      }),
            0);
}

// The overlay holds the layer's dentry, and asks the build on trial whether it is still good.
TEST_P(RollbackTest, ANameThatWasFoundAndThenLostOnTrialIsThereAgain) {
  ASSERT_EQ(first_->Call("park"), "ok");
  auto second = StartOnTrial(NewSetup(2));
  auto look = [&] {
    struct stat st;
    return stat((overlay_ + "/stored").c_str(), &st) == 0 ? 0 : errno;
  };
  EXPECT_EQ(Read(look), 0);
  ASSERT_EQ(second->Call("fault fuse.trial_wrong_enoent=wrong@0"), "ok");
  EXPECT_NE(Read(look), 0);
  second->Kill();
  ASSERT_EQ(first_->Call("resume"), "ok");
  EXPECT_TRUE(first_->Call("adopt 2 1").starts_with("ok"));
  EXPECT_GT(first_->Number("forget 1"), 0u);
  EXPECT_EQ(Read(look), 0);
  EXPECT_EQ(Read([&] { return CheckFile(overlay_ + "/stored", kStored, 0, kMiB); }), 0);
}

TEST_P(RollbackTest, WithoutALogAndWithOneThatOverflowedEverythingIsForgotten) {
  auto* header = static_cast<hf_touched_header*>(
      mmap(nullptr, sizeof(hf_touched_header), PROT_READ | PROT_WRITE, MAP_SHARED, bench_.touched.get(), 0));
  ASSERT_NE(header, MAP_FAILED);
  header->capacity = 1;
  munmap(header, sizeof *header);
  for (bool overflowed : {false, true}) {
    ASSERT_EQ(first_->Call("park"), "ok");
    uint64_t generation = overflowed ? 4 : 3;
    auto second =
        std::make_unique<ServerProcess>(bench_, NewSetup(generation, "fuse.trial_wrong_bytes=wrong@0"));
    ASSERT_EQ(second->Call(overflowed ? "trial 1" : "trial 0"), "ok");
    ASSERT_EQ(second->Call("start"), "ok");
    std::string path = bench_.mounts[100].path + (overflowed ? "/other" : "/stored");
    uint64_t node = overflowed ? kOther : kStored;
    EXPECT_EQ(Read([&] { return CheckFile(path, node, 0, kMiB); }), 200);
    second->Kill();
    if (overflowed) {
      auto log = TouchedLog::Map(bench_.touched);
      ASSERT_TRUE(log.ok());
      EXPECT_FALSE((*log)->Nodes().has_value());
    }
    ASSERT_EQ(first_->Call("resume"), "ok");
    EXPECT_GT(first_->Number(overflowed ? "forget 1" : "forget 0"), 0u);
    EXPECT_GT(first_->Number("forget 0"), 0u) << "it may be repeated";
    EXPECT_EQ(Read([&] { return CheckFile(path, node, 0, kMiB); }), 0);
  }
}

TEST_F(FuseTrialTest, OnTrialTheKernelAsksAgainAndAfterwardsItKeepsWhatItHears) {
  std::string root = bench_.Mount().path;
  bench_.MakeTouched();
  auto server = StartOnTrial(NewSetup(2));
  auto use = [&] {
    struct stat st;
    EXIT_UNLESS(stat((root + "/folder/in-folder").c_str(), &st) == 0);
    EXIT_UNLESS(stat((root + "/absent").c_str(), &st) != 0 && errno == ENOENT);
    EXIT_UNLESS(CountNames(root + "/folder") == 53);
    return CheckFile(root + "/stored", kStored, 0, 65536);
  };
  // A second run on trial asks for every name, attribute and byte once more; after the trial the third run
  // fills the caches, and the fourth asks for next to nothing (OPEN and RELEASE).
  uint64_t requests[5];
  requests[0] = server->Stats()["requests"];
  EXPECT_EQ(Read(use), 0);
  requests[1] = server->Stats()["requests"];
  EXPECT_EQ(Read(use), 0);
  requests[2] = server->Stats()["requests"];
  ASSERT_EQ(server->Call("endtrial"), "ok");
  EXPECT_EQ(Read(use), 0);
  requests[3] = server->Stats()["requests"];
  EXPECT_EQ(Read(use), 0);
  requests[4] = server->Stats()["requests"];
  EXPECT_GE(requests[2] - requests[1], 5u);
  EXPECT_LE(requests[4] - requests[3], 2u);
  auto nodes = Touched()[100];
  for (uint64_t node : {uint64_t{0}, kRoot, uint64_t{kStored}, uint64_t{kFolder}, uint64_t{kInFolder}}) {
    EXPECT_TRUE(nodes.contains(node)) << node;
  }
  EXPECT_FALSE(nodes.contains(kMissing));
}

TEST_F(FuseTrialTest, AReadThatWaitedAndIsAnsweredOnTrialIsNoted) {
  std::string root = bench_.Mount().path;
  bench_.MakeTouched();
  ServerSetup setup = NewSetup(1);
  auto first = std::make_unique<ServerProcess>(bench_, setup);
  ASSERT_EQ(first->Call("hold 100 1"), "ok");
  ASSERT_EQ(first->Call("start"), "ok");
  auto reader = Reader([&] { return CheckFile(root + "/missing", kMissing, 0, 4096, true); });
  ASSERT_TRUE(Eventually([&] { return first->Number("waiting 100") == 1; }));
  ASSERT_EQ(first->Call("park"), "ok");
  auto second = std::make_unique<ServerProcess>(bench_, NewSetup(2));
  ASSERT_EQ(second->Call("trial 1"), "ok");
  EXPECT_EQ(second->Number("adopt 1 0"), 1u);
  ASSERT_EQ(second->Call("start"), "ok");
  EXPECT_EQ(reader->Wait(10), 0);
  EXPECT_TRUE(Touched()[100].contains(kMissing));
}

TEST_F(FuseTrialTest, ATrialNeedsAReadableLogAndAServerNotYetStarted) {
  bench_.Mount();
  bench_.touched.Reset(eventfd(0, EFD_CLOEXEC));
  ServerProcess server(bench_, NewSetup(2));
  EXPECT_FALSE(server.Call("trial 1").starts_with("ok"));
  EXPECT_EQ(server.Call("trial 0"), "ok");
  EXPECT_FALSE(server.Call("forget 0").starts_with("ok")) << "nobody would answer the reads it waits for";
  ASSERT_EQ(server.Call("start"), "ok");
  EXPECT_FALSE(server.Call("trial 0").starts_with("ok"));
}

// How many mounts a server has in its epoll.
int ArmedMounts(const ServerProcess& server) {
  std::string folder =
      "/proc/" + std::to_string(const_cast<ServerProcess&>(server).process().pid()) + "/fdinfo";
  DIR* dir = opendir(folder.c_str());
  PCHECK(dir != nullptr);
  int armed = 0;
  while (dirent* entry = readdir(dir)) {
    auto info = ReadFile(folder + "/" + entry->d_name);
    if (!info.ok()) continue;
    for (size_t at = info->find("tfd:"); at != std::string::npos; at = info->find("tfd:", at + 1)) armed++;
  }
  closedir(dir);
  return armed - 1;  // the eventfd that ends the pool
}

TEST_F(FuseTrialTest, BeforeTheStartOnlyPrivateMountsAreRead) {
  std::string shared = bench_.Mount().path, canary = bench_.Mount().path;
  ServerSetup setup = NewSetup(2);
  setup.serve_now = {101};
  ServerProcess candidate(bench_, setup);
  EXPECT_EQ(Read([&] { return CheckFile(canary + "/stored", kStored, 0, kMiB); }), 0);
  EXPECT_EQ(ArmedMounts(candidate), 1);
  auto reader = Reader([&] { return CheckFile(shared + "/stored", kStored, 0, kMiB); });
  ASSERT_TRUE(bench_.WaitReadable(bench_.mounts[100], 5));
  EXPECT_EQ(reader->Wait(0.1), -1);
  ASSERT_EQ(candidate.Call("start"), "ok");
  EXPECT_EQ(reader->Wait(10), 0);
  EXPECT_EQ(ArmedMounts(candidate), 2);
  ASSERT_EQ(candidate.Call("park"), "ok");
  // Its caller does not wait for that.
  EXPECT_TRUE(Eventually([&] { return ArmedMounts(candidate) == 0; }));
  ASSERT_EQ(candidate.Call("resume"), "ok");
  EXPECT_EQ(ArmedMounts(candidate), 2);
}

TEST_F(FuseTrialTest, AThousandMountsCostNothingUntilTheStartAndAreThenReadAtOnce) {
  for (int i = 0; i < 1000; i++) bench_.Mount();
  ServerProcess server(bench_, NewSetup(2));
  EXPECT_EQ(server.Call("heldback"), "ok");
  EXPECT_EQ(ArmedMounts(server), 0);
  auto before = std::chrono::steady_clock::now();
  ASSERT_EQ(server.Call("start"), "ok");
  auto took = std::chrono::steady_clock::now() - before;
  EXPECT_EQ(ArmedMounts(server), 1000);
  EXPECT_LT(took, kTimeFactor * std::chrono::milliseconds(500));
  RecordProperty("start_us",
                 static_cast<int>(std::chrono::duration_cast<std::chrono::microseconds>(took).count()));
  std::string last = bench_.mounts.rbegin()->second.path;
  EXPECT_EQ(Read([&] { return CheckFile(last + "/stored", kStored, 0, 4096); }), 0);
}

TEST_F(FuseTrialTest, TheLiveProbeNamesTheGenerationAndBuildAndNothingElseAnswersIt) {
  std::string root = bench_.Mount().path;
  auto server = Start(NewSetup(7));
  EXPECT_EQ(Read([&] {
              hf_probe_live live;
              int fd = open(root.c_str(), O_RDONLY | O_DIRECTORY);
              EXIT_UNLESS(ioctl(fd, HF_PROBE_LIVE, &live) == 0);
              EXIT_UNLESS(live.generation == 7 && std::string(live.build) == "build-7");
              EXIT_UNLESS(ioctl(fd, _IOR('H', 0x47, hf_probe_live), &live) != 0 && errno == ENOTTY);
              fd = open((root + "/folder").c_str(), O_RDONLY | O_DIRECTORY);
              EXIT_UNLESS(ioctl(fd, HF_PROBE_LIVE, &live) != 0 && errno == ENOTTY);
              fd = open((root + "/stored").c_str(), O_RDONLY);
              EXIT_UNLESS(ioctl(fd, HF_PROBE_LIVE, &live) != 0 && errno == ENOTTY);
              return 0;
            }),
            0);
}

}  // namespace
}  // namespace holdfast::fuse
