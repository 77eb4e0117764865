#include "worker/ctl/drill.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "gtest/gtest.h"
#include "worker/ctl/canary_reader.h"
#include "worker/ctl/private_node.h"

namespace holdfast::ctl {
namespace {

LayerInfo Layer(const std::string& digest, uint64_t cached, uint64_t content, uint64_t files = 1) {
  LayerInfo layer;
  layer.digest = digest;
  layer.cached_bytes = cached;
  layer.content_bytes = content;
  layer.files = files;
  return layer;
}

TEST(DrillTest, CompleteAndSmallLayersAreChosenAndEmptyOnesNever) {
  std::vector<LayerInfo> chosen = ChooseLayers(
      {Layer("half", 50, 100), Layer("nothing", 0, 100), Layer("whole", 100, 100),
       Layer("huge", 1ull << 30, 1ull << 30), Layer("small", 10, 10), Layer("no files", 5, 5, 0)},
      3);
  ASSERT_EQ(chosen.size(), 3u);
  EXPECT_EQ(chosen[0].digest, "small");
  EXPECT_EQ(chosen[1].digest, "whole");
  EXPECT_EQ(chosen[2].digest, "half");
  EXPECT_EQ(ChooseLayers({Layer("huge", 1ull << 30, 1ull << 30)}, 3).size(), 1u);
}

DrillReport Example() {
  DrillReport report;
  report.layers = {"sha256:abc"};
  report.files = 64;
  report.cases = {{"swap", "", "128 requests compared", 1'500'000, 3'000'000, 500, 0},
                  {"refusal", "", "refused at step start", 0, 900'000, 400, 0}};
  return report;
}

TEST(DrillTest, EachCaseIsOneLine) {
  const DrillReport report = Example();
  EXPECT_EQ(
      DrillBeginText(report),
      "64 files of 1 layer of this node, read without pause on a private instance; no container is touched\n"
      "CASE       RESULT     PAUSE    READS  FAILED  LONGEST WAIT\n");
  EXPECT_EQ(DrillCaseText(report.cases[0]),
            "swap       ok        1.5 ms      500       0        3.0 ms  128 requests compared\n");
  EXPECT_EQ(DrillCaseText(report.cases[1]),
            "refusal    ok             -      400       0        900 us  refused at step start\n");
  EXPECT_EQ(DrillEndText(report), "every read was answered, with the right bytes\n");
  EXPECT_EQ(nlohmann::json::parse(DrillJson(report))["cases"][0]["longest_wait_ns"], 3'000'000);
}

TEST(DrillTest, AFailedReadFailsTheDrillAndShowsTheLog) {
  DrillReport report = Example();
  EXPECT_TRUE(report.ok());
  report.cases[0].failed_reads = 1;
  report.cases[0].failure = "/x: Input/output error";
  report.log = "line\n";
  EXPECT_FALSE(report.ok());
  EXPECT_EQ(DrillCaseText(report.cases[0]),
            "swap       FAILED    1.5 ms      500       1        3.0 ms  /x: Input/output error\n");
  EXPECT_NE(DrillEndText(report).find("FAILED"), std::string::npos);
  EXPECT_EQ(nlohmann::json::parse(DrillJson(report))["ok"], false);
  EXPECT_FALSE(DrillReport().ok()) << "nothing was proven";
}

class PrivateNodeTest : public ::testing::Test {
 protected:
  PrivateNodeTest() {
    EXPECT_TRUE(MakeDirs(root_.path() + "/state/content/abc").ok());
    EXPECT_TRUE(MakeDirs(root_.path() + "/state/bin/sha").ok());
    EXPECT_TRUE(MakeDirs(root_.path() + "/run").ok());
    origin_ = {root_.path() + "/state", root_.path() + "/run", getpid(), "sha"};
  }
  std::vector<std::string> Left() const {
    std::vector<std::string> names;
    for (const char* folder : {"/state/drill", "/run"}) {
      std::error_code none;
      for (const auto& entry : std::filesystem::directory_iterator(root_.path() + folder, none)) {
        names.push_back(entry.path());
      }
    }
    return names;
  }
  TempDir root_;
  PrivateNode::Origin origin_;
};

TEST_F(PrivateNodeTest, CopiesKeepBytesLengthAndHoles) {
  const std::string from = root_.path() + "/state/content/abc/content.1";
  UniqueFd file(open(from.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  ASSERT_EQ(ftruncate(file.get(), 64 << 20), 0);
  ASSERT_TRUE(PwriteFull(file.get(), "hello", 5, 32 << 20).ok());
  auto node = PrivateNode::Create(origin_);
  ASSERT_TRUE(node.ok()) << node.status();
  ASSERT_TRUE((*node)->CopyFolders({"content/abc"}).ok());
  const std::string to = (*node)->folder() + "/state/content/abc/content.1";
  struct stat info;
  ASSERT_EQ(stat(to.c_str(), &info), 0);
  EXPECT_EQ(info.st_size, 64 << 20);
  EXPECT_LT(info.st_blocks * 512, 1 << 20);
  std::string text(5, ' ');
  UniqueFd copy(open(to.c_str(), O_RDONLY | O_CLOEXEC));
  ASSERT_TRUE(PreadFull(copy.get(), text.data(), 5, 32 << 20).ok());
  EXPECT_EQ(text, "hello");
  EXPECT_EQ((*node)->CopyFolders({"../etc"}).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ((*node)->CopyFolders({"/etc"}).code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(PrivateNodeTest, NothingIsLeftAfterTheEndAndTheNextDrillRemovesWhatAKilledOneLeft) {
  {
    auto node = PrivateNode::Create(origin_);
    ASSERT_TRUE(node.ok()) << node.status();
    EXPECT_EQ(Left().size(), 2u);
  }
  EXPECT_TRUE(Left().empty());
  const std::string stale = root_.path() + "/state/drill/killed",
                    runtime = root_.path() + "/run/drill.killed";
  ASSERT_TRUE(MakeDirs(stale).ok() && MakeDirs(runtime).ok());
  ASSERT_TRUE(WriteFileAtomic(stale + "/runtime", runtime).ok());
  ASSERT_TRUE(WriteFileAtomic(stale + "/drill.lock", "").ok());
  auto node = PrivateNode::Create(origin_);
  ASSERT_TRUE(node.ok()) << node.status();
  EXPECT_FALSE(PathExists(stale));
  EXPECT_FALSE(PathExists(runtime));
  // Another drill at the same time is let alone.
  auto other = PrivateNode::Create(origin_);
  ASSERT_TRUE(other.ok()) << other.status();
  EXPECT_TRUE(PathExists((*node)->folder()));
}

TEST_F(PrivateNodeTest, ASupervisorThatIsNoneIsAnErrorWithItsWords) {
  // The origin's supervisor is this test, which does not understand the arguments and ends.
  auto node = PrivateNode::Create(origin_);
  ASSERT_TRUE(node.ok()) << node.status();
  setenv("GTEST_FILTER", "-*", 1);
  absl::Status status = (*node)->Start();
  unsetenv("GTEST_FILTER");
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
  EXPECT_NE(FromAbsl(status.message()).find("0 tests"), std::string::npos) << status;
  EXPECT_EQ((*node)->Signal(getpid(), SIGKILL).code(), absl::StatusCode::kFailedPrecondition);
}

TEST(CanaryReaderTest, ReadsAreComparedAndOtherBytesAreNoticed) {
  TempDir folder;
  const std::string path = folder.path() + "/file";
  ASSERT_TRUE(WriteFileAtomic(path, std::string(10'000, 'a')).ok());
  ASSERT_TRUE(ReadBeginning(path, 10'000).ok()) << "TMPDIR must be a file system that knows O_DIRECT";
  std::vector<CanaryFile> files = FindCachedFiles({folder.path()}, 10, 5);
  ASSERT_EQ(files.size(), 1u);
  EXPECT_EQ(files[0].beginning, std::string(10'000, 'a'));
  CanaryReader reader(files, 2);
  CanaryReader::Figures figures = reader.Take(10);
  EXPECT_GE(figures.reads, 2u);
  EXPECT_EQ(figures.failed, 0u);
  EXPECT_GT(figures.longest_nanos, 0u);
  ASSERT_TRUE(WriteFileAtomic(path, std::string(10'000, 'b')).ok());
  figures = reader.Take(10);
  EXPECT_GT(figures.failed, 0u);
  EXPECT_NE(figures.first_failure.find("other bytes"), std::string::npos) << figures.first_failure;
}

}  // namespace
}  // namespace holdfast::ctl
