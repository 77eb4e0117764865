// Work that may block, kept off the KJ event loop.
#pragma once

#include <kj/async.h>

#include <functional>
#include <memory>
#include <system_error>
#include <thread>
#include <utility>

namespace holdfast {

// On a thread of its own; the result comes back on the main loop. A job that never ends costs its thread,
// nothing else: the process leaves by _exit. Where no thread can be made (a limit, no memory) it is done here
// and now: what hangs has to be killed all the same. `job` must not throw.
template <typename T>
kj::Promise<kj::Own<T>> Offload(std::function<T()> job) {
  auto pair = kj::newPromiseAndCrossThreadFulfiller<kj::Own<T>>();
  // shared_ptr: std::thread wants what it runs to have a destructor that does not throw; kj::Own's may.
  auto fulfiller = std::make_shared<decltype(pair.fulfiller)>(kj::mv(pair.fulfiller));
  try {
    std::thread([job, fulfiller] { (*fulfiller)->fulfill(kj::heap<T>(job())); }).detach();
  } catch (const std::system_error&) {
    return kj::heap<T>(job());
  }
  return kj::mv(pair.promise);
}

}  // namespace holdfast
