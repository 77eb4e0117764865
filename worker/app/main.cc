// holdfast-worker: serves container layers lazily. Started by holdfast-supervisor, never by hand.
#include <fcntl.h>
#include <pthread.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>

#include "common/log.h"
#include "common/urgency.h"
#include "glog/logging.h"
#include "worker/app/build_info.h"
#include "worker/app/config.h"
#include "worker/app/self_test.h"
#include "worker/app/stack_dump.h"
#include "worker/app/worker.h"

namespace holdfast::app {
namespace {

constexpr char kUsage[] = R"(holdfast-worker: serves container image layers that are not downloaded yet.

Usage: holdfast-worker [--config FILE]

It is started by holdfast-supervisor, which gives it the mounts; run that one, or `holdfastctl upgrade --worker PATH` to
swap to another build while containers go on reading.

  --config FILE   configuration (default /etc/holdfast/config.toml, which may be missing)
  --self-test     check that this build runs on this machine, print the result and exit
  --version, --help

Environment: HOLDFAST_TOKEN is set by the supervisor. HOLDFAST_FAULTS arms fault points (docs/FAILURES.md), for tests only.
On SIGQUIT the thread that gets it writes its stack to standard error.
Exit codes: 0 ended in good order, 1 failed (the last line on standard error says why), 2 wrong usage.
)";

constexpr uint64_t kCapabilities = handover::kCapServeReads | handover::kCapMetadataHandover |
                                   handover::kCapPrepare | handover::kCapTrial | handover::kCapHealth |
                                   handover::kCapReattach;

enum ExitCode { kDone = 0, kFailed = 1, kUsageError = 2 };

struct Arguments {
  std::string config;
  bool help = false, version = false, self_test = false;
  bool drill = false;  // --private: not for people, hence not in the help
};

bool ParseArguments(int argc, char** argv, Arguments* out) {
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    if (arg == "--help" || arg == "-h") {
      out->help = true;
    } else if (arg == "--version") {
      out->version = true;
    } else if (arg == "--self-test") {
      out->self_test = true;
    } else if (arg == "--private") {
      out->drill = true;
    } else if (arg == "--config" && i + 1 < argc) {
      out->config = argv[++i];
    } else if (arg.rfind("--config=", 0) == 0) {
      out->config = arg.substr(sizeof "--config=" - 1);
    } else {
      fprintf(stderr, "holdfast-worker: wrong argument '%s'\n%s", arg.c_str(), kUsage);
      return false;
    }
  }
  return true;
}

// One descriptor a mount and a few a layer: as many as the machine allows.
void RaiseDescriptorLimit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  if (setrlimit(RLIMIT_NOFILE, &limit) != 0) PLOG(WARNING) << "worker.descriptor_limit";
}

// SIGTERM and SIGINT are taken by the main thread only; writing to a closed socket is an error, not a death.
sigset_t PrepareSignals() {
  signal(SIGPIPE, SIG_IGN);
  sigset_t handled;
  sigemptyset(&handled);
  sigaddset(&handled, SIGTERM);
  sigaddset(&handled, SIGINT);
  pthread_sigmask(SIG_BLOCK, &handled, nullptr);
  return handled;
}

[[noreturn]] void ExitNow(int code) {
  google::FlushLogFiles(google::GLOG_INFO);
  // Without destructors: threads of the parts may be in the middle of something, and everything on disk is
  // safe at any moment.
  _exit(code);
}

int Fail(const absl::Status& status) {
  LOG(ERROR) << "worker.failed error=" << LogValue(FromAbsl(status.message()));
  fprintf(stderr, "holdfast-worker: %s\n", std::string(FromAbsl(status.message())).c_str());
  return kFailed;
}

// The process ends before its connection does: the supervisor would take an end of that alone for a reason to
// kill, and the exit code would not be told.
[[noreturn]] void FailNow(const absl::Status& status) { ExitNow(Fail(status)); }

int Serve(const Arguments& arguments) {
  UniqueFd socket(handover::kSupervisorFd);
  RaiseDescriptorLimit();
  const bool started = fcntl(socket.get(), F_GETFD) >= 0;
  if (!started) socket.Release();
  handover::MoveUp(&socket);  // while there is one thread only: see ReserveDescriptors
  const sigset_t signals = PrepareSignals();
  // In RR by the supervisor, when reads wait for us. Nothing here is longer in it than this.
  UrgentTime urgency;
  if (IsUrgent()) urgency.Begin(kUrgentAtMost).IgnoreError();
  InstallStackDump();
  absl::StatusOr<Config> config = LoadConfig(arguments.config);
  if (!config.ok()) FailNow(config.status());
  const char* token = getenv("HOLDFAST_TOKEN");
  if (token == nullptr || !started) {
    FailNow(FailedPrecondition("not started by holdfast-supervisor (see --help)"));
  }
  Worker::Options options;
  options.config = *std::move(config);
  const char* faults = getenv("HOLDFAST_FAULTS");
  if (faults != nullptr) {
    absl::StatusOr<std::string> spec = FaultSpecFrom(faults);
    if (!spec.ok()) FailNow(spec.status());
    options.fault_spec = *std::move(spec);
  }
  options.build = BuildName();
  options.urgency = &urgency;
  options.drill = arguments.drill;
  options.exit = [](int code) { ExitNow(code); };
  absl::StatusOr<std::unique_ptr<Worker>> worker = Worker::Create(options);
  if (!worker.ok()) FailNow(worker.status());

  if (absl::Status fault = (*worker)->BeforeRegister(); !fault.ok()) FailNow(fault);
  auto link = handover::SupervisorLink::Connect(std::move(socket), {token, BuildName(), kCapabilities});
  if (!link.ok()) FailNow(link.status());
  unsetenv("HOLDFAST_TOKEN");  // credential helpers that we run need not see it
  absl::Status running = (*worker)->Run(std::move(*link));
  if (!running.ok()) FailNow(running);
  while (true) {
    int signal = 0;
    if (sigwait(&signals, &signal) != 0) continue;
    if ((*worker)->supervisor_lost()) {
      LOG(INFO) << "worker.ended signal=" << signal;
      ExitNow(kDone);
    }
    LOG(INFO) << "worker.signal_ignored signal=" << signal
              << " reason=\"the supervisor decides when a worker ends\"";
  }
}

int Main(int argc, char** argv) {
  prctl(PR_SET_NAME, "holdfast-worker");  // it was started by descriptor, and its name would be that number
  InitLogging(argv[0]);
  Arguments arguments;
  if (!ParseArguments(argc, argv, &arguments)) return kUsageError;
  if (arguments.help) {
    fputs(kUsage, stdout);
    return kDone;
  }
  if (arguments.version) {
    printf("holdfast-worker %s\n", BuildName().c_str());
    return kDone;
  }
  if (arguments.self_test) {
    absl::Status status = SelfTest();
    if (!status.ok()) return Fail(status);
    printf("holdfast-worker %s: self-test passed\n", BuildName().c_str());
    return kDone;
  }
  return Serve(arguments);
}

}  // namespace
}  // namespace holdfast::app

int main(int argc, char** argv) { return holdfast::app::Main(argc, argv); }
