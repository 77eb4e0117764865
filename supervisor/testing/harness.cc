#include "supervisor/testing/harness.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <fstream>
#include <functional>
#include <iostream>
#include <sstream>
#include <thread>
#include <utility>

#include "common/fuse_mount.h"
#include "common/testing/processes.h"
#include "common/testing/time_limit.h"
#include "gtest/gtest.h"

#pragma GCC diagnostic ignored "-Wnon-virtual-dtor"  // generated server bases

namespace holdfast::supervisor::testing {
namespace {

int Reap(pid_t pid, int seconds) {
  int status = 0;
  bool ended = Eventually([&] { return waitpid(pid, &status, WNOHANG) == pid; }, seconds);
  EXPECT_TRUE(ended) << "process " << pid << " did not end";
  if (!ended) return -1000;
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

std::string Text(capnp::Data::Reader data) {
  return std::string(reinterpret_cast<const char*>(data.begin()), data.size());
}

std::vector<uint64_t> Numbers(capnp::List<uint64_t>::Reader list) {
  std::vector<uint64_t> numbers;
  for (uint64_t number : list) numbers.push_back(number);
  return numbers;
}

MountView View(schema::MountEntry::Reader entry) {
  return {entry.getMountId(),         entry.getPath().cStr(), Text(entry.getInitRequest()),
          Text(entry.getInitReply()), Text(entry.getBlob()),  entry.getState()};
}

class StepCollector final : public schema::Progress::Server {
 public:
  explicit StepCollector(std::vector<std::string>* begun) : begun_(*begun) {}
  kj::Promise<void> step(StepContext context) override {
    if (!context.getParams().getDone()) begun_.emplace_back(context.getParams().getStep().getName().cStr());
    return kj::READY_NOW;
  }

 private:
  std::vector<std::string>& begun_;
};

}  // namespace

bool Eventually(const std::function<bool()>& condition, int seconds) {
  auto end = std::chrono::steady_clock::now() + kTimeFactor * std::chrono::seconds(seconds);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return true;
}

WorkerView StatusView::Worker(const std::string& role) const {
  for (const WorkerView& worker : workers) {
    if (worker.role == role) return worker;
  }
  ADD_FAILURE() << "no worker is " << role << " in phase " << phase;
  return {};
}

Harness::Harness() : io_(kj::setupAsyncIo()) {
  prctl(PR_SET_CHILD_SUBREAPER, 1);  // workers of a dead supervisor become ours to end
  MakeDirs(dir_.path() + "/run").IgnoreError();
  MakeDirs(state_dir() + "/mounts").IgnoreError();
}

Harness::~Harness() {
  control_ = nullptr;
  client_ = nullptr;
  stream_ = nullptr;
  if (pid_ != 0) Stop(SIGINT);
  ReapOrphans();
  for (pid_t child : Children()) {
    kill(child, SIGKILL);
    Reap(child, 10);
  }
  if (::testing::Test::HasFailure()) std::cerr << ReadFile(dir_.path() + "/supervisor.log").value_or("");
  auto mounts = ReadMountInfo();
  for (const MountInfo& mount : mounts.ok() ? *mounts : std::vector<MountInfo>()) {
    if (IsUnder(mount.path, dir_.path())) umount2(mount.path.c_str(), MNT_DETACH);
  }
}

std::string Harness::MakeWorker(const std::string& mode) {
  std::string path = dir_.path() + "/worker-" + std::to_string(++made_);
  auto program = ReadFile(Bin("holdfast-fake-worker"));
  EXPECT_TRUE(program.ok()) << program.status();
  std::ofstream(path, std::ios::binary) << *program << "\n#" << made_ << " HFMODE:" << mode << "\n";
  chmod(path.c_str(), 0755);
  return path;
}

pid_t Harness::Launch(const std::vector<std::string>& args, int output) {
  std::vector<std::string> all = {Bin("holdfast-supervisor"), "--state", state_dir(), "--runtime",
                                  dir_.path() + "/run",
                                  // Tests that hold a request back take their time; tests of hangs say 3000.
                                  "--hang-limit", "60000"};
  all.insert(all.end(), args.begin(), args.end());
  std::vector<char*> argv;
  for (std::string& arg : all) argv.push_back(arg.data());
  argv.push_back(nullptr);
  pid_t pid = fork();
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, nullptr);
    if (output >= 0) {
      dup2(output, 1);
      dup2(output, 2);
    }
    if (urgency_refused_) prctl(PR_CAPBSET_DROP, CAP_SYS_NICE);  // also from root's next program
    if (!faults_.empty()) setenv("HOLDFAST_SUPERVISOR_FAULTS", faults_.c_str(), 1);
    if (manager_ != nullptr) manager_->PrepareChild();
    execv(argv[0], argv.data());
    _exit(127);
  }
  return pid;
}

void Harness::Start(const std::vector<std::string>& extra, const std::string& mode) {
  std::vector<std::string> args = {"--worker", MakeWorker(mode)};
  args.insert(args.end(), extra.begin(), extra.end());
  args_ = std::move(args);
  StartAgain();
  if (mode == "good") WaitPhase("running");
}

void Harness::StartAgain() {
  if (manager_ != nullptr) manager_->Sync();
  std::string log = dir_.path() + "/supervisor.log";
  UniqueFd file(open(log.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600));
  pid_ = Launch(args_, getenv("HOLDFAST_TEST_VERBOSE") != nullptr ? -1 : file.get());
  Connect();
}

ServiceManager& Harness::UseServiceManager() {
  manager_ = std::make_unique<ServiceManager>(dir_.path() + "/notify.sock");
  return *manager_;
}

bool Harness::LogContains(const std::string& text) const {
  return ReadFile(dir_.path() + "/supervisor.log").value_or("").find(text) != std::string::npos;
}

void Harness::ReapOrphans() {
  for (pid_t child : Children()) {
    siginfo_t info{};
    // Whose parent we are from the start is waited for by whoever started it.
    std::string name = ReadFile("/proc/" + std::to_string(child) + "/comm").value_or("");
    if (name == "holdfast-superv\n" || name == ReadFile("/proc/self/comm").value_or("")) continue;
    waitid(P_PID, static_cast<id_t>(child), &info, WEXITED | WNOHANG);
  }
}

int Harness::WaitEnd() { return Reap(std::exchange(pid_, 0), 40); }

int Harness::RunToEnd(const std::vector<std::string>& extra, std::string* output) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return -1;
  UniqueFd read_end(ends[0]);
  UniqueFd write_end(ends[1]);
  pid_t pid = Launch(extra, write_end.get());
  write_end.Reset();
  pollfd ready{.fd = read_end.get(), .events = POLLIN, .revents = 0};
  char buffer[4096];
  output->clear();
  while (poll(&ready, 1, 10'000) == 1) {
    ssize_t got = read(read_end.get(), buffer, sizeof(buffer));
    if (got <= 0) break;
    output->append(buffer, static_cast<size_t>(got));
  }
  kill(pid, SIGKILL);  // ended already, unless the test fails
  return Reap(pid, 10);
}

int Harness::Stop(int signal) {
  pid_t pid = std::exchange(pid_, 0);
  kill(pid, signal);
  return Reap(pid, 40);
}

void Harness::Connect() {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  strncpy(address.sun_path, control_socket().c_str(), sizeof(address.sun_path) - 1);
  UniqueFd fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  ASSERT_TRUE(Eventually([&] {
    return connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0;
  })) << "no supervisor listens";
  control_ = nullptr;
  client_ = nullptr;
  stream_ = io_.lowLevelProvider->wrapUnixSocketFd(fd.Release(), kj::LowLevelAsyncIoProvider::TAKE_OWNERSHIP);
  client_ = kj::heap<capnp::TwoPartyClient>(*stream_, 253);
  control_ = client_->bootstrap().castAs<schema::Control>();
}

StatusView Harness::Status() {
  auto response =
      Wait(KJ_ASSERT_NONNULL(control_).statusRequest().send().then([](auto&& r) { return kj::mv(r); }));
  auto status = response.getStatus();
  StatusView view;
  view.phase = status.getPhase().cStr();
  view.swap_kind = status.getLastSwap().getKind().cStr();
  view.swap_result = status.getLastSwap().getResult().cStr();
  view.to_build = status.getLastSwap().getToBuild().cStr();
  view.from_build = status.getLastSwap().getFromBuild().cStr();
  view.carried = status.getLastSwap().getRequestsCarriedOver();
  view.pause_nanos = status.getLastSwap().getPauseNanos();
  view.crashes = status.getCrashes();
  view.hangs = status.getHangs();
  view.swaps = status.getSwaps();
  view.live = status.getMountsLive();
  view.detached = status.getMountsDetached();
  for (auto worker : status.getWorkers()) {
    view.workers.push_back({worker.getGeneration(), static_cast<pid_t>(worker.getPid()),
                            worker.getRole().cStr(), worker.getBuild().cStr(), worker.getExecutable().cStr(),
                            worker.getRequestsReceived()});
  }
  for (auto step : status.getLastSwap().getSteps())
    view.steps.push_back({step.getName().cStr(), step.getDetail().cStr(), step.getNanos()});
  view.last_good = status.getLastGood().cStr();
  view.spare = status.getSpareState().cStr();
  view.last_death = status.getLastDeath().cStr();
  view.last_death_wall_nanos = status.getLastDeathWallNanos();
  view.probation_seconds = status.getProbationSeconds();
  view.state_source = status.getStateSource().cStr();
  view.fd_store = status.getFdStore();
  view.restarts = status.getSupervisorRestarts();
  for (auto warning : status.getWarnings()) view.warnings.emplace_back(warning.cStr());
  return view;
}

StatusView Harness::WaitPhase(const std::string& phase, int seconds) {
  StatusView view;
  EXPECT_TRUE(Eventually([&] { return (view = Status()).phase == phase; }, seconds))
      << "phase is " << view.phase << ", not " << phase;
  return view;
}

std::string Harness::Upgrade(const std::string& path, bool force, bool* changed) {
  auto request = KJ_ASSERT_NONNULL(control_).upgradeRequest();
  request.setPath(path.c_str());
  request.setForce(force);
  try {
    auto response = Wait(request.send().then([](auto&& r) { return kj::mv(r); }), 30);
    *changed = response.getChanged();
    return "";
  } catch (const kj::Exception& exception) {
    return exception.getDescription().cStr();
  }
}

std::string Harness::Rollback(std::vector<std::string>* begun) {
  auto request = KJ_ASSERT_NONNULL(control_).rollbackRequest();
  if (begun != nullptr) request.setProgress(kj::heap<StepCollector>(begun));
  try {
    Wait(request.send().ignoreResult(), 30);
    return "";
  } catch (const kj::Exception& exception) {
    return exception.getDescription().cStr();
  }
}

std::string Harness::CheckRollback() {
  auto response = Wait(
      KJ_ASSERT_NONNULL(control_).checkRollbackRequest().send().then([](auto&& r) { return kj::mv(r); }));
  if (response.getReady()) return std::string("ready ") + response.getExecutable().cStr();
  return std::string("not ready: ") + response.getReason().cStr();
}

std::vector<MountView> Harness::Mounts(uint64_t after, uint32_t limit, bool* more) {
  auto request = KJ_ASSERT_NONNULL(control_).mountsRequest();
  request.setAfter(after);
  request.setLimit(limit);
  auto response = Wait(request.send().then([](auto&& r) { return kj::mv(r); }));
  *more = response.getMore();
  std::vector<MountView> views;
  for (auto entry : response.getEntries()) views.push_back(View(entry));
  return views;
}

std::vector<uint64_t> Harness::LedgerGenerations() {
  auto response =
      Wait(KJ_ASSERT_NONNULL(control_).ledgersRequest().send().then([](auto&& r) { return kj::mv(r); }));
  std::vector<uint64_t> generations;
  for (auto ledger : response.getLedgers()) generations.push_back(ledger.getGeneration());
  return generations;
}

FakeAdmin::Client Harness::Admin() {
  auto response =
      Wait(KJ_ASSERT_NONNULL(control_).workerAdminRequest().send().then([](auto&& r) { return kj::mv(r); }));
  return response.getAdmin().castAs<FakeAdmin>();
}

MountView Harness::Mount(const std::string& name, uint64_t flags, const std::string& blob) {
  std::string path = name[0] == '/' ? name : state_dir() + "/mounts/" + name;
  if (name[0] != '/') MakeDirs(path).IgnoreError();
  auto request = Admin().mountRequest();
  request.setPath(path.c_str());
  request.initOptions().setFlags(flags);
  request.setBlob(kj::arrayPtr(reinterpret_cast<const kj::byte*>(blob.data()), blob.size()));
  auto response = Wait(request.send().then([](auto&& r) { return kj::mv(r); }));
  return View(response.getEntry());
}

schema::MountState Harness::Unmount(uint64_t id) {
  auto request = Admin().unmountRequest();
  request.setMountId(id);
  return Wait(request.send().then([](auto&& r) { return kj::mv(r); })).getState();
}

void Harness::SetBlob(uint64_t id, const std::string& blob) {
  auto request = Admin().setBlobRequest();
  request.setMountId(id);
  request.setBlob(kj::arrayPtr(reinterpret_cast<const kj::byte*>(blob.data()), blob.size()));
  Wait(request.send().ignoreResult());
}

Info Harness::WorkerInfo() {
  auto response = Wait(Admin().infoRequest().send().then([](auto&& r) { return kj::mv(r); }));
  Info info;
  info.generation = response.getGeneration();
  info.adopted = response.getAdopted();
  info.pages = response.getPagesSeen();
  info.listener_works = response.getListenerWorks();
  info.mount_ids = Numbers(response.getMountIds());
  info.exited = Numbers(response.getExited());
  info.gone = Numbers(response.getGone());
  info.ledgers_seen = Numbers(response.getLedgersSeen());
  for (auto blob : response.getBlobs()) info.blobs.push_back(Text(blob));
  for (auto call : response.getCalls()) info.calls.emplace_back(call.cStr());
  for (auto fd : response.getOpenFds()) info.inherited_fds.emplace_back(fd.cStr());
  return info;
}

std::map<std::string, int> Harness::OpenFds() const {
  std::map<std::string, int> kinds;
  std::string path = "/proc/" + std::to_string(pid_) + "/fd";
  DIR* folder = opendir(path.c_str());
  while (dirent* entry = readdir(folder)) {
    char target[256] = {};
    if (entry->d_name[0] == '.' ||
        readlink((path + "/" + entry->d_name).c_str(), target, sizeof(target) - 1) < 0)
      continue;
    if (std::string(target).starts_with(dir_.path() + "/state/supervisor"))
      continue;  // a file there, and then the folder, is open while it is written
    ++kinds[std::string(target).substr(0, std::string(target).find(':'))];
  }
  closedir(folder);
  return kinds;
}

Stat::Stat(const std::string& path) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) abort();
  pipe_.Reset(ends[0]);
  UniqueFd write_end(ends[1]);
  pid_ = fork();
  if (pid_ == 0) {
    struct stat info;
    int64_t result = stat(path.c_str(), &info) == 0 ? static_cast<int64_t>(info.st_mtime) : -errno;
    if (write(write_end.get(), &result, sizeof(result)) != sizeof(result)) _exit(1);
    _exit(0);
  }
}

Stat::~Stat() {
  kill(pid_, SIGKILL);
  Eventually([&] { return waitpid(pid_, nullptr, WNOHANG) != 0; }, 10);
}

bool Stat::Done(int seconds) {
  pollfd ready{.fd = pipe_.get(), .events = POLLIN, .revents = 0};
  return poll(&ready, 1, seconds * 1'000) == 1;
}

int64_t Stat::Result(int seconds) {
  int64_t result = -ETIMEDOUT;
  if (Done(seconds * kTimeFactor) && read(pipe_.get(), &result, sizeof(result)) != sizeof(result))
    result = -EIO;
  return result;
}

}  // namespace holdfast::supervisor::testing
