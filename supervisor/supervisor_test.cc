// The supervisor as a process, with real mounts and the fake worker.
#include <fcntl.h>
#include <linux/fuse.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <thread>

#include "common/fuse_mount.h"
#include "common/urgency.h"
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
using testing::WorkerView;

constexpr uint64_t kAsyncRead = 1;
constexpr uint64_t kParallelDirops = 1u << 18;
constexpr uint64_t kMaxPages = 1u << 22;
constexpr uint64_t kAllowIdmap = uint64_t{1} << 40;
constexpr uint64_t kNeverOffered = uint64_t{1} << 63;

bool IsMounted(const std::string& path) {
  auto mounts = ReadMountInfo();
  return mounts.ok() &&
         std::any_of(mounts->begin(), mounts->end(), [&](const MountInfo& m) { return m.path == path; });
}

// The descriptors are those of `before`. libunwind opens one pipe for good when it traces the first
// exception.
bool SameFds(const std::map<std::string, int>& before, std::map<std::string, int> now) {
  if (now["pipe"] == before.at("pipe") + 2) now["pipe"] -= 2;
  return now == before;
}

// An overlay over a lower layer, like a container's root.
class Overlay {
 public:
  Overlay(const std::string& lower, const std::string& folder) : merged_(folder + "/merged") {
    for (const char* name : {"/upper", "/work", "/merged"}) MakeDirs(folder + name).IgnoreError();
    std::string data = "lowerdir=" + lower + ",upperdir=" + folder + "/upper,workdir=" + folder + "/work";
    mounted_ = mount("overlay", merged_.c_str(), "overlay", 0, data.c_str()) == 0;
  }
  ~Overlay() { Unmount(); }
  bool mounted() const { return mounted_; }
  const std::string& path() const { return merged_; }
  void Unmount() {
    if (mounted_) umount2(merged_.c_str(), MNT_DETACH);
    mounted_ = false;
  }

 private:
  std::string merged_;
  bool mounted_;
};

TEST(SupervisorTest, TheWorkerGetsItsSocketAndTheListenerAndNoOtherDescriptor) {
  Harness harness;
  harness.Start();
  Info info = harness.WorkerInfo();
  EXPECT_TRUE(info.listener_works);
  std::set<std::string> fds(info.inherited_fds.begin(), info.inherited_fds.end());
  EXPECT_EQ(fds, (std::set<std::string>{"0", "1", "2", "3"}));
  struct stat socket_info;
  ASSERT_EQ(stat(harness.control_socket().c_str(), &socket_info), 0);
  EXPECT_EQ(socket_info.st_mode & 0777, 0600u);
}

TEST(SupervisorTest, InitIsAnsweredWithTheRequestedFlagsThatTheKernelOffers) {
  Harness harness;
  harness.Start();
  MountView mount =
      harness.Mount("a", kAsyncRead | kParallelDirops | kMaxPages | kAllowIdmap | kNeverOffered, "blob a");
  EXPECT_EQ(mount.state, MountState::LIVE);
  EXPECT_EQ(mount.blob, "blob a");
  fuse_in_header request;
  ASSERT_GE(mount.init_request.size(), sizeof(request));
  memcpy(&request, mount.init_request.data(), sizeof(request));
  EXPECT_EQ(request.opcode, uint32_t{FUSE_INIT});
  ASSERT_EQ(mount.init_reply.size(), sizeof(fuse_out_header) + 64);
  fuse_init_out reply;
  memcpy(&reply, mount.init_reply.data() + sizeof(fuse_out_header), sizeof(reply));
  EXPECT_EQ(reply.flags & (kAsyncRead | kParallelDirops | kMaxPages),
            kAsyncRead | kParallelDirops | kMaxPages);
  EXPECT_EQ(reply.max_pages, 256);
  fuse_init_in offered;
  memcpy(&offered, mount.init_request.data() + sizeof(request), sizeof(offered));
  EXPECT_EQ(uint64_t{reply.flags2} << 32, kAllowIdmap & (uint64_t{offered.flags2} << 32));
  EXPECT_EQ(Stat(mount.path).Result(), static_cast<int64_t>(harness.WorkerInfo().generation));
  auto mounts = ReadMountInfo();
  ASSERT_TRUE(mounts.ok());
  auto it =
      std::find_if(mounts->begin(), mounts->end(), [&](const MountInfo& m) { return m.path == mount.path; });
  ASSERT_NE(it, mounts->end());
  EXPECT_EQ(it->type, "fuse.holdfast");
}

TEST(SupervisorTest, MountPointsOutsideTheStateFolderOrBehindLinksAreRefused) {
  Harness harness;
  harness.Start();
  TempDir elsewhere;
  ASSERT_EQ(symlink(elsewhere.path().c_str(), (harness.state_dir() + "/mounts/link").c_str()), 0);
  EXPECT_ANY_THROW(harness.Mount(elsewhere.path()));
  EXPECT_ANY_THROW(harness.Mount(harness.state_dir() + "/mounts/link"));
  EXPECT_ANY_THROW(harness.Mount(harness.state_dir() + "/../run"));
  EXPECT_ANY_THROW(harness.Mount(harness.state_dir() + "/mounts/missing"));
  EXPECT_ANY_THROW(harness.Mount(harness.state_dir()));
  harness.Mount("a");
  EXPECT_ANY_THROW(harness.Mount(harness.state_dir() + "/mounts/a")) << "mounted already";
  EXPECT_EQ(harness.Status().live, 1u);
}

TEST(SupervisorTest, ASuccessorAnswersTheRequestThatTheDeadWorkerHadTaken) {
  for (const char* hold : {"/hold", "/hold-pipe"}) {
    Harness harness;
    harness.Start();
    MountView mount = harness.Mount("a", 0, "first");
    harness.SetBlob(mount.id, "second");
    StatusView before = harness.Status();
    auto fds = harness.OpenFds();
    std::ofstream(harness.state_dir() + hold) << "1";
    uint64_t received = before.Worker("owner").received;
    Stat stat(mount.path);
    ASSERT_TRUE(Eventually([&] { return harness.Status().Worker("owner").received > received; }));
    ASSERT_EQ(unlink((harness.state_dir() + hold).c_str()), 0);
    EXPECT_FALSE(stat.Done(0)) << "the request was held";
    pid_t dead = before.Worker("owner").pid;
    ASSERT_EQ(kill(dead, SIGKILL), 0);
    EXPECT_GT(stat.Result(), 0);
    ASSERT_TRUE(Eventually([&] { return harness.Status().swap_result == "done"; }));
    StatusView after = harness.WaitPhase("running");
    EXPECT_NE(after.Worker("owner").pid, dead);
    EXPECT_EQ(after.swap_kind, "crash");
    EXPECT_EQ(after.carried, 1u);
    EXPECT_GT(after.pause_nanos, 0u);
    EXPECT_EQ(after.crashes, 1u);
    Info info = harness.WorkerInfo();
    EXPECT_EQ(info.adopted, 1u);
    EXPECT_EQ(info.mount_ids, std::vector<uint64_t>{mount.id});
    EXPECT_EQ(info.blobs, std::vector<std::string>{"second"});
    EXPECT_EQ(harness.LedgerGenerations(), std::vector<uint64_t>{info.generation})
        << "the drained ledger is dropped";
    EXPECT_TRUE(Eventually([&] { return SameFds(fds, harness.OpenFds()); }, 5))
        << "and with it its descriptors: " << ::testing::PrintToString(fds) << " became "
        << ::testing::PrintToString(harness.OpenFds());
  }
}

TEST(SupervisorTest, UpgradeSwapsToTheNewBuildAndCarriesRequestsOver) {
  Harness harness;
  harness.Start();
  MountView mount = harness.Mount("a");
  uint64_t old_generation = harness.WorkerInfo().generation;
  std::ofstream(harness.state_dir() + "/hold") << "1";
  uint64_t received = harness.Status().Worker("owner").received;
  Stat stat(mount.path);
  ASSERT_TRUE(Eventually([&] { return harness.Status().Worker("owner").received > received; }));
  ASSERT_EQ(unlink((harness.state_dir() + "/hold").c_str()), 0);
  bool changed = false;
  ASSERT_EQ(harness.Upgrade(harness.MakeWorker("good"), false, &changed), "");
  EXPECT_TRUE(changed);
  EXPECT_GT(stat.Result(), static_cast<int64_t>(old_generation));
  StatusView status = harness.WaitPhase("running");
  EXPECT_EQ(status.swap_kind, "upgrade");
  EXPECT_EQ(status.swap_result, "done");
  EXPECT_EQ(status.carried, 1u);
  EXPECT_GT(status.pause_nanos, 0u);
  EXPECT_EQ(status.swaps, 1u);
  EXPECT_EQ(status.crashes, 0u) << "retiring is no crash";
  ASSERT_TRUE(Eventually([&] { return harness.Status().workers.size() == 1; })) << "the old one exits";
  EXPECT_EQ(harness.Status().crashes, 0u);
  ASSERT_TRUE(
      Eventually([&] { return harness.WorkerInfo().exited == std::vector<uint64_t>{old_generation}; }));
  ASSERT_TRUE(Eventually([&] { return harness.LedgerGenerations().size() == 1; }))
      << "and its ledger is dropped";
}

TEST(SupervisorTest, UpgradeToTheRunningBuildChangesNothingUnlessForced) {
  Harness harness;
  std::string worker = harness.MakeWorker("good");
  harness.Start({"--worker", worker});
  uint64_t generation = harness.WorkerInfo().generation;
  bool changed = true;
  ASSERT_EQ(harness.Upgrade("", false, &changed), "");
  EXPECT_FALSE(changed);
  EXPECT_EQ(harness.WorkerInfo().generation, generation);
  ASSERT_EQ(harness.Upgrade("", true, &changed), "");
  EXPECT_TRUE(changed);
  EXPECT_GT(harness.WorkerInfo().generation, generation);
}

TEST(SupervisorTest, AfterAnUpgradeToABadBuildTheOldWorkerStillServes) {
  Harness harness;
  harness.Start({"--limits", "register=3000"});
  MountView mount = harness.Mount("a");
  auto generation = static_cast<int64_t>(harness.WorkerInfo().generation);
  for (const char* mode :
       {"exit", "silent", "wrong-token", "fail-serve", "die-serve", "fail-take", "die-take"}) {
    SCOPED_TRACE(mode);
    bool changed = false;
    EXPECT_NE(harness.Upgrade(harness.MakeWorker(mode), false, &changed), "");
    StatusView status = harness.WaitPhase("running");
    EXPECT_EQ(status.swap_kind, "upgrade");
    EXPECT_EQ(status.swap_result.substr(0, 7), "failed:") << status.swap_result;
    EXPECT_EQ(Stat(mount.path).Result(), generation);
    ASSERT_TRUE(Eventually([&] { return harness.Status().workers.size() == 1; })) << "the bad one is gone";
  }
  bool changed = false;
  const std::string no_program = harness.state_dir() + "/no-program";
  ASSERT_TRUE(WriteFileAtomic(no_program, "nonsense", 0755).ok());
  std::string reason = harness.Upgrade(no_program, false, &changed);
  EXPECT_NE(reason.find("Exec format error"), std::string::npos) << reason;
  EXPECT_EQ(reason.find("errno"), std::string::npos) << reason;
  reason = harness.Upgrade("/no/such/worker", false, &changed);
  EXPECT_NE(reason.find("worker /no/such/worker: "), std::string::npos) << reason;
  EXPECT_EQ(reason.find(" = "), std::string::npos) << "no source text in what people read: " << reason;
  EXPECT_EQ(harness.Upgrade(harness.MakeWorker("good"), false, &changed), "")
      << "and a good one can still come";
}

// Once its exit is known.
void ExpectLastDeath(Harness* harness, const std::string& reason) {
  EXPECT_TRUE(Eventually([&] { return harness->Status().last_death.find(reason) != std::string::npos; }))
      << harness->Status().last_death;
}

TEST(SupervisorTest, WhenTheOldWorkerFailsDuringAnUpgradeReadsGoOn) {
  for (const char* mode : {"fail-park", "fail-yield", "die-park", "die-yield"}) {
    SCOPED_TRACE(mode);
    Harness harness;
    harness.Start({}, mode);
    harness.WaitPhase("running");
    MountView mount = harness.Mount("a");
    bool changed = false;
    const uint64_t old = harness.Status().Worker("owner").generation;
    ASSERT_EQ(harness.Upgrade(harness.MakeWorker("good"), false, &changed), "");
    StatusView status = harness.WaitPhase("running");
    EXPECT_NE(status.Worker("owner").generation, old);
    EXPECT_EQ(status.crashes, 1u);
    const std::string step = std::string(mode).substr(std::string(mode).find('-') + 1);
    for (const auto& told : status.steps) {
      EXPECT_EQ(told.detail.rfind("the running worker is lost: ", 0) == 0, told.name == step) << told.detail;
    }
    if (step == "park" && mode[0] == 'f') ExpectLastDeath(&harness, "park failed: ");
    if (step == "yield" && mode[0] == 'f') ExpectLastDeath(&harness, "yieldMetadata failed: ");
    EXPECT_EQ(Stat(mount.path).Result(), static_cast<int64_t>(status.Worker("owner").generation));
  }
}

TEST(SupervisorTest, WhenBothWorkersOfAnUpgradeFailTheBuildThatRanIsStartedAgain) {
  struct Case {
    const char *old, *candidate, *error, *death;
  };
  for (const Case& one :
       {Case{"fail-resume", "fail-serve", "this build cannot serve", "resume failed: "},
        Case{"fail-park", "fail-take", "this build cannot read the metadata", "park failed: "},
        Case{"fail-yield", "die-take", "the new worker died", "yieldMetadata failed: "}}) {
    SCOPED_TRACE(std::string(one.old) + " " + one.candidate);
    Harness harness;
    harness.Start({}, one.old);
    const StatusView before = harness.WaitPhase("running");
    MountView mount = harness.Mount("a", FUSE_IOCTL_DIR, "blob");
    bool changed = false;
    const std::string error = harness.Upgrade(harness.MakeWorker(one.candidate), false, &changed);
    EXPECT_NE(error.find(one.error), std::string::npos) << error;
    const StatusView after = harness.WaitPhase("running");
    EXPECT_EQ(after.Worker("owner").executable, before.Worker("owner").executable);
    EXPECT_NE(after.Worker("owner").pid, before.Worker("owner").pid);
    EXPECT_EQ(after.crashes, 1u);
    ExpectLastDeath(&harness, one.death);
    EXPECT_EQ(Stat(mount.path).Result(), static_cast<int64_t>(after.Worker("owner").generation));
  }
}

TEST(SupervisorTest, ALayerThatAnOverlayUsesIsDetachedAndGoneOnlyAfterTheOverlay) {
  Harness harness;
  harness.Start();
  MountView mount = harness.Mount("a");
  Overlay overlay(mount.path, harness.state_dir());
  ASSERT_TRUE(overlay.mounted()) << strerror(errno);
  EXPECT_EQ(harness.Unmount(mount.id), MountState::DETACHED);
  EXPECT_FALSE(IsMounted(mount.path));
  EXPECT_EQ(harness.Status().detached, 1u);
  ASSERT_EQ(kill(harness.Status().Worker("owner").pid, SIGKILL), 0);
  EXPECT_GT(Stat(overlay.path()).Result(), 0) << "served through the overlay, by the successor";
  harness.WaitPhase("running");
  overlay.Unmount();
  ASSERT_TRUE(Eventually([&] { return harness.Status().detached == 0; }));
  ASSERT_TRUE(Eventually([&] { return harness.WorkerInfo().gone == std::vector<uint64_t>{mount.id}; }));
}

TEST(SupervisorTest, AnUnusedLayerIsGoneAtOnceAndItsIdIsNeverUsedAgain) {
  Harness harness;
  harness.Start();
  MountView first = harness.Mount("a");
  EXPECT_EQ(harness.Unmount(first.id), MountState::GONE);
  MountView second = harness.Mount("a");
  EXPECT_GT(second.id, first.id);
  harness.Unmount(second.id);
  EXPECT_EQ(harness.Stop(SIGINT), 0);
  harness.Start();
  EXPECT_GT(harness.Mount("a").id, second.id);
}

// 310 mounts; 10,000 in the long form (HOLDFAST_LOAD=long), which takes two minutes.
TEST(SupervisorTest, MountsAreHandedOverInPages) {
  const char* load = getenv("HOLDFAST_LOAD");
  const size_t mounts = load != nullptr && std::string(load) == "long" ? 10'000 : 310;
  constexpr size_t kPage = 200;
  Harness harness;
  harness.Start();
  for (size_t i = 0; i < mounts; ++i) harness.Mount(std::to_string(i), 0, std::to_string(i));
  bool more = false;
  EXPECT_EQ(harness.Mounts(0, 500, &more).size(), 200u);
  EXPECT_TRUE(more);
  ASSERT_EQ(kill(harness.Status().Worker("owner").pid, SIGKILL), 0);
  ASSERT_TRUE(Eventually([&] { return harness.Status().swap_result == "done"; }));
  harness.WaitPhase("running");
  auto expect_all = [&](size_t walks) {
    Info info = harness.WorkerInfo();
    EXPECT_EQ(info.mount_ids.size(), mounts);
    EXPECT_EQ(info.pages, walks * ((mounts + kPage - 1) / kPage));
    const std::string last = harness.state_dir() + "/mounts/" + std::to_string(mounts - 1);
    EXPECT_EQ(Stat(last).Result(), static_cast<int64_t>(info.generation));
    StatusView status = harness.Status();
    printf("%zu mounts: %s, pause %.1f ms\n", mounts, status.swap_kind.c_str(),
           static_cast<double>(status.pause_nanos) / 1e6);
  };
  expect_all(2);  // when it served, when it committed
  bool changed = false;
  ASSERT_EQ(harness.Upgrade("", true, &changed), "");
  expect_all(3);  // and when it prepared
}

TEST(SupervisorTest, TwentyDeathsLeakNoDescriptorAndNoLedger) {
  Harness harness;
  harness.Start();
  MountView mount = harness.Mount("a");
  auto kill_once = [&] {
    StatusView before = harness.WaitPhase("running", 30);
    ASSERT_EQ(kill(before.Worker("owner").pid, SIGKILL), 0);
    ASSERT_TRUE(Eventually(
        [&] {
          StatusView now = harness.Status();
          return now.phase == "running" && now.workers.size() == 1 && now.crashes > before.crashes;
        },
        30));
    // A death within a second of the last is answered by a longer and longer wait: let it run a second.
    usleep(1'050'000);
  };
  kill_once();
  auto fds = harness.OpenFds();
  for (int i = 0; i < 20; ++i) kill_once();
  EXPECT_EQ(harness.Status().crashes, 21u);
  EXPECT_TRUE(Eventually([&] { return SameFds(fds, harness.OpenFds()); }, 5))
      << ::testing::PrintToString(fds) << " became " << ::testing::PrintToString(harness.OpenFds());
  EXPECT_EQ(harness.LedgerGenerations().size(), 1u);
  EXPECT_GT(Stat(mount.path).Result(), 0);
}

TEST(SupervisorTest, AWorkerThatKeepsDyingIsStartedAgainEverMoreSlowly) {
  Harness harness;
  harness.Start({}, "exit");
  ASSERT_TRUE(Eventually([&] { return harness.Status().crashes >= 4; }));
  harness.WaitPhase("backoff");
  EXPECT_LE(harness.Status().crashes, 6u);
}

// What the process may open from now on: nothing.
rlimit LeaveNoDescriptor(pid_t pid) {
  std::set<int> open;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/" + std::to_string(pid) + "/fd"))
    open.insert(std::stoi(entry.path().filename()));
  rlimit none{}, before{};
  while (open.count(static_cast<int>(none.rlim_cur)) != 0) ++none.rlim_cur;
  prlimit(pid, RLIMIT_NOFILE, nullptr, &before);
  none.rlim_max = before.rlim_max;
  prlimit(pid, RLIMIT_NOFILE, &none, nullptr);
  return before;
}

TEST(SupervisorTest, WhoConnectsWhileNoDescriptorIsLeftIsHeardWhenThereIsOne) {
  Harness harness;
  harness.Start();
  const rlimit before = LeaveNoDescriptor(harness.pid());
  UniqueFd client(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  strncpy(address.sun_path, harness.control_socket().c_str(), sizeof(address.sun_path) - 1);
  ASSERT_EQ(connect(client.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  EXPECT_TRUE(Eventually([&] { return harness.LogContains("event=accept_failed"); }));
  ASSERT_EQ(prlimit(harness.pid(), RLIMIT_NOFILE, &before, nullptr), 0);
  harness.Connect();
  EXPECT_EQ(harness.Status().phase, "running");
}

TEST(SupervisorTest, StatusSaysHowTheLastWorkerDied) {
  Harness harness;
  harness.Start();
  const StatusView before = harness.Status();
  EXPECT_EQ(before.last_death, "");
  EXPECT_EQ(before.last_death_wall_nanos, 0);
  ASSERT_EQ(kill(before.Worker("owner").pid, SIGSEGV), 0);
  ExpectLastDeath(&harness, "signal 11 (Segmentation fault)");
  EXPECT_GT(harness.WaitPhase("running").last_death_wall_nanos, 0);
  bool changed = false;
  EXPECT_NE(harness.Upgrade(harness.MakeWorker("exit"), false, &changed), "");
  ExpectLastDeath(&harness, "signal 11");  // a candidate is the swap's affair
}

TEST(SupervisorTest, StatusSaysWhyNoWorkerStarts) {
  for (const auto& [mode, reason] :
       std::map<std::string, std::string>{{"exit", "exit 3"}, {"fail-serve", "this build cannot serve"}}) {
    Harness harness;
    harness.Start({}, mode);
    StatusView status;
    EXPECT_TRUE(Eventually([&] {
      status = harness.Status();
      return status.phase == "backoff" && status.last_death.find(reason) != std::string::npos;
    })) << mode
        << ": " << status.last_death;
  }
  Harness harness;
  const std::string no_program = harness.state_dir() + "/no-program";
  ASSERT_TRUE(WriteFileAtomic(no_program, "nonsense", 0755).ok());
  harness.Start({"--worker", no_program}, "exit");
  ExpectLastDeath(&harness, "Exec format error");
  EXPECT_EQ(harness.Status().crashes, 0u);
}

TEST(SupervisorTest, ADeadWorkersBinaryIsStartedFromThePrivateCopyWhenTheOriginalIsGone) {
  Harness harness;
  std::string worker = harness.MakeWorker("good");
  harness.Start({"--worker", worker});
  ASSERT_EQ(unlink(worker.c_str()), 0);
  StatusView before = harness.Status();
  ASSERT_EQ(kill(before.Worker("owner").pid, SIGKILL), 0);
  ASSERT_TRUE(Eventually([&] { return harness.Status().swap_result == "done"; }));
  EXPECT_EQ(harness.WaitPhase("running").Worker("owner").executable, before.Worker("owner").executable);
}

// Only the connection tells on kernels that do not know PIDFD_THREAD.
bool KernelTellsOfThreads() {
  UniqueFd thread(static_cast<int>(syscall(SYS_pidfd_open, gettid(), O_EXCL)));
  return thread.valid();
}

TEST(SupervisorTest, AWorkersDeathIsSeenByItsThreadBeforeItsConnectionEnds) {
  Harness harness;
  harness.Start({}, "thread");
  const WorkerView worker = harness.WaitPhase("running").Worker("owner");
  // Ends the thread alone: the connection and the process would live on.
  ASSERT_EQ(kill(worker.pid, SIGUSR1), 0);
  if (!KernelTellsOfThreads()) {
    EXPECT_EQ(harness.WaitPhase("running").Worker("owner").pid, worker.pid);
    return;
  }
  ASSERT_TRUE(Eventually([&] { return harness.Status().swap_result == "done"; }));
  const StatusView after = harness.WaitPhase("running");
  EXPECT_EQ(after.crashes, 1u);
  EXPECT_NE(after.Worker("owner").pid, worker.pid);
  EXPECT_TRUE(Eventually([&] { return kill(worker.pid, 0) != 0; })) << "it is killed, as any that is lost";
}

// Whatever is seen first: the end of its thread, of its connection, or its exit. Our own kill follows.
TEST(SupervisorTest, AKillFromOutsideIsToldAsSuch) {
  Harness harness;
  harness.Start({}, "thread");
  for (uint64_t deaths = 1; deaths <= 5; ++deaths) {
    const pid_t worker = harness.WaitPhase("running").Worker("owner").pid;
    ASSERT_EQ(kill(worker, SIGKILL), 0);
    ASSERT_TRUE(Eventually([&] { return harness.Status().crashes == deaths; }));
    ExpectLastDeath(&harness, "signal 9 (Killed)");
  }
}

int Policy(pid_t pid) { return sched_getscheduler(pid); }

bool UrgencyIsPermitted() {
  bool permitted = false;
  std::thread([&] { permitted = BecomeUrgent().ok(); }).join();
  return permitted;
}

TEST(SupervisorTest, TheSupervisorAndAWorkerThatReadsWaitForAreUrgentAndNobodyElse) {
  Harness harness;
  harness.Start({"--spare"}, "urgent");
  StatusView status = harness.WaitPhase("running");
  const bool permitted = UrgencyIsPermitted();
  EXPECT_EQ(Policy(harness.pid()), permitted ? SCHED_RR | SCHED_RESET_ON_FORK : SCHED_OTHER);
  const int urgent = permitted ? SCHED_RR : SCHED_OTHER;
  for (const std::string& text : status.warnings) {
    EXPECT_TRUE(!permitted || text.find("SCHED_RR") == std::string::npos) << text;
  }
  EXPECT_EQ(Policy(status.Worker("owner").pid), urgent) << "nobody served before it";
  ASSERT_TRUE(Eventually([&] { return harness.Status().spare == "ready"; }));
  status = harness.Status();
  EXPECT_EQ(Policy(status.Worker("spare").pid), SCHED_OTHER);
  bool changed = false;
  ASSERT_EQ(harness.Upgrade(harness.MakeWorker("urgent"), true, &changed), "");
  EXPECT_EQ(Policy(harness.WaitPhase("running").Worker("owner").pid), SCHED_OTHER) << "a candidate";
}

TEST(SupervisorTest, AfterACrashTheNextWorkerIsUrgentToo) {
  Harness harness;
  harness.Start({}, "urgent");
  const pid_t first = harness.WaitPhase("running").Worker("owner").pid;
  ASSERT_EQ(kill(first, SIGKILL), 0);
  ASSERT_TRUE(Eventually([&] { return harness.Status().swap_result == "done"; }));
  const pid_t next = harness.WaitPhase("running").Worker("owner").pid;
  EXPECT_EQ(Policy(next), UrgencyIsPermitted() ? SCHED_RR : SCHED_OTHER);
  // This stand-in, as builds of before, does not leave it by itself.
  EXPECT_TRUE(Eventually([&] { return Policy(next) == SCHED_OTHER; }, 15));
}

TEST(SupervisorTest, WhereRealTimeSchedulingIsRefusedStatusSaysSoAndAWorkerIsReplacedAllTheSame) {
  Harness harness;
  harness.RefuseUrgency();
  harness.Start({}, "urgent");
  const StatusView status = harness.WaitPhase("running");
  EXPECT_EQ(Policy(harness.pid()), SCHED_OTHER);
  EXPECT_EQ(Policy(status.Worker("owner").pid), SCHED_OTHER);
  ASSERT_EQ(status.warnings.size(), 1u);
  EXPECT_NE(status.warnings[0].find("SCHED_RR"), std::string::npos) << status.warnings[0];
  ASSERT_EQ(kill(status.Worker("owner").pid, SIGKILL), 0);
  ASSERT_TRUE(Eventually([&] { return harness.Status().swap_result == "done"; }));
}

TEST(SupervisorTest, WithoutMetadataReadsGoOnAndItIsTriedAgain) {
  Harness harness;
  harness.Start({}, "fail-take");
  StatusView status = harness.WaitPhase("no-metadata");
  EXPECT_EQ(std::count_if(status.warnings.begin(), status.warnings.end(),
                          [](const std::string& text) { return text.find("metadata") != std::string::npos; }),
            1);
  EXPECT_EQ(status.Worker("owner").build, "fake fail-take");
  bool changed = false;
  EXPECT_EQ(harness.Upgrade(harness.MakeWorker("good"), false, &changed), "") << "an upgrade is the way out";
  harness.WaitPhase("running");
}

TEST(SupervisorTest, ASecondSupervisorOnTheSameStateIsRefused) {
  Harness harness;
  std::string worker = harness.MakeWorker("good");
  harness.Start({"--worker", worker});
  std::string output;
  EXPECT_EQ(harness.RunToEnd({"--worker", worker}, &output), 1);
  EXPECT_NE(output.find("another holdfast-supervisor runs on the state folder"), std::string::npos) << output;
  EXPECT_EQ(harness.RunToEnd({"--worker", worker, "--state", harness.state_dir() + "-2"}, &output), 1);
  EXPECT_NE(output.find("is in use by a running process"), std::string::npos) << output;
  harness.WaitPhase("running");
}

TEST(SupervisorTest, BadArgumentsAndWorkersGiveOneClearLine) {
  Harness harness;
  std::string output;
  EXPECT_EQ(harness.RunToEnd({"--wroker", "x"}, &output), 2);
  EXPECT_NE(output.find("unknown argument '--wroker'"), std::string::npos) << output;
  EXPECT_EQ(harness.RunToEnd({"--help"}, &output), 0);
  EXPECT_NE(output.find("--snapshotter-socket"), std::string::npos);
  EXPECT_EQ(harness.RunToEnd({"--worker", "/no/such/worker"}, &output), 1);
  EXPECT_NE(output.find("worker /no/such/worker"), std::string::npos) << output;
  std::string plain = harness.state_dir() + "/plain";
  std::ofstream(plain) << "x";
  EXPECT_EQ(harness.RunToEnd({"--worker", plain}, &output), 1);
  EXPECT_NE(output.find("not executable"), std::string::npos) << output;
  EXPECT_EQ(std::count(output.begin(), output.end(), '\n'), 1) << output;
}

TEST(SupervisorTest, MountsOfADeadPredecessorWhoseWorkerCannotComeBackAreRemovedAtTheStart) {
  Harness harness;
  harness.Start({}, "no-reattach");
  harness.WaitPhase("running");
  MountView mount = harness.Mount("a");
  harness.Stop(SIGKILL);
  EXPECT_TRUE(IsMounted(mount.path));
  harness.Start();
  EXPECT_FALSE(IsMounted(mount.path));
  EXPECT_EQ(harness.Mount("a").path, mount.path);
}

TEST(SupervisorTest, SigintUnmountsEndsTheWorkerAndRemovesTheSockets) {
  Harness harness;
  harness.Start();
  MountView mount = harness.Mount("a");
  pid_t worker = harness.Status().Worker("owner").pid;
  EXPECT_EQ(harness.Stop(SIGINT), 0);
  EXPECT_FALSE(IsMounted(mount.path));
  EXPECT_FALSE(PathExists(harness.control_socket()));
  EXPECT_FALSE(PathExists(harness.snapshotter_socket()));
  EXPECT_NE(kill(worker, 0), 0) << "reaped";
}

TEST(SupervisorTest, AFullEndThatHasBegunIsNotAbortedBySigterm) {
  Harness harness;
  harness.Start();
  MountView mount = harness.Mount("a");
  const pid_t worker = harness.Status().Worker("owner").pid, supervisor = harness.pid();
  std::ofstream(harness.state_dir() + "/stop-yield") << "1";
  ASSERT_EQ(kill(supervisor, SIGINT), 0);
  harness.WaitPhase("stop-yielding");  // for as long as the worker is stopped
  ASSERT_EQ(kill(supervisor, SIGTERM), 0);
  EXPECT_TRUE(Eventually([&] { return harness.LogContains("event=sigterm_ignored"); }));
  EXPECT_FALSE(harness.LogContains("event=left_to_next"));
  const std::string stat = "/proc/" + std::to_string(worker) + "/stat";
  ASSERT_TRUE(Eventually([&] { return ReadFile(stat).value_or("").find(") T ") != std::string::npos; }));
  ASSERT_EQ(kill(worker, SIGCONT), 0);
  EXPECT_EQ(harness.WaitEnd(), 0);
  EXPECT_TRUE(harness.LogContains("event=stopped"));
  EXPECT_FALSE(IsMounted(mount.path));
  EXPECT_FALSE(PathExists(harness.control_socket()));
  EXPECT_NE(kill(worker, 0), 0) << "reaped";
}

TEST(SupervisorTest, ControlTurnsAwayWhoIsNotRoot) {
  Harness harness;
  harness.Start();
  ASSERT_EQ(chmod(harness.control_socket().c_str(), 0666), 0);
  // The folders above are private; a descriptor to the socket's folder gets around that.
  std::string folder = harness.control_socket().substr(0, harness.control_socket().rfind('/'));
  UniqueFd at(open(folder.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
  ASSERT_TRUE(at.valid());
  ASSERT_EQ(chmod(folder.c_str(), 0711), 0);
  pid_t child = fork();
  if (child == 0) {
    if (fchdir(at.get()) != 0 || setresuid(65534, 65534, 65534) != 0) _exit(1);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    strncpy(address.sun_path, "supervisor.sock", sizeof(address.sun_path) - 1);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) _exit(2);
    alarm(10);
    char byte;
    _exit(read(fd, &byte, 1) == 0 ? 0 : 3);  // hung up
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  harness.WaitPhase("running");
}

}  // namespace
}  // namespace holdfast::supervisor
