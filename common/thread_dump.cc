#include "common/thread_dump.h"

#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <system_error>
#include <vector>

#include "common/io.h"

namespace holdfast {
namespace {

std::vector<pid_t> Threads(pid_t pid) {
  std::vector<pid_t> threads;
  std::error_code error;
  std::filesystem::directory_iterator end;
  std::filesystem::directory_iterator it("/proc/" + std::to_string(pid) + "/task", error);
  for (; !error && it != end; it.increment(error)) threads.push_back(atoi(it->path().filename().c_str()));
  std::sort(threads.begin(), threads.end());
  return threads;
}

std::string Read(const std::string& path) {
  auto text = ReadFile(path);
  if (!text.ok()) return "(" + std::string(FromAbsl(text.status().message())) + ")";
  while (!text->empty() && text->back() == '\n') text->pop_back();
  return *text;
}

std::string StateOf(const std::string& status) {
  size_t at = status.find("State:\t");
  if (at == std::string::npos) return "?";
  return status.substr(at + 7, status.find('\n', at) - at - 7);
}

}  // namespace

std::string DumpThreads(pid_t pid, size_t max_bytes) {
  std::string out;
  for (pid_t thread : Threads(pid)) {
    std::string folder = "/proc/" + std::to_string(pid) + "/task/" + std::to_string(thread) + "/";
    out += "thread " + std::to_string(thread) + " " + Read(folder + "comm") + ": " +
           StateOf(Read(folder + "status")) + ", wchan " + Read(folder + "wchan") + ", syscall " +
           Read(folder + "syscall") + "\n" + Read(folder + "stack") + "\n";
    if (out.size() > max_bytes) break;
  }
  out.resize(std::min(out.size(), max_bytes));
  return out;
}

void SignalThreads(pid_t pid, int signal) {
  for (pid_t thread : Threads(pid)) syscall(SYS_tgkill, pid, thread, signal);
}

}  // namespace holdfast
