// Making and ending FUSE mounts. May block: for helper threads. Nothing here opens, stats or lists a path of
// a mounted file system. Format: <linux/fuse.h> (FUSE_INIT, protocol 7.x).
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <string_view>

#include "common/io.h"
#include "common/mountinfo.h"
#include "common/status.h"

namespace holdfast {

inline constexpr char kFuseType[] = "fuse.holdfast";

// InitOptions of schema/handover.capnp.
struct InitOptions {
  uint64_t flags = 0;
  uint16_t max_background = 64, congestion_threshold = 48, max_pages = 256;
  uint32_t max_stack_depth = 0, read_ahead_kib = 0, max_readahead = 0;
};

// What the kernel and the supervisor said to each other; both with their headers.
struct FuseInit {
  std::string request, reply;
};

absl::StatusOr<UniqueFd> OpenFuseDevice();
bool IsFuseDevice(int fd);

// Mounts `device`, a fresh one, which then is O_NONBLOCK, on the folder `path`, which lies under `state_dir`
// (open as `state_fd`) without crossing a symbolic link or a mount point, and answers FUSE_INIT. On an error
// nothing is left mounted.
absl::StatusOr<FuseInit> MountFuse(int device, int state_fd, const std::string& state_dir,
                                   const std::string& path, const InitOptions& options);

// The answer to `request`, with the wanted flags the kernel offered. InvalidArgument when it is no FUSE_INIT.
absl::StatusOr<std::string> BuildInitReply(std::string_view request, const InitOptions& options);

// Takes the mount out of the file tree; what uses it (an overlay) keeps it alive.
absl::Status RemoveMount(const std::string& path);

// RemoveMount. True: it is gone; false: something (an overlay) still uses it.
absl::StatusOr<bool> UnmountFuse(const std::string& path, int device);

// Lazily unmounts what a dead predecessor left under `state_dir`, but not the mounts on `keep`. Returns how
// many.
absl::StatusOr<size_t> RemoveStaleMounts(const std::string& state_dir,
                                         const std::set<std::string>& keep = {});

}  // namespace holdfast
