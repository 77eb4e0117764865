#include "verifier/probe.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <utility>

#include "absl/strings/escaping.h"
#include "common/io.h"
#include "common/sha256.h"
#include "schema/probe.h"

namespace holdfast::verifier {
namespace {

constexpr uint64_t kAlign = 4'096;        // O_DIRECT: of offsets, sizes and memory
constexpr size_t kMostNames = 100'000;    // a listing without an end shall not fill the memory
constexpr uint64_t kReadBytes = 1 << 20;  // at once

struct Counts {
  uint64_t checked = 0, skipped = 0;
};

absl::StatusOr<UniqueFd> OpenBeneath(int root, const std::string& path, uint64_t flags) {
  open_how how{};
  how.flags = flags | O_CLOEXEC;
  how.resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_XDEV;
  const char* name = path.empty() ? "." : path.c_str();
  UniqueFd fd;
  do {
    fd.Reset(static_cast<int>(syscall(SYS_openat2, root, name, &how, sizeof(how))));
  } while (!fd.valid() && (errno == EINTR || errno == EAGAIN));
  if (!fd.valid()) return ErrnoStatus(errno, "open");
  return fd;
}

absl::StatusOr<std::string> FileDigest(int root, const ProbeFile& file, bool direct) {
  HF_ASSIGN_OR_RETURN(UniqueFd fd, OpenBeneath(root, file.path, O_RDONLY | (direct ? O_DIRECT : 0)));
  struct Free {
    void operator()(void* memory) const { free(memory); }
  };
  std::unique_ptr<char, Free> buffer(static_cast<char*>(aligned_alloc(kAlign, kReadBytes)));
  Sha256 hash;
  for (uint64_t at = file.offset, end = file.offset + file.length; at < end;) {
    uint64_t base = at / kAlign * kAlign;
    ssize_t got = pread(fd.get(), buffer.get(), kReadBytes, static_cast<off_t>(base));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return ErrnoStatus(errno, "read at offset " + std::to_string(base));
    uint64_t stop = std::min(end, base + static_cast<uint64_t>(got));
    if (stop <= at) return DataLoss("it ends at offset " + std::to_string(stop));
    hash.Update(buffer.get() + (at - base), stop - at);
    at = stop;
  }
  return hash.FinishHex();
}

absl::StatusOr<std::string> FolderDigest(int root, const std::string& path) {
  HF_ASSIGN_OR_RETURN(UniqueFd fd, OpenBeneath(root, path, O_RDONLY | O_DIRECTORY));
  // The kernel keeps listings as it keeps content, and knows no O_DIRECT for them: the worker shall answer.
  posix_fadvise(fd.get(), 0, 0, POSIX_FADV_DONTNEED);
  std::unique_ptr<DIR, int (*)(DIR*)> folder(fdopendir(fd.get()), closedir);
  if (folder == nullptr) return ErrnoStatus(errno, "fdopendir");
  fd.Release();
  std::vector<std::string> names;
  errno = 0;
  while (dirent* entry = readdir(folder.get())) {
    names.emplace_back(entry->d_name);
    if (names.size() > kMostNames) return DataLoss("it has more names than any folder that is sampled");
  }
  if (errno != 0) return ErrnoStatus(errno, "readdir");
  std::sort(names.begin(), names.end());
  Sha256 hash;
  for (const std::string& name : names) {
    if (name != "." && name != "..") hash.Update(name.c_str(), name.size() + 1);
  }
  return hash.FinishHex();
}

absl::Status CheckFile(int root, const ProbeFile& file, bool direct) {
  if (file.kind == ProbeKind::kAbsent) {
    absl::Status status = OpenBeneath(root, file.path, O_PATH | O_NOFOLLOW).status();
    if (status.ok()) return DataLoss("it exists and must not");
    return StatusErrno(status) == ENOENT ? absl::OkStatus() : status;
  }
  bool folder = file.kind == ProbeKind::kFolder;
  HF_ASSIGN_OR_RETURN(std::string digest,
                      folder ? FolderDigest(root, file.path) : FileDigest(root, file, direct));
  if (digest == absl::BytesToHexString(ToAbsl(file.digest))) return absl::OkStatus();
  return DataLoss(folder ? "its names are not those expected" : "its content is not that expected");
}

bool IsMountRoot(int root) {
  struct statx info {};
  return statx(root, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, 0, &info) != 0 ||
         (info.stx_attributes & STATX_ATTR_MOUNT_ROOT) != 0;
}

absl::Status CheckLive(int root, const ProbeMount& mount, Counts* counts) {
  hf_probe_live live{};
  if (ioctl(root, HF_PROBE_LIVE, &live) == 0) {
    ++counts->checked;
    if (live.generation == mount.generation) return absl::OkStatus();
    return FailedPrecondition("generation " + std::to_string(live.generation) + " answers, not " +
                              std::to_string(mount.generation));
  }
  int error = errno;
  // Somebody may have unmounted it since the request was made: then this is only a folder.
  bool skip = error == ENOTTY && (mount.may_be_unsupported || !IsMountRoot(root));
  counts->skipped += skip ? 1 : 0;
  return skip ? absl::OkStatus() : ErrnoStatus(error, "live probe");
}

absl::Status CheckMount(const ProbeMount& mount, bool direct, Counts* counts) {
  UniqueFd root(open(mount.root.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  // A live mount may be removed at any moment.
  if (!root.valid() && errno == ENOENT && mount.generation != 0) {
    ++counts->skipped;
    return absl::OkStatus();
  }
  if (!root.valid()) return ErrnoStatus(errno, "open " + mount.root);
  if (mount.generation != 0) {
    HF_RETURN_IF_ERROR(Annotate(CheckLive(root.get(), mount, counts), mount.root));
    if (!IsMountRoot(root.get())) return absl::OkStatus();
  }
  for (const ProbeFile& file : mount.files) {
    std::string path = absl::CHexEscape(ToAbsl(mount.root + "/" + file.path));
    HF_RETURN_IF_ERROR(Annotate(CheckFile(root.get(), file, direct), path));
    ++counts->checked;
  }
  return absl::OkStatus();
}

}  // namespace

bool IsUnreadable(const std::string& root) {
  struct statx info {};
  return statx(AT_FDCWD, root.c_str(), AT_STATX_FORCE_SYNC, STATX_BASIC_STATS, &info) != 0 && errno == EIO;
}

absl::StatusOr<std::string> CheckMounts(const ProbeRequest& request,
                                        const std::function<void(uint64_t mount)>& at) {
  Counts counts;
  for (const ProbeMount& mount : request.mounts) {
    at(mount.id);
    HF_RETURN_IF_ERROR(
        Annotate(CheckMount(mount, request.direct, &counts), "mount " + std::to_string(mount.id)));
  }
  return "checked=" + std::to_string(counts.checked) + " skipped=" + std::to_string(counts.skipped);
}

}  // namespace holdfast::verifier
