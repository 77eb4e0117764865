#include "common/fuse_mount.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <linux/openat2.h>
#include <poll.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace holdfast {
namespace {

constexpr uint32_t kInitExt = 1u << 30;   // FUSE_INIT_EXT: flags2 is valid
constexpr uint32_t kMaxPages = 1u << 22;  // FUSE_MAX_PAGES
constexpr uint32_t kProtocolMinor = 45;   // the newest whose fields are filled below
constexpr uint32_t kMaxWrite = 4096;      // nothing is ever written; keeps the kernel's read buffers small

absl::StatusOr<UniqueFd> OpenMountPoint(int state_fd, const std::string& state_dir, const std::string& path) {
  if (!IsUnder(path, state_dir) || path.size() <= state_dir.size() + 1) {
    return InvalidArgument("mount point " + path + " is not below the state folder " + state_dir);
  }
  std::string relative = path.substr(state_dir.size() + 1);
  open_how how{};
  how.flags = O_PATH | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW;
  how.resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_XDEV;
  UniqueFd fd;
  do {
    fd.Reset(static_cast<int>(syscall(SYS_openat2, state_fd, relative.c_str(), &how, sizeof(how))));
  } while (!fd.valid() && (errno == EINTR || errno == EAGAIN));
  if (fd.valid()) return fd;
  if (errno == EXDEV) return FailedPrecondition("mount point " + path + " is, or lies in, a mount already");
  return ErrnoStatus(errno, "mount point " + path);
}

// Answers INIT. The kernel has applied the answer when write() returns.
absl::Status AnswerInit(int device, const InitOptions& options, FuseInit* init) {
  std::string buffer(FUSE_MIN_READ_BUFFER, '\0');
  ssize_t size = -1;
  while ((size = read(device, buffer.data(), buffer.size())) < 0 && errno == EINTR) continue;
  if (size < 0) return ErrnoStatus(errno, "reading FUSE_INIT");
  buffer.resize(static_cast<size_t>(size));
  HF_ASSIGN_OR_RETURN(init->reply, BuildInitReply(buffer, options));
  init->request = std::move(buffer);
  if (write(device, init->reply.data(), init->reply.size()) < 0) {
    return ErrnoStatus(errno, "answering FUSE_INIT");
  }
  return absl::OkStatus();
}

absl::Status SetReadAhead(const std::string& path, uint32_t kib) {
  HF_ASSIGN_OR_RETURN(std::vector<MountInfo> mounts, ReadMountInfo());
  for (const MountInfo& mount : mounts) {
    if (mount.path != path || mount.type != kFuseType) continue;
    HF_ASSIGN_OR_RETURN(UniqueFd file,
                        OpenFile("/sys/class/bdi/" + mount.device + "/read_ahead_kb", O_WRONLY));
    std::string text = std::to_string(kib);
    return PwriteFull(file.get(), text.data(), text.size(), 0);
  }
  return NotFound("the mount " + path);
}

absl::Status SetUp(int device, const InitOptions& options, const std::string& path, FuseInit* init) {
  HF_RETURN_IF_ERROR(AnswerInit(device, options, init));
  int flags = fcntl(device, F_GETFL);
  if (fcntl(device, F_SETFL, flags | O_NONBLOCK) != 0) return ErrnoStatus(errno, "O_NONBLOCK");
  // Only speed depends on it: a sandbox with a read-only /sys still works.
  if (options.read_ahead_kib != 0) SetReadAhead(path, options.read_ahead_kib).IgnoreError();
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<UniqueFd> OpenFuseDevice() { return OpenFile("/dev/fuse", O_RDWR); }

bool IsFuseDevice(int fd) {
  constexpr unsigned kMisc = 10, kFuseMinor = 229;
  struct stat info;
  return fstat(fd, &info) == 0 && S_ISCHR(info.st_mode) && info.st_rdev == makedev(kMisc, kFuseMinor);
}

absl::StatusOr<FuseInit> MountFuse(int device, int state_fd, const std::string& state_dir,
                                   const std::string& path, const InitOptions& options) {
  HF_ASSIGN_OR_RETURN(UniqueFd point, OpenMountPoint(state_fd, state_dir, path));
  std::string data =
      "fd=" + std::to_string(device) + ",rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions";
  // By descriptor: nobody can swap the folder between the check and the mount.
  std::string target = "/proc/self/fd/" + std::to_string(point.get());
  // Not MS_NOSUID, not MS_NOEXEC: it holds container images. MS_RDONLY also keeps reads from invalidating
  // atimes. mount() returns before INIT is answered, which the kernel has queued by then.
  if (::mount("holdfast", target.c_str(), kFuseType, MS_RDONLY | MS_NODEV, data.c_str()) != 0) {
    return ErrnoStatus(errno, "mount on " + path);
  }
  FuseInit init;
  absl::Status status = SetUp(device, options, path, &init);
  if (!status.ok()) {
    umount2(path.c_str(), MNT_DETACH | UMOUNT_NOFOLLOW);
    return Annotate(status, "mount on " + path);
  }
  return init;
}

absl::StatusOr<std::string> BuildInitReply(std::string_view request, const InitOptions& options) {
  fuse_in_header in;
  fuse_init_in init{};
  if (request.size() < sizeof(in)) return InvalidArgument("the first FUSE request is too short");
  memcpy(&in, request.data(), sizeof(in));
  if (in.opcode != FUSE_INIT || request.size() < sizeof(in) + 16) {
    return InvalidArgument("the first FUSE request is not FUSE_INIT");
  }
  memcpy(&init, request.data() + sizeof(in), std::min(sizeof(init), request.size() - sizeof(in)));
  if (init.major != FUSE_KERNEL_VERSION) return InvalidArgument("this FUSE protocol is not version 7");
  uint64_t offered = init.flags;
  if ((init.flags & kInitExt) != 0) offered |= uint64_t{init.flags2} << 32;
  uint64_t agreed = options.flags & offered;
  if ((agreed >> 32) != 0) agreed |= kInitExt;

  fuse_init_out out{};
  out.major = FUSE_KERNEL_VERSION;
  out.minor = std::min(init.minor, kProtocolMinor);
  out.max_readahead =
      options.max_readahead == 0 ? init.max_readahead : std::min(init.max_readahead, options.max_readahead);
  out.flags = static_cast<uint32_t>(agreed);
  out.flags2 = static_cast<uint32_t>(agreed >> 32);
  out.max_background = options.max_background;
  out.congestion_threshold = options.congestion_threshold;
  out.max_write = kMaxWrite;
  out.time_gran = 1;
  if ((out.flags & kMaxPages) != 0) out.max_pages = options.max_pages;
  out.unused[0] = options.max_stack_depth;  // its name since protocol 7.40; Debian 12's header is 7.38

  fuse_out_header header{};
  header.len = sizeof(header) + sizeof(out);
  header.unique = in.unique;
  std::string reply(header.len, '\0');
  memcpy(reply.data(), &header, sizeof(header));
  memcpy(reply.data() + sizeof(header), &out, sizeof(out));
  return reply;
}

absl::Status RemoveMount(const std::string& path) {
  // EINVAL, ENOENT: unmounted already.
  if (umount2(path.c_str(), MNT_DETACH | UMOUNT_NOFOLLOW) == 0 || errno == EINVAL || errno == ENOENT) {
    return absl::OkStatus();
  }
  return ErrnoStatus(errno, "umount of " + path);
}

absl::StatusOr<bool> UnmountFuse(const std::string& path, int device) {
  HF_RETURN_IF_ERROR(RemoveMount(path));
  pollfd state{.fd = device, .events = 0, .revents = 0};
  return poll(&state, 1, 0) == 1 && (state.revents & POLLERR) != 0;
}

absl::StatusOr<size_t> RemoveStaleMounts(const std::string& state_dir, const std::set<std::string>& keep) {
  HF_ASSIGN_OR_RETURN(std::vector<MountInfo> mounts, ReadMountInfo());
  size_t removed = 0;
  absl::Status failed;
  for (auto it = mounts.rbegin(); it != mounts.rend(); ++it) {
    if (it->type != kFuseType || !IsUnder(it->path, state_dir) || keep.count(it->path) != 0) continue;
    if (umount2(it->path.c_str(), MNT_DETACH | UMOUNT_NOFOLLOW) == 0) {
      ++removed;
    } else if (errno != EINVAL && errno != ENOENT && failed.ok()) {  // those: it went with its twin elsewhere
      failed = ErrnoStatus(errno, "umount of the stale mount " + it->path);
    }
  }
  if (!failed.ok()) return failed;
  return removed;
}

}  // namespace holdfast
