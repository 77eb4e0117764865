// Starting a worker. It outlives the supervisor, on purpose.
#pragma once

#include <string>
#include <vector>

#include "common/executable_store.h"
#include "common/io.h"
#include "common/process.h"
#include "common/status.h"

namespace holdfast::supervisor {

// The copies of worker programs.
inline ExecutableStore WorkerCopies(const std::string& state_dir) {
  return {state_dir + "/bin", "holdfast-worker"};
}

struct WorkerChild {
  Process process;
  UniqueFd socket;  // our end; the worker's is its descriptor 3
};

inline constexpr int kWorkerSocket = 3;

// Starts it with HOLDFAST_TOKEN=<token>, our descriptors 0, 1 and 2, and the socket. The service manager's
// variables are left out. `urgent`: reads wait for it (common/urgency.h).
absl::StatusOr<WorkerChild> Spawn(const Executable& executable, const std::vector<std::string>& args,
                                  const std::string& token, bool urgent);

}  // namespace holdfast::supervisor
