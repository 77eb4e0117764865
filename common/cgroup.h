// What cgroups (version 1 and 2) say of a process. Everything is optional: what cannot be read counts as 0.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <vector>

namespace holdfast {

// How long the processor limits of this process's cgroup and of those above it have stopped it so far. The
// kernel sums over processors, so this may run faster than the clock.
uint64_t ThrottledNanos(pid_t pid);

// Its parts. The cpu.stat files to look at for the text of /proc/PID/cgroup, from the process's own group
// upwards.
std::vector<std::string> CpuStatPaths(const std::string& proc_cgroup);
// The throttled time in the text of a cpu.stat, of either version.
uint64_t ParseThrottledNanos(const std::string& cpu_stat);

}  // namespace holdfast
