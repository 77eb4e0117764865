// Verifier processes (schema/verifier.capnp): what looks at workers and mounts for a supervisor that must
// never touch a path of a mount. Each is started for one task and killed after it.
//
// Main thread only. One that the kernel does not let die (it waits for a mount that nobody serves) is left
// behind and reaped when it ends; with kMostHanging of them there is no further task. Destroyed before the
// event loop; those that run then are killed, and reaped by init.
#pragma once

#include <capnp/rpc-twoparty.h>
#include <kj/async-io.h>
#include <kj/async-unix.h>

#include <functional>
#include <memory>
#include <set>
#include <string>

#include "common/process.h"
#include "schema/verifier.capnp.h"

namespace holdfast::supervisor {

inline constexpr size_t kMostHanging = 3;
inline constexpr uint64_t kHangingMillis = 1'000;  // killed so long ago, and still there

class Verifiers final : private kj::TaskSet::ErrorHandler {
  struct Child {
    Process process;
    bool ended = false;
    kj::Maybe<kj::TimePoint> killed{};
    kj::Own<kj::UnixEventPort::FdObserver> exit;
  };

 public:
  class Task {
   public:
    Task(std::shared_ptr<Child> child, kj::Own<kj::AsyncCapabilityStream> stream, kj::Timer& timer);
    ~Task() noexcept;
    KJ_DISALLOW_COPY(Task);
    schema::Verifier::Client client() { return connection_.bootstrap().castAs<schema::Verifier>(); }

   private:
    const std::shared_ptr<Child> child_;
    kj::Timer& timer_;
    kj::Own<kj::AsyncCapabilityStream> stream_;
    capnp::TwoPartyClient connection_;
  };

  // `program`: its path. What is there is started: an upgrade of the package brings newer checks, too.
  // `on_exit`: whenever one is gone.
  Verifiers(kj::AsyncIoContext* io, std::string program, std::function<void()> on_exit)
      : io_(*io),
        timer_(io->provider->getTimer()),
        program_(std::move(program)),
        on_exit_(std::move(on_exit)),
        tasks_(*this) {}
  ~Verifiers() noexcept;

  // Throws, with a reason for people.
  kj::Own<Task> Begin();

 private:
  void taskFailed(kj::Exception&& exception) override;
  static void Kill(Child* child, kj::TimePoint now);

  kj::AsyncIoContext& io_;
  kj::Timer& timer_;
  const std::string program_;
  const std::function<void()> on_exit_;
  std::set<std::shared_ptr<Child>> children_;  // not reaped yet
  kj::TaskSet tasks_;                          // last: cancelled first
};

}  // namespace holdfast::supervisor
