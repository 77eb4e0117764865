// The supervisor's command line, and what it checks of the machine before it starts.
#pragma once

#include <string>
#include <vector>

#include "common/io.h"
#include "common/status.h"
#include "supervisor/handover_machine.h"

namespace holdfast::supervisor {

struct Options {
  std::string worker = "/usr/lib/holdfast/holdfast-worker";
  std::string verifier;  // default: beside the supervisor's program, else in /usr/lib/holdfast
  std::string state_dir = "/var/lib/holdfast";
  std::string runtime_dir = "/run/holdfast";
  std::string snapshotter_socket;  // default: <runtime>/snapshotter.sock
  std::string control_socket;      // default: <runtime>/supervisor.sock
  std::vector<std::string> worker_args;
  Limits limits;
  uint64_t hang_limit_ms = 3'000;  // 0: a hanging worker is left alone
  bool help = false;
};

extern const char kUsage[];

// InvalidArgument names the mistake.
absl::StatusOr<Options> ParseOptions(const std::vector<std::string>& args);

// Root, /dev/fuse, descriptor limit raised, no core dumps.
absl::Status PrepareProcess();

// Creates both folders, makes their names in `options` real paths, refuses a state folder inside a FUSE
// mount, and locks it. The returned descriptor is the lock.
absl::StatusOr<UniqueFd> PrepareFolders(Options* options);

// Settings of the machine that endanger mounts, in words.
std::vector<std::string> MachineWarnings();

}  // namespace holdfast::supervisor
