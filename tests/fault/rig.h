// One node under test for many cases of the fault matrix: a real supervisor and worker with a lazily pulled
// image mounted, builds of the worker that stop or misbehave at a named point, and what must be the same
// after each case as it was before the first.
//
// One thread; the swap under way has one of its own. How it fails: a case that leaves the node unusable
// says so (`usable`), and the next case gets a new one.
#pragma once

#include <sys/types.h>

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "common/io.h"
#include "tests/fault/workload.h"
#include "tests/integration/lazy_image.h"
#include "tests/integration/node.h"
#include "tests/support/registry_server.h"

namespace holdfast::test {

// Builds of the worker: one stripped executable, and copies with their fault points in the tail.
class Builds {
 public:
  Builds();
  std::string clean() const { return folder_.path() + "/worker"; }
  std::string With(const std::string& faults);

 private:
  TempDir folder_;
  std::map<std::string, std::string> made_;
};

enum class Step { kStart, kPrepare, kRehearse, kPark, kServe, kProbe, kYield, kCommit, kProbation };
inline constexpr Step kSteps[] = {Step::kStart, Step::kPrepare, Step::kRehearse,
                                  Step::kPark,  Step::kServe,   Step::kProbe,
                                  Step::kYield, Step::kCommit,  Step::kProbation};
const char* StepName(Step step);

struct RigOptions {
  std::vector<std::string> arguments{};    // for the supervisor
  std::vector<std::string> environment{};  // beside HOLDFAST_FAULTS
  int state_megabytes = 0;
};

// A swap that stands still at a step: its candidate, or its owner, is stopped.
struct Held {
  uint64_t old_generation = 0, new_generation = 0;
  pid_t old_pid = 0, new_pid = 0;
};

class Rig {
 public:
  Rig(Builds* builds, const Image* image, RegistryServer* registry, const RigOptions& options);
  ~Rig();

  Node* node() { return node_.get(); }
  const std::string& root() const { return root_; }  // of the merged tree
  ColdFiles* cold() { return &cold_; }
  Builds* builds() { return builds_; }
  const Image& image() const { return *image_; }
  RegistryServer* registry() { return registry_; }
  std::string state() const { return node_->root() + "/state"; }
  bool usable() const { return usable_; }
  void Spoil() { usable_ = false; }
  // SIGKILL to all its processes: who still reads gets an error rather than wait for ever.
  void Abandon();

  std::optional<ctl::SupervisorStatus> Status();
  // Polls until `condition` holds; empty after `seconds`.
  std::optional<ctl::SupervisorStatus> Wait(
      const std::function<bool(const ctl::SupervisorStatus&)>& condition, int seconds = 30);
  // Exactly one worker, which is the owner, and no swap under way.
  std::optional<ctl::SupervisorStatus> WaitSettled(int seconds = 60);

  void BeginSwap(const std::string& build);
  bool SwapEnded() const { return swap_ended_; }
  // Waits for its end. Empty: done; else the error.
  std::string SwapResult();

  // Swaps to a build that stands still at `step`, and waits until it does. Empty: it never did.
  std::optional<Held> Reach(Step step, const std::string& more_faults = "");
  void Stop(pid_t pid);
  // Everybody who was stopped goes on.
  void LetGo();

  // What must not grow from case to case.
  void TakeBaseline();
  // What is left that should not be; tried again for some seconds, because ends take their time.
  std::vector<std::string> Leftovers();

  // Since the last call of MarkLog.
  std::string Log() const;
  void MarkLog();

 private:
  std::vector<std::string> LeftoversNow();

  Builds* const builds_;
  const Image* const image_;
  RegistryServer* const registry_;
  TempDir logs_;
  std::unique_ptr<Node> node_;
  ColdFiles cold_;
  std::string root_;
  bool usable_ = false;
  std::set<pid_t> stopped_;
  std::thread swap_;
  std::string swap_error_;
  std::atomic<bool> swap_ended_{true};
  std::map<std::string, int> supervisor_fds_, worker_fds_;
  std::vector<std::string> mounts_;
  size_t log_mark_ = 0;
};

}  // namespace holdfast::test
