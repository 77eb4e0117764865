// Private copies of worker executables, and starting one. A worker outlives the supervisor, on purpose.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "common/io.h"
#include "common/process.h"
#include "common/status.h"

namespace holdfast::supervisor {

// <state>/bin/<sha256>/holdfast-worker, opened. Stays valid when the original is upgraded or removed.
struct Executable {
  std::string sha256;
  UniqueFd file;
};

// Copies the program at `path`, synced, mode 0555. Blocks. The error says what is wrong with `path`.
absl::StatusOr<std::shared_ptr<const Executable>> CopyExecutable(const std::string& path,
                                                                 const std::string& state_dir);

inline constexpr char kLastGoodFile[] =
    "supervisor/last-good";  // in the state folder: the digest of that build
// The copy that was kept under this digest; null when there is none, or it is damaged.
std::shared_ptr<const Executable> OpenExecutable(const std::string& state_dir, const std::string& sha256);

// Removes the copies not named in `keep`. Errors are left for the next time.
void RemoveOtherExecutables(const std::string& state_dir, const std::vector<std::string>& keep);

struct WorkerChild {
  Process process;
  UniqueFd socket;  // our end; the worker's is its descriptor 3
};

inline constexpr int kWorkerSocket = 3;

// Starts it with HOLDFAST_TOKEN=<token>, our descriptors 0, 1 and 2, and the socket. The service manager's
// variables are left out.
absl::StatusOr<WorkerChild> Spawn(const Executable& executable, const std::vector<std::string>& args,
                                  const std::string& token);

}  // namespace holdfast::supervisor
