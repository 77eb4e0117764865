// The supervisor's look at the worker that reads, twice a second, and what follows a verdict (README.md,
// "Hangs"), also where the swap machine's time limits gave it.
#include <memory>
#include <string>
#include <utility>

#include "common/cgroup.h"
#include "common/hang_report.h"
#include "common/log.h"
#include "common/offload.h"
#include "glog/logging.h"
#include "supervisor/rpc.h"
#include "supervisor/supervisor.h"

namespace holdfast::supervisor {
namespace {

constexpr uint64_t kSaveStacksMillis = 300;  // the longest that this may delay the kill
constexpr uint64_t kDumpMillis = 200;        // for the worker to print its own stacks

}  // namespace

kj::Promise<void> Supervisor::WatchWorker() {
  return timer_.afterDelay(kHangTickMillis * kj::MILLISECONDS).then([this] {
    for (auto& [generation, worker] : workers_) LookAt(worker.get());
    return WatchWorker();
  });
}

void Supervisor::LookAt(WorkerProcess* worker) {
  const Ledger* ledger = ledgers_.Find(worker->generation);
  bool spare = worker->generation == state_.spare && worker->client != nullptr;
  bool lives = !worker->retired && worker->dead_since_boot_nanos == 0 && worker->hung.empty();
  if (!lives || ledger == nullptr || !(worker->reading || spare)) return void(worker->watch = nullptr);
  if (worker->watch == nullptr) {
    worker->watch = std::make_unique<WorkerWatch>(HangLimits{.limit_ns = options_.hang_limit_ms * 1'000'000});
  }
  WorkerWatch& watch = *worker->watch;
  Ping(worker);
  HangSample sample{
      .now_ns = clock_->BootNanos(), .ping = watch.ping, .throttled_ns = ThrottledNanos(worker->pid)};
  if (worker->reading) {  // of a spare only an answer is wanted
    sample.received = ledger->received();
    sample.heartbeat_ns = ledger->heartbeat();
    sample.executing = ledger->ExecutingSlots();
    // In all ledgers: it has adopted what its predecessors left.
    for (const Ledger* any : ledgers_.all()) any->FindOverdue(worker->generation, &sample);
  }
  if (worker->reading && (worker->capabilities & schema::CAP_HEALTH) != 0) {
    sample.readable = vault_.Readable();
    sample.held_back = watch.held_back;
    sample.loop = watch.loop;
    // A call of the machine may take long, and has a limit of its own.
    if (worker->calls == 0) sample.loop_age_ns = watch.loop_age_ns;
  }
  auto verdict = watch.monitor.Tick(sample);
  if (!verdict) return;
  if (spare)
    return GiveUp(worker->generation, "hung: " + verdict->what);  // the reports are of who was read from
  KillHung(worker->generation, *verdict);
}

// At most one is under way.
void Supervisor::Ping(WorkerProcess* worker) {
  WorkerWatch& watch = *worker->watch;
  if (watch.ping != 0) return;
  watch.ping = ++pings_;
  // Null when it is not watched any more, or anew.
  auto find = [this, generation = worker->generation, ping = watch.ping]() -> WorkerWatch* {
    WorkerProcess* pinged = Find(generation);
    if (pinged == nullptr || pinged->watch == nullptr || pinged->watch->ping != ping) return nullptr;
    pinged->watch->ping = 0;
    return pinged->watch.get();
  };
  auto answered = [find](capnp::Response<schema::Worker::PingResults>&& response) {
    WorkerWatch* pinged = find();
    if (pinged == nullptr) return;
    pinged->loop_age_ns = response.getLoopAgeNanos();
    pinged->loop = response.getLoop().cStr();
    pinged->held_back.clear();
    for (uint64_t mount : response.getHeldBack()) pinged->held_back.push_back(mount);
  };
  // An error is an answer, too: builds that know no ping.
  tasks_.add(
      KJ_ASSERT_NONNULL(worker->client).pingRequest().send().then(kj::mv(answered), [find](kj::Exception&&) {
        find();
      }));
}

// Also for what the machine finds: a step that its worker does not end. One that is dead may be a candidate
// whose exit was waited for and does not come; else its death was told, and telling it again changes nothing.
void Supervisor::KillHung(Generation generation, const HangVerdict& verdict) {
  WorkerProcess* worker = Find(generation);
  if (worker == nullptr || !worker->hung.empty()) return;
  if (worker->dead_since_boot_nanos != 0)
    return Dispatch({.type = EventType::kDied, .generation = generation, .reason = worker->death});
  worker->hung = "hung: " + verdict.what;
  LOG(ERROR) << "event=hang generation=" << generation << " pid=" << worker->pid
             << " seen=" << LogValue(verdict.what);
  if (Ledger* ledger = ledgers_.Find(generation)) ledger->owner_hung = true;
  // Reads stopped when it began, not now.
  if (worker->reading) swap_.ReadsStopped(clock_->BootNanos() - verdict.age_ns);
  using Saved = absl::StatusOr<std::string>;
  auto saved = Offload<Saved>(
      [folder = options_.state_dir + "/supervisor/hangs", pid = worker->pid, generation, what = verdict.what,
       now = clock_->WallNanos()] { return SaveStacks(folder, pid, generation, what, now); });
  auto told = saved.then([](kj::Own<Saved>&& path) {
    LOG(INFO) << "event=hang_report result=" << LogValue(path->ok() ? **path : path->status().ToString());
  });
  auto limited = told.exclusiveJoin(timer_.afterDelay(kSaveStacksMillis * kj::MILLISECONDS));
  auto dumped = limited.then([this] { return timer_.afterDelay(kDumpMillis * kj::MILLISECONDS); });
  tasks_.add(dumped.then([this, generation] {
    if (WorkerProcess* hung = Find(generation)) GiveUp(generation, hung->hung);
  }));
}

}  // namespace holdfast::supervisor
