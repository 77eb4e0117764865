#include "worker/app/stack_dump.h"

#include <execinfo.h>
#include <pthread.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstring>

namespace holdfast::app {
namespace {

constexpr int kFrames = 64;
constexpr int kTurnsWaited = 100;  // of a millisecond

// A signal handler can reach nothing but statics. Keeps the stacks of two threads apart.
std::atomic<bool> writing{false};

char* Append(char* out, const char* text) {
  while (*text != '\0') *out++ = *text++;
  return out;
}

char* AppendNumber(char* out, long number) {
  char digits[24];
  char* first = digits + sizeof digits;
  *--first = '\0';
  do {
    *--first = static_cast<char>('0' + number % 10);
    number /= 10;
  } while (number > 0);
  return Append(out, first);
}

void OnQuit(int) {
  const int before = errno;
  bool mine = false;
  for (int i = 0; i < kTurnsWaited && !(mine = !writing.exchange(true)); ++i) {
    const timespec millisecond{0, 1'000'000};
    nanosleep(&millisecond, nullptr);
  }
  char name[17] = {};
  prctl(PR_GET_NAME, name);
  char line[96];
  char* end = Append(line, "worker.stack thread=");
  end = Append(end, name);
  end = Append(end, " tid=");
  end = AppendNumber(end, syscall(SYS_gettid));
  *end++ = '\n';
  static_cast<void>(!write(STDERR_FILENO, line, static_cast<size_t>(end - line)));
  void* frames[kFrames];
  const int count = backtrace(frames, kFrames);
  backtrace_symbols_fd(frames, count, STDERR_FILENO);
  if (mine) writing = false;
  errno = before;
}

}  // namespace

void InstallStackDump() {
  // The first call loads libgcc, which the handler must not.
  void* frame = nullptr;
  backtrace(&frame, 1);
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_handler = OnQuit;
  action.sa_flags = SA_ONSTACK | SA_RESTART;
  sigemptyset(&action.sa_mask);
  sigaction(SIGQUIT, &action, nullptr);
  // Whoever started this process may have blocked it.
  sigset_t quit;
  sigemptyset(&quit);
  sigaddset(&quit, SIGQUIT);
  pthread_sigmask(SIG_UNBLOCK, &quit, nullptr);
}

}  // namespace holdfast::app
