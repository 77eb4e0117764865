// A worker of a build to come under today's supervisor, as real processes.
#include <signal.h>
#include <stdlib.h>

#include <string>

#include "common/io.h"
#include "gtest/gtest.h"
#include "supervisor/testing/harness.h"

namespace holdfast::supervisor {
namespace {

TEST(FutureWorkerTest, TodaysSupervisorAgreesOnWhatBothKnowAndIgnoresTheRest) {
  testing::Harness supervisor;
  supervisor.Start({"--worker", std::string(getenv("HOLDFAST_BIN")) + "/holdfast-future-worker"}, "replaced");
  const std::string report = supervisor.state_dir() + "/future-report";
  ASSERT_TRUE(testing::Eventually([&] { return PathExists(report); }));
  auto text = ReadFile(report);
  ASSERT_TRUE(text.ok()) << text.status();
  EXPECT_EQ(*text, "ok");
  auto status = supervisor.WaitPhase("running");
  EXPECT_EQ(status.Worker("owner").build, "of the future");
  EXPECT_EQ(status.live, 1u);
  EXPECT_EQ(status.crashes, 0u);
}

}  // namespace
}  // namespace holdfast::supervisor
