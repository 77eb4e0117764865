#include "supervisor/verifiers.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "common/log.h"
#include "glog/logging.h"
#include "schema/rpc.h"

namespace holdfast::supervisor {
namespace {

constexpr unsigned kMaxFds = 16;  // a message
using Flags = kj::LowLevelAsyncIoProvider::Flags;

absl::StatusOr<ConnectedProcess> StartVerifier(const std::string& path) {
  auto program = OpenFile(path, O_RDONLY);
  if (!program.ok()) return Annotate(program.status(), "verifier " + path);
  auto started = StartConnected({.program = program->get(), .argv = {"holdfast-verifier"}});
  if (!started.ok()) return Annotate(started.status(), "verifier " + path);
  return started;
}

}  // namespace

Verifiers::Task::Task(std::shared_ptr<Child> child, kj::Own<kj::AsyncCapabilityStream> stream,
                      kj::Timer& timer)
    : child_(std::move(child)), timer_(timer), stream_(kj::mv(stream)), connection_(*stream_, kMaxFds) {}

Verifiers::Task::~Task() noexcept { Kill(child_.get(), timer_.now()); }

Verifiers::~Verifiers() noexcept {
  for (const auto& child : children_) Kill(child.get(), timer_.now());
}

void Verifiers::taskFailed(kj::Exception&& exception) {
  LOG(ERROR) << "event=verifier_failed error=" << LogValue(exception.getDescription().cStr());
}

void Verifiers::Kill(Child* child, kj::TimePoint now) {
  if (child->ended || child->killed != nullptr) return;
  child->killed = now;
  syscall(SYS_pidfd_send_signal, child->process.pidfd.get(), SIGKILL, nullptr, 0);
}

kj::Own<Verifiers::Task> Verifiers::Begin() {
  auto hanging = std::count_if(children_.begin(), children_.end(), [&](const auto& child) {
    auto killed = child->killed.orDefault(timer_.now());
    return timer_.now() - killed > kHangingMillis * kj::MILLISECONDS;
  });
  if (hanging >= static_cast<long>(kMostHanging)) {
    Throw(Unavailable(std::to_string(hanging) + " verifiers of earlier tasks still hang in a mount"));
  }
  ConnectedProcess started = OrThrow(StartVerifier(program_));
  auto child = std::make_shared<Child>();
  child->process = std::move(started.process);
  child->exit = kj::heap<kj::UnixEventPort::FdObserver>(io_.unixEventPort, child->process.pidfd.get(),
                                                        kj::UnixEventPort::FdObserver::OBSERVE_READ);
  children_.insert(child);
  tasks_.add(child->exit->whenBecomesReadable().then([this, child] {
    std::string how = ReapReason(child->process.pidfd.get());
    LOG_IF(ERROR, child->killed == nullptr) << "event=verifier_died how=" << LogValue(how);
    child->ended = true;
    child->exit = nullptr;
    children_.erase(child);
    on_exit_();
  }));
  return kj::heap<Task>(child,
                        io_.lowLevelProvider->wrapUnixSocketFd(
                            started.socket.Release(), Flags::TAKE_OWNERSHIP | Flags::ALREADY_CLOEXEC),
                        timer_);
}

}  // namespace holdfast::supervisor
