// What the verifier sees of plain folders and real FUSE mounts, and of builds that test themselves.

#include <dirent.h>
#include <fcntl.h>
#include <kj/async-io.h>
#include <linux/fuse.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <fstream>
#include <functional>
#include <thread>

#include "absl/strings/escaping.h"
#include "common/fuse_mount.h"
#include "common/sha256.h"
#include "common/testing/processes.h"
#include "common/testing/time_limit.h"
#include "gtest/gtest.h"
#include "schema/probe.h"
#include "verifier/self_test.h"
#include "verifier/swap_checks.h"

namespace holdfast::verifier {
namespace {

using std::chrono::steady_clock;

std::string Digest(const std::string& text) {
  Sha256 hash;
  hash.Update(text.data(), text.size());
  return absl::HexStringToBytes(hash.FinishHex());
}

size_t CountFds() {
  size_t count = 0;
  DIR* folder = opendir("/proc/self/fd");
  while (readdir(folder) != nullptr) ++count;
  closedir(folder);
  return count;
}

bool Eventually(const std::function<bool()>& condition) {
  auto end = steady_clock::now() + kTimeFactor * std::chrono::seconds(10);
  while (!condition()) {
    if (steady_clock::now() > end) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return true;
}

// A real FUSE mount, unmounted and its connection ended by the destructor. Served only after Serve().
class TestMount {
 public:
  TestMount() {
    EXPECT_TRUE(MakeDirs(path()).ok());
    auto state = OpenFile(dir_.path(), O_PATH | O_DIRECTORY);
    constexpr uint64_t kIoctlDir = 1u << 11;  // FUSE_HAS_IOCTL_DIR
    device_ = OpenFuseDevice().value_or(UniqueFd());
    auto mount = MountFuse(device_.get(), state->get(), dir_.path(), path(), {.flags = kIoctlDir});
    EXPECT_TRUE(mount.ok()) << mount.status();
  }
  ~TestMount() { End(); }
  void End() {
    stop_ = true;
    umount2(path().c_str(), MNT_DETACH);
    if (thread_.joinable()) thread_.join();
    device_.Reset();  // the last descriptor: whoever waits gets an error
  }
  int device() const { return device_.get(); }
  std::string path() const { return dir_.path() + "/mnt"; }
  // Answers OPENDIR, GETATTR, and the live probe with `generation` (0: with ENOTTY).
  void Serve(uint64_t generation) {
    thread_ = std::thread([this, generation] {
      while (!stop_) {
        char buffer[65536];
        ssize_t got = read(device_.get(), buffer, sizeof(buffer));
        if (got > 0) Answer(buffer, generation);
        if (got < 0) usleep(500);
      }
    });
  }

 private:
  void Answer(const char* request, uint64_t generation) {
    fuse_in_header in;
    memcpy(&in, request, sizeof(in));
    if (in.opcode == FUSE_FORGET || in.opcode == FUSE_INTERRUPT) return;
    fuse_out_header header{.len = sizeof(header), .error = 0, .unique = in.unique};
    std::string body;
    auto append = [&](const auto& value) {
      body.append(reinterpret_cast<const char*>(&value), sizeof(value));
    };
    if (in.opcode == FUSE_OPENDIR) {
      append(fuse_open_out{});
    } else if (in.opcode == FUSE_GETATTR) {
      fuse_attr_out out{};
      out.attr.ino = 1;
      out.attr.mode = S_IFDIR | 0755;
      append(out);
    } else if (in.opcode == FUSE_IOCTL && generation != 0) {
      hf_probe_live live{};
      live.generation = generation;
      append(fuse_ioctl_out{});
      append(live);
    } else {
      header.error = in.opcode == FUSE_IOCTL ? -ENOTTY : -ENOSYS;
    }
    header.len += static_cast<uint32_t>(body.size());
    body.insert(0, reinterpret_cast<const char*>(&header), sizeof(header));
    EXPECT_EQ(write(device_.get(), body.data(), body.size()), static_cast<ssize_t>(body.size()));
  }

  TempDir dir_;
  UniqueFd device_;
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

class VerifierTest : public ::testing::Test {
 protected:
  VerifierTest() : io_(kj::setupAsyncIo()) {
    content_ = std::string(100'000, 'a') + "end";
    std::ofstream(dir_.path() + "/file", std::ios::binary) << content_;
    EXPECT_TRUE(MakeDirs(dir_.path() + "/folder/sub").ok());
    std::ofstream(dir_.path() + "/folder/\xff\n name") << "x";
  }
  ~VerifierTest() noexcept override {}
  static UniqueFd Open(const std::string& path) {
    auto file = OpenFile(path, O_RDONLY);
    EXPECT_TRUE(file.ok()) << file.status();
    return file.ok() ? std::move(*file) : UniqueFd();
  }
  absl::StatusOr<std::string> Probe(const ProbeRequest& request, uint64_t deadline_ms = 5'000) {
    return CheckMountsWithin(io_.provider->getTimer(), request, deadline_ms).wait(io_.waitScope);
  }
  absl::StatusOr<std::string> ProbeFiles(std::vector<ProbeFile> files) {
    return Probe({.mounts = {{.id = 7, .root = dir_.path(), .files = std::move(files)}}});
  }
  std::string ErrorOf(ProbeFile file) { return ProbeFiles({std::move(file)}).status().ToString(); }
  // What a build does that behaves as `mode` says when it is asked to test itself.
  SelfTestResult SelfTest(const std::string& mode, uint64_t deadline_ms) {
    std::string path = dir_.path() + "/worker";
    auto program = ReadFile(Bin("holdfast-fake-worker"));
    std::ofstream(path, std::ios::binary) << *program << "\n#1 HFMODE:" << mode << "\n";
    chmod(path.c_str(), 0755);
    return RunSelfTest(Open(path).get(), deadline_ms);
  }

  TempDir dir_;
  std::string content_;
  kj::AsyncIoContext io_;
};

TEST_F(VerifierTest, WhatIsAsExpectedIsCountedAndLeavesNoDescriptor) {
  std::vector<ProbeFile> files = {
      {.path = "file", .length = content_.size(), .digest = Digest(content_)},
      {.path = "file", .offset = 99'999, .length = 3, .digest = Digest("aen")},
      {.kind = ProbeKind::kFolder, .path = "folder", .digest = Digest(std::string("sub\0\xff\n name\0", 12))},
      {.kind = ProbeKind::kFolder, .digest = Digest(std::string("file\0folder\0", 12))},
      {.path = "folder/\xff\n name", .length = 1, .digest = Digest("x")},
      {.kind = ProbeKind::kAbsent, .path = "missing"}};
  auto first = ProbeFiles(files);
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ(*first, "checked=6 skipped=0");
  size_t fds = CountFds();
  for (int i = 0; i < 20; ++i) ASSERT_TRUE(ProbeFiles(files).ok());
  EXPECT_EQ(CountFds(), fds);
}

TEST_F(VerifierTest, EveryDifferenceIsNamedWithMountAndPath) {
  EXPECT_NE(ErrorOf({.path = "file", .length = 3, .digest = Digest("aab")})
                .find("mount 7: " + dir_.path() + "/file: its content is not that expected"),
            std::string::npos);
  EXPECT_NE(ErrorOf({.path = "file", .length = content_.size() + 1, .digest = Digest(content_)})
                .find("/file: it ends at offset 100003"),
            std::string::npos);
  EXPECT_NE(ErrorOf({.path = "none", .length = 1, .digest = Digest("a")}).find("/none: open: No such file"),
            std::string::npos);
  EXPECT_NE(ErrorOf({.kind = ProbeKind::kFolder, .path = "folder", .digest = Digest(std::string("sub\0", 4))})
                .find("/folder: its names are not those expected"),
            std::string::npos);
  EXPECT_NE(
      ErrorOf({.kind = ProbeKind::kAbsent, .path = "folder/sub"}).find("/folder/sub: it exists and must not"),
      std::string::npos);
}

TEST_F(VerifierTest, NothingOutsideTheMountIsRead) {
  TempDir outside;
  std::ofstream(outside.path() + "/secret") << "s";
  ASSERT_EQ(symlink(outside.path().c_str(), (dir_.path() + "/link").c_str()), 0);
  EXPECT_NE(ErrorOf({.path = "link/secret", .length = 1, .digest = Digest("s")}).find("symbolic"),
            std::string::npos);
  EXPECT_FALSE(
      ProbeFiles({{.path = "../" + outside.path().substr(5) + "/secret", .length = 1, .digest = Digest("s")}})
          .ok());
  ASSERT_EQ(mount(outside.path().c_str(), (dir_.path() + "/folder/sub").c_str(), nullptr, MS_BIND, nullptr),
            0);
  EXPECT_NE(ErrorOf({.path = "folder/sub/secret", .length = 1, .digest = Digest("s")}).find("cross-device"),
            std::string::npos);
  umount2((dir_.path() + "/folder/sub").c_str(), MNT_DETACH);
}

TEST_F(VerifierTest, ASampleThatNoPathCanBeIsADifference) {
  EXPECT_FALSE(ProbeFiles({{.path = std::string("a\0b", 3), .digest = Digest("")}}).ok());
  EXPECT_FALSE(ProbeFiles({{.path = "file", .digest = "short"}}).ok());
}

TEST_F(VerifierTest, TheLiveProbeWantsTheGenerationAskedFor) {
  TestMount mount;
  mount.Serve(42);
  auto ask = [&](uint64_t generation) {
    return Probe({.mounts = {{.id = 9, .root = mount.path(), .generation = generation}}});
  };
  auto right = ask(42);
  ASSERT_TRUE(right.ok()) << right.status();
  EXPECT_EQ(*right, "checked=1 skipped=0");
  EXPECT_NE(ask(43).status().ToString().find("generation 42 answers, not 43"), std::string::npos);
}

TEST_F(VerifierTest, AMountWithoutAProbeIsSkippedOnlyWhenThatWasExpected) {
  TestMount mount;
  mount.Serve(0);
  ProbeMount live{.id = 9, .root = mount.path(), .generation = 42};
  EXPECT_NE(Probe({.mounts = {live}}).status().ToString().find("live probe: Inappropriate ioctl"),
            std::string::npos);
  live.may_be_unsupported = true;
  auto skipped = Probe({.mounts = {live}});
  ASSERT_TRUE(skipped.ok()) << skipped.status();
  EXPECT_EQ(*skipped, "checked=0 skipped=1");
  auto unmounted = Probe({.mounts = {{.id = 10, .root = dir_.path(), .generation = 42}}});
  ASSERT_TRUE(unmounted.ok()) << "no mount any more: " << unmounted.status();
  EXPECT_EQ(*unmounted, "checked=0 skipped=1");
}

TEST_F(VerifierTest, AMountThatNobodyServesIsNamedAtTheDeadlineAndKeepsOnlyItsThread) {
  size_t fds = CountFds();
  {
    TestMount mount;
    auto begin = steady_clock::now();
    ProbeRequest request{.mounts = {{.id = 1, .root = dir_.path()}, {.id = 12, .root = mount.path()}}};
    auto result = Probe(request, 300);
    EXPECT_EQ(result.status().code(), absl::StatusCode::kDeadlineExceeded);
    EXPECT_NE(result.status().ToString().find("did not answer within 300 ms; it was at mount 12"),
              std::string::npos)
        << result.status();
    EXPECT_LT(steady_clock::now() - begin, std::chrono::seconds(3));
    EXPECT_TRUE(ProbeFiles({{.kind = ProbeKind::kAbsent, .path = "x"}}).ok()) << "the loop goes on";
  }
  EXPECT_TRUE(Eventually([&] { return CountFds() == fds; })) << "the thread ended with the mount";
}

TEST_F(VerifierTest, ASelfTestTellsWhetherABuildStarts) {
  SelfTestResult good = SelfTest("good", 5'000);
  EXPECT_TRUE(good.passed);
  EXPECT_EQ(good.output, "self-test of fake good");
  SelfTestResult bad = SelfTest("fail-self-test", 5'000);
  EXPECT_FALSE(bad.passed);
  EXPECT_EQ(bad.output, "the self-test ended with exit 1: self-test of fake fail-self-test");
  SelfTestResult hanging = SelfTest("hang-self-test", 300);
  EXPECT_FALSE(hanging.passed);
  EXPECT_EQ(hanging.output, "the self-test did not end within 300 ms: ");
  EXPECT_TRUE(Children().empty());
  std::ofstream(dir_.path() + "/text") << "no program";
  chmod((dir_.path() + "/text").c_str(), 0755);
  EXPECT_NE(RunSelfTest(Open(dir_.path() + "/text").get()).output.find("Exec format error"),
            std::string::npos);
}

TEST_F(VerifierTest, NothingThatASelfTestStartedOutlivesIt) {
  ASSERT_EQ(prctl(PR_SET_CHILD_SUBREAPER, 1), 0);  // what it leaves behind becomes our child
  for (const std::string mode : {"fork-self-test", "fork-hang-self-test"}) {
    const SelfTestResult result = SelfTest(mode, 2'000);
    EXPECT_EQ(result.passed, mode == "fork-self-test") << result.output;
    const size_t at = result.output.find("child ");
    ASSERT_NE(at, std::string::npos) << result.output;
    const pid_t child = atoi(result.output.c_str() + at + 6);
    int status = 0;
    EXPECT_TRUE(Eventually([&] { return waitpid(child, &status, WNOHANG) == child; })) << mode;
    if (status == 0) {
      kill(child, SIGKILL);
      waitpid(child, nullptr, 0);
    }
    EXPECT_TRUE(WIFSIGNALED(status)) << mode;
  }
  prctl(PR_SET_CHILD_SUBREAPER, 0);
}

}  // namespace
}  // namespace holdfast::verifier
