// What another process's threads are doing, as the kernel tells it. Works for a process that cannot run.
// Reads nothing that needs the process's memory lock, so a process stuck there does not block the reader.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <string>

namespace holdfast {

// For each thread its name, state, wait channel, system call and kernel stack (/proc/PID/task). At most
// `max_bytes`.
std::string DumpThreads(pid_t pid, size_t max_bytes);

// Sends `signal` to each of its threads.
void SignalThreads(pid_t pid, int signal);

}  // namespace holdfast
