// Why does an executable not start as a worker? Tried by hand, without mounts and without a supervisor, after
// an upgrade to it failed or while none that is started lives.
#pragma once

#include <sys/types.h>

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

// Runs `worker` (absolute; empty: the one that supervisor was started with) with --self-test, then with the
// node's worker arguments. Blocks, at most 10 s. Returns what it said, in words.
std::string TryCandidate(const std::string& worker, pid_t supervisor);

}  // namespace holdfast::ctl
