#include "tests/support/reader/mapped_copy.h"

#include <unistd.h>

#include <csetjmp>
#include <csignal>
#include <cstring>

namespace holdfast::reader {
namespace {

thread_local sigjmp_buf mmap_escape;
thread_local volatile sig_atomic_t mmap_armed = 0;

void OnSigbus(int) {
  if (mmap_armed == 0) _exit(70);
  siglongjmp(mmap_escape, 1);
}

}  // namespace

void InstallSigbus() {
  struct sigaction action = {};
  action.sa_handler = OnSigbus;
  sigaction(SIGBUS, &action, nullptr);
}

// On its own, so that no variable of a caller is lost in the jump.
[[gnu::noinline]] bool CopyMapped(void* to, const void* from, uint64_t size) {
  if (sigsetjmp(mmap_escape, 1) != 0) {
    mmap_armed = 0;
    return false;
  }
  mmap_armed = 1;
  std::memcpy(to, from, size);
  mmap_armed = 0;
  return true;
}

}  // namespace holdfast::reader
