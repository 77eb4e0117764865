// Helper processes of the supervisor: the probe (probe.h), and worker builds started with --self-test.
// Started off the main loop, ended by SIGKILL at their deadline, reaped whenever they end, never waited for:
// one that the kernel does not let die costs its process and keeps its mounts from being probed again,
// nothing else.
//
// Main thread only. Destroyed before the event loop; helpers that run then are killed, and reaped by init.
#pragma once

#include <kj/async-io.h>
#include <kj/async-unix.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "common/process.h"
#include "supervisor/probe.h"
#include "supervisor/spawner.h"

namespace holdfast::supervisor {

inline constexpr uint64_t kSelfTestMillis = 5'000;

struct SelfTestResult {
  bool ok = false;
  std::string output;  // what it printed, else what went wrong
};

class Helpers final : private kj::TaskSet::ErrorHandler {
 public:
  // `program`: the supervisor's own executable file, opened.
  Helpers(kj::AsyncIoContext* io, UniqueFd program);
  ~Helpers();

  // CheckMounts in a helper. Errors: its own; DeadlineExceeded with the mount it was at; Unavailable when an
  // earlier helper for one of the mounts has not ended yet. Never throws.
  kj::Promise<absl::StatusOr<std::string>> Probe(const ProbeRequest& request, uint64_t deadline_ms);

  // Does this build start here? Its --self-test touches nothing.
  kj::Promise<SelfTestResult> SelfTest(std::shared_ptr<const Executable> executable,
                                       uint64_t deadline_ms = kSelfTestMillis);

 private:
  struct Child {
    UniqueFd output;  // this and `process`: of the starting thread until `started`
    Process process;
    absl::Status start;
    bool started = false;
    kj::Own<kj::UnixEventPort::FdObserver> exit;
    std::string how{};     // it ended; empty: it runs
    bool expired = false;  // the deadline is over
  };
  void taskFailed(kj::Exception&& exception) override;
  // Resolves at the end of the process or at the deadline. `ended` is called when the process is gone.
  kj::Promise<std::shared_ptr<Child>> Run(std::shared_ptr<const UniqueFd> program,
                                          std::vector<std::string> argv, std::string input,
                                          uint64_t deadline_ms, std::function<void()> ended);
  kj::Promise<void> Watch(std::shared_ptr<Child> child);
  static void Kill(const Child& child);

  kj::AsyncIoContext* const io_;
  const std::shared_ptr<const UniqueFd> program_;
  std::set<uint64_t> busy_mounts_;
  std::set<std::shared_ptr<Child>> children_;
  kj::TaskSet tasks_;  // last: cancelled first
};

}  // namespace holdfast::supervisor
