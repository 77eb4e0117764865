#include "worker/ctl/private_node.h"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <thread>
#include <utility>

#include "common/mountinfo.h"

namespace holdfast::ctl {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr int kStartSeconds = 20;
constexpr int kEndSeconds = 20;
constexpr size_t kLogTail = 4096;
constexpr milliseconds kPoll(5);

// A read of something that is not on this disk fails soon, for the drill looks for what is.
constexpr char kConfig[] =
    "[fetch]\nmiss_timeout = \"500ms\"\ndocker_config = \"/nonexistent\"\n[cache]\nfree_floor = 0\n";

template <typename Condition>
bool WaitUntil(int seconds, Condition condition) {
  const auto deadline = steady_clock::now() + std::chrono::seconds(seconds);
  while (!condition()) {
    if (steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(kPoll);
  }
  return true;
}

std::vector<std::string> Names(const std::string& folder) {
  std::vector<std::string> names;
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(folder, ignored)) {
    names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

// Copies what is data and leaves the holes; shares the blocks where the file system can.
absl::Status CopySparse(const std::string& from, const std::string& to) {
  HF_ASSIGN_OR_RETURN(UniqueFd source, OpenFile(from, O_RDONLY | O_NOFOLLOW));
  struct stat info;
  if (fstat(source.get(), &info) != 0) return ErrnoStatus(errno, from);
  if (!S_ISREG(info.st_mode)) return absl::OkStatus();
  HF_ASSIGN_OR_RETURN(UniqueFd target, OpenFile(to, O_WRONLY | O_CREAT | O_EXCL, info.st_mode & 0777));
  if (ftruncate(target.get(), info.st_size) != 0) return ErrnoStatus(errno, to);
  off_t at = 0;
  while ((at = lseek(source.get(), at, SEEK_DATA)) >= 0 && at < info.st_size) {
    off_t end = lseek(source.get(), at, SEEK_HOLE);
    if (end < 0) return ErrnoStatus(errno, from);
    end = std::min(end, info.st_size);
    off_t out = at;
    while (at < end) {
      const ssize_t size =
          copy_file_range(source.get(), &at, target.get(), &out, static_cast<size_t>(end - at), 0);
      if (size < 0) return ErrnoStatus(errno, "copying " + from);
      if (size == 0) break;
    }
  }
  return at < 0 && errno != ENXIO ? ErrnoStatus(errno, from) : absl::OkStatus();
}

std::vector<pid_t> ProcessesOf(const std::string& folder) {
  std::vector<pid_t> pids;
  for (const std::string& name : Names("/proc")) {
    const long pid = strtol(name.c_str(), nullptr, 10);
    if (pid <= 0) continue;
    std::error_code error;
    const std::string program = std::filesystem::read_symlink("/proc/" + name + "/exe", error).string();
    if (!error && IsUnder(program, folder)) pids.push_back(static_cast<pid_t>(pid));
  }
  return pids;
}

// Ends what is left there of a supervisor that has ended, or was killed.
void RemoveRemains(const std::string& folder, const std::string& runtime) {
  WaitUntil(kEndSeconds, [&] {
    const std::vector<pid_t> pids = ProcessesOf(folder);
    for (pid_t pid : pids) kill(pid, SIGKILL);
    return pids.empty();
  });
  if (auto mounts = ReadMountInfo(); mounts.ok()) {
    for (auto it = mounts->rbegin(); it != mounts->rend(); ++it) {
      if (IsUnder(it->path, folder)) umount2(it->path.c_str(), MNT_DETACH | UMOUNT_NOFOLLOW);
    }
  }
  RemoveTree(folder).IgnoreError();
  RemoveTree(runtime).IgnoreError();
}

// Of drills that were killed: nobody holds their lock any more.
void RemoveStale(const std::string& drills) {
  for (const std::string& name : Names(drills)) {
    const std::string folder = drills + "/" + name;
    auto lock = OpenFile(folder + "/drill.lock", O_RDWR);
    if (lock.ok() && flock(lock->get(), LOCK_EX | LOCK_NB) != 0) continue;
    auto runtime = ReadFile(folder + "/runtime");
    // Its supervisor was told to end by the kernel; a moment later it has.
    WaitUntil(kEndSeconds, [&] {
      auto state_lock = OpenFile(folder + "/state/lock", O_RDWR);
      return !state_lock.ok() || flock(state_lock->get(), LOCK_EX | LOCK_NB) == 0;
    });
    RemoveRemains(folder, runtime.ok() ? *runtime : folder);
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<PrivateNode>> PrivateNode::Create(const Origin& origin) {
  const std::string drills = origin.state_dir + "/drill";
  RemoveStale(drills);
  HF_RETURN_IF_ERROR(MakeDirs(drills, 0700));
  std::string folder = drills + "/XXXXXX";
  std::string runtime = origin.runtime_dir + "/drill.XXXXXX";  // short: sockets lie in it
  if (mkdtemp(folder.data()) == nullptr) return ErrnoStatus(errno, "making " + folder);
  if (mkdtemp(runtime.data()) == nullptr) {
    const absl::Status status = ErrnoStatus(errno, "making " + runtime);
    RemoveTree(folder).IgnoreError();
    return status;
  }
  std::unique_ptr<PrivateNode> node(new PrivateNode(origin, folder, runtime));
  HF_ASSIGN_OR_RETURN(node->lock_, OpenFile(folder + "/drill.lock", O_RDWR | O_CREAT | O_EXCL));
  if (flock(node->lock_.get(), LOCK_EX) != 0) return ErrnoStatus(errno, folder + "/drill.lock");
  HF_RETURN_IF_ERROR(WriteFileAtomic(folder + "/runtime", runtime));
  HF_RETURN_IF_ERROR(WriteFileAtomic(folder + "/config.toml", kConfig));
  HF_RETURN_IF_ERROR(MakeDirs(folder + "/state"));
  return node;
}

PrivateNode::~PrivateNode() { End(); }

absl::Status PrivateNode::CopyFolders(const std::vector<std::string>& names) {
  for (const std::string& name : names) {
    // They are worker's words: below the state folder, and nowhere else.
    if (name.empty() || name.front() == '/' || name.find("..") != std::string::npos) {
      return InvalidArgument("not a folder of the node: " + name);
    }
    const std::string from = origin_.state_dir + "/" + name, to = folder_ + "/state/" + name;
    HF_RETURN_IF_ERROR(MakeDirs(to));
    std::vector<std::string> files = Names(from);
    // What says which bytes are there first, then the bytes: there may be more by then, but not fewer.
    std::stable_partition(files.begin(), files.end(),
                          [](const std::string& file) { return file.rfind("presence", 0) == 0; });
    for (const std::string& file : files) {
      HF_RETURN_IF_ERROR(CopySparse(from + "/" + file, to + "/" + file));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> PrivateNode::CopyWorker(const std::string& name) {
  const std::string path = folder_ + "/" + name;
  HF_RETURN_IF_ERROR(CopySparse(origin_.state_dir + "/bin/" + origin_.executable + "/holdfast-worker", path));
  if (chmod(path.c_str(), 0755) != 0) return ErrnoStatus(errno, path);
  HF_ASSIGN_OR_RETURN(UniqueFd file, OpenFile(path, O_WRONLY | O_APPEND));
  if (write(file.get(), "drill\n", 6) != 6) return ErrnoStatus(errno, path);
  return path;
}

absl::Status PrivateNode::Spawn() {
  HF_ASSIGN_OR_RETURN(UniqueFd program,
                      OpenFile("/proc/" + std::to_string(origin_.supervisor) + "/exe", O_RDONLY));
  HF_ASSIGN_OR_RETURN(UniqueFd log, OpenFile(folder_ + "/log", O_WRONLY | O_CREAT | O_APPEND));
  std::vector<std::string> words = {"holdfast-supervisor",
                                    "--probation",
                                    "1",
                                    "--worker",
                                    origin_.state_dir + "/bin/" + origin_.executable + "/holdfast-worker",
                                    "--state",
                                    folder_ + "/state",
                                    "--runtime",
                                    runtime_,
                                    "--",
                                    "--config",
                                    folder_ + "/config.toml",
                                    "--private"};
  std::vector<std::string> variables =
      EnvironmentWithout({"HOLDFAST_", "NOTIFY_SOCKET", "LISTEN_", "WATCHDOG_", "GLOG_"});
  std::vector<char*> argv, environment;
  for (std::string& word : words) argv.push_back(word.data());
  for (std::string& variable : variables) environment.push_back(variable.data());
  argv.push_back(nullptr);
  environment.push_back(nullptr);
  MutexLock lock(&mutex_);
  if (ended_) return Cancelled("the drill was ended");
  const pid_t parent = getpid();
  // fork, for only the child itself can ask to be told of our death. Calls that are safe after it, no others.
  const pid_t pid = fork();
  if (pid < 0) return ErrnoStatus(errno, "fork");
  if (pid == 0) {
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, nullptr);
    setpgid(0, 0);  // the terminal's Ctrl-C is for the drill, which then ends us
    prctl(PR_SET_PDEATHSIG, SIGINT);
    if (getppid() != parent) _exit(1);
    dup2(log.get(), STDOUT_FILENO);
    dup2(log.get(), STDERR_FILENO);
    fexecve(program.get(), argv.data(), environment.data());
    _exit(127);
  }
  supervisor_.pid = pid;
  HF_ASSIGN_OR_RETURN(supervisor_.pidfd, OpenPidfd(pid));
  return absl::OkStatus();
}

absl::Status PrivateNode::Start() {
  HF_RETURN_IF_ERROR(Spawn());
  bool ended = false;
  const bool up = WaitUntil(kStartSeconds, [&] {
    {
      MutexLock lock(&mutex_);
      ended = ended_ || HasExited(supervisor_.pidfd.get());
    }
    if (ended) return true;
    auto client = Connect();
    if (!client.ok()) return false;
    auto status = (*client)->Status();
    return status.ok() && status->phase == "running";
  });
  if (ended) return FailedPrecondition("the private supervisor ended at once; its log: " + LogTail());
  if (!up) return DeadlineExceeded("the private instance does not come up; its log: " + LogTail());
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<ControlClient>> PrivateNode::Connect() const {
  return ControlClient::Connect(runtime_ + "/supervisor.sock");
}

std::vector<pid_t> PrivateNode::Workers() const { return ProcessesOf(folder_ + "/state/bin"); }

absl::Status PrivateNode::Signal(pid_t worker, int signal) const {
  const std::vector<pid_t> workers = Workers();
  if (std::find(workers.begin(), workers.end(), worker) == workers.end()) {
    return FailedPrecondition("process " + std::to_string(worker) + " is no worker of the drill");
  }
  if (kill(worker, signal) != 0) return ErrnoStatus(errno, "signalling the worker");
  return absl::OkStatus();
}

std::string PrivateNode::LogTail() const {
  auto text = ReadFile(folder_ + "/log");
  if (!text.ok()) return "";
  return text->size() <= kLogTail ? *text : text->substr(text->find('\n', text->size() - kLogTail) + 1);
}

void PrivateNode::End() {
  MutexLock lock(&mutex_);
  if (std::exchange(ended_, true)) return;
  if (supervisor_.pidfd.valid()) {
    for (pid_t worker : Workers()) kill(worker, SIGCONT);
    kill(supervisor_.pid, SIGINT);
    pollfd exit{.fd = supervisor_.pidfd.get(), .events = POLLIN, .revents = 0};
    if (poll(&exit, 1, kEndSeconds * 1000) != 1) {
      kill(supervisor_.pid, SIGKILL);
      poll(&exit, 1, kEndSeconds * 1000);
    }
    ReapReason(supervisor_.pidfd.get());
  }
  RemoveRemains(folder_, runtime_);
  rmdir((origin_.state_dir + "/drill").c_str());  // when no other drill uses it
}

}  // namespace holdfast::ctl
