#include "supervisor/spawner.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <string.h>
#include <sys/random.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <utility>

#include "common/sha256.h"
#include "glog/logging.h"

extern char** environ;

namespace holdfast::supervisor {
namespace {

constexpr char kName[] = "/holdfast-worker";
constexpr idtype_t kPidfd = static_cast<idtype_t>(3);  // P_PIDFD
constexpr mode_t kMode = 0555;

absl::Status CheckProgram(int fd, const std::string& path) {
  struct stat info;
  if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode))
    return InvalidArgument("worker " + path + " is no file");
  if ((info.st_mode & 0111) == 0) return PermissionDenied("worker " + path + " is not executable (chmod +x)");
  return absl::OkStatus();
}

// True if that very program lies there already: then a full disk does not keep it from being started.
bool IsCopy(const std::string& path, const std::string& sha256) {
  auto file = OpenFile(path, O_RDONLY | O_NOFOLLOW);
  if (!file.ok()) return false;
  auto digest = Sha256OfFile(file->get());
  return digest.ok() && *digest == sha256;
}

// Written under another name, so that a crash leaves no half copy under the right one. Returns its digest.
absl::StatusOr<std::string> WriteCopy(int source, const std::string& path) {
  unlink(path.c_str());
  HF_ASSIGN_OR_RETURN(UniqueFd copy, OpenFile(path, O_RDWR | O_CREAT | O_EXCL, kMode));
  for (;;) {
    ssize_t sent = sendfile(copy.get(), source, nullptr, 1 << 20);
    if (sent < 0 && errno != EINTR) return ErrnoStatus(errno, "copying to " + path);
    if (sent == 0) break;
  }
  if (fchmod(copy.get(), kMode) != 0 || fsync(copy.get()) != 0) return ErrnoStatus(errno, "syncing " + path);
  return Sha256OfFile(copy.get());
}

std::vector<std::string> WorkerEnvironment(const std::string& token) {
  std::vector<std::string> environment = {"HOLDFAST_TOKEN=" + token};
  for (char** entry = environ; *entry != nullptr; ++entry) {
    std::string text = *entry;
    std::string name = text.substr(0, text.find('='));
    // The service manager's variables speak to us, not to the worker.
    bool ours = name == "HOLDFAST_TOKEN" || name == "NOTIFY_SOCKET" || name.substr(0, 7) == "LISTEN_";
    if (!ours && name.substr(0, 9) != "WATCHDOG_") environment.push_back(text);
  }
  return environment;
}

std::vector<char*> Pointers(std::vector<std::string>& strings) {
  std::vector<char*> pointers;
  for (std::string& text : strings) pointers.push_back(text.data());
  pointers.push_back(nullptr);
  return pointers;
}

absl::StatusOr<pid_t> SpawnChild(int program, int socket, std::vector<std::string> args,
                                 const std::string& token) {
  std::string path = "/proc/self/fd/" + std::to_string(program);
  std::vector<std::string> environment = WorkerEnvironment(token);
  posix_spawn_file_actions_t actions;
  posix_spawnattr_t attributes;
  posix_spawn_file_actions_init(&actions);
  posix_spawnattr_init(&attributes);
  posix_spawn_file_actions_adddup2(&actions, socket, kWorkerSocket);
  sigset_t none, all;
  sigemptyset(&none);
  sigfillset(&all);
  posix_spawnattr_setsigmask(&attributes, &none);
  posix_spawnattr_setsigdefault(&attributes, &all);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETSID);
  pid_t pid = 0;
  int error = posix_spawn(&pid, path.c_str(), &actions, &attributes, Pointers(args).data(),
                          Pointers(environment).data());
  posix_spawn_file_actions_destroy(&actions);
  posix_spawnattr_destroy(&attributes);
  if (error != 0) return ErrnoStatus(error, "starting the worker");
  return pid;
}

// Returns the digest, by which the copy is named.
absl::StatusOr<std::string> InstallCopy(int source, const std::string& bin) {
  HF_RETURN_IF_ERROR(MakeDirs(bin, 0755));
  std::string temporary = bin + ".new";
  absl::StatusOr<std::string> sha256 = WriteCopy(source, temporary);
  if (!sha256.ok()) {
    unlink(temporary.c_str());
    return sha256.status();
  }
  HF_RETURN_IF_ERROR(MakeDirs(bin + *sha256, 0755));
  if (rename(temporary.c_str(), (bin + *sha256 + kName).c_str()) != 0) return ErrnoStatus(errno, temporary);
  HF_RETURN_IF_ERROR(SyncDir(bin + *sha256));
  HF_RETURN_IF_ERROR(SyncDir(bin));
  return sha256;
}

}  // namespace

absl::StatusOr<std::shared_ptr<const Executable>> CopyExecutable(const std::string& path,
                                                                 const std::string& state_dir) {
  auto source = OpenFile(path, O_RDONLY);
  if (!source.ok()) return Annotate(source.status(), "worker " + path);
  HF_RETURN_IF_ERROR(CheckProgram(source->get(), path));
  std::string bin = state_dir + "/bin/";
  auto executable = std::make_shared<Executable>();
  HF_ASSIGN_OR_RETURN(executable->sha256, Sha256OfFile(source->get()));
  if (!IsCopy(bin + executable->sha256 + kName, executable->sha256)) {
    HF_ASSIGN_OR_RETURN(executable->sha256, InstallCopy(source->get(), bin));
  }
  HF_ASSIGN_OR_RETURN(executable->file, OpenFile(bin + executable->sha256 + kName, O_RDONLY | O_NOFOLLOW));
  return std::shared_ptr<const Executable>(std::move(executable));
}

void RemoveOtherExecutables(const std::string& state_dir, const std::vector<std::string>& keep) {
  std::error_code ignored;
  std::vector<std::string> others;
  for (const auto& entry : std::filesystem::directory_iterator(state_dir + "/bin", ignored)) {
    std::string name = entry.path().filename();
    if (std::find(keep.begin(), keep.end(), name) == keep.end()) others.push_back(entry.path());
  }
  for (const std::string& path : others) RemoveTree(path).IgnoreError();
}

absl::StatusOr<Process> Spawn(const Executable& executable, const std::vector<std::string>& args,
                              const std::string& token) {
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) return ErrnoStatus(errno, "socketpair");
  Process process;
  process.socket.Reset(ends[0]);
  UniqueFd child_end(ends[1]);
  // Above the worker's socket, so that the child's dup2 cannot hit it.
  UniqueFd program(fcntl(executable.file.get(), F_DUPFD_CLOEXEC, 16));
  if (!program.valid()) return ErrnoStatus(errno, "duplicating a descriptor");
  std::vector<std::string> argv = {"holdfast-worker"};
  argv.insert(argv.end(), args.begin(), args.end());
  HF_ASSIGN_OR_RETURN(process.pid, SpawnChild(program.get(), child_end.get(), std::move(argv), token));
  // Our own child, not reaped before its pidfd fires: the pid cannot have been reused.
  process.pidfd.Reset(static_cast<int>(syscall(SYS_pidfd_open, process.pid, 0)));
  if (!process.pidfd.valid()) {
    absl::Status status = ErrnoStatus(errno, "pidfd_open");
    kill(process.pid, SIGKILL);
    waitpid(process.pid, nullptr, 0);
    return status;
  }
  return process;
}

std::string RandomBytes(size_t bytes) {
  std::string out(bytes, '\0');
  // Never short below 257 bytes, and never fails once the kernel has booted.
  CHECK_EQ(getrandom(out.data(), bytes, 0), static_cast<ssize_t>(bytes));
  return out;
}

std::string ReapReason(int pidfd) {
  siginfo_t info{};
  // It has exited, so this does not sleep and cannot be interrupted.
  if (waitid(kPidfd, static_cast<id_t>(pidfd), &info, WEXITED) != 0) return "unknown";
  if (info.si_code == CLD_EXITED) return "exit " + std::to_string(info.si_status);
  return "signal " + std::to_string(info.si_status) + " (" + strsignal(info.si_status) + ")";
}

}  // namespace holdfast::supervisor
