#include "tests/fault/rig.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <utility>

#include "common/clock.h"
#include "common/testing/time_limit.h"
#include "glog/logging.h"
#include "tests/fault/process.h"
#include "worker/ctl/inflight.h"

namespace holdfast::test {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr char kConfig[] = "[cache]\nfree_floor = 0\n[fetch]\nmiss_timeout = \"50s\"\n";
constexpr int kSettleTries = 400;
constexpr milliseconds kSettlePause{20};
// Of a worker's descriptors, these come and go.
constexpr int kTablesAndContent = 12, kToRegistry = 8;
// For replies, one a thread that replies; those of a ledger are 32.
constexpr int kPipeEnds = 16;
// A refused build's executable, until the next swap.
constexpr int kCandidate = 1;

// Where a build stands still, and in which phase that is.
struct Stand {
  const char* faults;
  const char* phase;
};
Stand StandOf(Step step) {
  switch (step) {
    case Step::kStart:
      return {"worker.register=stop", "starting"};
    case Step::kPrepare:
      return {"worker.prepare=stop", "preparing"};
    case Step::kRehearse:
    case Step::kPark:
      return {"worker.replay=stop", "rehearsing"};
    case Step::kServe:
      return {"worker.serve=stop", "serving"};
    case Step::kProbe:
    case Step::kYield:
      return {"fuse.probe=stop", "probing"};
    case Step::kCommit:
      return {"worker.take_metadata=stop", "committing"};
    case Step::kProbation:
      return {"worker.end_trial=stop", "running"};
  }
  return {"", ""};
}

bool WaitUntil(int seconds, const std::function<bool()>& condition) {
  const auto deadline = steady_clock::now() + kTimeFactor * std::chrono::seconds(seconds);
  while (!condition()) {
    if (steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(milliseconds(3));
  }
  return true;
}

void Append(const std::string& path, const std::string& text) {
  auto file = OpenFile(path, O_WRONLY | O_APPEND);
  CHECK(file.ok()) << file.status();
  CHECK_EQ(write(file->get(), text.data(), text.size()), static_cast<ssize_t>(text.size()));
}

}  // namespace

const char* StepName(Step step) {
  static const char* const kNames[] = {"start", "prepare", "rehearse", "park",     "serve",
                                       "probe", "yield",   "commit",   "probation"};
  return kNames[static_cast<int>(step)];
}

Builds::Builds() {
  const char* bin = getenv("HOLDFAST_BIN");
  CHECK(bin != nullptr) << "HOLDFAST_BIN is not set: run through ctest";
  // Without debug information: it is copied and hashed for every case.
  const std::string command =
      std::string("strip --strip-debug -o '") + clean() + "' '" + bin + "/holdfast-worker'";
  CHECK_EQ(system(command.c_str()), 0) << command;
}

std::string Builds::With(const std::string& faults) {
  std::string& path = made_[faults];
  if (path.empty()) {
    path = clean() + "-" + std::to_string(made_.size());
    std::filesystem::copy_file(clean(), path);
    Append(path, "HFFAULTS:" + faults + "\n");
  }
  return path;
}

Rig::Rig(Builds* builds, const Image* image, RegistryServer* registry, const RigOptions& options)
    : builds_(builds), image_(image), registry_(registry), cold_(*image) {
  Node::Programs programs;
  programs.worker = builds->clean();
  programs.arguments = options.arguments;
  programs.environment = options.environment;
  programs.environment.emplace_back("HOLDFAST_FAULTS=@exe");
  programs.log = logs_.path() + "/log";
  programs.state_megabytes = options.state_megabytes;
  node_ = std::make_unique<Node>(kConfig, programs);
  auto parent = PullLazily(node_->snapshots(), registry_, *image_, "matrix");
  CHECK(parent.ok()) << parent.status();
  auto mounts = node_->snapshots()->Prepare("default/9/matrix", *parent, {});
  CHECK(mounts.ok()) << mounts.status();
  root_ = node_->MountAll(*mounts);
  node_->CloseSnapshots();  // else each old worker lives on for its sake
  TakeBaseline();
  usable_ = true;
}

Rig::~Rig() {
  LetGo();
  if (swap_.joinable()) {
    if (!swap_ended_) Abandon();
    swap_.join();
  }
}

void Rig::Abandon() {
  usable_ = false;
  std::vector<pid_t> pids;
  for (const Child& child : ChildrenOf(node_->supervisor())) pids.push_back(child.pid);
  if (node_->supervisor() > 0) kill(node_->supervisor(), SIGKILL);
  for (pid_t pid : pids) kill(pid, SIGKILL);
}

std::optional<ctl::SupervisorStatus> Rig::Status() {
  auto control = node_->Control();
  if (control == nullptr) return std::nullopt;
  auto status = control->Status();
  if (!status.ok()) return std::nullopt;
  return *status;
}

std::optional<ctl::SupervisorStatus> Rig::Wait(
    const std::function<bool(const ctl::SupervisorStatus&)>& condition, int seconds) {
  std::optional<ctl::SupervisorStatus> found;
  WaitUntil(seconds, [&] {
    auto status = Status();
    if (!status || !condition(*status)) return false;
    found = std::move(status);
    return true;
  });
  return found;
}

std::optional<ctl::SupervisorStatus> Rig::WaitSettled(int seconds) {
  return Wait(
      [](const ctl::SupervisorStatus& status) {
        return status.phase == "running" && status.workers.size() == 1 &&
               status.workers.front().role == "owner" && status.in_progress.empty() &&
               status.last_swap.result != "running";
      },
      seconds);
}

void Rig::BeginSwap(const std::string& build) {
  CHECK(!swap_.joinable());
  swap_ended_ = false;
  swap_error_.clear();
  swap_ = std::thread([this, build] {
    auto control = node_->Control();
    if (control == nullptr) {
      swap_error_ = "no supervisor";
    } else {
      auto result = control->Upgrade(build, /*force=*/true);
      if (!result.ok()) swap_error_ = std::string(FromAbsl(result.status().message()));
      if (!result.ok() && swap_error_.empty()) swap_error_ = result.status().ToString();
    }
    swap_ended_ = true;
  });
}

std::string Rig::SwapResult() {
  if (swap_.joinable()) swap_.join();
  return swap_error_;
}

std::optional<Held> Rig::Reach(Step step, const std::string& more_faults) {
  auto before = WaitSettled();
  if (!before) return std::nullopt;
  Held held;
  held.old_generation = before->workers.front().generation;
  held.old_pid = static_cast<pid_t>(before->workers.front().pid);
  const Stand stand = StandOf(step);
  BeginSwap(builds_->With(stand.faults + (more_faults.empty() ? "" : ";" + more_faults)));
  auto reached = Wait([&](const ctl::SupervisorStatus& status) {
    for (const ctl::WorkerStatus& worker : status.workers) {
      const auto pid = static_cast<pid_t>(worker.pid);
      if (worker.generation <= held.old_generation || StateOf(pid) != 'T') continue;
      held.new_generation = worker.generation;
      held.new_pid = pid;
      return status.phase == stand.phase;
    }
    return false;
  });
  if (!reached) return std::nullopt;
  stopped_.insert(held.new_pid);
  if (step != Step::kPark && step != Step::kYield) return held;
  // From here on it is the owner that is asked.
  Stop(held.old_pid);
  kill(held.new_pid, SIGCONT);
  stopped_.erase(held.new_pid);
  const std::string phase = step == Step::kPark ? "parking" : "yielding";
  if (!Wait([&](const ctl::SupervisorStatus& status) { return status.phase == phase; })) return std::nullopt;
  return held;
}

void Rig::Stop(pid_t pid) {
  kill(pid, SIGSTOP);
  stopped_.insert(pid);
  WaitUntil(5, [pid] { return StateOf(pid) == 'T'; });
}

void Rig::LetGo() {
  for (pid_t pid : stopped_) {
    if (StateOf(pid) == 'T') kill(pid, SIGCONT);
  }
  stopped_.clear();
}

void Rig::TakeBaseline() {
  // A swap to another build and back, so that what is there after one counts as usual.
  for (const std::string& build : {builds_->With("none=wrong"), builds_->clean()}) {
    BeginSwap(build);
    const std::string error = SwapResult();
    CHECK(error.empty()) << error << "\n" << Log();
    auto settled = WaitSettled();
    CHECK(settled) << Log();
    auto highest = [](const std::map<std::string, int>& now, std::map<std::string, int>* most) {
      for (const auto& [kind, count] : now) (*most)[kind] = std::max((*most)[kind], count);
    };
    highest(DescriptorsOf(node_->supervisor()), &supervisor_fds_);
    highest(DescriptorsOf(static_cast<pid_t>(settled->workers.front().pid)), &worker_fds_);
  }
  mounts_ = node_->MountsLeft();
}

std::vector<std::string> Rig::Leftovers() {
  std::vector<std::string> left;
  for (int i = 0; i < kSettleTries; ++i) {
    std::this_thread::sleep_for(kSettlePause);
    left = LeftoversNow();
    if (left.empty()) break;
  }
  return left;
}

std::vector<std::string> Rig::LeftoversNow() {
  std::vector<std::string> left;
  // First of all, while no connection of ours is open.
  const std::map<std::string, int> supervisor_fds = DescriptorsOf(node_->supervisor());
  auto status = Status();
  if (!status || status->workers.size() != 1) return {"not exactly one worker"};
  const auto pid = static_cast<pid_t>(status->workers.front().pid);
  auto compare = [&left](const std::string& who, const std::map<std::string, int>& now,
                         const std::map<std::string, int>& most, const std::map<std::string, int>& more) {
    for (const auto& [kind, count] : now) {
      const int usual = most.count(kind) == 0 ? 0 : most.at(kind);
      const int allowed = usual + (more.count(kind) == 0 ? 0 : more.at(kind));
      if (count > allowed) {
        left.push_back(who + " has " + std::to_string(count) + " descriptors of kind " + kind + ", " +
                       std::to_string(allowed) + " are usual");
      }
    }
  };
  compare("the supervisor", supervisor_fds, supervisor_fds_, {{"file", kCandidate}});
  compare("the worker", DescriptorsOf(pid), worker_fds_,
          {{"file", kTablesAndContent}, {"socket", kToRegistry}, {"pipe", kPipeEnds}});
  for (const Child& child : ChildrenOf(node_->supervisor())) {
    if (child.pid != pid) {
      left.push_back("process " + std::to_string(child.pid) + " (" + child.name + ", " + child.state + ")");
    }
  }
  std::vector<std::string> mounts = node_->MountsLeft();
  for (const std::string& mount : mounts) {
    if (std::find(mounts_.begin(), mounts_.end(), mount) == mounts_.end()) left.push_back("mount " + mount);
  }
  if (mounts.size() < mounts_.size()) left.push_back("a mount is gone");
  std::error_code error;
  for (std::filesystem::directory_iterator it(state() + "/supervisor/canary", error), end;
       !error && it != end; it.increment(error)) {
    left.push_back("canary folder " + it->path().string());
  }
  auto control = node_->Control();
  auto ledgers = control != nullptr ? control->Ledgers() : Unavailable("no supervisor");
  if (!ledgers.ok()) return {"ledgers: " + ledgers.status().ToString()};
  for (const ctl::LedgerFd& ledger : *ledgers) {
    if (ledger.generation != status->workers.front().generation) {
      left.push_back("ledger of generation " + std::to_string(ledger.generation));
    }
    auto requests = ctl::ReadLedgerFd(ledger.memory.get(), Clock::Real()->BootNanos());
    if (!requests.ok() || !requests->empty()) left.push_back("requests in a ledger");
  }
  return left;
}

std::string Rig::Log() const {
  auto text = ReadFile(logs_.path() + "/log");
  return text.ok() ? text->substr(std::min(log_mark_, text->size())) : "";
}

void Rig::MarkLog() {
  auto text = ReadFile(logs_.path() + "/log");
  log_mark_ = text.ok() ? text->size() : 0;
}

}  // namespace holdfast::test
