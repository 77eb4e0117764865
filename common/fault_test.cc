#include "common/fault.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <thread>

#include "common/io.h"
#include "gtest/gtest.h"

namespace holdfast {
namespace {

TEST(FaultTest, TheNthPassFailsOnceAndIsCounted) {
  FaultPoints faults;
  faults.FailAt("write", ErrnoStatus(ENOSPC, "write"), 2);
  EXPECT_TRUE(faults.Pass("write").ok());
  EXPECT_EQ(StatusErrno(faults.Pass("write")), ENOSPC);
  EXPECT_TRUE(faults.Pass("write").ok());
  EXPECT_EQ(faults.passes("write"), 3);
  EXPECT_EQ(faults.fired("write"), 1);
}

TEST(FaultTest, ABlockedPassWaitsForItsRelease) {
  FaultPoints faults;
  faults.BlockAt("step");
  std::thread thread([&] { EXPECT_TRUE(faults.Pass("step").ok()); });
  EXPECT_TRUE(faults.WaitFired("step", 1, 10));
  faults.Release("step");
  thread.join();
}

TEST(FaultTest, AProcessStopsAtAPointUntilItIsContinued) {
  const pid_t child = fork();
  if (child == 0) {
    FaultPoints faults;
    _exit(faults.Parse("step=stop@2").ok() && faults.Pass("step").ok() && faults.Pass("step").ok() &&
                  faults.fired("step") == 1
              ? 3
              : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, WUNTRACED), child);
  ASSERT_TRUE(WIFSTOPPED(status)) << status;
  ASSERT_EQ(kill(child, SIGCONT), 0);
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(WEXITSTATUS(status), 3);
}

TEST(FaultTest, ASpecIsParsedAndABadOneIsNamed) {
  FaultPoints faults;
  ASSERT_TRUE(faults.Parse("a=eio@2;b=enospc").ok());
  EXPECT_TRUE(faults.Pass("a").ok());
  EXPECT_EQ(StatusErrno(faults.Pass("a")), EIO);
  EXPECT_EQ(StatusErrno(faults.Pass("b")), ENOSPC);
  EXPECT_NE(std::string(FromAbsl(faults.Parse("c=explode").message())).find("c=explode"), std::string::npos);
}

TEST(FaultTest, NoFaultPointsMeansNoFaults) { EXPECT_TRUE(PassFault(nullptr, "x").ok()); }

TEST(FaultTest, ABuildCarriesItsFaultsInTheTailOfItsExecutable) {
  TempDir dir;
  const std::string program = dir.path() + "/program";
  EXPECT_EQ(FaultSpecFrom("a=kill", program).value(), "a=kill");
  ASSERT_TRUE(WriteFileAtomic(program, std::string(4000, 'x')).ok());
  EXPECT_EQ(FaultSpecFrom("@exe", program).value(), "");
  ASSERT_TRUE(
      WriteFileAtomic(program, std::string(4000, 'x') + "HFFAULTS:a=kill;b=eio@0\nHFMODE:good\n").ok());
  EXPECT_EQ(FaultSpecFrom("@exe", program).value(), "a=kill;b=eio@0");
  ASSERT_TRUE(WriteFileAtomic(program, "HFFAULTS:a=kill\n" + std::string(4000, 'x')).ok());
  EXPECT_EQ(FaultSpecFrom("@exe", program).value(), "") << "not at the end";
  ASSERT_TRUE(WriteFileAtomic(program, "HFFAULTS:a=kill").ok());
  EXPECT_FALSE(FaultSpecFrom("@exe", program).ok()) << "cut off";
  EXPECT_FALSE(FaultSpecFrom("@exe", dir.path() + "/absent").ok());
}

}  // namespace
}  // namespace holdfast
