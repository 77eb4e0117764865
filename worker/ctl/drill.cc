#include "worker/ctl/drill.h"

#include <signal.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <filesystem>
#include <memory>
#include <thread>
#include <tuple>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "worker/ctl/canary_reader.h"
#include "worker/ctl/private_node.h"
#include "worker/ctl/swap_report.h"

namespace holdfast::ctl {
namespace {

using std::chrono::steady_clock;

constexpr size_t kLayers = 3;
constexpr size_t kFiles = 64;
constexpr int kFindSeconds = 15;
constexpr int kReaders = 2;
constexpr int kCaseSeconds = 30;
constexpr int kReadSeconds = 10;
constexpr uint64_t kLargeLayer = 512ull << 20;
constexpr uint64_t kWorkerRoom = 512ull << 20;  // of copies of the worker
// Undisturbed reading before each case; a worker that ran for less than a second counts as one that dies
// quickly, and is not what is to be proven here.
constexpr auto kUndisturbed = std::chrono::milliseconds(1'200);

const WorkerStatus* OwnerOf(const SupervisorStatus& status) {
  for (const WorkerStatus& worker : status.workers) {
    if (worker.role == "owner") return &worker;
  }
  return nullptr;
}

// SIGINT and its like end the drill in order: on a thread of its own, for the main thread may wait for an
// answer.
class EndOnSignal {
 public:
  explicit EndOnSignal(std::function<void()> end) {
    sigemptyset(&signals_);
    for (int signal : {SIGINT, SIGTERM, SIGHUP}) sigaddset(&signals_, signal);
    pthread_sigmask(SIG_BLOCK, &signals_, &before_);
    thread_ = std::thread([this, end = std::move(end)] {
      while (!done_) {
        const timespec tick{0, 100'000'000};
        if (sigtimedwait(&signals_, nullptr, &tick) < 0) continue;
        end();
        _exit(1);
      }
    });
  }
  ~EndOnSignal() {
    done_ = true;
    thread_.join();
    pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  }
  EndOnSignal(const EndOnSignal&) = delete;
  EndOnSignal& operator=(const EndOnSignal&) = delete;

 private:
  sigset_t signals_, before_;
  std::atomic<bool> done_{false};
  std::thread thread_;
};

// The private instance, ended by whoever comes first: the end of the drill, or a signal.
struct Slot {
  ~Slot() { End(); }
  void End() {
    MutexLock lock(&mutex);
    node.reset();
  }
  Mutex mutex;  // held while the node is made or ended; only the main thread uses it meanwhile
  std::unique_ptr<PrivateNode> node;
};

class Drill {
 public:
  Drill(PrivateNode* node, ControlClient* control, CanaryReader* reader)
      : node_(*node), control_(*control), reader_(*reader) {}

  DrillCase Run(const std::string& name, const std::function<absl::Status(DrillCase*)>& body) {
    DrillCase one;
    one.name = name;
    std::this_thread::sleep_for(kUndisturbed);
    absl::Status status = body(&one);
    if (!status.ok()) one.failure = std::string(FromAbsl(status.message()));
    const CanaryReader::Figures figures = reader_.Take(kReadSeconds);
    one.longest_wait_nanos = figures.longest_nanos;
    one.reads = figures.reads;
    one.failed_reads = figures.failed;
    if (one.failure.empty() && figures.failed != 0) one.failure = figures.first_failure;
    return one;
  }

  absl::Status Swap(DrillCase* one) {
    HF_ASSIGN_OR_RETURN(UpgradeResult result, control_.Upgrade("", /*force=*/true));
    one->pause_nanos = result.swap.pause_nanos;
    for (const SwapStep& step : result.swap.steps) {
      if (step.name == "rehearse" || step.name == "probe") Append(step.detail, one);
    }
    return absl::OkStatus();
  }

  // `signal` makes an end of the worker, or stops it; another one must serve.
  absl::Status Death(int signal, DrillCase* one) {
    HF_ASSIGN_OR_RETURN(const SupervisorStatus before, control_.Status());
    const WorkerStatus* owner = OwnerOf(before);
    if (owner == nullptr) return FailedPrecondition("no worker serves");
    const uint64_t generation = owner->generation;
    HF_RETURN_IF_ERROR(node_.Signal(static_cast<pid_t>(owner->pid), signal));
    SupervisorStatus now;
    const bool replaced = WaitFor([&] {
      absl::StatusOr<SupervisorStatus> status = control_.Status();
      if (!status.ok()) return false;
      now = std::move(*status);
      const WorkerStatus* other = OwnerOf(now);
      return now.phase == "running" && other != nullptr && other->generation != generation &&
             now.crashes > before.crashes && (signal != SIGSTOP || now.hangs > before.hangs);
    });
    if (!replaced) {
      // So that the cases after this one start from a living worker.
      if (signal == SIGSTOP) node_.Signal(static_cast<pid_t>(owner->pid), SIGKILL).IgnoreError();
      return DeadlineExceeded("no other worker took over within " + std::to_string(kCaseSeconds) + " s");
    }
    one->pause_nanos = now.last_swap.pause_nanos;
    return absl::OkStatus();
  }

  // This very program is no worker, so it dies while it starts.
  absl::Status Refusal(DrillCase* one) {
    HF_ASSIGN_OR_RETURN(const SupervisorStatus before, control_.Status());
    StepLog log;
    absl::StatusOr<UpgradeResult> result =
        control_.Upgrade("/proc/" + std::to_string(getpid()) + "/exe", /*force=*/true,
                         [&](const SwapStep& step, bool done) { log.Add(step, done); });
    if (result.ok()) return Internal("a program that is no worker was accepted");
    HF_ASSIGN_OR_RETURN(const SupervisorStatus after, control_.Status());
    const WorkerStatus *was = OwnerOf(before), *is = OwnerOf(after);
    if (was == nullptr || is == nullptr || was->generation != is->generation) {
      return Internal("the worker was replaced all the same");
    }
    Append("refused at step " + log.Unfinished(), one);
    return absl::OkStatus();
  }

  absl::Status Rollback(DrillCase* one) {
    HF_ASSIGN_OR_RETURN(const SupervisorStatus before, control_.Status());
    HF_ASSIGN_OR_RETURN(const std::string copy, node_.CopyWorker("other-worker"));
    HF_RETURN_IF_ERROR(control_.Upgrade(copy, /*force=*/false).status());
    HF_ASSIGN_OR_RETURN(const SupervisorStatus upgraded, control_.Status());
    HF_ASSIGN_OR_RETURN(const SwapStatus swap, control_.Rollback(nullptr));
    one->pause_nanos = swap.pause_nanos;
    HF_ASSIGN_OR_RETURN(const SupervisorStatus after, control_.Status());
    const WorkerStatus *was = OwnerOf(before), *between = OwnerOf(upgraded), *is = OwnerOf(after);
    if (was == nullptr || between == nullptr || is == nullptr) return Internal("no worker serves");
    if (between->executable == was->executable) return Internal("the upgrade before it changed nothing");
    if (is->executable != was->executable) return Internal("another build runs than before");
    Append(between->executable.substr(0, 12) + " -> " + is->executable.substr(0, 12), one);
    return absl::OkStatus();
  }

 private:
  static void Append(const std::string& text, DrillCase* one) {
    if (!text.empty()) one->detail += (one->detail.empty() ? "" : "; ") + text;
  }

  template <typename Condition>
  static bool WaitFor(Condition condition) {
    const auto deadline = steady_clock::now() + std::chrono::seconds(kCaseSeconds);
    while (!condition()) {
      if (steady_clock::now() > deadline) return false;
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    return true;
  }

  PrivateNode& node_;
  ControlClient& control_;
  CanaryReader& reader_;
};

absl::Status RequireRoom(const std::string& folder, const std::vector<LayerInfo>& layers) {
  uint64_t needed = kWorkerRoom;
  for (const LayerInfo& layer : layers) needed += layer.cached_bytes;
  struct statvfs info;
  if (statvfs(folder.c_str(), &info) != 0) return ErrnoStatus(errno, folder);
  if (info.f_bavail * info.f_frsize < 2 * needed) {
    return ResourceExhausted("too little room in " + folder + ": a drill copies up to " +
                             std::to_string(needed >> 20) +
                             " MiB, and takes no more than half of what is free");
  }
  return absl::OkStatus();
}

// Copies the layers, starts the instance, and mounts them in it. The folders of the mounts.
absl::StatusOr<std::vector<std::string>> SetUp(const std::vector<LayerInfo>& layers,
                                               const std::vector<MountInfo>& mounts, PrivateNode* node,
                                               std::unique_ptr<ControlClient>* control) {
  std::vector<const MountInfo*> like;
  for (const LayerInfo& layer : layers) {
    auto mount = std::find_if(mounts.begin(), mounts.end(), [&](const MountInfo& one) {
      return one.layer_digest == layer.digest && one.index_digest == layer.index_digest;
    });
    if (mount == mounts.end()) continue;  // unmounted meanwhile
    HF_RETURN_IF_ERROR(Annotate(node->CopyFolders(layer.folders), "copying " + layer.digest));
    like.push_back(&*mount);
  }
  HF_RETURN_IF_ERROR(node->Start());
  HF_ASSIGN_OR_RETURN(*control, node->Connect());
  std::vector<std::string> roots;
  for (const MountInfo* mount : like) {
    HF_ASSIGN_OR_RETURN(std::string root, (*control)->MountPrivate(std::to_string(roots.size()), *mount));
    roots.push_back(std::move(root));
  }
  return roots;
}

}  // namespace

bool DrillReport::ok() const {
  return !cases.empty() &&
         std::all_of(cases.begin(), cases.end(), [](const DrillCase& one) { return one.ok(); });
}

std::vector<LayerInfo> ChooseLayers(std::vector<LayerInfo> layers, size_t limit) {
  layers.erase(
      std::remove_if(layers.begin(), layers.end(),
                     [](const LayerInfo& layer) { return layer.cached_bytes == 0 || layer.files == 0; }),
      layers.end());
  auto rank = [](const LayerInfo& layer) {
    const uint64_t tenths = 10 * layer.cached_bytes / std::max<uint64_t>(layer.content_bytes, 1);
    return std::make_tuple(layer.cached_bytes > kLargeLayer, 10 - std::min<uint64_t>(tenths, 10),
                           layer.cached_bytes);
  };
  std::sort(layers.begin(), layers.end(),
            [&](const LayerInfo& a, const LayerInfo& b) { return rank(a) < rank(b); });
  if (layers.size() > limit) layers.resize(limit);
  return layers;
}

absl::StatusOr<DrillReport> RunDrill(std::unique_ptr<ControlClient> client, const std::string& socket_path,
                                     const std::function<void(const DrillReport&)>& on_begin,
                                     const std::function<void(const DrillCase&)>& on_case) {
  HF_ASSIGN_OR_RETURN(const SupervisorStatus status, client->Status());
  const WorkerStatus* owner = OwnerOf(status);
  if (owner == nullptr) return FailedPrecondition("no worker serves on this node now");
  HF_ASSIGN_OR_RETURN(std::vector<LayerInfo> all, client->Layers());
  const std::vector<LayerInfo> layers = ChooseLayers(std::move(all), kLayers);
  if (layers.empty()) {
    return NotFound(
        "no lazily served layer has content on this disk yet, so there is nothing to read in a drill");
  }
  if (layers.front().folders.empty()) {
    return Unimplemented("the running worker is older than this command: `holdfastctl upgrade` first");
  }
  HF_ASSIGN_OR_RETURN(const std::vector<MountInfo> mounts, client->Mounts());
  client.reset();
  HF_RETURN_IF_ERROR(RequireRoom(status.state_dir, layers));

  // Nothing is made before the signals are caught, and they are caught until nothing is left.
  Slot slot;
  EndOnSignal signals([&] { slot.End(); });
  auto cleanup = absl::MakeCleanup([&] { slot.End(); });
  {
    MutexLock lock(&slot.mutex);
    HF_ASSIGN_OR_RETURN(
        slot.node, PrivateNode::Create({status.state_dir, std::filesystem::path(socket_path).parent_path(),
                                        static_cast<pid_t>(status.pid), owner->executable}));
  }
  PrivateNode* const node = slot.node.get();
  DrillReport report;
  std::unique_ptr<ControlClient> control;
  absl::StatusOr<std::vector<std::string>> roots = SetUp(layers, mounts, node, &control);
  if (!roots.ok()) return roots.status();
  std::vector<CanaryFile> files = FindCachedFiles(*roots, kFiles, kFindSeconds);
  if (files.empty()) {
    return NotFound("no file of " + layers.front().digest +
                    " begins with content that is on this disk, so there is nothing to read in a drill");
  }
  for (const LayerInfo& layer : layers) report.layers.push_back(layer.digest);
  report.files = files.size();
  on_begin(report);
  {
    CanaryReader reader(std::move(files), kReaders);
    Drill drill(node, control.get(), &reader);
    auto run = [&](const std::string& name, const std::function<absl::Status(DrillCase*)>& body) {
      report.cases.push_back(drill.Run(name, body));
      on_case(report.cases.back());
    };
    run("swap", [&](DrillCase* one) { return drill.Swap(one); });
    run("crash", [&](DrillCase* one) { return drill.Death(SIGKILL, one); });
    run("hang", [&](DrillCase* one) { return drill.Death(SIGSTOP, one); });
    run("refusal", [&](DrillCase* one) { return drill.Refusal(one); });
    run("rollback", [&](DrillCase* one) { return drill.Rollback(one); });
    if (!report.ok()) report.log = node->LogTail();
  }
  return report;
}

}  // namespace holdfast::ctl
