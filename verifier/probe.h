// Looks at mounts as a container would see them: the live probe of a swap and the walk over canary mounts
// (DESIGN 4.4). Whoever opens a path of a FUSE mount may be stuck for ever: for a thread that nobody waits
// for, in a process that may be killed.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "common/status.h"

namespace holdfast::verifier {

enum class ProbeKind { kFile, kFolder, kAbsent };  // SampleKind of schema/handover.capnp

// What a path must show; SampleFile of schema/handover.capnp.
struct ProbeFile {
  ProbeKind kind = ProbeKind::kFile;
  std::string path{};  // below the root, without a slash before it; "" is the root; any bytes but 0
  uint64_t offset = 0, length = 0;
  std::string digest{};  // SHA-256, 32 bytes
};

struct ProbeMount {
  uint64_t id = 0;
  std::string root{};
  uint64_t generation = 0;  // that must answer HF_PROBE_LIVE; 0: it is not asked
  // The mount or its worker may know nothing of HF_PROBE_LIVE: ENOTTY then skips the question.
  bool may_be_unsupported = false;
  std::vector<ProbeFile> files{};
};

struct ProbeRequest {
  std::vector<ProbeMount> mounts;
  bool direct = true;  // read with O_DIRECT: past the page cache, so that the worker is asked
};

// Whether whoever serves the mount answers EIO for its root; the kernel's memory is not asked. Blocks like
// CheckMounts.
bool IsUnreadable(const std::string& root);

// Blocks, for ever when a mount is not served. "checked=N skipped=M": checked counts generations and files,
// skipped the generations that could not be asked for, of mounts that know no probe or are no mounts any
// more. The error names mount, path and what is wrong. `at` is told each mount before it is looked at.
absl::StatusOr<std::string> CheckMounts(const ProbeRequest& request,
                                        const std::function<void(uint64_t mount)>& at);

}  // namespace holdfast::verifier
