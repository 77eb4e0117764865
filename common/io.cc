#include "common/io.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>

#include "glog/logging.h"

namespace holdfast {
namespace {

template <typename F>
auto Retry(F f) -> decltype(f()) {
  decltype(f()) result;
  do {
    result = f();
  } while (result == -1 && errno == EINTR);
  return result;
}

std::string ParentOf(const std::string& path) {
  size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

absl::Status RemoveTreeAt(int parent, const char* name, dev_t device, const std::string& shown) {
  struct stat st;
  if (fstatat(parent, name, &st, AT_SYMLINK_NOFOLLOW) != 0) {
    return errno == ENOENT ? absl::OkStatus() : ErrnoStatus(errno, "stat " + shown);
  }
  if (!S_ISDIR(st.st_mode)) {
    if (unlinkat(parent, name, 0) != 0 && errno != ENOENT) return ErrnoStatus(errno, "unlink " + shown);
    return absl::OkStatus();
  }
  if (device != 0 && st.st_dev != device) return ErrnoStatus(EBUSY, shown + " is a mount point, not removed");
  int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  if (fd < 0) return errno == ENOENT ? absl::OkStatus() : ErrnoStatus(errno, "open " + shown);
  DIR* dir = fdopendir(fd);
  if (dir == nullptr) {
    int error = errno;
    close(fd);
    return ErrnoStatus(error, "fdopendir " + shown);
  }
  absl::Status result;
  while (dirent* entry = readdir(dir)) {
    std::string child = entry->d_name;
    if (child == "." || child == "..") continue;
    absl::Status status = RemoveTreeAt(dirfd(dir), child.c_str(), st.st_dev, shown + "/" + child);
    if (!status.ok() && result.ok()) result = status;
  }
  closedir(dir);
  if (!result.ok()) return result;
  if (unlinkat(parent, name, AT_REMOVEDIR) != 0 && errno != ENOENT)
    return ErrnoStatus(errno, "rmdir " + shown);
  return absl::OkStatus();
}

}  // namespace

void UniqueFd::Reset(int fd) {
  if (fd_ >= 0) close(fd_);
  fd_ = fd;
}

absl::StatusOr<UniqueFd> OpenFile(const std::string& path, int flags, mode_t mode) {
  int fd = Retry([&] { return open(path.c_str(), flags | O_CLOEXEC, mode); });
  if (fd < 0) return ErrnoStatus(errno, "open " + path);
  return UniqueFd(fd);
}

absl::StatusOr<UniqueFd> DupFd(int fd) {
  int copy = fcntl(fd, F_DUPFD_CLOEXEC, 3);
  if (copy < 0) return ErrnoStatus(errno, "dup");
  return UniqueFd(copy);
}

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  HF_ASSIGN_OR_RETURN(UniqueFd fd, OpenFile(path, O_RDONLY));
  std::string content;
  char buffer[65536];
  while (true) {
    ssize_t n = Retry([&] { return read(fd.get(), buffer, sizeof buffer); });
    if (n < 0) return ErrnoStatus(errno, "read " + path);
    if (n == 0) return content;
    content.append(buffer, static_cast<size_t>(n));
  }
}

absl::Status WriteFileAtomic(const std::string& path, std::string_view content, mode_t mode) {
  static std::atomic<uint64_t> counter{0};
  std::string temporary = path + ".tmp." + std::to_string(getpid()) + "." + std::to_string(counter++);
  HF_ASSIGN_OR_RETURN(UniqueFd fd, OpenFile(temporary, O_WRONLY | O_CREAT | O_EXCL, mode));
  absl::Status status = PwriteFull(fd.get(), content.data(), content.size(), 0);
  if (status.ok() && fsync(fd.get()) != 0) status = ErrnoStatus(errno, "fsync " + temporary);
  if (status.ok() && rename(temporary.c_str(), path.c_str()) != 0)
    status = ErrnoStatus(errno, "rename to " + path);
  if (!status.ok()) {
    unlink(temporary.c_str());
    return Annotate(status, "write " + path);
  }
  return SyncDir(ParentOf(path));
}

absl::Status PreadFull(int fd, void* buffer, size_t size, uint64_t offset) {
  char* out = static_cast<char*>(buffer);
  while (size > 0) {
    ssize_t n = Retry([&] { return pread(fd, out, size, static_cast<off_t>(offset)); });
    if (n < 0) return ErrnoStatus(errno, "pread");
    if (n == 0) return absl::OutOfRangeError("file ends before the bytes asked for");
    out += n;
    size -= static_cast<size_t>(n);
    offset += static_cast<uint64_t>(n);
  }
  return absl::OkStatus();
}

absl::Status PwriteFull(int fd, const void* data, size_t size, uint64_t offset) {
  const char* in = static_cast<const char*>(data);
  while (size > 0) {
    ssize_t n = Retry([&] { return pwrite(fd, in, size, static_cast<off_t>(offset)); });
    if (n < 0) return ErrnoStatus(errno, "pwrite");
    in += n;
    size -= static_cast<size_t>(n);
    offset += static_cast<uint64_t>(n);
  }
  return absl::OkStatus();
}

absl::Status MakeDirs(const std::string& path, mode_t mode) {
  if (path.empty() || path == "/") return absl::OkStatus();
  if (mkdir(path.c_str(), mode) == 0) return absl::OkStatus();
  if (errno == EEXIST) {
    struct stat st;
    if (stat(path.c_str(), &st) == 0 && S_ISDIR(st.st_mode)) return absl::OkStatus();
    return ErrnoStatus(ENOTDIR, "mkdir " + path);
  }
  if (errno != ENOENT) return ErrnoStatus(errno, "mkdir " + path);
  std::string parent = ParentOf(path);
  if (parent == path || parent == ".") return ErrnoStatus(ENOENT, "mkdir " + path);
  HF_RETURN_IF_ERROR(MakeDirs(parent, mode));
  if (mkdir(path.c_str(), mode) != 0 && errno != EEXIST) return ErrnoStatus(errno, "mkdir " + path);
  return absl::OkStatus();
}

absl::Status RemoveTree(const std::string& path) { return RemoveTreeAt(AT_FDCWD, path.c_str(), 0, path); }

absl::Status SyncDir(const std::string& path) {
  HF_ASSIGN_OR_RETURN(UniqueFd fd, OpenFile(path, O_RDONLY | O_DIRECTORY));
  if (fsync(fd.get()) != 0) return ErrnoStatus(errno, "fsync " + path);
  return absl::OkStatus();
}

bool PathExists(const std::string& path) {
  struct stat st;
  return lstat(path.c_str(), &st) == 0;
}

std::string RandomBytes(size_t bytes) {
  std::string out(bytes, '\0');
  CHECK_LE(bytes, 256u);  // never short up to there, and never fails once the kernel has booted
  CHECK_EQ(getrandom(out.data(), bytes, 0), static_cast<ssize_t>(bytes));
  return out;
}

TempDir::TempDir() {
  const char* base = getenv("TMPDIR");
  std::string pattern = std::string(base != nullptr ? base : "/tmp") + "/holdfast.XXXXXX";
  CHECK(mkdtemp(pattern.data()) != nullptr) << "mkdtemp " << pattern;
  path_ = pattern;
}

TempDir::~TempDir() {
  absl::Status status = RemoveTree(path_);
  LOG_IF(ERROR, !status.ok()) << "temporary folder left behind: " << status;
}

}  // namespace holdfast
