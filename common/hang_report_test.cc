#include "common/hang_report.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <set>

#include "common/io.h"
#include "gtest/gtest.h"

namespace holdfast {
namespace {

std::set<std::string> Reports(const std::string& state_dir) {
  std::set<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(state_dir + "/supervisor/hangs"))
    names.insert(entry.path().filename());
  return names;
}

TEST(HangReportTest, NamesVerdictAndThreadsAndEndsTheWorkerThatDoesNotHandleSigquit) {
  TempDir state;
  pid_t pid = fork();
  if (pid == 0) {
    for (;;) pause();
  }
  auto path = SaveStacks(state.path() + "/supervisor/hangs", pid, 7, "ping unanswered for 3.5 s",
                         1'700'000'000'000'000'000);
  ASSERT_TRUE(path.ok()) << path.status();
  EXPECT_EQ(*path, state.path() + "/supervisor/hangs/20231114T221320Z-g7.txt");
  std::string text = ReadFile(*path).value();
  EXPECT_EQ(text.find("worker generation 7, pid " + std::to_string(pid) + ": ping unanswered for 3.5 s\n"),
            0u)
      << text;
  EXPECT_NE(text.find("thread " + std::to_string(pid) + " common_test"), std::string::npos) << text;
  int status = 0;
  ASSERT_EQ(waitpid(pid, &status, 0), pid);
  EXPECT_EQ(WTERMSIG(status), SIGQUIT);
}

TEST(HangReportTest, OnlyTheNewestTwentyReportsStay) {
  TempDir state;
  constexpr int64_t kDay = 86'400'000'000'000;
  constexpr pid_t kNobody = 0x7ffffff0;
  for (int64_t day = 1; day <= 25; ++day)
    ASSERT_TRUE(SaveStacks(state.path() + "/supervisor/hangs", kNobody, 1, "x", day * kDay).ok());
  auto reports = Reports(state.path());
  EXPECT_EQ(reports.size(), 20u);
  EXPECT_EQ(*reports.begin(), "19700107T000000Z-g1.txt");
}

}  // namespace
}  // namespace holdfast
