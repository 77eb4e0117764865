// Only in builds with ThreadSanitizer: backtrace(3) of the C library, not the one of libunwind that glog
// brings. KJ asks for one with each exception, and libunwind keeps a cache for the thread, which it frees at
// the thread's end when ThreadSanitizer has already forgotten the thread: its interceptor of munmap crashes.
#include <dlfcn.h>

namespace {

using Backtrace = int (*)(void**, int);
// Looked up at once: a signal handler may ask for a backtrace.
const Backtrace libc_backtrace =
    reinterpret_cast<Backtrace>(dlsym(dlopen("libc.so.6", RTLD_LAZY | RTLD_NOLOAD), "backtrace"));

}  // namespace

extern "C" int backtrace(void** buffer, int size) {
  return libc_backtrace == nullptr ? 0 : libc_backtrace(buffer, size);
}
