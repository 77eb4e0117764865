#include "common/process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>

#include "gtest/gtest.h"

namespace holdfast {
namespace {

class ProcessTest : public ::testing::Test {
 protected:
  Process Sh(const std::string& script, std::vector<std::pair<int, int>> descriptors = {}) {
    UniqueFd program = OpenFile("/bin/sh", O_RDONLY).value();
    ProcessSpec spec{program.get(), {"sh", "-c", script}, EnvironmentWithout({}), std::move(descriptors)};
    return StartProcess(spec).value();
  }
  static void WaitExit(const Process& process) {
    pollfd exit{.fd = process.pidfd.get(), .events = POLLIN, .revents = 0};
    ASSERT_EQ(poll(&exit, 1, 20'000), 1);
    EXPECT_TRUE(HasExited(process.pidfd.get()));
  }
};

TEST_F(ProcessTest, HowItEndedIsTold) {
  Process exits = Sh("exit 3");
  WaitExit(exits);
  EXPECT_EQ(ReapReason(exits.pidfd.get()), "exit 3");
  Process killed = Sh("kill -KILL $$");
  WaitExit(killed);
  EXPECT_EQ(ReapReason(killed.pidfd.get()), "signal 9 (Killed)");
}

TEST_F(ProcessTest, OfAProcessThatIsNoChildNothingIsKnown) {
  UniqueFd self = OpenPidfd(getpid()).value();
  EXPECT_FALSE(HasExited(self.get()));
  EXPECT_EQ(ReapReason(self.get()), "unknown");
}

TEST_F(ProcessTest, DescriptorsArriveUnderTheirNumbersAlsoWhenTheseCross) {
  int ends[2];
  ASSERT_EQ(pipe2(ends, O_CLOEXEC), 0);
  UniqueFd read_end(ends[0]), write_end(ends[1]);
  UniqueFd null = OpenFile("/dev/null", O_RDWR).value();
  // The child's number of the one is our number of the other.
  Process child = Sh("echo hello >&" + std::to_string(null.get()),
                     {{null.get(), write_end.get()}, {write_end.get(), null.get()}});
  write_end.Reset();
  WaitExit(child);
  EXPECT_EQ(ReapReason(child.pidfd.get()), "exit 0");
  char text[16] = {};
  EXPECT_EQ(read(read_end.get(), text, sizeof(text)), 6);
  EXPECT_STREQ(text, "hello\n");
}

TEST_F(ProcessTest, ABadDescriptorOrProgramIsAnError) {
  EXPECT_FALSE(StartProcess({.program = -1, .argv = {"x"}, .environment = {}, .descriptors = {}}).ok());
  UniqueFd folder = OpenFile("/", O_RDONLY).value();
  EXPECT_FALSE(StartProcess({folder.get(), {"x"}, {}, {}}).ok());
  EXPECT_FALSE(StartProcess({folder.get(), {"x"}, {}, {{-1, 3}}}).ok());
}

TEST_F(ProcessTest, TheEnvironmentLeavesOutWhatIsNamed) {
  ASSERT_EQ(setenv("HFTEST_A", "1", 1), 0);
  ASSERT_EQ(setenv("HFTEST_B", "2", 1), 0);
  auto environment = EnvironmentWithout({"HFTEST_A="});
  EXPECT_EQ(std::count(environment.begin(), environment.end(), "HFTEST_A=1"), 0);
  EXPECT_EQ(std::count(environment.begin(), environment.end(), "HFTEST_B=2"), 1);
  unsetenv("HFTEST_A");
  unsetenv("HFTEST_B");
}

TEST_F(ProcessTest, TheSignalThatEndsAProcessIsKnownBeforeItIsReaped) {
  int ends[2];
  ASSERT_EQ(pipe2(ends, O_CLOEXEC), 0);
  UniqueFd read_end(ends[0]), write_end(ends[1]);
  Process lives = Sh("read word <&5", {{read_end.get(), 5}});  // until it is killed
  EXPECT_EQ(EndingReason(lives.pid), "");
  ASSERT_EQ(kill(lives.pid, SIGKILL), 0);
  WaitExit(lives);
  EXPECT_EQ(EndingReason(lives.pid), "signal 9 (Killed)");
  EXPECT_EQ(ReapReason(lives.pidfd.get()), "signal 9 (Killed)");
  EXPECT_EQ(EndingReason(lives.pid), "") << "it is gone";
  Process exits = Sh("exit 3");
  WaitExit(exits);
  EXPECT_EQ(EndingReason(exits.pid), "");
  EXPECT_EQ(ReapReason(exits.pidfd.get()), "exit 3");
}

TEST_F(ProcessTest, AConnectedChildHasOurEnvironmentButNotWhatWasSaidToUs) {
  ASSERT_EQ(setenv("HFTEST_A", "1", 1), 0);
  ASSERT_EQ(setenv("NOTIFY_SOCKET", "/manager", 1), 0);
  ASSERT_EQ(setenv("HOLDFAST_TOKEN", "ours", 1), 0);
  UniqueFd program = OpenFile("/bin/sh", O_RDONLY).value();
  auto child = StartConnected(
      {.program = program.get(),
       .argv = {"sh", "-c", "read word <&3; echo $word $HFTEST_A $HOLDFAST_TOKEN $NOTIFY_SOCKET >&3"},
       .environment = {"HOLDFAST_TOKEN=theirs"}});
  for (const char* name : {"HFTEST_A", "NOTIFY_SOCKET", "HOLDFAST_TOKEN"}) unsetenv(name);
  ASSERT_TRUE(child.ok()) << child.status();
  ASSERT_EQ(write(child->socket.get(), "hello\n", 6), 6);
  WaitExit(child->process);
  char text[64] = {};
  EXPECT_GT(read(child->socket.get(), text, sizeof(text)), 0);
  EXPECT_STREQ(text, "hello 1 theirs\n");
  EXPECT_EQ(read(child->socket.get(), text, sizeof(text)), 0) << "its end is closed, and nobody else has one";
}

TEST_F(ProcessTest, TheStartTimeTellsAProcessFromALaterOneWithItsPid) {
  EXPECT_EQ(ProcessStartTicks(getpid()).value(), ProcessStartTicks(getpid()).value());
  EXPECT_GT(ProcessStartTicks(getpid()).value(), ProcessStartTicks(1).value());
  Process child = Sh("exit 0");
  WaitExit(child);
  ReapReason(child.pidfd.get());
  EXPECT_EQ(ProcessStartTicks(child.pid).status().code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace holdfast
