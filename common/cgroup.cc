#include "common/cgroup.h"

#include <sstream>

#include "common/io.h"

namespace holdfast {

std::vector<std::string> CpuStatPaths(const std::string& proc_cgroup) {
  std::vector<std::string> paths;
  std::istringstream lines(proc_cgroup);
  for (std::string line; std::getline(lines, line);) {  // "4:cpu,cpuacct:/path", or "0::/path" of version 2
    size_t first = line.find(':');
    size_t second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    std::string controllers = line.substr(first + 1, second - first - 1);
    bool has_cpu = ("," + controllers + ",").find(",cpu,") != std::string::npos;
    if (!has_cpu && !controllers.empty()) continue;
    // Version 2 lies at the top, or beside version 1; either may be missing.
    std::vector<std::string> roots = {"/sys/fs/cgroup", "/sys/fs/cgroup/unified"};
    if (has_cpu) roots = {"/sys/fs/cgroup/" + controllers};
    std::string path = line.substr(second + 1);
    while (!path.empty() && path != "/") {
      for (const std::string& root : roots) paths.push_back(root + path + "/cpu.stat");
      path.resize(path.rfind('/') == std::string::npos ? 0 : path.rfind('/'));
    }
  }
  return paths;
}

uint64_t ParseThrottledNanos(const std::string& cpu_stat) {
  std::istringstream words(cpu_stat);
  std::string name;
  for (uint64_t value = 0; words >> name >> value;) {
    if (name == "throttled_usec") return value * 1'000;
    if (name == "throttled_time") return value;
  }
  return 0;
}

uint64_t ThrottledNanos(pid_t pid) {
  auto groups = ReadFile("/proc/" + std::to_string(pid) + "/cgroup");
  uint64_t nanos = 0;
  for (const std::string& path : CpuStatPaths(groups.ok() ? *groups : "")) {
    auto text = ReadFile(path);
    if (text.ok()) nanos += ParseThrottledNanos(*text);
  }
  return nanos;
}

}  // namespace holdfast
