// For tests: the programs that were built, and the processes that a test or its supervisor has started.
#pragma once

#include <stdlib.h>
#include <sys/types.h>
#include <unistd.h>

#include <fstream>
#include <string>
#include <vector>

namespace holdfast {

// The path of a program of the build under test.
inline std::string Bin(const std::string& name) {
  const char* bin = getenv("HOLDFAST_BIN");
  return std::string(bin == nullptr ? "." : bin) + "/" + name;
}

// Of the first thread of `parent`, zombies included.
inline std::vector<pid_t> Children(pid_t parent = getpid()) {
  std::string pid = std::to_string(parent);
  std::ifstream file("/proc/" + pid + "/task/" + pid + "/children");
  std::vector<pid_t> pids;
  for (pid_t child = 0; file >> child;) pids.push_back(child);
  return pids;
}

}  // namespace holdfast
