// holdfast-verifier: started by the supervisor (schema/verifier.capnp), ends with its connection.
#include <capnp/rpc-twoparty.h>
#include <fcntl.h>
#include <kj/async-io.h>
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <iostream>
#include <memory>

#include "common/io.h"
#include "common/log.h"
#include "common/offload.h"
#include "schema/rpc.h"
#include "verifier/self_test.h"
#include "verifier/swap_checks.h"

// Generated server bases have a protected life cycle (kj::Own) and no virtual destructor.
#pragma GCC diagnostic ignored "-Wnon-virtual-dtor"

namespace holdfast::verifier {
namespace {

constexpr int kSocket = 3;
constexpr unsigned kMaxFds = 16;  // a message

class VerifierServer final : public schema::Verifier::Server {
 public:
  explicit VerifierServer(kj::Timer& timer) : checks_(timer) {}

  kj::Promise<void> rehearse(RehearseContext context) override {
    auto params = context.getParams();
    kj::Maybe<schema::Worker::Client> owner;
    if (params.hasOwner()) owner = params.getOwner();
    return checks_
        .Rehearse(kj::mv(owner), params.getCandidate(), params.getMounts(), params.getCanaryFolder().cStr())
        .then([context](std::string&& summary) mutable { context.getResults().setSummary(summary.c_str()); });
  }

  kj::Promise<void> probeLive(ProbeLiveContext context) override {
    return checks_.ProbeLive(context.getParams().getGeneration())
        .then([context](std::string&& summary) mutable { context.getResults().setSummary(summary.c_str()); });
  }

  kj::Promise<void> selfTest(SelfTestContext context) override {
    auto executable = context.getParams().getExecutable();
    auto fd = executable.getFd();
    return fd.then([context, executable = kj::mv(executable)](kj::Maybe<int> file) mutable {
      auto copy = DupFd(file.orDefault(-1));
      if (!copy.ok()) Throw(Annotate(copy.status(), "the program to test"));
      auto program = std::make_shared<UniqueFd>(std::move(*copy));
      return Offload<SelfTestResult>([program] { return RunSelfTest(program->get()); })
          .then([context](kj::Own<SelfTestResult>&& result) mutable {
            context.getResults().setPassed(result->passed);
            context.getResults().setOutput(result->output.c_str());
          });
    });
  }

 private:
  SwapChecks checks_;
};

int Main(char** argv) {
  InitLogging(argv[0]);
  if (fcntl(kSocket, F_GETFD) < 0) {
    std::cerr << "holdfast-verifier: not started by holdfast-supervisor\n";
    return 2;
  }
  prctl(PR_SET_NAME, "holdfast-verifier");  // started by descriptor, it has a number for a name
  // The supervisor's score is not ours.
  if (auto score = OpenFile("/proc/self/oom_score_adj", O_WRONLY); score.ok()) {
    PwriteFull(score->get(), "0", 1, 0).IgnoreError();
  }
  signal(SIGPIPE, SIG_IGN);
  auto io = kj::setupAsyncIo();
  using Provider = kj::LowLevelAsyncIoProvider;
  fcntl(kSocket, F_SETFD, FD_CLOEXEC);
  auto stream = io.lowLevelProvider->wrapUnixSocketFd(kSocket, Provider::TAKE_OWNERSHIP);
  capnp::TwoPartyClient connection(*stream, kMaxFds, kj::heap<VerifierServer>(io.provider->getTimer()),
                                   capnp::rpc::twoparty::Side::SERVER);
  connection.onDisconnect().wait(io.waitScope);
  _exit(0);  // threads may wait for a mount; the kernel ends them
}

}  // namespace
}  // namespace holdfast::verifier

int main(int, char** argv) { return holdfast::verifier::Main(argv); }
