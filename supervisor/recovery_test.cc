// The death and the upgrade of the supervisor, with real processes and mounts, with systemd's part (a
// stand-in that keeps descriptors) and without: then everything comes back from the living worker.
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <set>

#include "common/fd_store.h"
#include "common/mountinfo.h"
#include "gtest/gtest.h"
#include "supervisor/testing/harness.h"

namespace holdfast::supervisor {
namespace {

using schema::MountState;
using testing::Eventually;
using testing::Harness;
using testing::Info;
using testing::MountView;
using testing::Stat;
using testing::StatusView;

bool IsMounted(const std::string& path) {
  auto mounts = ReadMountInfo();
  return mounts.ok() &&
         std::any_of(mounts->begin(), mounts->end(), [&](const MountInfo& m) { return m.path == path; });
}

class RecoveryTest : public ::testing::TestWithParam<bool> {
 protected:
  RecoveryTest() {
    if (WithStore()) harness_.UseServiceManager();
  }
  ~RecoveryTest() noexcept override {}  // the harness's destructor may throw, says KJ
  bool WithStore() const { return GetParam(); }
  const char* Source() const { return WithStore() ? "fd store" : "worker"; }

  // Everything is as it must be: one worker, which owns the metadata, serves every mount; nothing is left
  // over.
  StatusView ExpectHealthy(const std::vector<MountView>& mounts) {
    StatusView status;
    EXPECT_TRUE(Eventually([&] {
      Harness::ReapOrphans();
      status = harness_.Status();
      return status.phase == "running" && status.workers.size() == 1;
    })) << "phase "
        << status.phase << ", workers " << status.workers.size();
    auto generation = static_cast<int64_t>(status.Worker("owner").generation);
    for (const MountView& mount : mounts) {
      EXPECT_EQ(Stat(mount.path).Result(), generation) << mount.path;
      EXPECT_TRUE(IsMounted(mount.path));
    }
    EXPECT_EQ(status.live, mounts.size());
    EXPECT_TRUE(Eventually([&] { return harness_.LedgerGenerations().size() == 1; }, 5))
        << "no ledger but the worker's";
    if (WithStore()) ExpectStoreMatches(status);
    return status;
  }

  void ExpectStoreMatches(const StatusView& status) {
    size_t mounts = status.live + status.detached;
    auto as_expected = [&] {
      harness_.manager().Sync();
      std::map<char, size_t> kinds;
      for (const auto& [name, count] : harness_.manager().Stored()) {
        if (name == "state" || name == "snap" || name == "ctl") continue;
        ++kinds[name[0]];
        if (count != (name[0] == 'p' ? 32u : 1u)) return false;
      }
      return harness_.manager().Stored().count("state") == 1 &&
             harness_.manager().Stored().count("snap") == 1 && kinds['m'] == mounts && kinds['l'] == 1 &&
             kinds['p'] == 1 && kinds['w'] == 1;
    };
    EXPECT_TRUE(Eventually(as_expected, 5))
        << ::testing::PrintToString(harness_.manager().Stored()) << " mounts: " << mounts;
  }

  Harness harness_;
};

TEST_P(RecoveryTest, ARetiredWorkerIsKilledAtItsLimitByTheNextSupervisorToo) {
  harness_.Start({"--limits", "retired=1500"}, "hang-retire");
  harness_.WaitPhase("running");
  MountView mount = harness_.Mount("a");
  bool changed = false;
  ASSERT_EQ(harness_.Upgrade(harness_.MakeWorker("good"), false, &changed), "");
  ASSERT_EQ(harness_.Status().workers.size(), 2u);
  EXPECT_EQ(harness_.Stop(SIGKILL), -SIGKILL);
  harness_.StartAgain();
  ExpectHealthy({mount});
}

TEST_P(RecoveryTest, TheNextSupervisorGoesOnWithTheWorkerThatServed) {
  harness_.Start();
  MountView mount = harness_.Mount("a", 0, "blob");
  harness_.SetBlob(mount.id, "newer blob");
  StatusView before = harness_.Status();
  EXPECT_EQ(before.state_source, "new");
  EXPECT_EQ(before.fd_store, WithStore());
  EXPECT_EQ(harness_.Stop(SIGKILL), -SIGKILL);
  EXPECT_GT(Stat(mount.path).Result(), 0) << "read while there is no supervisor";
  harness_.StartAgain();
  StatusView after = ExpectHealthy({mount});
  EXPECT_EQ(after.Worker("owner").pid, before.Worker("owner").pid);
  EXPECT_EQ(after.Worker("owner").executable, before.Worker("owner").executable);
  EXPECT_EQ(after.Worker("owner").build, before.Worker("owner").build);
  EXPECT_EQ(after.state_source, Source());
  EXPECT_EQ(after.restarts, 1u);
  EXPECT_EQ(after.crashes, 0u);
  bool more = false;
  auto mounts = harness_.Mounts(0, 10, &more);
  ASSERT_EQ(mounts.size(), 1u);
  EXPECT_EQ(mounts[0].id, mount.id);
  EXPECT_EQ(mounts[0].blob, "newer blob");
  EXPECT_EQ(mounts[0].init_request, mount.init_request);
  EXPECT_EQ(mounts[0].init_reply, mount.init_reply);
  EXPECT_TRUE(harness_.WorkerInfo().listener_works);
  MountView second = harness_.Mount("b");
  EXPECT_GT(second.id, mount.id) << "ids go on";
  EXPECT_EQ(harness_.Unmount(mount.id), MountState::GONE);
  ExpectHealthy({second});
}

TEST_P(RecoveryTest, ASupervisorIsUpgradedBySigtermAndAStart) {
  harness_.Start();
  MountView mount = harness_.Mount("a");
  pid_t worker = harness_.Status().Worker("owner").pid;
  EXPECT_EQ(harness_.Stop(SIGTERM), 0);
  EXPECT_TRUE(IsMounted(mount.path));
  EXPECT_TRUE(PathExists(harness_.snapshotter_socket()));
  EXPECT_GT(Stat(mount.path).Result(), 0);
  harness_.StartAgain();
  EXPECT_EQ(ExpectHealthy({mount}).Worker("owner").pid, worker);
}

TEST_P(RecoveryTest, AfterManyRestartsThereIsNoDescriptorMoreAndTheWorkerCanStillBeReplaced) {
  harness_.Start();
  MountView mount = harness_.Mount("a");
  std::map<std::string, int> fds;
  for (int i = 0; i < 10; ++i) {
    harness_.Stop(i % 2 == 0 ? SIGKILL : SIGTERM);
    harness_.StartAgain();
    ExpectHealthy({mount});
    if (i == 0) fds = harness_.OpenFds();
  }
  EXPECT_EQ(harness_.OpenFds(), fds);
  EXPECT_EQ(harness_.Status().restarts, 10u);
  StatusView before = harness_.Status();
  ASSERT_EQ(kill(before.Worker("owner").pid, SIGKILL), 0);
  ASSERT_TRUE(Eventually([&] { return harness_.Status().crashes == 1; }));
  EXPECT_GT(ExpectHealthy({mount}).Worker("owner").generation, before.Worker("owner").generation);
  bool changed = false;
  ASSERT_EQ(harness_.Upgrade(harness_.MakeWorker("good"), false, &changed), "");
  ExpectHealthy({mount});
}

TEST_P(RecoveryTest, ARequestThatTheWorkerHasTakenIsAnsweredAfterTheTakeover) {
  harness_.Start();
  MountView mount = harness_.Mount("a");
  std::ofstream(harness_.state_dir() + "/hold") << "1";
  uint64_t received = harness_.Status().Worker("owner").received;
  Stat stat(mount.path);
  ASSERT_TRUE(Eventually([&] { return harness_.Status().Worker("owner").received > received; }));
  ASSERT_EQ(unlink((harness_.state_dir() + "/hold").c_str()), 0);
  harness_.Stop(SIGKILL);
  EXPECT_FALSE(stat.Done(0)) << "the request was held";
  harness_.StartAgain();
  EXPECT_GT(stat.Result(), 0);
  ExpectHealthy({mount});
}

TEST_P(RecoveryTest, DeathInTheMiddleOfAMountLeavesNoHalfMount) {
  for (const char* point : {"supervisor.before_mount", "supervisor.after_mount"}) {
    SCOPED_TRACE(point);
    harness_.SetFaults(std::string(point) + "=kill@2");
    harness_.Start();
    MountView first = harness_.Mount("first");
    EXPECT_ANY_THROW(harness_.Mount("second"));
    ASSERT_EQ(harness_.WaitEnd(), -SIGKILL) << "the fault happened";
    EXPECT_GT(Stat(first.path).Result(), 0);
    harness_.SetFaults("");
    harness_.StartAgain();
    ExpectHealthy({first});
    EXPECT_FALSE(IsMounted(harness_.state_dir() + "/mounts/second"));
    MountView second = harness_.Mount("second");
    EXPECT_GT(second.id, first.id);
    ExpectHealthy({first, second});
    EXPECT_EQ(harness_.Stop(SIGINT), 0);
  }
}

TEST_P(RecoveryTest, AWorkerThatItWasAboutToKillWhenItDiedIsKilledByTheNext) {
  harness_.SetFaults("supervisor.before_kill=kill");
  harness_.Start({"--hang-limit", "1000"});
  MountView mount = harness_.Mount("a");
  pid_t hung = harness_.Status().Worker("owner").pid;
  ASSERT_EQ(kill(hung, SIGSTOP), 0);
  ASSERT_EQ(harness_.WaitEnd(), -SIGKILL) << "the fault happened";
  ASSERT_EQ(kill(hung, SIGCONT), 0) << "it was killed";
  harness_.SetFaults("");
  harness_.StartAgain();
  StatusView status = ExpectHealthy({mount});
  EXPECT_NE(status.Worker("owner").pid, hung);
}

TEST_P(RecoveryTest, DeathInTheMiddleOfAnUnmountEndsItAfterwards) {
  for (const char* point : {"supervisor.before_unmount", "supervisor.after_unmount"}) {
    SCOPED_TRACE(point);
    harness_.SetFaults(std::string(point) + "=kill");
    harness_.Start();
    MountView keep = harness_.Mount("keep");
    MountView mount = harness_.Mount("going");
    EXPECT_ANY_THROW(harness_.Unmount(mount.id));
    ASSERT_EQ(harness_.WaitEnd(), -SIGKILL) << "the fault happened";
    harness_.SetFaults("");
    harness_.StartAgain();
    ExpectHealthy({keep});
    EXPECT_FALSE(IsMounted(mount.path));
    ASSERT_TRUE(Eventually([&] { return harness_.Status().detached == 0; })) << "nobody used it";
    EXPECT_GT(harness_.Mount("going").id, mount.id);
    EXPECT_EQ(harness_.Stop(SIGINT), 0);
  }
}

TEST_P(RecoveryTest, ADetachedMountIsServedOn) {
  harness_.Start();
  MountView mount = harness_.Mount("a");
  std::string merged = harness_.state_dir() + "/merged";
  for (const char* name : {"/merged", "/upper", "/work"}) MakeDirs(harness_.state_dir() + name).IgnoreError();
  std::string data = "lowerdir=" + mount.path + ",upperdir=" + harness_.state_dir() +
                     "/upper,workdir=" + harness_.state_dir() + "/work";
  ASSERT_EQ(::mount("overlay", merged.c_str(), "overlay", 0, data.c_str()), 0) << strerror(errno);
  EXPECT_EQ(harness_.Unmount(mount.id), MountState::DETACHED);
  harness_.Stop(SIGKILL);
  harness_.StartAgain();
  EXPECT_EQ(ExpectHealthy({}).detached, 1u);
  EXPECT_GT(Stat(merged).Result(), 0);
  umount2(merged.c_str(), MNT_DETACH);
  EXPECT_TRUE(Eventually([&] { return harness_.Status().detached == 0; }));
}

struct Step {
  const char* fault;
  bool old_goes_on;  // else the new one, or its successor
  bool distrusted;   // the candidate had served on trial
  std::string told = old_goes_on ? "failed: the supervisor ended in it" : "done";
};

class EveryStepTest : public RecoveryTest {
 protected:
  void DieAt(const Step& step) {
    SCOPED_TRACE(step.fault);
    harness_.SetFaults("supervisor.phase." + std::string(step.fault));
    harness_.Start();
    harness_.Mount("a");
    MountView mount = harness_.Mount("b");
    StatusView before = harness_.Status();
    bool changed = false;
    EXPECT_NE(harness_.Upgrade(harness_.MakeWorker("good"), false, &changed), "");
    ASSERT_EQ(harness_.WaitEnd(), -SIGKILL) << "the fault happened";
    harness_.SetFaults("");
    Stat stat(mount.path);
    harness_.StartAgain();
    EXPECT_GT(stat.Result(), 0) << "asked while there was no supervisor";
    harness_.WaitPhase("running");
    bool more = false;
    StatusView after = ExpectHealthy(harness_.Mounts(0, 10, &more));
    EXPECT_EQ(after.live, 2u) << "and no canary";
    EXPECT_EQ(after.Worker("owner").pid == before.Worker("owner").pid, step.old_goes_on);
    auto distrusted = [&] {
      auto calls = harness_.WorkerInfo().calls;
      return std::any_of(calls.begin(), calls.end(),
                         [](const std::string& call) { return call.substr(0, 8) == "distrust"; });
    };
    EXPECT_EQ(step.distrusted, step.distrusted ? Eventually(distrusted, 5) : distrusted());
    after = harness_.Status();
    EXPECT_EQ(after.swap_kind, "upgrade");
    EXPECT_EQ(after.swap_result, step.told);
    ASSERT_EQ(harness_.Upgrade(harness_.MakeWorker("good"), false, &changed), "") << "it can be tried again";
  }
};

TEST_P(EveryStepTest, Starting) { DieAt({"starting=kill@2", true, false}); }
TEST_P(EveryStepTest, Preparing) { DieAt({"preparing=kill", true, false}); }
TEST_P(EveryStepTest, Rehearsing) { DieAt({"rehearsing=kill", true, false}); }
TEST_P(EveryStepTest, Parking) { DieAt({"parking=kill", true, false}); }
TEST_P(EveryStepTest, Serving) { DieAt({"serving=kill@2", true, true}); }
TEST_P(EveryStepTest, Probing) { DieAt({"probing=kill", true, true}); }
TEST_P(EveryStepTest, Yielding) { DieAt({"yielding=kill", true, true}); }
TEST_P(EveryStepTest, Committing) { DieAt({"committing=kill@2", false, false}); }
TEST_P(EveryStepTest, Running) { DieAt({"running=kill@2", false, false}); }

TEST_P(RecoveryTest, HowASwapWentThatWasUnderWayIsToldAlsoWhenItHadFailedOrWasARollback) {
  harness_.SetFaults("supervisor.phase.resuming=kill");
  harness_.Start();
  MountView mount = harness_.Mount("a");
  bool changed = false;
  EXPECT_NE(harness_.Upgrade(harness_.MakeWorker("fail-serve"), false, &changed), "");
  ASSERT_EQ(harness_.WaitEnd(), -SIGKILL) << "the fault happened";
  harness_.SetFaults("supervisor.phase.probing=kill@2");
  harness_.StartAgain();
  StatusView status = ExpectHealthy({mount});
  EXPECT_EQ(status.swap_kind, "upgrade");
  EXPECT_EQ(status.swap_result, "failed: the supervisor ended in it");
  ASSERT_EQ(harness_.Upgrade(harness_.MakeWorker("good"), false, &changed), "");
  EXPECT_NE(harness_.Rollback(), "");
  ASSERT_EQ(harness_.WaitEnd(), -SIGKILL) << "the fault happened";
  harness_.SetFaults("");
  harness_.StartAgain();
  status = ExpectHealthy({mount});
  EXPECT_EQ(status.swap_kind, "rollback");
  EXPECT_EQ(status.swap_result, "failed: the supervisor ended in it");
}

TEST_P(RecoveryTest, ARollbackThatIsCommittedByTheNextSupervisorLeavesNothingOfTheBuildEither) {
  harness_.SetFaults("supervisor.phase.committing=kill@3");
  harness_.Start();
  MountView mount = harness_.Mount("a");
  const std::string good = harness_.Status().Worker("owner").executable;
  bool changed = false;
  ASSERT_EQ(harness_.Upgrade(harness_.MakeWorker("good"), false, &changed), "");
  EXPECT_NE(harness_.Rollback(), "");
  ASSERT_EQ(harness_.WaitEnd(), -SIGKILL) << "the fault happened";
  harness_.SetFaults("");
  harness_.StartAgain();
  const StatusView status = ExpectHealthy({mount});
  EXPECT_EQ(status.swap_kind, "rollback");
  EXPECT_EQ(status.swap_result, "done");
  EXPECT_EQ(status.Worker("owner").executable, good);
  EXPECT_EQ(status.last_good, good);
  EXPECT_TRUE(Eventually([&] {
    auto calls = harness_.WorkerInfo().calls;
    return std::any_of(calls.begin(), calls.end(),
                       [](const std::string& call) { return call.rfind("distrust", 0) == 0; });
  }));
  EXPECT_TRUE(Eventually([&] {
    return harness_.Rollback().find("no other build is kept") != std::string::npos;
  })) << "not back to that one";
}

TEST_P(RecoveryTest, WhatACandidateHadReadIsAnsweredWhenTheNextSupervisorHasKilledIt) {
  harness_.SetFaults("supervisor.phase.probing=kill");
  harness_.Start();
  MountView mount = harness_.Mount("a");
  const auto owner = static_cast<pid_t>(harness_.Status().Worker("owner").pid);
  bool changed = false;
  EXPECT_NE(harness_.Upgrade(harness_.MakeWorker("good"), false, &changed), "");
  ASSERT_EQ(harness_.WaitEnd(), -SIGKILL) << "the fault happened";
  harness_.SetFaults("");
  ASSERT_EQ(kill(owner, SIGSTOP), 0);  // so that the candidate reads
  const std::string hold = harness_.state_dir() + "/hold", held = harness_.state_dir() + "/held";
  std::ofstream(hold) << "1";
  Stat stat(mount.path);
  EXPECT_TRUE(Eventually([&] { return PathExists(held); }));
  ASSERT_EQ(unlink(hold.c_str()), 0);
  ASSERT_EQ(kill(owner, SIGCONT), 0);
  EXPECT_FALSE(stat.Done(0)) << "the request was held";
  harness_.StartAgain();
  EXPECT_GT(stat.Result(), 0);
  harness_.WaitPhase("running");
  EXPECT_EQ(ExpectHealthy({mount}).Worker("owner").pid, owner);
}

TEST_P(RecoveryTest, TheWorkerDiesAndThenTheSupervisorWhenTheNextOneServes) {
  harness_.SetFaults("supervisor.phase.committing=kill@2");
  harness_.Start();
  MountView mount = harness_.Mount("a");
  ASSERT_EQ(kill(harness_.Status().Worker("owner").pid, SIGKILL), 0);
  ASSERT_EQ(harness_.WaitEnd(), -SIGKILL) << "the fault happened";
  EXPECT_GT(Stat(mount.path).Result(), 0) << "read while there is no supervisor";
  harness_.SetFaults("");
  harness_.StartAgain();
  ExpectHealthy({mount});
}

TEST_P(RecoveryTest, TheNextSupervisorMayDieInTheTakeoverToo) {
  harness_.Start();
  MountView mount = harness_.Mount("a");
  pid_t worker = harness_.Status().Worker("owner").pid;
  for (const char* fault : {"supervisor.takeover=kill", "supervisor.phase.resuming=kill"}) {
    SCOPED_TRACE(fault);
    harness_.Stop(SIGKILL);
    harness_.SetFaults(fault);
    harness_.StartAgain();
    ASSERT_EQ(harness_.WaitEnd(), -SIGKILL) << "the fault happened";
    harness_.SetFaults("");
    harness_.StartAgain();
    EXPECT_EQ(ExpectHealthy({mount}).Worker("owner").pid, worker);
  }
}

TEST_P(RecoveryTest, AWorkerThatComesBackButCannotResumeIsReplaced) {
  harness_.Start({}, "fail-resume");
  harness_.WaitPhase("running");
  MountView mount = harness_.Mount("a");
  const StatusView before = harness_.Status();
  harness_.Stop(SIGKILL);
  Stat stat(mount.path);
  harness_.StartAgain();
  EXPECT_GT(stat.Result(), 0) << "asked while there was no supervisor";
  const StatusView after = ExpectHealthy({mount});
  EXPECT_NE(after.Worker("owner").pid, before.Worker("owner").pid);
  EXPECT_EQ(after.crashes, 1u);
  EXPECT_EQ(after.swap_kind, "crash");
}

TEST_P(RecoveryTest, AWorkerWithAWrongTokenIsNotBelieved) {
  harness_.Start({}, "reattach-wrong-token");
  harness_.WaitPhase("running");
  MountView mount = harness_.Mount("a");
  StatusView before = harness_.Status();
  harness_.Stop(SIGKILL);
  harness_.StartAgain();
  // With the fd store it is replaced and everything goes on; without, nothing can be taken over.
  StatusView after = ExpectHealthy(WithStore() ? std::vector<MountView>{mount} : std::vector<MountView>());
  EXPECT_GT(after.Worker("owner").generation, before.Worker("owner").generation);
  EXPECT_EQ(after.state_source, WithStore() ? "fd store" : "new");
  EXPECT_EQ(after.swap_kind, WithStore() ? "supervisor" : "none");
  EXPECT_TRUE(harness_.LogContains("event=reattach_refused"));
  EXPECT_EQ(IsMounted(mount.path), WithStore());
}

TEST_P(RecoveryTest, AnOwnerThatDoesNotComeBackIsReplacedWhenItsDescriptorsAreHeldElsewhere) {
  harness_.Start({}, "never-reattach");
  harness_.WaitPhase("running");
  MountView mount = harness_.Mount("a");
  StatusView before = harness_.Status();
  harness_.Stop(SIGKILL);
  harness_.StartAgain();
  if (WithStore()) {
    StatusView after = ExpectHealthy({mount});
    EXPECT_GT(after.Worker("owner").generation, before.Worker("owner").generation);
    return;
  }
  EXPECT_EQ(kill(before.Worker("owner").pid, 0), 0) << "it may still serve containers";
  ASSERT_TRUE(Eventually([&] { return harness_.Status().phase == "no-metadata"; })) << "which it holds";
  EXPECT_GE(harness_.Status().warnings.size(), 2u);
  ASSERT_EQ(kill(before.Worker("owner").pid, SIGKILL), 0);
  ExpectHealthy({});
}

INSTANTIATE_TEST_SUITE_P(Store, RecoveryTest, ::testing::Bool(),
                         [](const auto& test) { return test.param ? "FdStore" : "WorkerOnly"; });

INSTANTIATE_TEST_SUITE_P(Store, EveryStepTest, ::testing::Bool(),
                         [](const auto& test) { return test.param ? "FdStore" : "WorkerOnly"; });

// What only the fd store can bring back.
class BothDeadTest : public RecoveryTest {};

TEST_P(BothDeadTest, SupervisorAndWorkerKilledAtOnceAndHalfASecondApart) {
  for (int pause_ms : {0, 500}) {
    SCOPED_TRACE(pause_ms);
    harness_.Start();
    MountView mount = harness_.Mount("a");
    StatusView before = harness_.Status();
    std::ofstream(harness_.state_dir() + "/hold-pipe") << "1";
    Stat stat(mount.path);
    ASSERT_TRUE(Eventually(
        [&] { return harness_.Status().Worker("owner").received > before.Worker("owner").received; }));
    ASSERT_EQ(unlink((harness_.state_dir() + "/hold-pipe").c_str()), 0);
    harness_.Stop(SIGKILL);
    usleep(static_cast<useconds_t>(pause_ms) * 1'000);  // the case's name
    ASSERT_EQ(kill(before.Worker("owner").pid, SIGKILL), 0);
    harness_.StartAgain();
    EXPECT_GT(stat.Result(), 0) << "from the pipe of the dead worker";
    StatusView after = ExpectHealthy({mount});
    EXPECT_GT(after.Worker("owner").generation, before.Worker("owner").generation);
    EXPECT_EQ(after.state_source, "fd store");
    EXPECT_EQ(harness_.Stop(SIGINT), 0);
    harness_.manager().Sync();
    harness_.manager().Clear();  // as systemd does when the unit is stopped
  }
}

TEST_P(BothDeadTest, TheWorkerDiesAndThenTheSupervisorAtEveryStepOfItsReplacement) {
  for (const char* phase : {"starting=kill@2", "serving=kill@2", "committing=kill@2"}) {
    SCOPED_TRACE(phase);
    harness_.SetFaults("supervisor.phase." + std::string(phase));
    harness_.Start();
    MountView mount = harness_.Mount("a");
    ASSERT_EQ(kill(harness_.Status().Worker("owner").pid, SIGKILL), 0);
    ASSERT_EQ(harness_.WaitEnd(), -SIGKILL) << "the fault happened";
    harness_.SetFaults("");
    harness_.StartAgain();
    ExpectHealthy({mount});
    EXPECT_EQ(harness_.Stop(SIGINT), 0);
    harness_.manager().Sync();
    harness_.manager().Clear();
  }
}

TEST_P(BothDeadTest, GarbageInsteadOfTheStateIsToldAndNothingIsLeftMounted) {
  harness_.Start();
  MountView mount = harness_.Mount("a");
  StatusView before = harness_.Status();
  harness_.Stop(SIGKILL);
  ASSERT_EQ(kill(before.Worker("owner").pid, SIGKILL), 0);
  harness_.manager().Sync();
  UniqueFd garbage(memfd_create("garbage", MFD_CLOEXEC));
  ASSERT_TRUE(PwriteFull(garbage.get(), "no state", 8, 0).ok());
  harness_.manager().Replace("state", std::move(garbage));
  harness_.StartAgain();
  StatusView after = ExpectHealthy({});
  EXPECT_EQ(after.state_source, "new");
  ASSERT_GE(after.warnings.size(), 1u);
  EXPECT_NE(after.warnings.back().find("could not be read"), std::string::npos) << after.warnings.back();
  EXPECT_FALSE(IsMounted(mount.path));
  EXPECT_GT(harness_.Mount("a").id, mount.id) << "ids are still not used again";
}

TEST_P(BothDeadTest, AGarbageStateIsReplacedByTheOneOfTheLivingWorker) {
  harness_.Start();
  MountView mount = harness_.Mount("a");
  harness_.Stop(SIGKILL);
  harness_.manager().Sync();
  harness_.manager().Replace("state", UniqueFd(memfd_create("garbage", MFD_CLOEXEC)));
  harness_.StartAgain();
  EXPECT_EQ(ExpectHealthy({mount}).state_source, "worker");
}

TEST_P(BothDeadTest, WhatTheServiceManagerDidNotKeepComesFromTheWorker) {
  harness_.Start();
  MountView mount = harness_.Mount("a");
  harness_.Stop(SIGKILL);
  harness_.manager().Sync();
  for (const auto& [name, count] : harness_.manager().Stored()) {
    if (name != "state") harness_.manager().Drop(name);
  }
  harness_.StartAgain();
  EXPECT_TRUE(Eventually([&] { return harness_.Status().phase == "running"; }));
  EXPECT_GT(Stat(mount.path).Result(), 0);
  EXPECT_EQ(harness_.Status().live, 1u);
  EXPECT_EQ(harness_.LedgerGenerations().size(), 1u);
  ExpectHealthy({mount});
}

TEST_P(BothDeadTest, AnOwnerThatComesBackAndHangsIsReplacedWhenItsDescriptorsAreHeldElsewhere) {
  harness_.Start();
  MountView mount = harness_.Mount("a");
  const StatusView before = harness_.WaitPhase("running");
  harness_.Stop(SIGKILL);
  std::ofstream(harness_.state_dir() + "/stop-held") << "1";
  harness_.StartAgain();
  ASSERT_TRUE(Eventually([&] { return !PathExists(harness_.state_dir() + "/stop-held"); }))
      << "it stops there";
  const int64_t by = Stat(mount.path).Result();  // within 10 s
  EXPECT_GT(by, static_cast<int64_t>(before.Worker("owner").generation));
  EXPECT_EQ(ExpectHealthy({mount}).hangs, 1u);
}

INSTANTIATE_TEST_SUITE_P(Store, BothDeadTest, ::testing::Values(true), [](const auto&) { return "FdStore"; });

class FdStoreTest : public ::testing::Test {
 protected:
  FdStoreTest() { setenv("NOTIFY_SOCKET", (dir_.path() + "/notify").c_str(), 1); }
  ~FdStoreTest() override {
    unsetenv("NOTIFY_SOCKET");
    unsetenv("FDSTORE");
  }
  static std::vector<SharedFd> Fds(size_t count) {
    std::vector<SharedFd> fds;
    for (size_t i = 0; i < count; ++i) {
      fds.push_back(std::make_shared<UniqueFd>(memfd_create("fd", MFD_CLOEXEC)));
    }
    return fds;
  }
  TempDir dir_;
  testing::ServiceManager manager_{dir_.path() + "/notify"};
};

TEST_F(FdStoreTest, DescriptorsArriveUnpolledAndInOrder) {
  SystemdFdStore store({});
  EXPECT_TRUE(store.enabled());
  store.Push("a", Fds(1));
  store.Push("p", Fds(32));
  store.Remove("a");
  store.Remove("never stored");
  EXPECT_TRUE(store.Flush(5'000));
  manager_.Sync();
  EXPECT_EQ(manager_.Stored(), (std::map<std::string, size_t>{{"p", 32}}));
  EXPECT_EQ(manager_.messages("FDPOLL=0"), 2);
  EXPECT_EQ(manager_.messages("FDSTOREREMOVE=1"), 1);
}

TEST_F(FdStoreTest, AStoreThatIsNearlyFullIsToldAndAnUnknownLimitIsNot) {
  StoredFds held;
  held["m1"].emplace_back(memfd_create("fd", MFD_CLOEXEC));
  SystemdFdStore unlimited(held);
  setenv("FDSTORE", "40", 1);
  SystemdFdStore store(held);
  EXPECT_FALSE(store.Warning());
  for (SystemdFdStore* each : {&store, &unlimited}) {
    each->Push("a", Fds(35));
    ASSERT_TRUE(each->Flush(5'000));
  }
  EXPECT_FALSE(unlimited.Warning());
  ASSERT_TRUE(store.Warning());
  EXPECT_NE(store.Warning()->find("36 of at most 40"), std::string::npos) << *store.Warning();
  store.Remove("m1");
  store.Remove("a");
  EXPECT_FALSE(store.Warning());
}

TEST_F(FdStoreTest, WithoutAServiceManagerNothingIsKept) {
  unsetenv("NOTIFY_SOCKET");
  SystemdFdStore store({});
  EXPECT_FALSE(store.enabled());
  store.Push("a", Fds(1));
  EXPECT_TRUE(store.Flush(1));
  manager_.Sync();
  EXPECT_TRUE(manager_.Stored().empty());
}

}  // namespace
}  // namespace holdfast::supervisor
