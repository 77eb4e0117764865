#include "tests/integration/node.h"

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <thread>
#include <utility>

#include "common/process.h"
#include "common/testing/time_limit.h"
#include "glog/logging.h"

namespace holdfast::test {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

std::string Program(const std::string& name) {
  const char* folder = getenv("HOLDFAST_BIN");
  CHECK(folder != nullptr) << "HOLDFAST_BIN is not set: run through ctest";
  return std::string(folder) + "/" + name;
}

template <typename Condition>
bool WaitUntil(int seconds, Condition condition) {
  const auto deadline = steady_clock::now() + kTimeFactor * std::chrono::seconds(seconds);
  while (!condition()) {
    if (steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(milliseconds(5));
  }
  return true;
}

// Not our child, so there is nothing to wait for but its absence; a reused pid cannot be ours within a test.
// An orphan that ended may stay a zombie where nobody reaps it.
bool Alive(pid_t pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string stat;
  if (!std::getline(file, stat)) return false;
  const size_t name_end = stat.rfind(')');
  return name_end == std::string::npos || stat.compare(name_end, 3, ") Z") != 0;
}

pid_t OwnerOf(const ctl::SupervisorStatus& status) {
  for (const ctl::WorkerStatus& worker : status.workers) {
    if (worker.role == "owner") return static_cast<pid_t>(worker.pid);
  }
  return 0;
}

}  // namespace

Node::Node(const std::string& config, Programs programs) : programs_(std::move(programs)) {
  Start(config);
  CHECK(WaitRunning()) << "holdfast did not come up in " << root();
  Reconnect();
}

void Node::Reconnect() { snapshots_ = SnapshotsClient::Connect(root() + "/run/snapshotter.sock"); }

void Node::Start(const std::string& config) {
  CHECK(MakeDirs(root() + "/state").ok() && MakeDirs(root() + "/run").ok());
  CHECK(WriteFileAtomic(root() + "/config.toml", config).ok());
  if (programs_.state_megabytes > 0) {
    const std::string size = "mode=0700,size=" + std::to_string(programs_.state_megabytes) + "m";
    PCHECK(mount("tmpfs", (root() + "/state").c_str(), "tmpfs", 0, size.c_str()) == 0);
  }
  Spawn();
}

void Node::Spawn() {
  auto program = [](const std::string& given, const char* name) {
    return given.empty() ? Program(name) : given;
  };
  std::vector<std::string> words = {program(programs_.supervisor, "holdfast-supervisor"),
                                    "--worker",
                                    program(programs_.worker, "holdfast-worker"),
                                    "--state",
                                    root() + "/state",
                                    "--runtime",
                                    root() + "/run"};
  words.insert(words.end(), programs_.arguments.begin(), programs_.arguments.end());
  words.insert(words.end(), {"--", "--config", root() + "/config.toml"});
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  std::vector<std::string> environment = EnvironmentWithout({});
  environment.insert(environment.end(), programs_.environment.begin(), programs_.environment.end());
  std::vector<char*> envp;
  for (std::string& variable : environment) envp.push_back(variable.data());
  envp.push_back(nullptr);
  posix_spawn_file_actions_t files;
  posix_spawn_file_actions_init(&files);
  if (!programs_.log.empty()) {
    posix_spawn_file_actions_addopen(&files, 1, programs_.log.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600);
    posix_spawn_file_actions_adddup2(&files, 1, 2);
  }
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP);  // the terminal's Ctrl-C is for the test
  CHECK_EQ(posix_spawn(&supervisor_, argv[0], &files, &attributes, argv.data(), envp.data()), 0);
  posix_spawn_file_actions_destroy(&files);
  posix_spawnattr_destroy(&attributes);
}

Node::~Node() {
  UnmountAll();
  if (supervisor_ != 0 && Stop() == -1) {
    LOG(ERROR) << "the supervisor did not end; killing it";
    kill(supervisor_, SIGKILL);
    waitpid(supervisor_, nullptr, 0);
  }
  // Without any holder of their descriptors the FUSE connections end, so nothing can hang on them.
  for (pid_t pid : workers_) {
    if (Alive(pid)) kill(pid, SIGKILL);
  }
  for (pid_t pid : workers_) WaitUntil(10, [pid] { return !Alive(pid); });
  for (const std::string& path : MountsLeft()) umount2(path.c_str(), MNT_DETACH);
}

std::unique_ptr<ctl::ControlClient> Node::Control() const {
  auto client = ctl::ControlClient::Connect(control_socket());
  return client.ok() ? std::move(*client) : nullptr;
}

bool Node::WaitRunning(int seconds, pid_t killed) const {
  return WaitUntil(seconds, [&] {
    auto control = Control();
    if (control == nullptr) return false;
    auto status = control->Status();
    if (!status.ok() || status->phase != "running") return false;
    const pid_t owner = OwnerOf(*status);
    return owner != 0 && owner != killed;
  });
}

pid_t Node::WorkerPid() const {
  auto control = Control();
  if (control == nullptr) return 0;
  auto status = control->Status();
  return status.ok() ? OwnerOf(*status) : 0;
}

void Node::NoteWorkers() {
  auto control = Control();
  if (control == nullptr) return;
  auto status = control->Status();
  if (!status.ok()) return;
  for (const ctl::WorkerStatus& worker : status->workers) {
    const auto pid = static_cast<pid_t>(worker.pid);
    if (std::find(workers_.begin(), workers_.end(), pid) == workers_.end()) workers_.push_back(pid);
  }
}

pid_t Node::KillWorker() {
  pid_t pid = WorkerPid();
  if (pid > 0) kill(pid, SIGKILL);
  return pid;
}

pid_t Node::KillSupervisor() {
  NoteWorkers();
  const pid_t orphan = WorkerPid();
  kill(supervisor_, SIGKILL);
  waitpid(supervisor_, nullptr, 0);
  supervisor_ = 0;
  return orphan;
}

bool Node::StartAgain() {
  CHECK_EQ(supervisor_, 0);
  Spawn();
  return WaitRunning();
}

bool Node::WaitEnded(pid_t pid, int seconds) const {
  return WaitUntil(seconds, [pid] { return !Alive(pid); });
}

std::string Node::MountAll(const std::vector<SnapshotsClient::Mount>& mounts) {
  const std::string target = root() + "/mnt" + std::to_string(mounted_.size());
  CHECK(MakeDirs(target).ok());
  for (const SnapshotsClient::Mount& entry : mounts) {
    unsigned long flags = 0;
    std::string data;
    for (const std::string& option : entry.options) {
      if (option == "rbind") {
        flags |= MS_BIND | MS_REC;
      } else if (option == "ro") {
        flags |= MS_RDONLY;
      } else if (option != "rw") {
        data += (data.empty() ? "" : ",") + option;
      }
    }
    PCHECK(mount(entry.source.c_str(), target.c_str(), entry.type.c_str(), flags, data.c_str()) == 0)
        << entry.type << " " << data;
  }
  mounted_.push_back(target);
  return target;
}

void Node::UnmountAll() {
  for (const std::string& path : mounted_) umount2(path.c_str(), MNT_DETACH);
}

int Node::Stop(int seconds) {
  if (supervisor_ == 0) return -1;
  NoteWorkers();
  kill(supervisor_, SIGINT);
  int status = 0;
  if (!WaitUntil(seconds, [&] { return waitpid(supervisor_, &status, WNOHANG) == supervisor_; })) return -1;
  supervisor_ = 0;
  return status;
}

std::vector<std::string> Node::MountsLeft() const {
  std::ifstream file("/proc/self/mountinfo");
  std::vector<std::string> found;
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string skipped, path;
    words >> skipped >> skipped >> skipped >> skipped >> path;
    if (path.rfind(root() + "/", 0) == 0) found.push_back(path);
  }
  std::reverse(found.begin(), found.end());
  return found;
}

}  // namespace holdfast::test
