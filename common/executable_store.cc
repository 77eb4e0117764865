#include "common/executable_store.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <utility>

#include "common/sha256.h"

namespace holdfast {
namespace {

constexpr mode_t kMode = 0555;
constexpr size_t kPiece = 1 << 18;

absl::Status CheckProgram(int fd, const std::string& path) {
  struct stat info;
  if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) return InvalidArgument("not a file");
  if ((info.st_mode & 0111) == 0) return PermissionDenied("not executable (chmod +x)");
  if (info.st_size > kMostExecutableBytes) {
    return InvalidArgument(path + " has " + std::to_string(info.st_size) +
                           " bytes; a program may have at most " +
                           std::to_string(kMostExecutableBytes >> 30) + " GiB");
  }
  return absl::OkStatus();
}

// True if that very program lies there already: then a full disk does not keep it from being started.
bool IsCopy(const std::string& path, const std::string& sha256, Unhurried* unhurried) {
  auto file = OpenFile(path, O_RDONLY | O_NOFOLLOW);
  if (!file.ok()) return false;
  auto digest = Sha256OfFile(file->get(), unhurried);
  return digest.ok() && *digest == sha256;
}

// Written under another name, so that a crash leaves no half copy under the right one. Returns its digest.
absl::StatusOr<std::string> WriteCopy(int source, const std::string& path, Unhurried* unhurried) {
  unlink(path.c_str());
  HF_ASSIGN_OR_RETURN(UniqueFd copy, OpenFile(path, O_RDWR | O_CREAT | O_EXCL, kMode));
  for (;;) {
    ssize_t sent = sendfile(copy.get(), source, nullptr, kPiece);
    if (sent < 0 && errno != EINTR) return ErrnoStatus(errno, "copying to " + path);
    if (sent == 0) break;
    if (unhurried != nullptr) unhurried->Rest();
  }
  if (fchmod(copy.get(), kMode) != 0 || fsync(copy.get()) != 0) return ErrnoStatus(errno, "syncing " + path);
  return Sha256OfFile(copy.get(), unhurried);
}

}  // namespace

absl::StatusOr<std::shared_ptr<const Executable>> ExecutableStore::Add(const std::string& path,
                                                                       Unhurried* unhurried) const {
  // A FIFO without a writer must not be waited for.
  HF_ASSIGN_OR_RETURN(UniqueFd source, OpenFile(path, O_RDONLY | O_NONBLOCK));
  HF_RETURN_IF_ERROR(CheckProgram(source.get(), path));
  auto executable = std::make_shared<Executable>();
  HF_ASSIGN_OR_RETURN(executable->sha256, Sha256OfFile(source.get(), unhurried));
  if (!IsCopy(PathOf(executable->sha256), executable->sha256, unhurried)) {
    HF_ASSIGN_OR_RETURN(executable->sha256, Install(source.get(), unhurried));
  }
  HF_ASSIGN_OR_RETURN(executable->file, OpenFile(PathOf(executable->sha256), O_RDONLY | O_NOFOLLOW));
  return std::shared_ptr<const Executable>(std::move(executable));
}

// Returns the digest, by which the copy is named.
absl::StatusOr<std::string> ExecutableStore::Install(int source, Unhurried* unhurried) const {
  HF_RETURN_IF_ERROR(MakeDirs(folder_, 0755));
  std::string temporary = folder_ + "/.new";
  absl::StatusOr<std::string> sha256 = WriteCopy(source, temporary, unhurried);
  if (!sha256.ok()) {
    unlink(temporary.c_str());
    return sha256.status();
  }
  HF_RETURN_IF_ERROR(MakeDirs(folder_ + "/" + *sha256, 0755));
  if (rename(temporary.c_str(), PathOf(*sha256).c_str()) != 0) return ErrnoStatus(errno, temporary);
  HF_RETURN_IF_ERROR(SyncDir(folder_ + "/" + *sha256));
  HF_RETURN_IF_ERROR(SyncDir(folder_));
  return sha256;
}

std::shared_ptr<const Executable> ExecutableStore::Open(const std::string& sha256) const {
  if (!IsCopy(PathOf(sha256), sha256, nullptr)) return nullptr;
  auto file = OpenFile(PathOf(sha256), O_RDONLY | O_NOFOLLOW);
  if (!file.ok()) return nullptr;
  auto executable = std::make_shared<Executable>();
  executable->sha256 = sha256;
  executable->file = *std::move(file);
  return executable;
}

void ExecutableStore::Keep(const std::vector<std::string>& keep) const {
  std::error_code ignored;
  std::vector<std::string> others;
  for (const auto& entry : std::filesystem::directory_iterator(folder_, ignored)) {
    std::string name = entry.path().filename();
    if (std::find(keep.begin(), keep.end(), name) == keep.end()) others.push_back(entry.path());
  }
  for (const std::string& path : others) RemoveTree(path).IgnoreError();
}

}  // namespace holdfast
