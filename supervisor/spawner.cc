#include "supervisor/spawner.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <utility>

#include "common/sha256.h"

namespace holdfast::supervisor {
namespace {

constexpr char kName[] = "/holdfast-worker";
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

std::shared_ptr<const Executable> OpenExecutable(const std::string& state_dir, const std::string& sha256) {
  std::string path = state_dir + "/bin/" + sha256 + kName;
  if (!IsCopy(path, sha256)) return nullptr;
  auto file = OpenFile(path, O_RDONLY | O_NOFOLLOW);
  if (!file.ok()) return nullptr;
  auto executable = std::make_shared<Executable>();
  executable->sha256 = sha256;
  executable->file = *std::move(file);
  return executable;
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

absl::StatusOr<WorkerChild> Spawn(const Executable& executable, const std::vector<std::string>& args,
                                  const std::string& token) {
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) return ErrnoStatus(errno, "socketpair");
  WorkerChild child;
  child.socket.Reset(ends[0]);
  UniqueFd child_end(ends[1]);
  // The service manager's variables speak to us, not to the worker.
  ProcessSpec spec{
      .program = executable.file.get(),
      .argv = {"holdfast-worker"},
      .environment = EnvironmentWithout({"HOLDFAST_TOKEN=", "NOTIFY_SOCKET=", "LISTEN_", "WATCHDOG_"}),
      .descriptors = {{child_end.get(), kWorkerSocket}}};
  spec.argv.insert(spec.argv.end(), args.begin(), args.end());
  spec.environment.push_back("HOLDFAST_TOKEN=" + token);
  HF_ASSIGN_OR_RETURN(child.process, StartProcess(spec));
  return child;
}

}  // namespace holdfast::supervisor
