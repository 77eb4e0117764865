// The client against a stand-in for the supervisor: the same interface, in a thread, with answers that the
// test names.
#include "worker/ctl/control_client.h"

#include <capnp/rpc-twoparty.h>
#include <fcntl.h>
#include <kj/async-io.h>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <thread>
#include "common/testing/time_limit.h"
#include "gtest/gtest.h"
#include "schema/control.capnp.h"
#include "worker/ctl/candidate_check.h"
#include "worker/ctl/format.h"

#pragma GCC diagnostic ignored "-Wnon-virtual-dtor"

namespace holdfast::ctl {
namespace {

// What the stand-in does; set before it is asked.
struct Script {
  std::vector<std::string> steps;  // that an upgrade or rollback goes through
  std::string failure;             // of its last step; empty: it ends well
  bool old_supervisor = false;     // knows neither progress nor the newer methods
  bool silent_check = false;       // checkRollback is never answered
  bool worker_died = false;        // while it was asked
};

class StandIn final : public schema::Control::Server {
 public:
  explicit StandIn(const Script* script) : script_(*script) {}

  kj::Promise<void> status(StatusContext context) override {
    auto status = context.getResults().initStatus();
    status.setPhase("running");
    if (script_.old_supervisor) return kj::READY_NOW;
    status.setHangs(1);
    status.setProbationSeconds(42);
    status.setLastGood("abc");
    status.setSpareState("ready");
    status.setSupervisorRestarts(2);
    status.setStateSource("worker");
    status.setFdStore(true);
    status.setLastDeath("exit 3");
    status.setLastDeathWallNanos(9);
    status.initInProgress(1)[0].setName("rehearse");
    auto step = status.initLastSwap().initSteps(1)[0];
    step.setName("copy");
    step.setNanos(5);
    step.setDetail("new");
    return kj::READY_NOW;
  }

  kj::Promise<void> upgrade(UpgradeContext context) override {
    auto params = context.getParams();
    KJ_REQUIRE(params.getPath() == "/w" && params.getForce());
    context.getResults().setChanged(true);
    if (script_.old_supervisor) return kj::READY_NOW;
    return Tell(params.getProgress(), 0).then([context]() mutable {
      context.getResults().initSwap().setPauseNanos(7);
    });
  }

  kj::Promise<void> workerAdmin(WorkerAdminContext context) override {
    if (!script_.worker_died) return schema::Control::Server::workerAdmin(kj::mv(context));
    return KJ_EXCEPTION(DISCONNECTED, "Peer disconnected.");
  }

  kj::Promise<void> rollback(RollbackContext context) override {
    if (script_.old_supervisor) return schema::Control::Server::rollback(kj::mv(context));
    return Tell(context.getParams().getProgress(), 0).then([context]() mutable {
      context.getResults().initSwap().setKind("rollback");
    });
  }

  kj::Promise<void> checkRollback(CheckRollbackContext context) override {
    if (script_.old_supervisor) return schema::Control::Server::checkRollback(kj::mv(context));
    if (script_.silent_check) return kj::NEVER_DONE;
    context.getResults().setReady(true);
    context.getResults().setExecutable("abc");
    context.getResults().setReason("passed");
    return kj::READY_NOW;
  }

 private:
  kj::Promise<void> Tell(schema::Progress::Client progress, size_t index) {
    if (index == script_.steps.size()) return kj::READY_NOW;
    const bool fails = index + 1 == script_.steps.size() && !script_.failure.empty();
    return Step(progress, index, false).then([this, progress, index, fails]() mutable -> kj::Promise<void> {
      if (fails) {
        return kj::Exception(kj::Exception::Type::FAILED, __FILE__, __LINE__,
                             kj::str(script_.failure.c_str()));
      }
      return Step(progress, index, true).then([this, progress, index]() mutable {
        return Tell(progress, index + 1);
      });
    });
  }

  kj::Promise<void> Step(schema::Progress::Client& progress, size_t index, bool done) {
    auto request = progress.stepRequest();
    request.initStep().setName(script_.steps[index].c_str());
    if (done) request.getStep().setNanos(index + 1);
    request.setDone(done);
    return request.send().ignoreResult();
  }

  const Script& script_;
};

class ControlClientTest : public ::testing::Test {
 protected:
  ControlClientTest() {
    kj::MutexGuarded<bool> listening(false);
    thread_ = std::thread([this, &listening] {
      auto io = kj::setupAsyncIo();
      auto listener = io.provider->getNetwork().parseAddress("unix:" + socket()).wait(io.waitScope)->listen();
      capnp::TwoPartyServer server(schema::Control::Client(kj::heap<StandIn>(&script_)));
      auto serving = server.listen(*listener);
      auto stop = kj::newPromiseAndCrossThreadFulfiller<void>();
      stop_ = kj::mv(stop.fulfiller);
      *listening.lockExclusive() = true;
      stop.promise.wait(io.waitScope);
    });
    listening.when([](bool yes) { return yes; }, [](bool) {});
    auto client = ControlClient::Connect(socket());
    EXPECT_TRUE(client.ok()) << client.status();
    client_ = std::move(*client);
  }
  ~ControlClientTest() noexcept override {
    client_.reset();
    stop_->fulfill();
    thread_.join();
  }

  std::string socket() const { return folder_.path() + "/s"; }
  OnStep Note() {
    return [this](const SwapStep& step, bool done) {
      told_ += step.name + (done ? "=" + std::to_string(step.nanos) + " " : "? ");
    };
  }

  TempDir folder_;
  Script script_;
  kj::Own<kj::CrossThreadPromiseFulfiller<void>> stop_;
  std::thread thread_;
  std::unique_ptr<ControlClient> client_;
  std::string told_;
};

TEST_F(ControlClientTest, AnUpgradeTellsEachStepAsItBeginsAndEnds) {
  script_.steps = {"copy", "start"};
  auto result = client_->Upgrade("/w", true, Note());
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_TRUE(result->changed);
  EXPECT_EQ(result->swap.pause_nanos, 7u);
  EXPECT_EQ(told_, "copy? copy=1 start? start=2 ");
}

TEST_F(ControlClientTest, AFailedUpgradeKeepsTheSupervisorsWordsAndTheStep) {
  script_.steps = {"copy", "start"};
  script_.failure = "the worker ended: exit 1";
  auto result = client_->Upgrade("/w", true, Note());
  EXPECT_EQ(result.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(FromAbsl(result.status().message()), "the worker ended: exit 1");
  EXPECT_EQ(told_, "copy? copy=1 start? ");
}

TEST_F(ControlClientTest, ARollbackTellsItsSteps) {
  script_.steps = {"start"};
  auto swap = client_->Rollback(Note());
  ASSERT_TRUE(swap.ok()) << swap.status();
  EXPECT_EQ(swap->kind, "rollback");
  EXPECT_EQ(told_, "start? start=1 ");
}

TEST_F(ControlClientTest, StatusCarriesWhatTheSupervisorKnows) {
  auto status = client_->Status();
  ASSERT_TRUE(status.ok()) << status.status();
  EXPECT_EQ(status->hangs, 1u);
  EXPECT_EQ(status->probation_seconds, 42u);
  EXPECT_EQ(status->last_good, "abc");
  EXPECT_EQ(status->spare, "ready");
  EXPECT_EQ(status->supervisor_restarts, 2u);
  EXPECT_EQ(status->state_source, "worker");
  EXPECT_TRUE(status->fd_store);
  EXPECT_EQ(status->last_death, "exit 3");
  EXPECT_EQ(status->last_death_wall_nanos, 9);
  ASSERT_EQ(status->in_progress.size(), 1u);
  EXPECT_EQ(status->in_progress[0].name, "rehearse");
  ASSERT_EQ(status->last_swap.steps.size(), 1u);
  EXPECT_EQ(status->last_swap.steps[0].detail, "new");
}

TEST_F(ControlClientTest, AnOldSupervisorUpgradesAndRefusesTheRestByName) {
  script_.old_supervisor = true;
  auto result = client_->Upgrade("/w", true, Note());
  EXPECT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(told_, "");
  auto status = client_->Status();
  ASSERT_TRUE(status.ok()) << status.status();
  EXPECT_EQ(status->state_source, "");
  EXPECT_EQ(status->last_death, "");
  EXPECT_EQ(client_->Rollback(nullptr).status().code(), absl::StatusCode::kUnimplemented);
  auto check = client_->CheckRollback();
  EXPECT_EQ(check.status().code(), absl::StatusCode::kUnimplemented) << check.status();
  EXPECT_NE(FromAbsl(check.status().message()).find("older than this command"), std::string::npos);
}

TEST_F(ControlClientTest, AWorkerThatDiesOverItsAnswerIsNotTheSupervisorsEnd) {
  script_.worker_died = true;
  const absl::Status status = client_->Layers().status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(FromAbsl(status.message()).find("the worker died over its answer"), 0u) << status;
}

TEST_F(ControlClientTest, TheRollbackCheckIsWaitedForSixSeconds) {
  auto check = client_->CheckRollback();
  ASSERT_TRUE(check.ok()) << check.status();
  EXPECT_TRUE(check->ready);
  script_.silent_check = true;
  const auto before = std::chrono::steady_clock::now();
  check = client_->CheckRollback();
  EXPECT_EQ(check.status().code(), absl::StatusCode::kDeadlineExceeded) << check.status();
  EXPECT_LT(std::chrono::steady_clock::now() - before, std::chrono::seconds(8));
}

TEST(ControlClientConnectTest, NobodyThereIsUnavailable) {
  EXPECT_EQ(ControlClient::Connect("/nonexistent/s").status().code(), absl::StatusCode::kUnavailable);
}

TEST(CandidateCheckTest, TheSupervisorsCommandLineNamesTheWorkerAndItsArguments) {
  using std::string_literals::operator""s;
  WorkerCommand command = ParseSupervisorCommand("s\0--worker\0/w\0--state\0/s\0--\0--config\0c.toml\0"s);
  EXPECT_EQ(command.worker, "/w");
  EXPECT_EQ(command.args, (std::vector<std::string>{"--config", "c.toml"}));
  EXPECT_EQ(ParseSupervisorCommand("s\0--worker=/w\0"s).worker, "/w");
  EXPECT_EQ(ParseSupervisorCommand("s\0"s).worker, "/usr/lib/holdfast/holdfast-worker");
}

TEST(CandidateCheckTest, AProgramThatIsNoWorkerIsTriedAndItsWordsAreKept) {
  TempDir folder;
  const std::string path = folder.path() + "/worker";
  EXPECT_NE(TryCandidate(path, getpid()).find("cannot be executed"), std::string::npos);
  ASSERT_TRUE(WriteFileAtomic(path, "#!/bin/sh\necho broken >&2; exit 3\n", 0755).ok());
  EXPECT_EQ(TryCandidate(path, getpid()), path + " --self-test: exit code 3: broken");
  ASSERT_TRUE(WriteFileAtomic(
                  path, "#!/bin/sh\n[ \"$1\" = --self-test ] || { echo c.toml:3: bad key; exit 1; }\n", 0755)
                  .ok());
  EXPECT_NE(TryCandidate(path, getpid()).find("its configuration: exit code 1: c.toml:3: bad key"),
            std::string::npos);
  ASSERT_TRUE(WriteFileAtomic(path, "#!/bin/sh\necho not started by holdfast-supervisor\n", 0755).ok());
  EXPECT_NE(TryCandidate(path, getpid()).find("accepts its arguments"), std::string::npos);
}

TEST(CandidateCheckTest, WhatATriedScriptStartedEndsWithItAndIsNotWaitedFor) {
  constexpr uint64_t kLimit = kTimeFactor * 2'000'000'000ull;
  for (const bool hangs : {true, false}) {
    TempDir folder;
    // Its processes hold `alive` open, and end in any case when this test closes `hold`.
    const std::string path = folder.path() + "/worker", alive = folder.path() + "/alive",
                      hold = folder.path() + "/hold";
    ASSERT_EQ(mkfifo(alive.c_str(), 0600), 0);
    ASSERT_EQ(mkfifo(hold.c_str(), 0600), 0);
    UniqueFd held = OpenFile(hold, O_RDWR).value(), pipe = OpenFile(alive, O_RDONLY | O_NONBLOCK).value();
    const std::string begin = "#!/bin/sh\nexec 3>" + alive + "\ncat <" + hold + " &\necho x >&3\n";
    const std::string end = hangs ? "cat <" + hold + "\n" : "echo broken; exit 3\n";
    ASSERT_TRUE(WriteFileAtomic(path, begin + end, 0755).ok());
    const auto before = std::chrono::steady_clock::now();
    const std::string said = TryCandidate(path, getpid(), kLimit);
    EXPECT_EQ(said, path + " --self-test: " +
                        (hangs ? "had not ended after " + HumanDuration(kLimit)
                               : std::string("exit code 3: broken")));
    EXPECT_EQ(std::chrono::steady_clock::now() - before >= std::chrono::nanoseconds(kLimit), hangs);
    char text[4] = {};
    EXPECT_EQ(read(pipe.get(), text, sizeof text), 2) << "it did not run";
    pollfd all_ended{.fd = pipe.get(), .events = POLLIN, .revents = 0};
    EXPECT_EQ(poll(&all_ended, 1, 5'000 * kTimeFactor), 1) << "something it started lives on";
    EXPECT_EQ(all_ended.revents, POLLHUP);
  }
}

}  // namespace
}  // namespace holdfast::ctl
