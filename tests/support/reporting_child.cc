// For the test of sanitized_run.py: a child process does what the sanitizer of this build must report, and
// nobody asks how it ended.
#include <sys/wait.h>
#include <unistd.h>

#include <memory>
#include <thread>

namespace {

int shared = 0;

void RaceAndUseAfterFree() {
  std::thread other([] { ++shared; });
  ++shared;
  other.join();
  auto owned = std::make_unique<int>(shared);
  volatile int* freed = owned.get();
  owned.reset();
  *freed = 1;
}

}  // namespace

int main() {
  pid_t child = fork();
  if (child < 0) return 1;
  if (child == 0) {
    RaceAndUseAfterFree();
    _exit(0);
  }
  waitpid(child, nullptr, 0);
  return 0;
}
