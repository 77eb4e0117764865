#include <fcntl.h>
#include <kj/async-io.h>
#include <kj/async-unix.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <systemd/sd-daemon.h>
#include <unistd.h>

#include <exception>
#include <iostream>
#include <string>
#include <utility>
#include <vector>

#include "common/log.h"
#include "common/unix_socket.h"
#include "common/urgency.h"
#include "glog/logging.h"
#include "supervisor/options.h"
#include "supervisor/rpc.h"
#include "supervisor/supervisor.h"

namespace holdfast::supervisor {
namespace {

constexpr uint64_t kMountIdBlock = 1'000;
constexpr uint64_t kGenerationBlock = 100;
constexpr int kFlushMillis = 2'000;

// Everything that must be in order before the first worker is started.
absl::StatusOr<Resources> Prepare(const Options& options, FdStore* store, FaultPoints* faults,
                                  StoredFds fds) {
  HF_ASSIGN_OR_RETURN(UniqueFd state_dir, OpenFile(options.state_dir, O_PATH | O_DIRECTORY));
  std::string folder = options.state_dir + "/supervisor";
  HF_RETURN_IF_ERROR(MakeDirs(folder));
  HF_ASSIGN_OR_RETURN(IdFile mount_ids, IdFile::Open(folder + "/next-mount-id", kMountIdBlock));
  HF_ASSIGN_OR_RETURN(IdFile generations, IdFile::Open(folder + "/next-generation", kGenerationBlock));
  const ExecutableStore copies = WorkerCopies(options.state_dir);
  auto executable = copies.Add(options.worker);
  if (!executable.ok()) return Annotate(executable.status(), "worker " + options.worker);
  auto kept = ReadFile(options.state_dir + "/" + kLastGoodFile);
  auto last_good = kept.ok() ? copies.Open(kept->substr(0, kept->find('\n'))) : nullptr;
  std::vector<LivingWorker> living = ReadLivingWorkers(WorkersPath(options.state_dir));
  SharedFd listener;  // else it comes back with the rest
  if (living.empty() && fds.empty()) {
    HF_ASSIGN_OR_RETURN(UniqueFd fresh, ListenUnix(options.snapshotter_socket));
    listener = std::make_shared<UniqueFd>(std::move(fresh));
  }
  std::vector<std::string> warnings = MachineWarnings();
  if (absl::Status urgent = BecomeUrgent(); !urgent.ok()) {
    warnings.push_back("on a busy machine a dead worker is replaced late: " +
                       std::string(FromAbsl(urgent.message())));
  }
  for (const std::string& text : warnings) LOG(WARNING) << "event=machine_warning text=" << LogValue(text);
  return Resources{std::move(state_dir),
                   std::move(listener),
                   std::move(mount_ids),
                   std::move(generations),
                   *std::move(executable),
                   std::move(last_good),
                   std::move(warnings),
                   store,
                   std::move(fds),
                   std::move(living),
                   faults};
}

// The control socket, from the service manager if it kept it: then no client was ever refused.
absl::StatusOr<SharedFd> ControlListener(const Options& options, FdStore* store, StoredFds* fds) {
  auto kept = fds->extract(kControlFd);
  if (!kept.empty() && IsListeningOn(kept.mapped().front().get(), options.control_socket)) {
    return std::make_shared<UniqueFd>(std::move(kept.mapped().front()));
  }
  store->Remove(kControlFd);
  HF_ASSIGN_OR_RETURN(UniqueFd fresh, ListenUnix(options.control_socket));
  auto listener = std::make_shared<UniqueFd>(std::move(fresh));
  store->Push(kControlFd, {listener});
  return listener;
}

// The next supervisor goes on from what is saved already: worker, mounts and sockets stay as they are.
[[noreturn]] void LeaveToNext(FdStore* store) {
  LOG(INFO) << "event=left_to_next";
  sd_notify(0, "STOPPING=1");
  store->Flush(kFlushMillis);
  _exit(0);
}

[[noreturn]] void ServeUntilStopped(const Options& options, Resources resources, SharedFd control) {
  kj::UnixEventPort::captureSignal(SIGTERM);
  kj::UnixEventPort::captureSignal(SIGINT);
  signal(SIGPIPE, SIG_IGN);
  signal(SIGHUP, SIG_IGN);  // of the terminal it was started in
  auto io = kj::setupAsyncIo();
  FdStore* store = resources.store;
  Supervisor supervisor(options, std::move(resources), &io);
  using Flags = kj::LowLevelAsyncIoProvider::Flags;
  auto listener = io.lowLevelProvider->wrapListenSocketFd(control->get(),
                                                          Flags::ALREADY_CLOEXEC | Flags::ALREADY_NONBLOCK);
  auto serving = ServeControl(&supervisor, listener.get(), &io.provider->getTimer())
                     .eagerlyEvaluate([](kj::Exception&& exception) {
                       LOG(ERROR) << "event=control_ended error="
                                  << LogValue(exception.getDescription().cStr());
                     });
  auto left =
      io.unixEventPort.onSignal(SIGTERM).then([&](siginfo_t) { return supervisor.SaveLivingWorkers(); });
  left = left.then([&supervisor, store] {
               // Half of a full end is of no use to the next one.
               if (!supervisor.stopping()) LeaveToNext(store);
               LOG(WARNING) << "event=sigterm_ignored reason=\"everything is being ended\"";
             })
             .eagerlyEvaluate(nullptr);
  auto told = io.unixEventPort.onSignal(SIGINT).then([&](siginfo_t info) {
    sd_notify(0, "STOPPING=1");
    supervisor.Stop(strsignal(info.si_signo));
  });
  told = told.eagerlyEvaluate(nullptr);
  auto stopped = supervisor.Run();
  sd_notify(0, "READY=1");  // nothing without NOTIFY_SOCKET
  stopped.wait(io.waitScope);
  supervisor.KillRemaining();
  unlink(options.control_socket.c_str());
  unlink(options.snapshotter_socket.c_str());
  LOG(INFO) << "event=stopped";
  _exit(0);  // helper threads may be stuck in a system call; the kernel ends them
}

absl::Status Run(Options options) {
  HF_RETURN_IF_ERROR(PrepareProcess());
  HF_ASSIGN_OR_RETURN(UniqueFd lock, PrepareFolders(&options));
  StoredFds fds = TakeStoredFds();
  SystemdFdStore store(fds);
  FaultPoints faults;
  const char* armed = getenv("HOLDFAST_SUPERVISOR_FAULTS");
  if (armed != nullptr) HF_RETURN_IF_ERROR(faults.Parse(armed));
  HF_ASSIGN_OR_RETURN(SharedFd control, ControlListener(options, &store, &fds));
  HF_ASSIGN_OR_RETURN(Resources resources,
                      Prepare(options, &store, armed != nullptr ? &faults : nullptr, std::move(fds)));
  LOG(INFO) << "event=start build=" << LogValue(kBuild) << " state=" << LogValue(options.state_dir)
            << " snapshotter=" << LogValue(options.snapshotter_socket)
            << " control=" << LogValue(options.control_socket);
  ServeUntilStopped(options, std::move(resources), std::move(control));
}

int Main(int argc, char** argv) {
  auto options = ParseOptions(std::vector<std::string>(argv + 1, argv + argc));
  if (!options.ok()) {
    std::cerr << "holdfast-supervisor: " << FromAbsl(options.status().message()) << "; see --help\n";
    return 2;
  }
  if (options->help) {
    std::cout << kUsage;
    return 0;
  }
  InitLogging(argv[0]);
  std::string error;
  try {
    error = std::string(Run(std::move(*options)).message());
  } catch (const std::exception& exception) {  // KJ's are of this type, too
    error = exception.what();
  }
  std::cerr << "holdfast-supervisor: " << error << "\n";
  return 1;
}

}  // namespace
}  // namespace holdfast::supervisor

int main(int argc, char** argv) { return holdfast::supervisor::Main(argc, argv); }
