// What a test may look at and do in another process, from outside: its state, its descriptors, its end.
#pragma once

#include <sys/types.h>

#include <map>
#include <string>
#include <vector>

#include "common/io.h"
#include "common/status.h"

namespace holdfast::test {

// Of /proc/PID/stat: 'R', 'S', 'T' (stopped), 'Z', ...; 0: there is no such process.
char StateOf(pid_t pid);

struct Child {
  pid_t pid = 0;
  char state = 0;
  std::string name;
};
std::vector<Child> ChildrenOf(pid_t pid);

// What its descriptors are ("socket", "pipe", "/dev/fuse", "memfd:NAME", "file", ...), and how many of each.
std::map<std::string, int> DescriptorsOf(pid_t pid);
// The numbers of those whose link begins with `target`.
std::vector<int> DescriptorsTo(pid_t pid, const std::string& target);
// A duplicate of its descriptor `fd`, in this process.
absl::StatusOr<UniqueFd> Borrow(pid_t pid, int fd);

// A process that, killed, does not come to its end: its first thread stops at the exit, as one does that
// sleeps in the kernel or dumps core. All it had open stays open. Only from the thread that made it.
class HeldExit {
 public:
  explicit HeldExit(pid_t pid);
  ~HeldExit() { LetGo(); }
  HeldExit(const HeldExit&) = delete;
  HeldExit& operator=(const HeldExit&) = delete;
  bool held() const { return pid_ != 0; }
  // It is being killed, and stands at its exit. False after `seconds`.
  bool WaitAtExit(int seconds);
  void LetGo();

 private:
  pid_t pid_;
  bool at_exit_ = false;
};

}  // namespace holdfast::test
