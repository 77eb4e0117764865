#include "supervisor/spawner.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <string_view>
#include <utility>

#include "common/sha256.h"

extern char** environ;

namespace holdfast::supervisor {
namespace {

constexpr char kName[] = "/holdfast-worker";
constexpr int kPidfdIdType = 3;  // P_PIDFD
constexpr mode_t kMode = 0555;

absl::Status CheckProgram(int fd, const std::string& path) {
  struct stat info;
  if (fstat(fd, &info) != 0) return ErrnoStatus(errno, path);
  if (!S_ISREG(info.st_mode)) return InvalidArgument("worker " + path + " is not a regular file");
  if ((info.st_mode & 0111) == 0) return PermissionDenied("worker " + path + " is not executable (chmod +x)");
  if (info.st_size == 0) return InvalidArgument("worker " + path + " is empty");
  return absl::OkStatus();
}

absl::Status CopyBytes(int from, int to) {
  std::vector<char> buffer(1 << 18);
  for (uint64_t offset = 0;;) {
    ssize_t size = pread(from, buffer.data(), buffer.size(), static_cast<off_t>(offset));
    if (size < 0 && errno == EINTR) continue;
    if (size < 0) return ErrnoStatus(errno, "reading the worker");
    if (size == 0) return absl::OkStatus();
    HF_RETURN_IF_ERROR(PwriteFull(to, buffer.data(), static_cast<size_t>(size), offset));
    offset += static_cast<uint64_t>(size);
  }
}

// The copy at `path` when its content is what its name says.
absl::StatusOr<UniqueFd> OpenIntact(const std::string& path, const std::string& sha256) {
  HF_ASSIGN_OR_RETURN(UniqueFd file, OpenFile(path, O_RDONLY | O_NOFOLLOW));
  HF_ASSIGN_OR_RETURN(std::string digest, Sha256OfFile(file.get()));
  if (digest != sha256) return DataLoss(path + " is damaged");
  return file;
}

// Written under another name, so that a crash leaves no half copy under the right one.
absl::Status WriteCopy(int source, const std::string& folder) {
  std::string temporary = folder + "/.new";
  unlink(temporary.c_str());
  {
    HF_ASSIGN_OR_RETURN(UniqueFd copy, OpenFile(temporary, O_WRONLY | O_CREAT | O_EXCL, kMode));
    HF_RETURN_IF_ERROR(CopyBytes(source, copy.get()));
    if (fchmod(copy.get(), kMode) != 0 || fsync(copy.get()) != 0) return ErrnoStatus(errno, "syncing " + temporary);
  }  // closed: a file open for writing cannot be executed
  if (rename(temporary.c_str(), (folder + kName).c_str()) != 0) return ErrnoStatus(errno, "renaming " + temporary);
  return SyncDir(folder);
}

std::vector<std::string> WorkerEnvironment(const std::string& token) {
  std::vector<std::string> environment;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    std::string_view text = *entry;
    bool ours = false;
    for (std::string_view name : {"HOLDFAST_TOKEN=", "NOTIFY_SOCKET=", "LISTEN_FDS=", "LISTEN_PID=", "LISTEN_FDNAMES=", "WATCHDOG_"}) {
      ours = ours || text.substr(0, name.size()) == name;
    }
    if (!ours) environment.emplace_back(text);
  }
  environment.push_back("HOLDFAST_TOKEN=" + token);
  return environment;
}

std::vector<char*> Pointers(std::vector<std::string>& strings) {
  std::vector<char*> pointers;
  for (std::string& text : strings) pointers.push_back(text.data());
  pointers.push_back(nullptr);
  return pointers;
}

// A duplicate above the standard descriptors and the worker's socket, so that the child's dup2 cannot hit it.
absl::StatusOr<UniqueFd> DupHigh(int fd) {
  UniqueFd high(fcntl(fd, F_DUPFD_CLOEXEC, 16));
  if (!high.valid()) return ErrnoStatus(errno, "duplicating a descriptor");
  return high;
}

absl::StatusOr<pid_t> SpawnChild(int program, int socket, std::vector<std::string> args, const std::string& token) {
  std::string path = "/proc/self/fd/" + std::to_string(program);
  std::vector<std::string> environment = WorkerEnvironment(token);
  posix_spawn_file_actions_t actions;
  posix_spawnattr_t attributes;
  posix_spawn_file_actions_init(&actions);
  posix_spawnattr_init(&attributes);
  posix_spawn_file_actions_adddup2(&actions, socket, kWorkerSocket);
  sigset_t none;
  sigset_t all;
  sigemptyset(&none);
  sigfillset(&all);
  posix_spawnattr_setsigmask(&attributes, &none);
  posix_spawnattr_setsigdefault(&attributes, &all);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETSID);
  pid_t pid = 0;
  int error = posix_spawn(&pid, path.c_str(), &actions, &attributes, Pointers(args).data(), Pointers(environment).data());
  posix_spawn_file_actions_destroy(&actions);
  posix_spawnattr_destroy(&attributes);
  if (error != 0) return ErrnoStatus(error, "starting the worker");
  return pid;
}

}  // namespace

absl::StatusOr<std::shared_ptr<const Executable>> CopyExecutable(const std::string& path, const std::string& state_dir) {
  auto source = OpenFile(path, O_RDONLY);
  if (!source.ok()) return Annotate(source.status(), "worker " + path);
  HF_RETURN_IF_ERROR(CheckProgram(source->get(), path));
  HF_ASSIGN_OR_RETURN(std::string sha256, Sha256OfFile(source->get()));
  std::string folder = state_dir + "/bin/" + sha256;
  auto copy = OpenIntact(folder + kName, sha256);
  if (!copy.ok()) {
    HF_RETURN_IF_ERROR(MakeDirs(folder, 0755));
    HF_RETURN_IF_ERROR(WriteCopy(source->get(), folder));
    HF_RETURN_IF_ERROR(SyncDir(state_dir + "/bin"));
    copy = OpenIntact(folder + kName, sha256);  // the original may have changed under our hands
    if (!copy.ok()) return Annotate(copy.status(), "copying worker " + path);
  }
  auto executable = std::make_shared<Executable>();
  executable->sha256 = std::move(sha256);
  executable->file = std::move(*copy);
  return std::shared_ptr<const Executable>(std::move(executable));
}

void RemoveOtherExecutables(const std::string& state_dir, const std::vector<std::string>& keep) {
  DIR* folder = opendir((state_dir + "/bin").c_str());
  if (folder == nullptr) return;
  std::vector<std::string> others;
  while (dirent* entry = readdir(folder)) {
    std::string name = entry->d_name;
    if (name != "." && name != ".." && std::find(keep.begin(), keep.end(), name) == keep.end()) others.push_back(name);
  }
  closedir(folder);
  for (const std::string& name : others) RemoveTree(state_dir + "/bin/" + name).IgnoreError();
}

absl::StatusOr<Process> Spawn(const Executable& executable, const std::vector<std::string>& args, const std::string& token) {
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) return ErrnoStatus(errno, "socketpair");
  Process process;
  process.socket.Reset(ends[0]);
  UniqueFd child_end(ends[1]);
  HF_ASSIGN_OR_RETURN(UniqueFd socket, DupHigh(child_end.get()));
  HF_ASSIGN_OR_RETURN(UniqueFd program, DupHigh(executable.file.get()));
  std::vector<std::string> argv = {"holdfast-worker"};
  argv.insert(argv.end(), args.begin(), args.end());
  HF_ASSIGN_OR_RETURN(process.pid, SpawnChild(program.get(), socket.get(), std::move(argv), token));
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

absl::StatusOr<std::string> RandomBytes(size_t bytes) {
  std::string out(bytes, '\0');
  if (getrandom(out.data(), bytes, 0) != static_cast<ssize_t>(bytes)) return ErrnoStatus(errno, "getrandom");
  return out;
}

std::string ToHex(const std::string& bytes) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string out;
  for (char c : bytes) {
    auto byte = static_cast<unsigned char>(c);
    out += kDigits[byte >> 4];
    out += kDigits[byte & 15];
  }
  return out;
}

std::string ReapReason(int pidfd) {
  siginfo_t info{};
  int result;
  do {
    result = waitid(static_cast<idtype_t>(kPidfdIdType), static_cast<id_t>(pidfd), &info, WEXITED);
  } while (result != 0 && errno == EINTR);
  if (result != 0) return "unknown";
  if (info.si_code == CLD_EXITED) return "exit " + std::to_string(info.si_status);
  const char* name = strsignal(info.si_status);
  return "signal " + std::to_string(info.si_status) + " (" + (name == nullptr ? "?" : name) + ")";
}

}  // namespace holdfast::supervisor
