// Hangs of real processes: noticed, evidence kept, replaced; what is only slow is left alone.
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <thread>

#include "absl/strings/str_split.h"
#include "common/io.h"
#include "gtest/gtest.h"
#include "supervisor/testing/harness.h"

namespace holdfast::supervisor {
namespace {

using std::chrono::steady_clock;
using testing::Eventually;
using testing::Harness;
using testing::MountView;
using testing::Stat;
using testing::StatusView;

constexpr auto kDetected = std::chrono::milliseconds(5'000);  // the promise

class HangTest : public ::testing::Test {
 protected:
  ~HangTest() noexcept override {}
  void Start(const std::string& mode = "good") {
    harness_.Start({"--hang-limit", "3000"}, mode);
    harness_.WaitPhase("running");
    mount_ = harness_.Mount("a");
    before_ = harness_.Status();
  }
  std::string File(const std::string& name) { return harness_.state_dir() + "/" + name; }
  void Make(const std::string& name) { std::ofstream(File(name)) << "1"; }
  // The text of the only report.
  std::string Report() {
    std::string folder = File("supervisor/hangs"), text;
    EXPECT_TRUE(Eventually([&] { return PathExists(folder) && !std::filesystem::is_empty(folder); }, 2));
    for (const auto& entry : std::filesystem::directory_iterator(folder)) text += *ReadFile(entry.path());
    return text;
  }
  // A reader that is not answered. The worker may have been about to read when it was made deaf: the first
  // ones may be.
  std::unique_ptr<Stat> UnreadStat() {
    Make("deaf");
    auto stat = std::make_unique<Stat>(mount_.path);
    for (int i = 0; i < 10 && stat->Done(1); ++i) stat = std::make_unique<Stat>(mount_.path);
    return stat;
  }
  // Since `begin` the worker hangs: it is replaced in time, and `stat` answered by its successor.
  void ExpectReplaced(steady_clock::time_point begin) {
    ASSERT_TRUE(Eventually([&] { return harness_.Status().hangs == 1; }, 10)) << "nobody noticed";
    EXPECT_LT(steady_clock::now() - begin, kDetected);
    for (const char* name : {"stuck", "deaf"}) unlink(File(name).c_str());
    ASSERT_TRUE(Eventually([&] { return harness_.Status().swap_result == "done"; }));
    StatusView after = harness_.WaitPhase("running");
    EXPECT_EQ(after.swap_kind, "hang");
    EXPECT_EQ(after.crashes, 1u) << "a hang is one of the crashes";
    EXPECT_GT(after.pause_nanos, 2'500'000'000u) << "the pause begins with the hang";
    EXPECT_LT(after.pause_nanos, 6'000'000'000u);
    EXPECT_NE(after.Worker("owner").pid, before_.Worker("owner").pid);
  }
  void ExpectLeftAlone() {
    StatusView after = harness_.Status();
    EXPECT_EQ(after.hangs, 0u);
    EXPECT_EQ(after.crashes, 0u);
    EXPECT_EQ(after.Worker("owner").pid, before_.Worker("owner").pid);
  }

  Harness harness_;
  MountView mount_;
  StatusView before_;
};

TEST_F(HangTest, AStoppedWorkerIsReplacedAndItsReadersAnswered) {
  Start();
  auto begin = steady_clock::now();
  ASSERT_EQ(kill(before_.Worker("owner").pid, SIGSTOP), 0);
  Stat stat(mount_.path);
  ExpectReplaced(begin);
  EXPECT_GT(stat.Result(), 0);
  std::string report = Report();
  EXPECT_EQ(report.find("worker generation " + std::to_string(before_.Worker("owner").generation)), 0u)
      << report;
  EXPECT_NE(report.find(" fake-reader: T (stopped), wchan "), std::string::npos) << report;
}

TEST_F(HangTest, AThreadStuckInARequestIsNamedAndTheRequestIsAnsweredByTheSuccessor) {
  Start();
  Make("stuck");
  auto begin = steady_clock::now();
  Stat stat(mount_.path);
  ExpectReplaced(begin);
  EXPECT_GT(stat.Result(), static_cast<int64_t>(before_.Worker("owner").generation));
  std::string report = Report();
  EXPECT_NE(report.find(": slot 0 executing for 3."), std::string::npos) << report;
  EXPECT_NE(report.find(", mount " + std::to_string(mount_.id) + ", opcode 3\n"), std::string::npos)
      << report;
  EXPECT_NE(report.find(" fake-reader: S (sleeping), wchan "), std::string::npos) << report;
}

TEST_F(HangTest, RequestsThatNobodyReadsAreNoticed) {
  Start();
  auto begin = steady_clock::now();
  auto stat = UnreadStat();
  ExpectReplaced(begin);
  EXPECT_GT(stat->Result(), 0);
  EXPECT_NE(Report().find("a request of mount " + std::to_string(mount_.id) + " unread for 3."),
            std::string::npos);
}

TEST_F(HangTest, MountsThatAreHeldBackOnPurposeAreNoHang) {
  Start();
  Make("held-back");
  auto stat = UnreadStat();
  EXPECT_FALSE(stat->Done(8)) << "the request was held back";
  ExpectLeftAlone();
  unlink(File("deaf").c_str());
  EXPECT_GT(stat->Result(), 0);
}

class SlowTest : public HangTest, public ::testing::WithParamInterface<const char*> {};

TEST_P(SlowTest, AWorkerThatIsOnlySlowIsLeftAlone) {
  Start(GetParam());
  Make("slow");
  auto begin = steady_clock::now();
  for (int i = 0; i < 3; ++i) EXPECT_GT(Stat(mount_.path).Result(), 0);
  EXPECT_GT(steady_clock::now() - begin, std::chrono::seconds(6)) << "it was slow";
  ExpectLeftAlone();
}
INSTANTIATE_TEST_SUITE_P(Builds, SlowTest, ::testing::Values("good", "old"));

TEST_F(HangTest, ASpareThatNeverGetsReadyIsMadeAnew) {
  harness_.Start({"--spare", "--limits", "register=3000,prepare=200"}, "hang-prepare");
  auto spare = [&] {
    const StatusView status = harness_.Status();
    for (const auto& worker : status.workers) {
      if (worker.role == "spare") return worker.pid;
    }
    return pid_t{0};
  };
  pid_t first = 0;
  ASSERT_TRUE(Eventually([&] { return (first = spare()) != 0; }));
  EXPECT_TRUE(Eventually([&] { return spare() != first && spare() != 0; }, 20));
  EXPECT_EQ(harness_.Status().hangs, 0u) << "nobody's worker";
}

TEST_F(HangTest, ASpareThatStoppedIsMadeAnewBeforeItIsNeeded) {
  harness_.Start({"--hang-limit", "1000", "--spare"});
  EXPECT_TRUE(Eventually([&] { return harness_.Status().spare == "ready"; }));
  const pid_t stopped = harness_.Status().Worker("spare").pid;
  ASSERT_EQ(kill(stopped, SIGSTOP), 0);
  EXPECT_TRUE(Eventually([&] {
    StatusView status = harness_.Status();
    return status.spare == "ready" && status.Worker("spare").pid != stopped;
  }));
  EXPECT_EQ(harness_.Status().hangs, 0u) << "nobody's worker";
  EXPECT_EQ(harness_.Status().crashes, 0u);
}

// A worker stops for good in a step of a swap. Somebody reads all the time.
class HangInSwapTest : public HangTest {
 protected:
  // The upgrade's failure, or "", and the longest read of it.
  std::string Upgrade(const std::string& stops_at, const std::vector<std::string>& limits = {},
                      const std::string& mode = "good") {
    harness_.Start(limits);
    harness_.WaitPhase("running");
    mount_ = harness_.Mount("a");
    before_ = harness_.Status();
    for (absl::string_view at : absl::StrSplit(stops_at, ' ', absl::SkipEmpty()))
      Make("stop-" + std::string(at));
    bool changed = false;
    std::string error;
    ReadMeanwhile([&] { error = harness_.Upgrade(harness_.MakeWorker(mode), false, &changed); });
    for (absl::string_view at : absl::StrSplit(stops_at, ' ', absl::SkipEmpty()))
      EXPECT_FALSE(PathExists(File("stop-" + std::string(at)))) << "nobody stopped there";
    return error;
  }
  void ReadMeanwhile(const std::function<void()>& action) {
    std::atomic<bool> over{false};
    std::thread reader([&] {
      while (!over) {
        auto begin = steady_clock::now();
        EXPECT_GT(Stat(mount_.path).Result(), 0);
        longest_ = std::max(longest_, steady_clock::now() - begin);
      }
    });
    action();
    over = true;
    reader.join();
  }
  void ExpectCounted(uint64_t hangs) {
    StatusView after = harness_.WaitPhase("running");
    EXPECT_EQ(after.hangs, hangs);
    EXPECT_EQ(after.crashes, hangs);
    EXPECT_TRUE(Eventually([&] { return harness_.Status().workers.size() == 1; }));
    EXPECT_NE(Report().find(": T (stopped), wchan "), std::string::npos);
  }
  uint64_t OldGeneration() const { return before_.Worker("owner").generation; }

  steady_clock::duration longest_{};
};

TEST_F(HangInSwapTest, AnOwnerThatDoesNotParkIsReplacedByTheCandidateItself) {
  EXPECT_EQ(Upgrade("park"), "");
  EXPECT_LT(longest_, kDetected);
  EXPECT_GT(longest_, std::chrono::seconds(2)) << "it did not hang";
  ExpectCounted(1);
  StatusView after = harness_.Status();
  EXPECT_EQ(after.swap_result, "done");
  EXPECT_EQ(after.Worker("owner").generation, OldGeneration() + 1);
  EXPECT_GT(after.pause_nanos, 2'500'000'000u);
  for (const testing::StepView& step : after.steps)
    EXPECT_EQ(step.detail.find("the running worker is lost: hung: ") == 0, step.name == "park")
        << step.detail;
}

TEST_F(HangInSwapTest, AnOwnerThatDoesNotYieldCostsNoReaderAnything) {
  EXPECT_EQ(Upgrade("yield", {"--limits", "yield=2500"}), "");
  EXPECT_LT(longest_, std::chrono::seconds(2));
  ExpectCounted(1);
  StatusView after = harness_.Status();
  EXPECT_EQ(after.swap_result, "done");
  EXPECT_EQ(after.Worker("owner").generation, OldGeneration() + 1);
  EXPECT_LT(after.pause_nanos, 2'000'000'000u);
}

TEST_F(HangInSwapTest, ACandidateThatDoesNotServeIsGivenUpSoon) {
  EXPECT_NE(Upgrade("serve").find("it took too long (phase serving)"), std::string::npos);
  EXPECT_LT(longest_, kDetected);
  ExpectCounted(0);
  StatusView after = harness_.Status();
  EXPECT_EQ(after.Worker("owner").generation, OldGeneration());
  EXPECT_GT(after.pause_nanos, 2'500'000'000u) << "readers waited, though nothing was taken over";
}

TEST_F(HangInSwapTest, SoIsOneOfABuildThatKnowsNoTrial) {
  EXPECT_NE(Upgrade("serve", {}, "old").find("it took too long (phase serving)"), std::string::npos);
  EXPECT_LT(longest_, kDetected);
  EXPECT_EQ(harness_.WaitPhase("running").Worker("owner").generation, OldGeneration());
}

TEST_F(HangInSwapTest, AnOwnerThatStopsShortlyBeforeItIsToParkHasNoMoreTimeForIt) {
  Start();
  std::thread stopper([&] {
    EXPECT_TRUE(Eventually([&] { return PathExists(File("replaying")); }));
    kill(before_.Worker("owner").pid, SIGSTOP);
  });
  bool changed = false;
  ReadMeanwhile(
      [&] { EXPECT_EQ(harness_.Upgrade(harness_.MakeWorker("slow-replay"), false, &changed), ""); });
  stopper.join();
  EXPECT_LT(longest_, kDetected);
  ExpectCounted(1);
  EXPECT_GT(harness_.Status().pause_nanos, 2'500'000'000u) << "from the moment it stopped";
}

TEST_F(HangInSwapTest, AnAnswerThatComesWhileTheWorkerIsKilledForItDoesNotCount) {
  const std::string error = Upgrade("", {"--limits", "prepare=500"}, "late-prepare");
  EXPECT_NE(error.find("it took too long (phase preparing)"), std::string::npos) << error;
  EXPECT_LT(longest_, std::chrono::seconds(2));
  StatusView after = harness_.WaitPhase("running");
  EXPECT_EQ(after.Worker("owner").generation, OldGeneration());
  EXPECT_EQ(after.hangs, 0u);
}

TEST_F(HangInSwapTest, ALimitThatPassedWhileTheSupervisorSleptCondemnsNobody) {
  harness_.Start({"--limits", "yield=1500"}, "slow-yield");
  harness_.WaitPhase("running");
  std::thread sleep([this, supervisor = harness_.pid()] {
    EXPECT_TRUE(Eventually([&] { return PathExists(File("yielding")); }));
    kill(supervisor, SIGSTOP);
    std::this_thread::sleep_for(std::chrono::seconds(4));  // what it sleeps through, not an order
    kill(supervisor, SIGCONT);
  });
  bool changed = false;
  EXPECT_EQ(harness_.Upgrade(harness_.MakeWorker("good"), false, &changed), "");
  sleep.join();
  EXPECT_EQ(harness_.Status().crashes, 0u);
  EXPECT_FALSE(harness_.LogContains("event=hang "));
}

TEST_F(HangInSwapTest, WhenBothHangAFreshWorkerServes) {
  EXPECT_NE(Upgrade("serve resume", {"--limits", "prepared=500,resume=500"}), "");
  EXPECT_LT(longest_, kDetected);
  ExpectCounted(1);
  EXPECT_GT(harness_.Status().Worker("owner").generation, OldGeneration() + 1);
}

TEST_F(HangInSwapTest, TheFirstWorkerAfterACrashIsGivenUpSoonerThanTheNext) {
  Start();
  Make("stop-serve");
  ReadMeanwhile([&] {
    kill(before_.Worker("owner").pid, SIGKILL);
    EXPECT_TRUE(Eventually([&] { return harness_.Status().hangs == 1; }));
  });
  EXPECT_LT(longest_, std::chrono::seconds(7));
  StatusView after = harness_.WaitPhase("running");
  EXPECT_EQ(after.swap_result, "done");
  EXPECT_EQ(after.Worker("owner").generation, OldGeneration() + 2);
}

}  // namespace
}  // namespace holdfast::supervisor
