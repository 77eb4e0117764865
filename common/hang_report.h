// Evidence of a hang, saved before the worker is killed.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>

#include "common/status.h"

namespace holdfast {

inline constexpr size_t kHangReportsKept = 20;

// What the worker's threads are doing, into <folder>/<UTC time>-g<generation>.txt, whose name
// is returned; then SIGQUIT to each thread, so that the worker prints its own stacks if it still can. Only
// the newest kHangReportsKept reports stay. May block: for Offload.
absl::StatusOr<std::string> SaveStacks(const std::string& folder, pid_t pid, uint64_t generation,
                                       const std::string& verdict, int64_t wall_nanos);

}  // namespace holdfast
