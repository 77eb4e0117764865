// holdfastctl: asks the supervisor, and through it the worker, over one unix socket.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <filesystem>
#include <iostream>
#include <string>
#include <vector>

#include "common/clock.h"
#include "worker/ctl/candidate_check.h"
#include "worker/ctl/control_client.h"
#include "worker/ctl/drill.h"
#include "worker/ctl/inflight.h"
#include "worker/ctl/report.h"
#include "worker/ctl/swap_report.h"

namespace holdfast::ctl {
namespace {

enum ExitCode { kDone = 0, kFailed = 1, kUsage = 2, kNotReachable = 3 };

constexpr char kExamples[] = R"(
Examples:
  holdfastctl status                       is everything all right, and what was the last swap
  holdfastctl layers                       what is mounted lazily, and how much of it is on this disk
  holdfastctl inflight                     which reads wait right now (works when the worker is dead or hangs)
  holdfastctl upgrade                      swap to the worker installed now; containers go on reading
  holdfastctl upgrade --worker ./holdfast-worker
  holdfastctl drill                        prove on this node that nothing is lost when a worker dies
  holdfastctl rollback                     swap back to the build that ran before
  holdfastctl --json status | jq .last_swap

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 the supervisor cannot be reached.)";

constexpr char kConnectionLost[] =
    "the worker serves on without its supervisor, and the next supervisor takes it over: systemctl status "
    "holdfast, "
    "then `holdfastctl status`";

const bool kTerminal = isatty(STDOUT_FILENO) == 1;

struct Options {
  std::string socket = "/run/holdfast/supervisor.sock";
  bool json = false;
  std::string worker;
  bool force = false;
  uint32_t limit = 50;
};

class Session {
 public:
  Session(const Options& options, std::string command) : options_(options), command_(std::move(command)) {}

  int Run();

 private:
  int Status();
  int Inflight();
  int Upgrade();
  int Rollback();
  int Drill();
  int Swapped(const absl::Status& status, const StepLog& log);
  void ShowStep(const SwapStep& step, bool done, StepLog* log) const;
  int Fail(const absl::Status& status, const std::string& advice);

  template <typename T, typename Text, typename AsJson>
  int Show(const absl::StatusOr<T>& value, Text text, AsJson json) {
    if (!value.ok()) return Fail(value.status(), "is a worker running? `holdfastctl status` shows it");
    std::cout << (options_.json ? json(*value) : text(*value));
    return kDone;
  }

  const Options& options_;
  const std::string command_;
  const int64_t now_ = Clock::Real()->WallNanos();
  std::unique_ptr<ControlClient> client_;
};

int Session::Fail(const absl::Status& status, const std::string& advice) {
  const std::string message(FromAbsl(status.message()));
  if (options_.json) std::cout << ErrorJson(command_, message, advice);
  std::cerr << "holdfastctl " << command_ << ": " << message << "\n";
  if (!advice.empty()) std::cerr << "  " << advice << "\n";
  return absl::IsUnavailable(status) || absl::IsPermissionDenied(status) ? kNotReachable : kFailed;
}

int Session::Status() {
  absl::StatusOr<SupervisorStatus> status = client_->Status();
  if (!status.ok()) return Fail(status.status(), "");
  NodeStatus node;
  node.supervisor = std::move(*status);
  // The worker's figures are an extra: a dead worker must not spoil the answer.
  if (absl::StatusOr<WorkerStats> answer = client_->Stats(); answer.ok()) node.worker = *answer;
  absl::StatusOr<RollbackCheck> check = client_->CheckRollback();
  if (check.ok()) {
    node.rollback = std::move(*check);
  } else {
    node.rollback_unknown = std::string(FromAbsl(check.status().message()));
  }
  // In the pause between two starts that came to nothing: why may be plain to see.
  if (node.supervisor.phase == "backoff" && !node.supervisor.last_death.empty())
    node.start_check = TryCandidate("", static_cast<pid_t>(node.supervisor.pid));
  std::cout << (options_.json ? StatusJson(node) : StatusText(node, now_));
  return kDone;
}

int Session::Inflight() {
  absl::StatusOr<std::vector<LedgerFd>> ledgers = client_->Ledgers();
  if (!ledgers.ok()) return Fail(ledgers.status(), "");
  ctl::Inflight inflight;
  for (const LedgerFd& ledger : *ledgers) {
    auto requests = ReadLedgerFd(ledger.memory.get(), Clock::Real()->BootNanos());
    if (!requests.ok()) return Fail(requests.status(), "");
    inflight.requests.insert(inflight.requests.end(), requests->begin(), requests->end());
  }
  absl::StatusOr<std::vector<MountInfo>> mounts = client_->Mounts();
  if (mounts.ok()) inflight.mounts = std::move(*mounts);
  std::cout << (options_.json ? InflightJson(inflight) : InflightText(inflight));
  return kDone;
}

// On a terminal the step under way stands in the last line.
void Session::ShowStep(const SwapStep& step, bool done, StepLog* log) const {
  log->Add(step, done);
  if (options_.json) return;
  if (done) {
    std::cout << (kTerminal ? "\r" : "") << StepText(step) << std::flush;
  } else if (kTerminal) {
    std::cout << "  " << step.name << " ..." << std::flush;
  }
}

int Session::Swapped(const absl::Status& status, const StepLog& log) {
  SwapFailure failure{command_, std::string(FromAbsl(status.message())), log.Unfinished(), options_.worker,
                      ""};
  const bool lost = status.code() == absl::StatusCode::kUnavailable;
  if (!options_.json && !failure.step.empty()) {
    // Of a supervisor that is gone nobody knows at which step: those in which reads wait are not told at
    // once.
    const std::string text = lost ? "\n" : FailedStepText(failure.step);
    std::cout << (kTerminal ? "\r" : "") << text << std::flush;
  }
  std::string advice = kConnectionLost;
  if (!lost) {
    if (failure.step == "start") {
      absl::StatusOr<SupervisorStatus> now = client_->Status();
      if (now.ok()) failure.verdict = TryCandidate(options_.worker, static_cast<pid_t>(now->pid));
    }
    advice = SwapAdvice(failure);
  }
  if (!options_.json) return Fail(status, advice);
  std::cout << SwapFailureJson(failure, log, advice);
  return lost ? kNotReachable : kFailed;
}

int Session::Upgrade() {
  StepLog log;
  auto result = client_->Upgrade(options_.worker, options_.force,
                                 [&](const SwapStep& step, bool done) { ShowStep(step, done, &log); });
  if (!result.ok()) return Swapped(result.status(), log);
  std::cout << (options_.json ? UpgradeJson(*result) : UpgradeText(*result));
  return kDone;
}

int Session::Rollback() {
  StepLog log;
  auto result = client_->Rollback([&](const SwapStep& step, bool done) { ShowStep(step, done, &log); });
  if (!result.ok()) return Swapped(result.status(), log);
  std::cout << (options_.json ? RollbackJson(*result) : RollbackText(*result));
  return kDone;
}

int Session::Drill() {
  if (!options_.json) std::cerr << "a private instance is being set up ...\n";
  auto begin = [&](const DrillReport& report) {
    if (!options_.json) std::cout << DrillBeginText(report) << std::flush;
  };
  auto one_case = [&](const DrillCase& one) {
    if (!options_.json) std::cout << DrillCaseText(one) << std::flush;
  };
  absl::StatusOr<DrillReport> report = RunDrill(std::move(client_), options_.socket, begin, one_case);
  if (!report.ok()) {
    const absl::Status& status = report.status();
    return Fail(status, status.code() == absl::StatusCode::kNotFound
                            ? "start a container from a lazily pulled image and let it read, then try again"
                            : "nothing of this node was touched, and nothing was left behind");
  }
  std::cout << (options_.json ? DrillJson(*report) : DrillEndText(*report));
  return report->ok() ? kDone : kFailed;
}

int Session::Run() {
  auto client = ControlClient::Connect(options_.socket);
  if (absl::IsPermissionDenied(client.status()))
    return Fail(client.status(), "run it as root, for example: sudo holdfastctl " + command_);
  if (!client.ok()) {
    return Fail(
        client.status(),
        "is holdfast-supervisor running (systemctl status holdfast), and does --socket name its socket?");
  }
  client_ = std::move(*client);
  if (command_ == "status") return Status();
  if (command_ == "inflight") return Inflight();
  if (command_ == "upgrade") return Upgrade();
  if (command_ == "rollback") return Rollback();
  if (command_ == "drill") return Drill();
  if (command_ == "mounts") return Show(client_->Mounts(), MountsText, MountsJson);
  if (command_ == "layers") {
    return Show(
        client_->Layers(), [&](const auto& layers) { return LayersText(layers, now_); }, LayersJson);
  }
  if (command_ == "snapshots") {
    return Show(
        client_->Snapshots(), [&](const auto& snapshots) { return SnapshotsText(snapshots, now_); },
        SnapshotsJson);
  }
  return Show(client_->Trace(options_.limit), TraceText, TraceJson);
}

// What is wrong with the command line, in one line.
std::string Mistake(const CLI::App* app, const CLI::Error& error) {
  std::string what = error.what();
  const std::vector<std::string> unknown = app->remaining(true);
  const std::vector<CLI::App*> given = app->get_subcommands();
  if (!unknown.empty()) {
    const std::string& word = unknown.front();
    what = word[0] == '-'  ? "unknown option '" + word + "'"
           : given.empty() ? "unknown command '" + word + "'"
                           : "unknown word '" + word + "' beside " + given.front()->get_name();
  } else if (given.empty() && error.get_name() == "RequiredError") {
    what = "a command is missing";
  }
  return "holdfastctl: " + what + "; see holdfastctl --help\n";
}

int Main(int argc, char** argv) {
  Options options;
  CLI::App app("Looks after a holdfast snapshotter: what it serves, and the swap of its worker.");
  app.footer(kExamples);
  app.require_subcommand(1);
  app.failure_message(Mistake);
  app.fallthrough();
  app.add_option("--socket", options.socket, "the supervisor's control socket")->capture_default_str();
  app.add_flag("--json", options.json,
               "machine-readable output, {\"schema\": 1, ...}; keys are only ever added");
  app.set_version_flag("--version", HOLDFAST_VERSION);
  app.add_subcommand("status", "supervisor, workers, mounts, the last swap; works without a worker");
  app.add_subcommand("mounts", "every FUSE mount the supervisor holds, detached ones included");
  app.add_subcommand("layers", "lazily served layers: cached, fetched, by which image");
  app.add_subcommand("snapshots", "every snapshot that containerd knows here");
  app.add_subcommand("inflight", "requests that are not answered yet; works without a worker");
  CLI::App* upgrade = app.add_subcommand("upgrade", "swap the worker while containers go on reading");
  upgrade->add_option("--worker", options.worker, "the executable to swap to (default: the installed one)");
  upgrade->add_flag("--reexec,--force", options.force,
                    "swap even to the build that runs: for replaced libraries or a changed configuration");
  app.add_subcommand(
      "rollback",
      "swap back to the build that ran before, without asking the running one; what that answered "
      "is forgotten");
  app.add_subcommand(
      "drill",
      "prove swap, crash, hang and rollback on this node, on a private instance; touches no container");
  CLI::App* trace = app.add_subcommand("trace", "the worker's last trace points, oldest first");
  trace->add_option("--limit", options.limit, "how many at most")->capture_default_str();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? kDone : kUsage;
  }
  // The supervisor runs in another folder.
  if (!options.worker.empty()) options.worker = std::filesystem::absolute(options.worker).string();
  return Session(options, app.get_subcommands().front()->get_name()).Run();
}

}  // namespace
}  // namespace holdfast::ctl

int main(int argc, char** argv) { return holdfast::ctl::Main(argc, argv); }
