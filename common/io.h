// Owned descriptors and whole-file helpers. Every function retries EINTR; every descriptor is close-on-exec.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "common/status.h"

namespace holdfast {

// Owns one descriptor; closes it in the destructor. Not thread-safe.
class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    if (this != &other) Reset(std::exchange(other.fd_, -1));
    return *this;
  }
  ~UniqueFd() { Reset(); }

  int get() const { return fd_; }
  bool valid() const { return fd_ >= 0; }
  int Release() { return std::exchange(fd_, -1); }
  void Reset(int fd = -1);

 private:
  int fd_ = -1;
};

// Closed when nobody uses it any more.
using SharedFd = std::shared_ptr<UniqueFd>;

absl::StatusOr<UniqueFd> OpenFile(const std::string& path, int flags, mode_t mode = 0600);
absl::StatusOr<UniqueFd> DupFd(int fd);

absl::StatusOr<std::string> ReadFile(const std::string& path);

// Writes a temporary file beside `path`, syncs it, renames it over `path` and syncs the folder: after a crash
// the file is the old or the new one, whole.
absl::Status WriteFileAtomic(const std::string& path, std::string_view content, mode_t mode = 0600);

// Reads or writes exactly `size` bytes; a short read is OutOfRange.
absl::Status PreadFull(int fd, void* buffer, size_t size, uint64_t offset);
absl::Status PwriteFull(int fd, const void* data, size_t size, uint64_t offset);

// mkdir -p; existing folders keep their mode.
absl::Status MakeDirs(const std::string& path, mode_t mode = 0700);
// rm -rf without crossing into mounts (openat/unlinkat, never follows symlinks). A missing path is OK.
absl::Status RemoveTree(const std::string& path);
absl::Status SyncDir(const std::string& path);
bool PathExists(const std::string& path);

// From the kernel's generator: for secrets and ids.
std::string RandomBytes(size_t bytes);

// A fresh folder under $TMPDIR (or /tmp), removed with all its content by the destructor. For tests and
// self-tests.
class TempDir {
 public:
  TempDir();
  ~TempDir();
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

}  // namespace holdfast
