#include "tests/fault/process.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <thread>

#include "common/process.h"

namespace holdfast::test {
namespace {

// The fields of /proc/PID/stat from the state on; false: no such process.
bool ReadStat(pid_t pid, char* state, pid_t* parent, std::string* name) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string line;
  if (!std::getline(file, line)) return false;
  const size_t begin = line.find('('), end = line.rfind(')');
  if (begin == std::string::npos || end == std::string::npos) return false;
  *name = line.substr(begin + 1, end - begin - 1);
  return sscanf(line.c_str() + end + 1, " %c %d", state, parent) == 2;
}

std::string LinkOf(pid_t pid, const std::string& fd) {
  std::error_code error;
  return std::filesystem::read_symlink("/proc/" + std::to_string(pid) + "/fd/" + fd, error).string();
}

std::vector<std::string> NumbersIn(const std::string& folder) {
  std::vector<std::string> numbers;
  std::error_code error;
  for (std::filesystem::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    const std::string name = it->path().filename().string();
    if (name.find_first_not_of("0123456789") == std::string::npos) numbers.push_back(name);
  }
  return numbers;
}

}  // namespace

char StateOf(pid_t pid) {
  char state = 0;
  pid_t parent = 0;
  std::string name;
  return ReadStat(pid, &state, &parent, &name) ? state : '\0';
}

std::vector<Child> ChildrenOf(pid_t pid) {
  std::vector<Child> children;
  for (const std::string& number : NumbersIn("/proc")) {
    Child child{.pid = atoi(number.c_str()), .state = 0, .name = {}};
    pid_t parent = 0;
    if (ReadStat(child.pid, &child.state, &parent, &child.name) && parent == pid) children.push_back(child);
  }
  return children;
}

std::map<std::string, int> DescriptorsOf(pid_t pid) {
  std::map<std::string, int> kinds;
  for (const std::string& fd : NumbersIn("/proc/" + std::to_string(pid) + "/fd")) {
    std::string link = LinkOf(pid, fd);
    if (link.empty()) continue;
    if (link.rfind("/memfd:", 0) == 0) {
      link = link.substr(1, link.find(' ') - 1);
    } else if (link[0] == '/' && link != "/dev/fuse") {
      link = "file";
    } else if (link.rfind("anon_inode:", 0) != 0) {
      link = link.substr(0, link.find(':'));
    }
    kinds[link]++;
  }
  return kinds;
}

std::vector<int> DescriptorsTo(pid_t pid, const std::string& target) {
  std::vector<int> numbers;
  for (const std::string& fd : NumbersIn("/proc/" + std::to_string(pid) + "/fd")) {
    if (LinkOf(pid, fd).rfind(target, 0) == 0) numbers.push_back(atoi(fd.c_str()));
  }
  return numbers;
}

absl::StatusOr<UniqueFd> Borrow(pid_t pid, int fd) {
  HF_ASSIGN_OR_RETURN(UniqueFd pidfd, OpenPidfd(pid));
  UniqueFd copy(static_cast<int>(syscall(SYS_pidfd_getfd, pidfd.get(), fd, 0)));
  if (!copy.valid()) return ErrnoStatus(errno, "descriptor of another process");
  return copy;
}

HeldExit::HeldExit(pid_t pid) : pid_(pid) {
  if (ptrace(PTRACE_SEIZE, pid, nullptr, PTRACE_O_TRACEEXIT) != 0) pid_ = 0;
}

bool HeldExit::WaitAtExit(int seconds) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  while (held() && !at_exit_ && std::chrono::steady_clock::now() < deadline) {
    int status = 0;
    const pid_t seen = waitpid(pid_, &status, WNOHANG | __WALL);
    if (seen < 0) pid_ = 0;
    if (seen != pid_) {
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    } else if (status >> 8 == (SIGTRAP | PTRACE_EVENT_EXIT << 8)) {
      at_exit_ = true;
    } else if (WIFSTOPPED(status)) {
      // A stop of the whole process (SIGSTOP), its end, or a signal on its way: as without us.
      const bool event = status >> 16 == PTRACE_EVENT_STOP;
      const bool stopped = event && WSTOPSIG(status) == SIGSTOP;
      ptrace(stopped ? PTRACE_LISTEN : PTRACE_CONT, pid_, nullptr, event ? 0 : WSTOPSIG(status));
    } else {
      pid_ = 0;  // it ended after all
    }
  }
  return at_exit_;
}

void HeldExit::LetGo() {
  if (held()) ptrace(PTRACE_DETACH, pid_, nullptr, nullptr);
  pid_ = 0;
}

}  // namespace holdfast::test
