// Runs inside a booted systemd container (run.py): holdfast as packaging/holdfast.service, with readers on a
// lazily pulled image. systemd restarts the supervisor, kills it, keeps its descriptors; the kernel kills the
// worker for memory; PID 1 must not notice the reads.
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "common/io.h"
#include "gtest/gtest.h"
#include "tests/integration/lazy_image.h"
#include "tests/integration/node.h"
#include "tests/support/registry_server.h"
#include "worker/ctl/control_client.h"

namespace holdfast::test {
namespace {

constexpr char kControl[] = "/run/holdfast/supervisor.sock";
constexpr char kSnapshotter[] = "/run/holdfast/snapshotter.sock";
constexpr char kMemoryGroup[] =
    "/run/memory-group";       // a memory control group of ours, where the host has cgroup v1
constexpr int kPatience = 30;  // seconds

std::string Output(const std::string& command) {
  FILE* pipe = popen((command + " 2>&1").c_str(), "r");
  if (pipe == nullptr) return "popen failed";
  std::string output;
  char buffer[4096];
  while (size_t got = fread(buffer, 1, sizeof buffer, pipe)) output.append(buffer, got);
  pclose(pipe);
  while (!output.empty() && output.back() == '\n') output.pop_back();
  return output;
}

bool Succeeds(const std::string& command) {
  const int status = system(command.c_str());
  EXPECT_EQ(status, 0) << command;
  return status == 0;
}

bool WaitUntil(const std::function<bool()>& condition, int seconds = kPatience) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return true;
}

std::string Property(const std::string& name) {
  return Output("systemctl show --value -p " + name + " holdfast");
}
pid_t MainPid() { return static_cast<pid_t>(atoi(Property("MainPID").c_str())); }
int StoredDescriptors() { return atoi(Property("NFileDescriptorStore").c_str()); }

absl::StatusOr<ctl::SupervisorStatus> Status() {
  HF_ASSIGN_OR_RETURN(auto control, ctl::ControlClient::Connect(kControl));
  return control->Status();
}

// The supervisor `main` serves its control socket and a worker owns everything.
bool Running(pid_t main) {
  auto status = Status();
  return status.ok() && static_cast<pid_t>(status->pid) == main && status->phase == "running";
}

pid_t Owner() {
  auto status = Status();
  if (!status.ok()) return 0;
  for (const ctl::WorkerStatus& worker : status->workers) {
    if (worker.role == "owner") return static_cast<pid_t>(worker.pid);
  }
  return 0;
}

uint64_t Read() {
  auto status = Status();
  if (!status.ok()) return 0;
  uint64_t received = 0;
  for (const ctl::WorkerStatus& worker : status->workers) received += worker.requests_received;
  return received;
}

// Processes that run a copy of the worker, which the supervisor keeps in its state folder.
std::vector<pid_t> Workers() {
  std::vector<pid_t> found;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator("/proc", error)) {
    const auto program = std::filesystem::read_symlink(entry.path() / "exe", error).string();
    if (program.rfind("/var/lib/holdfast/", 0) == 0) found.push_back(atoi(entry.path().filename().c_str()));
  }
  return found;
}

std::vector<std::string> FuseMounts() {
  std::ifstream file("/proc/self/mountinfo");
  std::vector<std::string> found;
  for (std::string line; std::getline(file, line);) {
    if (line.find(" - fuse") == std::string::npos || line.find("fusectl") != std::string::npos) continue;
    std::istringstream words(line);
    std::string path;
    for (int i = 0; i < 5; ++i) words >> path;
    found.push_back(path);
  }
  return found;
}

// How often PID 1 woke up, and how long it ran.
struct Activity {
  uint64_t wakeups = 0, nanos = 0;
};
Activity OfPid1() {
  Activity activity;
  std::ifstream status("/proc/1/status");
  for (std::string word; status >> word;) {
    // As often as it went to sleep again. Whoever else wants the processor takes it away more often than
    // that.
    if (word == "voluntary_ctxt_switches:") status >> activity.wakeups;
  }
  std::ifstream("/proc/1/schedstat") >> activity.nanos;
  return activity;
}

class ServiceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(Succeeds("systemctl start holdfast"));
    ASSERT_TRUE(WaitUntil([] { return Running(MainPid()); })) << Output("systemctl status holdfast");
    snapshots_ = SnapshotsClient::Connect(kSnapshotter);
  }

  // Ends everything, as the unit's comment says, and looks for what is left.
  void TearDown() override {
    for (const std::string& path : mounted_) umount2(path.c_str(), MNT_DETACH);
    const std::string folder = "/run/systemd/system/holdfast.service.d";
    Succeeds("mkdir -p " + folder + " && printf '[Service]\\nKillSignal=SIGINT\\n' > " + folder +
             "/end.conf && systemctl daemon-reload && systemctl stop holdfast; rm -r " + folder +
             "; systemctl daemon-reload");
    EXPECT_EQ(Property("ActiveState"), "inactive");
    EXPECT_TRUE(WaitUntil([] { return Workers().empty(); })) << "a worker outlives the full end";
    EXPECT_TRUE(FuseMounts().empty()) << FuseMounts().front();
    if (HasFailure()) fputs(Output("journalctl --no-pager -n 60 -u holdfast").c_str(), stderr);
    Succeeds("rm -rf /var/lib/holdfast/*");
  }

  // A lazily pulled image, mounted as a container's root.
  std::string Mounted(const Image& image, const std::string& name) {
    auto parent = PullLazily(snapshots_.get(), &registry_, image, name);
    EXPECT_TRUE(parent.ok()) << parent.status();
    if (!parent.ok()) return "";
    return MountedAgain(*parent, name);
  }
  std::string MountedAgain(const std::string& parent, const std::string& name) {
    parent_ = parent;
    auto mounts = snapshots_->Prepare("default/9/" + name, parent, {});
    EXPECT_TRUE(mounts.ok()) << mounts.status();
    if (!mounts.ok()) return "";
    const std::string target = folder_.path() + "/" + name;
    EXPECT_TRUE(MakeDirs(target).ok());
    for (const SnapshotsClient::Mount& entry : *mounts) {
      std::string options;
      for (const std::string& option : entry.options) options += (options.empty() ? "" : ",") + option;
      EXPECT_EQ(entry.type, "overlay");
      EXPECT_EQ(mount(entry.source.c_str(), target.c_str(), "overlay", 0, options.c_str()), 0) << options;
    }
    mounted_.push_back(target);
    return target;
  }

  // `replace` ends the supervisor one way or the other; systemd brings the next one, which must take over
  // everything while `readers` go on.
  void ReplaceSupervisor(Readers* readers, const std::function<void(pid_t)>& replace) {
    const pid_t before = MainPid(), worker = Owner();
    ASSERT_GT(before, 0);
    ASSERT_GT(worker, 0);
    const size_t mounts = FuseMounts().size();
    const uint64_t reads = readers->read();
    replace(before);
    ASSERT_TRUE(WaitUntil([&] {
      const pid_t now = MainPid();
      return now > 0 && now != before && Running(now);
    })) << Output("systemctl status holdfast");
    EXPECT_EQ(Owner(), worker) << "the worker must outlive its supervisor";
    EXPECT_EQ(FuseMounts().size(), mounts);
    auto status = Status();
    ASSERT_TRUE(status.ok()) << status.status();
    EXPECT_EQ(status->mounts_live + status->mounts_detached, mounts);
    EXPECT_TRUE(WaitUntil([&] { return readers->read() > reads + 20; })) << "the readers stand still";
    EXPECT_EQ(readers->wrong(), 0u) << readers->first_error();
    EXPECT_TRUE(snapshots_->Stat(parent_).ok());
  }

  RegistryServer registry_;
  TempDir folder_;
  std::unique_ptr<SnapshotsClient> snapshots_;
  std::vector<std::string> mounted_;
  std::string parent_;
};

TEST_F(ServiceTest, SystemdFindsNothingWrongWithTheUnit) {
  EXPECT_EQ(Output("systemd-analyze verify /etc/systemd/system/holdfast.service"), "");
  EXPECT_EQ(Property("FileDescriptorStoreMax"), "65536");
  EXPECT_EQ(Property("OOMPolicy"), "continue");
  EXPECT_EQ(Output("readlink /proc/" + std::to_string(MainPid()) + "/ns/mnt"),
            Output("readlink /proc/1/ns/mnt"));
  EXPECT_EQ(Property("OOMScoreAdjust"), "-900");
  EXPECT_EQ(Property("Delegate"), "yes");
}

TEST_F(ServiceTest, RestartingTheSupervisorUnderReadersFailsNothing) {
  const Image image = MakeImage(1, {.small_files = 40, .large_bytes = 1u << 20});
  const std::string root = Mounted(image, "restart");
  Readers readers(image, root, 3, Readers::Until::kStopped);
  for (int i = 0; i < 5 && !HasFatalFailure(); ++i) {
    SCOPED_TRACE(i);
    ReplaceSupervisor(&readers, [](pid_t) { Succeeds("systemctl restart holdfast"); });
  }
  readers.Stop();
  EXPECT_EQ(readers.wrong(), 0u) << readers.first_error();
  // New layers and a swap are possible under the supervisor that took over.
  const Image other = MakeImage(2, {.small_files = 10, .large_bytes = 100'000});
  const std::string fresh = Mounted(other, "fresh");
  Readers once(other, fresh, 2, Readers::Until::kAllRead);
  once.Wait();
  EXPECT_EQ(once.wrong(), 0u) << once.first_error();
  EXPECT_TRUE(Succeeds("systemctl reload holdfast"));
}

TEST_F(ServiceTest, KillingTheSupervisorUnderReadersFailsNothing) {
  const Image image = MakeImage(3, {.small_files = 40, .large_bytes = 1u << 20});
  const std::string root = Mounted(image, "killed");
  Readers readers(image, root, 3, Readers::Until::kStopped);
  for (int i = 0; i < 5 && !HasFatalFailure(); ++i) {
    SCOPED_TRACE(i);
    ReplaceSupervisor(&readers, [](pid_t main) { EXPECT_EQ(kill(main, SIGKILL), 0); });
  }
  readers.Stop();
  EXPECT_EQ(readers.wrong(), 0u) << readers.first_error();
  EXPECT_GE(atoi(Property("NRestarts").c_str()), 5) << "systemd did not restart it: was it killed at all?";
  auto status = Status();
  ASSERT_TRUE(status.ok()) << status.status();
  EXPECT_TRUE(status->fd_store);
  EXPECT_EQ(status->state_source, "fd store");
}

TEST_F(ServiceTest, StoppingAndStartingTheServiceUnderReadersFailsNothing) {
  const Image image = MakeImage(4, {.small_files = 40, .large_bytes = 1u << 20});
  const std::string root = Mounted(image, "stopped");
  Readers readers(image, root, 3, Readers::Until::kStopped);
  ReplaceSupervisor(&readers, [&](pid_t main) {
    const pid_t worker = Owner();
    Succeeds("systemctl stop holdfast");
    EXPECT_NE(kill(main, 0), 0) << "the supervisor is still there";
    EXPECT_EQ(kill(worker, 0), 0) << "the worker ended with its supervisor";
    EXPECT_EQ(StoredDescriptors(), 0) << "a stopped service keeps no descriptors";
    const uint64_t reads = readers.read();
    EXPECT_TRUE(WaitUntil([&] { return readers.read() > reads + 100; })) << "the readers stand still";
    Succeeds("systemctl start holdfast");
  });
  auto status = Status();
  ASSERT_TRUE(status.ok()) << status.status();
  EXPECT_EQ(status->state_source, "worker");
  EXPECT_GT(StoredDescriptors(), 0) << "what came back from the worker is not stored again";
  readers.Stop();
  EXPECT_EQ(readers.wrong(), 0u) << readers.first_error();
}

TEST_F(ServiceTest, SupervisorAndWorkerKilledAtOnceLoseNothing) {
  const Image image = MakeImage(5, {.small_files = 40, .large_bytes = 1u << 20});
  const std::string root = Mounted(image, "both");
  Readers readers(image, root, 3, Readers::Until::kStopped);
  for (int apart : {0, 500}) {
    SCOPED_TRACE(std::to_string(apart) + " ms apart");
    ASSERT_TRUE(WaitUntil([] { return Owner() > 0 && Running(MainPid()); }));
    const pid_t main = MainPid(), worker = Owner();
    const uint64_t reads = readers.read();
    EXPECT_EQ(kill(main, SIGKILL), 0);
    std::this_thread::sleep_for(std::chrono::milliseconds(apart));
    EXPECT_EQ(kill(worker, SIGKILL), 0);
    ASSERT_TRUE(WaitUntil([&] { return MainPid() > 0 && MainPid() != main && Running(MainPid()); }))
        << Output("systemctl status holdfast");
    EXPECT_NE(Owner(), worker);
    EXPECT_TRUE(WaitUntil([&] { return readers.read() > reads + 20; })) << "the readers stand still";
    EXPECT_EQ(readers.wrong(), 0u) << readers.first_error();
  }
  readers.Stop();
  EXPECT_EQ(readers.wrong(), 0u) << readers.first_error();
}

// A memory control group with a limit, in which the kernel kills for memory: with cgroup v1 one of run.py's,
// into which only the worker is put; with v2 the service's own, which holds the supervisor, too.
class MemoryGroup {
 public:
  explicit MemoryGroup(const std::string& limit) : v1_(PathExists(kMemoryGroup)) {
    folder_ = v1_ ? kMemoryGroup : "/sys/fs/cgroup" + Property("ControlGroup");
    Succeeds(v1_ ? "echo " + limit + " > " + folder_ + "/memory.limit_in_bytes"
                 : "systemctl set-property --runtime holdfast MemoryMax=" + limit);
  }
  ~MemoryGroup() {
    if (!v1_) Succeeds("systemctl set-property --runtime holdfast MemoryMax=infinity");
  }
  std::string procs() const { return folder_ + "/cgroup.procs"; }
  uint64_t kills() const {
    std::ifstream file(folder_ + (v1_ ? "/memory.oom_control" : "/memory.events"));
    uint64_t count = 0;
    for (std::string word; file >> word;) {
      if (word == "oom_kill") file >> count;
    }
    return count;
  }

 private:
  const bool v1_;
  std::string folder_;
};

// Takes memory in that group for ever. Not a fork of this large process, whose pages would count as its own.
pid_t StartHog(const MemoryGroup& group) {
  const pid_t hog = fork();
  if (hog != 0) return hog;
  const std::string command = "echo $$ > " + group.procs() + " && exec tail /dev/zero";
  execl("/bin/sh", "sh", "-c", command.c_str(), nullptr);
  _exit(127);
}

TEST_F(ServiceTest, AWorkerKilledByTheKernelForMemoryIsReplacedAndTheServiceLivesOn) {
  const Image image = MakeImage(6, {.small_files = 40, .large_bytes = 1u << 20});
  const std::string root = Mounted(image, "oom");
  Readers readers(image, root, 3, Readers::Until::kStopped);
  ASSERT_TRUE(WaitUntil([&] { return readers.read() > 50; }));
  const pid_t main = MainPid(), worker = Owner();
  const std::string restarts = Property("NRestarts");
  MemoryGroup group("64M");
  const uint64_t before = group.kills();
  ASSERT_TRUE(Succeeds("echo " + std::to_string(worker) + " > " + group.procs()));
  // The worker is the kernel's first choice. (The other way round, sparing the hog, needs CAP_SYS_RESOURCE.)
  ASSERT_TRUE(Succeeds("echo 1000 > /proc/" + std::to_string(worker) + "/oom_score_adj"));
  const pid_t hog = StartHog(group);
  EXPECT_TRUE(WaitUntil([&] { return group.kills() > before; })) << "the kernel killed nothing";
  kill(hog, SIGKILL);
  waitpid(hog, nullptr, 0);
  EXPECT_TRUE(WaitUntil([&] { return Running(main) && Owner() != worker; }))
      << Output("systemctl status holdfast");
  EXPECT_EQ(MainPid(), main) << "the supervisor was taken along";
  EXPECT_EQ(Property("NRestarts"), restarts);
  const uint64_t reads = readers.read();
  EXPECT_TRUE(WaitUntil([&] { return readers.read() > reads + 20; })) << "the readers stand still";
  readers.Stop();
  EXPECT_EQ(readers.wrong(), 0u) << readers.first_error();
}

TEST_F(ServiceTest, Pid1DoesNotNoticeAHundredThousandReads) {
  constexpr uint64_t kReads = 100'000;
  const Image image = MakeImage(7, {.small_files = 10, .large_bytes = 1u << 20});
  const std::string root = Mounted(image, "idle");
  EXPECT_EQ(ReadWhole(root + "/data/large"), image.files.at("data/large"));
  EXPECT_TRUE(WaitUntil([] { return StoredDescriptors() > 2; }))
      << "nothing is stored, so nothing could wake PID 1";
  // What the start of the service has set off is over.
  EXPECT_TRUE(WaitUntil([] {
    const uint64_t wakeups = OfPid1().wakeups;
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    return OfPid1().wakeups - wakeups <= 3;
  })) << "PID 1 does not come to rest";
  const uint64_t asked = Read();
  const Activity before = OfPid1();
  std::atomic<uint64_t> wrong{0};
  std::vector<std::thread> threads;
  for (uint64_t i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      auto file = OpenFile(root + "/data/large", O_RDONLY | O_DIRECT);
      if (!file.ok()) {
        wrong += kReads;
        return;
      }
      const std::string& right = image.files.at("data/large");
      alignas(4096) char page[4096];
      for (uint64_t n = 0; n < kReads / 4; ++n) {
        const uint64_t offset = (n * 7 + i) % (right.size() / 4096) * 4096;
        const bool same = pread(file->get(), page, sizeof page, static_cast<off_t>(offset)) == 4096 &&
                          right.compare(offset, 4096, page, 4096) == 0;
        if (!same) wrong++;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const Activity after = OfPid1();
  ASSERT_GT(before.nanos, 0u) << "/proc/1/schedstat says nothing";
  ASSERT_GT(before.wakeups, 0u);
  EXPECT_EQ(wrong, 0u);
  EXPECT_GE(Read() - asked, kReads) << "the reads did not reach the worker";
  const uint64_t wakeups = after.wakeups - before.wakeups;
  const double used_ms = static_cast<double>(after.nanos - before.nanos) / 1e6;
  printf("PID 1 during %llu reads: %llu wakeups, %.1f ms of a processor; %d descriptors stored\n",
         static_cast<unsigned long long>(kReads), static_cast<unsigned long long>(wakeups), used_ms,
         StoredDescriptors());
  EXPECT_LT(wakeups, kReads / 1000);
  EXPECT_LT(used_ms, 50);
}

// Stores `count` more descriptors with systemd in the service's name, as the supervisor does (FDPOLL=0, short
// names).
void StoreMore(int count) {
  // Where both versions of cgroup are mounted, systemd tracks services in the one of version 2.
  const std::string base = PathExists("/sys/fs/cgroup/unified") ? "/sys/fs/cgroup/unified" : "/sys/fs/cgroup";
  const std::string procs = base + Property("ControlGroup") + "/cgroup.procs";
  ASSERT_TRUE(PathExists(procs)) << procs;
  // In the service's control group, by which systemd knows whom a message is from.
  const pid_t child = fork();
  if (child == 0) {
    std::ofstream(procs) << getpid() << std::flush;
    UniqueFd manager(socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    strcpy(address.sun_path, "/run/systemd/notify");
    for (int i = 0; i < count; ++i) {
      UniqueFd memory(memfd_create("more", MFD_CLOEXEC));
      std::string text = "FDSTORE=1\nFDPOLL=0\nFDNAME=x" + std::to_string(i);
      iovec part{.iov_base = text.data(), .iov_len = text.size()};
      alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
      msghdr message{};
      message.msg_name = &address;
      message.msg_namelen = sizeof address;
      message.msg_iov = &part;
      message.msg_iovlen = 1;
      message.msg_control = control;
      message.msg_controllen = sizeof control;
      cmsghdr* rights = CMSG_FIRSTHDR(&message);
      rights->cmsg_level = SOL_SOCKET;
      rights->cmsg_type = SCM_RIGHTS;
      rights->cmsg_len = CMSG_LEN(sizeof(int));
      const int fd = memory.get();
      memcpy(CMSG_DATA(rights), &fd, sizeof fd);
      if (sendmsg(manager.get(), &message, 0) < 0) _exit(1);
    }
    pause();  // until systemd has taken all: it asks for the sender's group then
  }
  EXPECT_TRUE(WaitUntil([&] { return StoredDescriptors() >= count; })) << StoredDescriptors();
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
}

// 1,000 of them are mounts. (systemd reads the whole list of mounts again for each that comes or goes, so
// that 5,000 would take it many minutes; the others are descriptors in the service's name that the next
// supervisor does not know.)
TEST_F(ServiceTest, FiveThousandStoredDescriptorsComeBackAfterARestart) {
  constexpr int kStored = 5'000, kMounts = 1'000;
  const Image image = MakeImage(8, {.small_files = 10, .large_bytes = 100'000});
  const std::string root = Mounted(image, "many");
  // The same two layers under ever new names: two mounts each.
  std::atomic<int> next{0};
  std::vector<std::thread> pullers;
  for (int i = 0; i < 4; ++i) {
    pullers.emplace_back([&] {
      auto client = SnapshotsClient::Connect(kSnapshotter);
      for (int number = next++; number < kMounts / 2; number = next++) {
        auto pulled = PullLazily(client.get(), &registry_, image, "many" + std::to_string(number));
        ASSERT_TRUE(pulled.ok()) << pulled.status();
      }
    });
  }
  for (std::thread& puller : pullers) puller.join();
  ASSERT_FALSE(HasFailure());
  EXPECT_TRUE(WaitUntil([] { return StoredDescriptors() > kMounts; })) << StoredDescriptors();
  const std::string folder = "/run/systemd/system/holdfast.service.d";
  ASSERT_TRUE(Succeeds("mkdir -p " + folder + " && printf '[Service]\\nNotifyAccess=all\\n' > " + folder +
                       "/notify.conf && systemctl daemon-reload"));
  StoreMore(kStored - kMounts);
  EXPECT_GE(StoredDescriptors(), kStored);
  const int stored = StoredDescriptors();
  const size_t mounts = FuseMounts().size();
  printf("%d descriptors stored, %zu mounts\n", stored, mounts);
  Readers readers(image, root, 2, Readers::Until::kStopped);
  ReplaceSupervisor(&readers, [](pid_t main) { EXPECT_EQ(kill(main, SIGKILL), 0); });
  EXPECT_EQ(FuseMounts().size(), mounts);
  EXPECT_GE(StoredDescriptors(), static_cast<int>(mounts));
  auto status = Status();
  ASSERT_TRUE(status.ok()) << status.status();
  EXPECT_EQ(status->state_source, "fd store");
  // And once more with both dead: every mount's descriptor comes from the store, and a new worker serves them
  // all.
  ASSERT_GT(Owner(), 0);
  const pid_t worker = Owner(), main = MainPid();
  kill(main, SIGKILL);
  kill(worker, SIGKILL);
  ASSERT_TRUE(WaitUntil([&] { return MainPid() > 0 && MainPid() != main && Running(MainPid()); }));
  EXPECT_EQ(FuseMounts().size(), mounts);
  const uint64_t reads = readers.read();
  EXPECT_TRUE(WaitUntil([&] { return readers.read() > reads + 20; })) << "the readers stand still";
  readers.Stop();
  EXPECT_EQ(readers.wrong(), 0u) << readers.first_error();
}

}  // namespace
}  // namespace holdfast::test
