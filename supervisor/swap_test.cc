// The verified swap with the supervisor as a process, real mounts and the fake worker: what a candidate must
// pass, what happens when it does not, probation, rollback, the spare.
#include <linux/fuse.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "common/mountinfo.h"
#include "common/testing/processes.h"
#include "gtest/gtest.h"
#include "supervisor/testing/harness.h"

namespace holdfast::supervisor {
namespace {

using testing::Eventually;
using testing::Harness;
using testing::Info;
using testing::MountView;
using testing::Stat;
using testing::StatusView;
using testing::StepView;

bool Contains(const std::vector<std::string>& list, const std::string& what) {
  return std::any_of(list.begin(), list.end(),
                     [&](const std::string& entry) { return entry.find(what) != std::string::npos; });
}

// Without what came with them.
std::vector<std::string> Methods(std::vector<std::string> calls) {
  for (std::string& call : calls) call.resize(std::min(call.size(), call.find(" last ")));
  return calls;
}

std::vector<std::string> StepNames(const StatusView& status) {
  std::vector<std::string> names;
  for (const auto& step : status.steps) names.push_back(step.name);
  return names;
}

// Canaries are gone: mounts and folders.
void ExpectNoCanary(const Harness& harness) {
  auto mounts = ReadMountInfo();
  ASSERT_TRUE(mounts.ok());
  for (const MountInfo& mount : *mounts) {
    EXPECT_FALSE(mount.path.rfind(harness.state_dir() + "/supervisor/canary", 0) == 0) << mount.path;
  }
  std::error_code none;
  for (const auto& entry :
       std::filesystem::directory_iterator(harness.state_dir() + "/supervisor/canary", none))
    ADD_FAILURE() << entry.path() << " is left";
}

TEST(SwapTest, ACandidateIsComparedAndProbedBeforeItMayCommit) {
  Harness harness;
  harness.Start();
  MountView mount = harness.Mount("a", FUSE_IOCTL_DIR, "blob");
  auto fds = harness.OpenFds();
  bool changed = false;
  ASSERT_EQ(harness.Upgrade(harness.MakeWorker("good"), false, &changed), "");
  EXPECT_TRUE(changed);
  Info info = harness.WorkerInfo();
  const std::string last = " last " + std::to_string(mount.id);
  EXPECT_EQ(info.calls,
            (std::vector<std::string>{"prepare", "replay 1", "add 1", "serve trial" + last + " ledgers 1",
                                      "end trial", "swap over"}));
  EXPECT_EQ(info.mount_ids, std::vector<uint64_t>{mount.id}) << "the canary is gone";
  StatusView status = harness.Status();
  EXPECT_EQ(StepNames(status), (std::vector<std::string>{"copy", "start", "prepare", "rehearse", "park",
                                                         "serve", "probe", "yield", "commit"}));
  for (const auto& step : status.steps) EXPECT_GT(step.nanos, 0u) << step.name;
  EXPECT_EQ(status.steps[3].detail, "1 requests compared, 1 canary mounts walked, 1 samples");
  EXPECT_EQ(status.steps[6].detail, "1 live mounts probed: checked=2 skipped=0");
  EXPECT_EQ(status.swap_result, "done");
  EXPECT_GT(status.probation_seconds, 50u);
  EXPECT_EQ(Stat(mount.path).Result(), static_cast<int64_t>(info.generation));
  ExpectNoCanary(harness);
  EXPECT_TRUE(Eventually([&] { return harness.Status().workers.size() == 1; }));
}

// Children of `parent` that were started as `name`.
std::vector<pid_t> ChildrenNamed(pid_t parent, const std::string& name) {
  std::vector<pid_t> found;
  for (pid_t child : Children(parent)) {
    std::string line;
    std::getline(std::ifstream("/proc/" + std::to_string(child) + "/cmdline"), line, '\0');
    if (line == name) found.push_back(child);
  }
  return found;
}

TEST(SwapTest, ARetiredWorkerThatDoesNotEndIsKilledAtItsLimit) {
  Harness harness;
  harness.Start({"--limits", "retired=300"}, "hang-retire");
  harness.WaitPhase("running");
  bool changed = false;
  ASSERT_EQ(harness.Upgrade(harness.MakeWorker("good"), false, &changed), "");
  EXPECT_TRUE(Eventually([&] { return harness.Status().workers.size() == 1; }));
  EXPECT_EQ(harness.Status().crashes, 0u);
}

TEST(SwapTest, ARetiredWorkerIsNotAmongThoseThatTheNextSupervisorWaitsFor) {
  Harness harness;
  harness.Start({}, "hang-retire");
  const pid_t old = harness.WaitPhase("running").Worker("owner").pid;
  bool changed = false;
  ASSERT_EQ(harness.Upgrade(harness.MakeWorker("good"), false, &changed), "");
  const auto listed = [&](pid_t pid) {
    const std::string text = ReadFile(harness.state_dir() + "/supervisor/workers").value_or("");
    return text.find("\n" + std::to_string(pid) + " ") != std::string::npos;
  };
  EXPECT_TRUE(Eventually([&] { return listed(harness.Status().Worker("owner").pid) && !listed(old); }));
  EXPECT_EQ(harness.Status().Worker("retiring").pid, old) << "it is still there";
}

TEST(SwapTest, ARunningBuildThatCannotSayWhatItAnsweredKeepsNoOtherOut) {
  Harness harness;
  harness.Start({}, "fail-samples");
  harness.WaitPhase("running");
  harness.Mount("a", FUSE_IOCTL_DIR, "blob");
  bool changed = false;
  ASSERT_EQ(harness.Upgrade(harness.MakeWorker("good"), false, &changed), "");
  const std::vector<StepView> steps = harness.Status().steps;
  ASSERT_EQ(steps.size(), 9u);
  const std::string rehearsed = steps[3].detail;
  EXPECT_EQ(rehearsed.rfind("nothing compared", 0), 0u) << rehearsed;
  EXPECT_NE(rehearsed.find("this build forgets"), std::string::npos) << rehearsed;
  EXPECT_NE(rehearsed.find("1 canary mounts walked"), std::string::npos)
      << "it opens, at least: " << rehearsed;
  EXPECT_EQ(steps[6].detail, "1 live mounts probed: checked=1 skipped=0");
}

// A build whose samples are wrong refuses every other one: nobody answers as it does.
TEST(SwapTest, ARollbackLeavesARunningBuildThatAnswersWronglyWithoutAskingIt) {
  Harness harness;
  harness.Start();
  harness.Mount("a", FUSE_IOCTL_DIR, "blob");
  const std::string good = harness.Status().Worker("owner").executable;
  bool changed = false;
  ASSERT_EQ(harness.Upgrade(harness.MakeWorker("wrong-samples"), false, &changed), "");
  EXPECT_NE(harness.Upgrade(harness.MakeWorker("good"), false, &changed).find("rehearse failed"),
            std::string::npos);
  ASSERT_EQ(harness.Rollback(), "");
  const StatusView after = harness.Status();
  EXPECT_EQ(after.Worker("owner").executable, good);
  ASSERT_EQ(after.steps.size(), 8u);
  EXPECT_EQ(after.steps[2].detail,
            "nothing compared, for the running worker is not asked, 1 canary mounts walked, 0 samples");
  EXPECT_EQ(after.steps[5].detail, "1 live mounts probed: checked=1 skipped=0");
  EXPECT_EQ(after.last_good, good);
  const std::vector<std::string> calls = harness.WorkerInfo().calls;
  EXPECT_TRUE(std::any_of(calls.begin(), calls.end(), [](const std::string& call) {
    return call.rfind("distrust ", 0) == 0;
  })) << "what the kernel was told, and what was stored";
  EXPECT_NE(harness.Rollback().find("no other build is kept"), std::string::npos) << "not back to that one";
}

TEST(SwapTest, ARunningBuildThatDiesOverTakingBackKeepsNoOtherOut) {
  Harness harness;
  harness.Start({}, "die-distrust");
  harness.WaitPhase("running");
  MountView mount = harness.Mount("a", FUSE_IOCTL_DIR, "blob");
  bool changed = false;
  const std::string error = harness.Upgrade(harness.MakeWorker("fail-take"), false, &changed);
  EXPECT_NE(error.find("could not be taken back: workers die over it"), std::string::npos) << error;
  EXPECT_EQ(harness.WaitPhase("running").crashes, 2u);
  ASSERT_EQ(harness.Upgrade(harness.MakeWorker("good"), false, &changed), "");
  EXPECT_GT(Stat(mount.path).Result(), 0);
}

// The owner is given up, and the candidate fails where the spare then goes on: the swap has failed there.
TEST(SwapTest, WhereASpareTakesOverFromACandidateTheStepThatFailedIsTold) {
  Harness harness;
  harness.Start({"--spare"}, "fail-park");
  harness.WaitPhase("running");
  MountView mount = harness.Mount("a", FUSE_IOCTL_DIR, "blob");
  ASSERT_TRUE(Eventually([&] { return harness.Status().spare == "ready"; }));
  bool changed = false;
  const std::string error = harness.Upgrade(harness.MakeWorker("die-serve"), false, &changed);
  EXPECT_NE(error.find("the new worker died"), std::string::npos) << error;
  const StatusView after = harness.WaitPhase("running");
  ASSERT_FALSE(after.steps.empty());
  EXPECT_EQ(after.steps.back().name, "serve");
  EXPECT_GT(Stat(mount.path).Result(), 0);
}

TEST(SwapTest, AVerifierThatDiesFailsTheUpgradeAtOnceAndNothingElse) {
  Harness harness;
  harness.Start({}, "hang-samples");  // so that the verifier waits for it
  harness.WaitPhase("running");
  MountView mount = harness.Mount("a", FUSE_IOCTL_DIR, "blob");
  auto old = static_cast<int64_t>(harness.WorkerInfo().generation);
  std::atomic<bool> killed{false};
  std::thread killer([&, supervisor = harness.pid()] {
    killed = Eventually([&] {
      for (pid_t pid : ChildrenNamed(supervisor, "holdfast-verifier")) return kill(pid, SIGKILL) == 0;
      return false;
    });
  });
  bool changed = false;
  std::string error = harness.Upgrade(harness.MakeWorker("good"), false, &changed);
  killer.join();
  EXPECT_TRUE(killed);
  EXPECT_NE(error.find("the verifier died"), std::string::npos) << error;
  EXPECT_EQ(Stat(mount.path).Result(), old);
  EXPECT_EQ(harness.Status().crashes, 0u);
  EXPECT_TRUE(Eventually([&] { return ChildrenNamed(harness.pid(), "holdfast-verifier").empty(); }));
  EXPECT_TRUE(Eventually([&] { return harness.Status().workers.size() == 1; })) << "the candidate is gone";
}

TEST(SwapTest, WithoutAVerifierNoBuildIsTakenAndTheReasonIsTold) {
  Harness harness;
  harness.Start({"--verifier", "/nonexistent/verifier"});
  MountView mount = harness.Mount("a", FUSE_IOCTL_DIR, "blob");
  auto old = static_cast<int64_t>(harness.WorkerInfo().generation);
  bool changed = false;
  std::string error = harness.Upgrade(harness.MakeWorker("good"), false, &changed);
  EXPECT_NE(error.find("verifier /nonexistent/verifier: "), std::string::npos) << error;
  EXPECT_NE(harness.CheckRollback().find("verifier /nonexistent/verifier: "), std::string::npos);
  EXPECT_EQ(Stat(mount.path).Result(), old);
}

struct BadBuild {
  std::string mode, step, reason;
  bool touched_containers;
};

class BadBuildTest : public ::testing::TestWithParam<BadBuild> {};

TEST_P(BadBuildTest, IsRefusedAndTheOldWorkerServesOn) {
  const BadBuild& bad = GetParam();
  Harness harness;
  harness.Start();
  MountView mount = harness.Mount("a", FUSE_IOCTL_DIR, "blob");
  auto old = static_cast<int64_t>(harness.WorkerInfo().generation);
  bool changed = false;
  std::string error = harness.Upgrade(harness.MakeWorker(bad.mode), false, &changed);
  EXPECT_NE(error.find(bad.reason), std::string::npos) << error;
  StatusView status = harness.WaitPhase("running");
  EXPECT_EQ(status.swap_kind, "upgrade");
  EXPECT_NE(status.swap_result.find(bad.reason), std::string::npos) << status.swap_result;
  EXPECT_TRUE(Contains(StepNames(status), bad.step)) << ::testing::PrintToString(StepNames(status));
  EXPECT_EQ(Stat(mount.path).Result(), old);
  Info info = harness.WorkerInfo();
  EXPECT_EQ(Contains(info.calls, "distrust"), bad.touched_containers) << ::testing::PrintToString(info.calls);
  EXPECT_EQ(status.crashes, 0u);
  EXPECT_TRUE(Eventually([&] { return harness.Status().workers.size() == 1; })) << "the bad one is gone";
  ExpectNoCanary(harness);
  EXPECT_EQ(harness.Upgrade(harness.MakeWorker("good"), false, &changed), "") << "a good one is welcome";
}

std::string NameOf(const ::testing::TestParamInfo<BadBuild>& test) {
  std::string name = test.param.mode;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

INSTANTIATE_TEST_SUITE_P(
    Swap, BadBuildTest,
    ::testing::Values(
        BadBuild{"fail-prepare", "prepare", "this build cannot prepare", false},
        BadBuild{"die-prepare", "prepare", "the new worker died: exit 3", false},
        BadBuild{"crash-prepare", "prepare", "the new worker died: signal 11 (Segmentation fault)", false},
        // The SIGKILL that ends it is the supervisor's own.
        BadBuild{"hang-up-prepare", "prepare", "the new worker died: its connection ended", false},
        BadBuild{"die-replay", "rehearse", "the new worker died: exit 3", false},
        BadBuild{"differs", "rehearse", "1 of 1 requests otherwise than the running one", false},
        BadBuild{"wrong-everywhere", "rehearse", "canary walk", false},
        BadBuild{"fail-serve", "serve", "this build cannot serve", true},
        BadBuild{"die-serve", "serve", "the new worker died", true},
        BadBuild{"wrong-generation", "probe", "generation", true},
        BadBuild{"wrong-on-trial", "probe", "no such name", true},
        BadBuild{"fail-take", "commit", "cannot read the metadata", true},
        BadBuild{"die-take", "commit", "the new worker died", true}),
    NameOf);

TEST(SwapTest, ACandidateThatCannotDieFailsTheUpgradeAtTheLimitOfItsStep) {
  for (const auto& [mode, reason] :
       std::map<std::string, std::string>{{"undying-prepare", "its connection ended"},
                                          {"undying-hung", "hung: it took too long (phase preparing)"}}) {
    SCOPED_TRACE(mode);
    Harness harness;
    harness.Start({"--limits", "prepare=1500"});
    MountView mount = harness.Mount("a");
    const StatusView before = harness.Status();
    std::ofstream(harness.state_dir() + "/hold") << "1";
    bool changed = false;
    const auto begin = std::chrono::steady_clock::now();
    std::string error = harness.Upgrade(harness.MakeWorker(mode), false, &changed);
    EXPECT_GE(std::chrono::steady_clock::now() - begin, std::chrono::milliseconds(1'500));
    EXPECT_NE(error.find("the new worker died: " + reason), std::string::npos) << error;
    StatusView status = harness.WaitPhase("running");
    EXPECT_EQ(status.Worker("owner").pid, before.Worker("owner").pid);
    EXPECT_GT(status.Worker("dying").pid, 0)
        << "in state D: the owner has taken its request and answers none";
    unlink((harness.state_dir() + "/hold").c_str());
    kill(before.Worker("owner").pid, SIGKILL);
    EXPECT_TRUE(Eventually([&] { return harness.Status().workers.size() == 1; })) << "answered, it is gone";
    EXPECT_GT(Stat(mount.path).Result(), 0);
  }
}

TEST(SwapTest, WhatACandidateAnsweredOnTrialIsTakenBack) {
  Harness harness;
  harness.Start();
  MountView mount = harness.Mount("a", FUSE_IOCTL_DIR, "blob");
  bool changed = false;
  EXPECT_NE(harness.Upgrade(harness.MakeWorker("wrong-on-trial"), false, &changed), "");
  uint64_t bad = harness.Status().Worker("owner").generation + 1;
  EXPECT_TRUE(
      Contains(harness.WorkerInfo().calls, "distrust " + std::to_string(bad) + " vault id 16 touched"));
}

TEST(SwapTest, TheWorkerThatReadsIsToldThatASwapWasAskedForAndThatItIsOver) {
  Harness harness;
  harness.Start();
  harness.Mount("a", FUSE_IOCTL_DIR, "blob");
  bool changed = false;
  ASSERT_NE(harness.Upgrade(harness.MakeWorker("fail-prepare"), false, &changed), "");
  EXPECT_EQ(Methods(harness.WorkerInfo().calls),
            (std::vector<std::string>{"serve", "swap ahead", "swap over"}));
  ASSERT_NE(harness.Upgrade("/nonexistent", false, &changed), "");
  EXPECT_EQ(harness.WorkerInfo().calls.back(), "swap over");
  ASSERT_EQ(harness.Upgrade(harness.MakeWorker("good"), false, &changed), "");
  EXPECT_FALSE(Contains(harness.WorkerInfo().calls, "swap ahead"));
}

TEST(SwapTest, AFailedUpgradeBeginsTheProbationOfTheRunningBuildAnewAndStatusSaysSo) {
  Harness harness;
  harness.Start();
  bool changed = false;
  ASSERT_EQ(harness.Upgrade(harness.MakeWorker("good"), false, &changed), "");
  const uint64_t first = harness.Status().probation_seconds;
  ASSERT_TRUE(Eventually([&] { return harness.Status().probation_seconds < first - 1; }));
  ASSERT_NE(harness.Upgrade(harness.MakeWorker("differs"), false, &changed), "");
  EXPECT_GE(harness.WaitPhase("running").probation_seconds, first - 1);
}

TEST(SwapTest, ABuildThatKnowsNoTrialIsSwappedToWithoutOne) {
  Harness harness;
  harness.Start();
  harness.Mount("a", FUSE_IOCTL_DIR, "blob");
  bool changed = false;
  ASSERT_EQ(harness.Upgrade(harness.MakeWorker("old"), false, &changed), "");
  EXPECT_EQ(Methods(harness.WorkerInfo().calls), (std::vector<std::string>{"serve", "swap over"}));
  ASSERT_EQ(harness.Upgrade(harness.MakeWorker("good"), false, &changed), "");
  EXPECT_EQ(Methods(harness.WorkerInfo().calls), (std::vector<std::string>{"serve", "swap over"}))
      << "the old one can name no samples";
}

void KillOwner(Harness& harness) {
  StatusView before = harness.Status();
  uint64_t generation = before.Worker("owner").generation;
  kill(before.Worker("owner").pid, SIGKILL);
  ASSERT_TRUE(Eventually([&] {
    StatusView now = harness.Status();
    return now.phase == "running" && now.Worker("owner").generation != generation;
  }));
}

TEST(SwapTest, ABuildThatDiesTwiceInItsProbationIsReplacedByLastGood) {
  Harness harness;
  harness.Start();
  std::string good = harness.Status().last_good;
  ASSERT_EQ(good, harness.Status().Worker("owner").executable);
  bool changed = false;
  ASSERT_EQ(harness.Upgrade(harness.MakeWorker("good"), false, &changed), "");
  std::string bad = harness.Status().Worker("owner").executable;
  EXPECT_NE(bad, good);
  KillOwner(harness);
  EXPECT_EQ(harness.Status().Worker("owner").executable, bad);
  KillOwner(harness);
  StatusView status = harness.Status();
  EXPECT_EQ(status.Worker("owner").executable, good);
  EXPECT_TRUE(Contains(status.warnings, bad)) << ::testing::PrintToString(status.warnings);
  EXPECT_TRUE(Contains(status.warnings, "did not survive its probation"));
  EXPECT_EQ(status.probation_seconds, 0u);
  EXPECT_NE(harness.Rollback(), "") << "not back to the bad one";
  KillOwner(harness);
  EXPECT_EQ(harness.Status().Worker("owner").executable, good);
  EXPECT_TRUE(Contains(harness.Status().warnings, "not to blame"));
}

TEST(SwapTest, ABuildThatSurvivesItsProbationIsLastGoodAlsoForTheNextSupervisor) {
  Harness harness;
  harness.Start({"--probation", "0"});
  std::string first = harness.Status().last_good;
  bool changed = false;
  ASSERT_EQ(harness.Upgrade(harness.MakeWorker("good"), false, &changed), "");
  std::string second = harness.Status().Worker("owner").executable;
  EXPECT_TRUE(Eventually([&] { return harness.Status().last_good == second; }));
  EXPECT_NE(first, second);
  auto kept = ReadFile(harness.state_dir() + "/supervisor/last-good");
  EXPECT_TRUE(Eventually([&] {
    kept = ReadFile(harness.state_dir() + "/supervisor/last-good");
    return kept.ok() && *kept == second + "\n";
  }));
}

TEST(SwapTest, ARollbackBringsTheBuildBeforeBackAndTellsItsSteps) {
  Harness harness;
  harness.Start();
  EXPECT_NE(harness.Rollback().find("no other build"), std::string::npos);
  std::string first = harness.Status().Worker("owner").executable;
  bool changed = false;
  ASSERT_EQ(harness.Upgrade(harness.MakeWorker("good"), false, &changed), "");
  EXPECT_EQ(harness.CheckRollback(), "ready " + first);
  std::vector<std::string> begun;
  ASSERT_EQ(harness.Rollback(&begun), "");
  EXPECT_EQ(begun, (std::vector<std::string>{"start", "prepare", "rehearse", "park", "serve", "probe",
                                             "yield", "commit"}));
  StatusView status = harness.Status();
  EXPECT_EQ(status.Worker("owner").executable, first);
  EXPECT_EQ(status.swap_kind, "rollback");
  EXPECT_EQ(status.swap_result, "done");
  EXPECT_EQ(status.probation_seconds, 0u) << "it has proved itself";
}

TEST(SwapTest, RollbackReadinessIsProvenByStartingTheBuild) {
  Harness harness;
  harness.Start({}, "fail-self-test");
  harness.WaitPhase("running");
  bool changed = false;
  ASSERT_EQ(harness.Upgrade(harness.MakeWorker("good"), false, &changed), "");
  EXPECT_NE(harness.CheckRollback().find("not ready: "), std::string::npos);
}

TEST(SwapTest, ASpareTakesOverAndIsReplaced) {
  Harness harness;
  harness.Start({"--spare"});
  MountView mount = harness.Mount("a", FUSE_IOCTL_DIR, "blob");
  ASSERT_TRUE(Eventually([&] { return harness.Status().spare == "ready"; }));
  const uint64_t later = harness.Mount("b", FUSE_IOCTL_DIR, "blob").id;  // the spare has not asked for it
  StatusView before = harness.Status();
  uint64_t spare = before.Worker("spare").generation;
  EXPECT_EQ(Stat(mount.path).Result(), static_cast<int64_t>(before.Worker("owner").generation));
  KillOwner(harness);
  StatusView after = harness.Status();
  EXPECT_EQ(after.Worker("owner").generation, spare);
  EXPECT_EQ(after.swap_kind, "crash");
  EXPECT_EQ(after.swap_result, "done");
  EXPECT_EQ(Stat(mount.path).Result(), static_cast<int64_t>(spare));
  const std::vector<std::string> calls = harness.WorkerInfo().calls;
  EXPECT_EQ(Methods(calls), (std::vector<std::string>{"prepare", "serve"}));
  // With the dead one's ledger, unless its end was proven, and nothing in it, before.
  EXPECT_TRUE(Contains(calls, "serve last " + std::to_string(later) + " ledgers "));
  EXPECT_TRUE(Eventually([&] { return harness.Status().spare == "ready"; })) << "the next one";
}

TEST(SwapTest, InProbationTheSpareIsOfTheProvenBuildAndBringsItBack) {
  Harness harness;
  harness.Start({"--spare"});
  std::string good = harness.Status().last_good;
  ASSERT_TRUE(Eventually([&] { return harness.Status().spare == "ready"; }));
  bool changed = false;
  ASSERT_EQ(harness.Upgrade(harness.MakeWorker("good"), false, &changed), "");
  EXPECT_EQ(harness.Status().Worker("spare").executable, good);
  KillOwner(harness);
  EXPECT_EQ(harness.Status().Worker("owner").executable, good);
  EXPECT_TRUE(Contains(harness.Status().warnings, "did not survive its probation"));
}

TEST(SwapTest, ADeadSpareIsNoCrashAndIsReplaced) {
  Harness harness;
  harness.Start({"--spare"});
  ASSERT_TRUE(Eventually([&] { return harness.Status().spare == "ready"; }));
  StatusView before = harness.Status();
  kill(before.Worker("spare").pid, SIGKILL);
  ASSERT_TRUE(Eventually([&] { return harness.Status().spare != "ready"; }));
  ASSERT_TRUE(Eventually([&] { return harness.Status().spare == "ready"; }, 20));
  StatusView after = harness.Status();
  EXPECT_EQ(after.crashes, 0u);
  EXPECT_EQ(after.Worker("owner").generation, before.Worker("owner").generation);
}

}  // namespace
}  // namespace holdfast::supervisor
