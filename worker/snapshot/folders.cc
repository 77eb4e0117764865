#include "worker/snapshot/folders.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <set>
#include <utility>

#include "absl/strings/numbers.h"
#include "common/clock.h"
#include "common/io.h"
#include "worker/metadata/row_codec.h"

namespace holdfast::snapshot {
namespace {

constexpr int kMaxScanDepth = 256;  // one open folder each; what lies deeper is not counted

absl::Status MakeFolder(const std::string& path, mode_t mode) {
  if (mkdir(path.c_str(), mode) != 0) return ErrnoStatus(errno, "mkdir " + path);
  if (chmod(path.c_str(), mode) != 0) return ErrnoStatus(errno, "chmod " + path);  // whatever the umask is
  return absl::OkStatus();
}

absl::Status CopyOwner(const std::string& from, const std::string& to) {
  struct stat st;
  if (lstat(from.c_str(), &st) != 0) return ErrnoStatus(errno, "stat " + from);
  if (lchown(to.c_str(), st.st_uid, st.st_gid) != 0) return ErrnoStatus(errno, "chown " + to);
  return absl::OkStatus();
}

class Scanner {
 public:
  Scanner(uint64_t deadline, const std::atomic<bool>& cancelled)
      : deadline_(deadline), cancelled_(cancelled) {}

  // Takes `fd`.
  void Walk(int fd, int depth) {
    DIR* dir = fdopendir(fd);
    if (dir == nullptr) {
      close(fd);
      return;
    }
    while (dirent* entry = readdir(dir)) {
      std::string_view name = entry->d_name;
      if (name == "." || name == "..") continue;
      if (!usage.complete || Expired()) break;
      struct stat st;
      // A running container may remove what readdir just named.
      if (fstatat(dirfd(dir), entry->d_name, &st, AT_SYMLINK_NOFOLLOW) != 0 || st.st_dev != device) continue;
      Count(st);
      if (!S_ISDIR(st.st_mode) || depth >= kMaxScanDepth) continue;
      int child = openat(dirfd(dir), entry->d_name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
      if (child >= 0) Walk(child, depth + 1);
    }
    closedir(dir);
  }

  void Count(const struct stat& st) {
    if (st.st_nlink > 1 && !S_ISDIR(st.st_mode) && !seen_.insert(st.st_ino).second) return;
    usage.bytes += static_cast<uint64_t>(st.st_blocks) * 512;
    usage.inodes++;
  }

  TreeUsage usage;
  dev_t device = 0;

 private:
  bool Expired() {
    if (cancelled_ || (deadline_ != 0 && Clock::Real()->BootNanos() >= deadline_)) usage.complete = false;
    return !usage.complete;
  }

  const uint64_t deadline_;
  const std::atomic<bool>& cancelled_;
  std::set<ino_t> seen_;
};

// Empties folders without recursion deeper than kMaxDepth: what lies deeper is first moved to the top.
class Remover {
 public:
  Remover(int top, const std::atomic<bool>& cancelled) : top_(top), cancelled_(cancelled) {}

  // Takes `fd`.
  absl::Status Empty(int fd, int depth, const std::string& shown) {
    DIR* dir = fdopendir(fd);
    if (dir == nullptr) {
      int error = errno;
      close(fd);
      return ErrnoStatus(error, "open " + shown);
    }
    absl::Status result;
    while (dirent* entry = readdir(dir)) {
      std::string name = entry->d_name;
      if (name == "." || name == "..") continue;
      if (cancelled_) {
        result = Cancelled("removal of " + shown + " was stopped");
        break;
      }
      absl::Status status = RemoveEntry(dirfd(dir), name, depth, shown + "/" + name);
      if (!status.ok() && result.ok()) result = status;
    }
    closedir(dir);
    return result;
  }

  bool moved() { return std::exchange(moved_, false); }

 private:
  static constexpr int kMaxDepth = 64;

  absl::Status RemoveEntry(int parent, const std::string& name, int depth, const std::string& shown) {
    if (unlinkat(parent, name.c_str(), 0) == 0 || errno == ENOENT) return absl::OkStatus();
    if (errno != EISDIR && errno != EPERM) return ErrnoStatus(errno, "unlink " + shown);
    struct statx st;
    // DONT_SYNC: no request to a file server that may be dead.
    int flags = AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT | AT_STATX_DONT_SYNC;
    if (statx(parent, name.c_str(), flags, STATX_TYPE, &st) != 0) {
      return errno == ENOENT ? absl::OkStatus() : ErrnoStatus(errno, "stat " + shown);
    }
    if ((st.stx_attributes & STATX_ATTR_MOUNT_ROOT) != 0)
      return FailedPrecondition(shown + " is a mount point");
    if (!S_ISDIR(st.stx_mode)) return ErrnoStatus(EPERM, "unlink " + shown);
    if (depth >= kMaxDepth) return MoveToTop(parent, name, shown);
    int child = openat(parent, name.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (child < 0) return errno == ENOENT ? absl::OkStatus() : ErrnoStatus(errno, "open " + shown);
    HF_RETURN_IF_ERROR(Empty(child, depth + 1, shown));
    if (unlinkat(parent, name.c_str(), AT_REMOVEDIR) != 0 && errno != ENOENT) {
      return ErrnoStatus(errno, "rmdir " + shown);
    }
    return absl::OkStatus();
  }

  absl::Status MoveToTop(int parent, const std::string& name, const std::string& shown) {
    std::string target =
        "deep." + std::to_string(Clock::Real()->BootNanos()) + "." + std::to_string(moves_++);
    if (renameat(parent, name.c_str(), top_, target.c_str()) != 0)
      return ErrnoStatus(errno, "rename " + shown);
    moved_ = true;
    return absl::OkStatus();
  }

  const int top_;
  const std::atomic<bool>& cancelled_;
  uint64_t moves_ = 0;
  bool moved_ = false;
};

}  // namespace

absl::Status AsPlainFailure(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kAlreadyExists:
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kUnimplemented:
      return Internal(FromAbsl(status.message()));
    default:
      return status;
  }
}

absl::Status Folders::Init() const { return AsPlainFailure(MakeDirs(root_, 0700)); }

absl::Status Folders::Create(const metadata::SnapshotRow& row, const std::string& owner_from) const {
  if (mkdir(Folder(row.id).c_str(), 0700) != 0) {
    if (errno == EEXIST) return AlreadyExists(Folder(row.id));
    return AsPlainFailure(ErrnoStatus(errno, "mkdir " + Folder(row.id)));
  }
  absl::Status status = MakeFolder(Fs(row.id), 0755);
  if (status.ok() && row.kind == metadata::Kind::kActive) status = MakeFolder(Work(row.id), 0711);
  if (status.ok() && !owner_from.empty()) status = CopyOwner(owner_from, Fs(row.id));
  if (!status.ok()) return AsPlainFailure(status);
  return Describe(row);
}

absl::Status Folders::Describe(const metadata::SnapshotRow& row) const {
  HF_ASSIGN_OR_RETURN(std::string bytes, metadata::EncodeRow(row));
  std::string path = Folder(row.id) + "/snapshot.json";
  std::string temporary = path + ".new";
  absl::StatusOr<UniqueFd> fd = OpenFile(temporary, O_WRONLY | O_CREAT | O_TRUNC);
  absl::Status status = fd.status();
  if (status.ok()) status = PwriteFull(fd->get(), bytes.data(), bytes.size(), 0);
  // Else a power failure could leave the new name with no content in it.
  if (status.ok() && fdatasync(fd->get()) != 0) status = ErrnoStatus(errno, "sync " + temporary);
  if (status.ok() && rename(temporary.c_str(), path.c_str()) != 0)
    status = ErrnoStatus(errno, "rename to " + path);
  return AsPlainFailure(Annotate(status, "describe snapshot " + std::to_string(row.id)));
}

absl::StatusOr<std::vector<uint64_t>> Folders::Ids() const {
  DIR* dir = opendir(root_.c_str());
  if (dir == nullptr) return AsPlainFailure(ErrnoStatus(errno, "open " + root_));
  std::vector<uint64_t> ids;
  while (dirent* entry = readdir(dir)) {
    uint64_t id = 0;
    if (absl::SimpleAtoi(entry->d_name, &id)) ids.push_back(id);
  }
  closedir(dir);
  return ids;
}

TreeUsage Folders::Scan(const std::string& path, uint64_t deadline_boot_nanos,
                        const std::atomic<bool>& cancelled) {
  Scanner scanner(deadline_boot_nanos, cancelled);
  scanner.usage.complete = true;
  struct stat st;
  if (lstat(path.c_str(), &st) != 0) return scanner.usage;
  scanner.device = st.st_dev;
  scanner.Count(st);
  int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  if (fd >= 0) scanner.Walk(fd, 1);
  return scanner.usage;
}

absl::Status RemoveFolder(const std::string& path, const std::atomic<bool>& cancelled) {
  absl::StatusOr<UniqueFd> top = OpenFile(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
  if (!top.ok()) return StatusErrno(top.status()) == ENOENT ? absl::OkStatus() : top.status();
  Remover remover(top->get(), cancelled);
  do {
    int fd = openat(top->get(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return ErrnoStatus(errno, "open " + path);
    absl::Status status = remover.Empty(fd, 1, path);
    if (remover.moved()) continue;
    HF_RETURN_IF_ERROR(status);
    if (rmdir(path.c_str()) == 0 || errno == ENOENT) return absl::OkStatus();
    return ErrnoStatus(errno, "rmdir " + path);
  } while (true);
}

}  // namespace holdfast::snapshot
