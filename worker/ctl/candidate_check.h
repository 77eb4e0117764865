// Why does an executable not start as a worker? Tried by hand, without mounts and without a supervisor, after
// an upgrade to it failed or while none that is started lives.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <vector>

namespace holdfast::ctl {

// How the supervisor `pid` was started: the worker it was given (its default when none), and the worker's
// arguments.
struct WorkerCommand {
  std::string worker;
  std::vector<std::string> args;
};
WorkerCommand ParseSupervisorCommand(const std::string& cmdline);  // as in /proc/PID/cmdline

inline constexpr uint64_t kTryNanos = 5'000'000'000;

// Runs `worker` (absolute; empty: the one that supervisor was started with) with --self-test, then with the
// node's worker arguments. Blocks, at most `limit_nanos` for each; what a run started ends with it. Returns
// what it said, in words.
std::string TryCandidate(const std::string& worker, pid_t supervisor, uint64_t limit_nanos = kTryNanos);

}  // namespace holdfast::ctl
