// Starting programs, and watching processes by pidfd, which a reused pid cannot fool. Thread-safe.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "common/io.h"
#include "common/status.h"

namespace holdfast {

struct Process {
  pid_t pid = 0;
  UniqueFd pidfd;
};

struct ProcessSpec {
  int program = -1;  // open descriptor of the executable file
  std::vector<std::string> argv{};
  std::vector<std::string> environment{};  // "NAME=value"
  // {ours, the child's number}. It keeps 0, 1 and 2; all others must be close-on-exec.
  std::vector<std::pair<int, int>> descriptors{};
  bool urgent = false;  // from its first instruction on, where that is permitted (urgency.h)
};

// In a session of its own, with no signal blocked or ignored.
absl::StatusOr<Process> StartProcess(const ProcessSpec& spec);

// This process's environment without the variables whose names begin with one of `prefixes`.
std::vector<std::string> EnvironmentWithout(const std::vector<std::string_view>& prefixes);

// A child that we speak with: its end of the socket is its descriptor 3.
struct ConnectedProcess {
  Process process;
  UniqueFd socket;  // our end
};
// It gets this process's environment, but not what was said to this process alone (by its service manager, or
// by a supervisor), and then spec.environment.
absl::StatusOr<ConnectedProcess> StartConnected(ProcessSpec spec);

absl::StatusOr<UniqueFd> OpenPidfd(pid_t pid);
bool HasExited(int pidfd);

// "exit 3", "signal 9 (Killed)"; reaps the process. Call when its pidfd is readable. "unknown" when it is no
// child of ours.
std::string ReapReason(int pidfd);

// As ReapReason, of a process that a signal ends just now, though it may exist for a while. Empty: none does,
// or it cannot be known.
std::string EndingReason(pid_t pid);

// When it started, in clock ticks since boot: with the pid, it names a process for as long as the machine is
// up. NotFound when there is no such process.
absl::StatusOr<uint64_t> ProcessStartTicks(pid_t pid);

}  // namespace holdfast
