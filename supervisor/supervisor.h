// The supervisor proper: carries out what the swap machine decides; owns vault, ledgers and worker processes.
// One thread, the KJ event loop, which never blocks; what may block goes through Offload.
#pragma once

#include <capnp/rpc-twoparty.h>
#include <kj/async-io.h>
#include <kj/async-unix.h>

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "common/clock.h"
#include "common/executable_store.h"
#include "common/fault.h"
#include "common/fd_store.h"
#include "common/fuse_mount.h"
#include "common/id_file.h"
#include "common/io.h"
#include "common/offload.h"
#include "schema/control.capnp.h"
#include "schema/handover.capnp.h"
#include "supervisor/handover_machine.h"
#include "supervisor/hang_monitor.h"
#include "supervisor/options.h"
#include "supervisor/recovery.h"
#include "supervisor/state_journal.h"
#include "supervisor/swap_record.h"
#include "supervisor/vault.h"
#include "supervisor/verifiers.h"

namespace holdfast::supervisor {

inline constexpr char kBuild[] = "holdfast-supervisor 0.1.0";
inline constexpr char kLastGoodFile[] = "supervisor/last-good";  // in the state folder: that build's digest
// Private copies of worker builds, as <state>/bin/<sha256>/holdfast-worker: started by descriptor, so that
// what is at the path of the original may change.
inline ExecutableStore WorkerCopies(const std::string& state_dir) {
  return {state_dir + "/bin", "holdfast-worker"};
}
inline constexpr uint64_t kNanosPerSecond = 1'000'000'000;
inline constexpr uint64_t kStopUnmountSeconds = 10;  // what is not unmounted by then is left to the kernel
inline constexpr uint64_t kUnkillableSeconds = 5;    // a killed worker that still exists then is reported

// What is known of the health of a worker that reads, from one look to the next.
struct WorkerWatch {
  explicit WorkerWatch(const HangLimits& limits) : monitor(limits) {}
  HangMonitor monitor;
  uint64_t ping = 0;  // the one under way; 0: none
  uint64_t loop_age_ns = 0;
  std::string loop{};
  std::vector<uint64_t> held_back{};
};

struct WorkerProcess {
  Generation generation = 0;
  std::shared_ptr<const Executable> executable;
  std::string token;  // hexadecimal
  pid_t pid = 0;
  uint64_t start_ticks = 0;
  UniqueFd pidfd, thread;  // `thread`: a pidfd, too; of Hello.thread
  kj::Own<kj::UnixEventPort::FdObserver> exit_observer, thread_observer;
  kj::Own<kj::AsyncCapabilityStream> stream;
  kj::Own<capnp::TwoPartyClient> connection;
  kj::Maybe<schema::Worker::Client> client;  // once registered
  kj::Maybe<capnp::Capability::Client> admin;
  std::string build;
  uint64_t capabilities = 0;  // agreed on
  int64_t started_wall_nanos = 0;
  uint64_t dead_since_boot_nanos = 0;  // first sign of death, or our SIGKILL; 0: alive
  bool killed = false, retired = false, disconnected = false, exited = false;
  bool reading = false;  // from its answer to serve or resume until it is told to park
  uint32_t calls = 0;    // of the machine, under way
  std::string hung{};    // the verdict; empty: none
  std::string death{};   // why it is dead or useless
  std::unique_ptr<WorkerWatch> watch;
  // Timers: they end with it.
  kj::Promise<void> urgency_limit = nullptr, spare_limit = nullptr, retirement_limit = nullptr;
};

// Of a worker that was not asked to end, or came to nothing; not of candidates and spares.
struct Death {
  Generation generation = 0;  // 0: none yet
  std::string reason{};
  int64_t wall_nanos = 0;
};

struct RollbackReadiness {
  bool ready = false;
  std::string executable, reason;
};

// What main has prepared.
struct Resources {
  UniqueFd state_dir;
  SharedFd snapshot_listener;  // null: a living worker may bring it
  IdFile mount_ids, generations;
  std::shared_ptr<const Executable> executable;  // of the command line
  std::shared_ptr<const Executable> last_good;   // null: none is known yet
  std::vector<std::string> warnings;
  FdStore* store;                    // outlives the supervisor
  StoredFds fds;                     // what the service manager kept
  std::vector<LivingWorker> living;  // of an earlier supervisor
  FaultPoints* faults;               // may be null
};

// While the state of an earlier supervisor is being taken over (recovery.cc).
struct Takeover {
  SavedState state;
  StoredFds fds;
  std::set<std::string> kept;        // names that the service manager has already
  std::vector<LivingWorker> living;  // of the workers' file
  bool adopted = false;              // `state` is valid
  Generation owner = 0;              // who is to go on; 0: nobody
  Generation source = 0;             // a worker that can hand out descriptors; 0: none
  Generation candidate = 0;          // is to end once it has handed out its ledger; 0: none
  bool holds_metadata = false;       // the owner says so
  int fetch_failures = 0;
  std::optional<std::set<uint64_t>> held;  // mounts that the owner was given; unknown if it could not say
};

class Supervisor final : private kj::TaskSet::ErrorHandler {
 public:
  Supervisor(const Options& options, Resources resources, kj::AsyncIoContext* io);

  // Starts the first worker. Resolves after Stop().
  kj::Promise<void> Run();
  // Takes all mounts out of the tree (what is in use lives on as long as its server), ends the workers.
  void Stop(const std::string& reason);
  bool stopping() const { return stopping_; }
  // For the next supervisor. Resolves when the file has all of them.
  kj::Promise<void> SaveLivingWorkers();
  // Last: kills what is left.
  void KillRemaining();

  // For the RPC servers. They throw kj::Exception on bad requests.
  void Register(Generation generation, schema::Hello::Reader hello, schema::Worker::Client worker,
                capnp::Capability::Client admin, schema::Welcome::Builder welcome);
  // A worker of an earlier supervisor. `state`: what it was given, or -1. Throws when it is not wanted.
  void Reattach(Generation generation, schema::Hello::Reader hello, schema::Worker::Client worker,
                capnp::Capability::Client admin, int state, bool holds_metadata);
  // The connection of a worker that came by Reattach() is gone.
  void ConnectionLost(Generation generation) { OnDisconnected(generation); }
  const std::string& vault_id() const { return vault_id_; }
  kj::Promise<const Mount*> MountLayer(Generation caller, std::string path, InitOptions options,
                                       std::string blob);
  kj::Promise<MountState> UnmountLayer(Generation caller, uint64_t mount_id);
  // True: swapped; false: the same build runs already. `progress` is told each step.
  kj::Promise<bool> Upgrade(std::string path, bool force, kj::Maybe<schema::Progress::Client> progress);
  kj::Promise<bool> Rollback(kj::Maybe<schema::Progress::Client> progress);
  kj::Promise<RollbackReadiness> CheckRollback();

  void FillStatus(schema::Status::Builder status) const;
  kj::Maybe<capnp::Capability::Client> RunningAdmin();
  const SwapRecord& swap() const { return swap_; }
  Vault& vault() { return vault_; }
  LedgerStore& ledgers() { return ledgers_; }

 private:
  void taskFailed(kj::Exception&& exception) override;

  // recovery.cc
  kj::Promise<void> Recover();
  void AdoptState(DurableMap map, SavedState state, const char* source, Generation bringer);
  absl::Status AdoptBroughtState(Generation generation, pid_t pid, const std::string& token, int state);
  void StateUnusable(const absl::Status& why);
  void AdoptWorkers();
  std::shared_ptr<const Executable> KeptExecutable(const std::string& sha256) const;
  void KillOthers(const std::set<Generation>& spared);
  bool WaitsForWorker();
  kj::Promise<void> WaitForWorker(uint64_t deadline_boot_nanos);
  kj::Promise<void> FetchDescriptors();
  kj::Promise<void> FetchMounts(schema::Worker::Client worker, uint64_t after,
                                std::shared_ptr<std::set<uint64_t>> held);
  kj::Promise<void> FetchLedgers(schema::Worker::Client worker, uint64_t after);
  kj::Promise<void> FetchCandidatesLedger();
  kj::Promise<void> TakeFd(schema::Descriptor::Client descriptor, std::string name);
  kj::Promise<void> RestoreVault();
  void RestoreLedgers();
  absl::Status OpenSnapshotListener();
  void EndTakeover();
  void StartFresh();
  void PushAll(const Takeover& takeover);
  // What the next supervisor must know.
  void StoreWorker(const WorkerProcess& worker);
  void SaveMachine();
  void SaveWorker(const WorkerProcess& worker);
  std::vector<LivingWorker> LivingWorkers() const;
  void WatchExit(WorkerProcess* worker);
  void WatchThread(WorkerProcess* worker, pid_t thread);
  bool IsLost(Generation generation);

  // The machine's events and actions.
  void Dispatch(Event event);
  void Apply(const Event& event);
  void Do(const Action& action);
  void SpawnWorker(Generation generation, Binary binary);
  void ClaimSwap(const std::string& kind, kj::Maybe<schema::Progress::Client> progress);
  void SwapAnswered();
  void TellSwapAhead(bool over);
  kj::Promise<bool> SwapTo(std::shared_ptr<const Executable> executable);
  // Another build than the running one is last-good.
  bool RunsUnproven() const { return last_good_ != nullptr && last_good_->sha256 != running_->sha256; }
  std::shared_ptr<const Executable> RollbackTarget() const;
  void SetLastGood(std::shared_ptr<const Executable> executable);
  void Connect(WorkerProcess* worker, UniqueFd socket);
  void CallWorker(const Action& action, uint64_t waited_ms = 0);
  void LimitRetirement(WorkerProcess* worker);
  kj::Promise<void> SendCall(WorkerProcess* worker, const Action& action);
  kj::Promise<void> Serve(WorkerProcess* worker);
  kj::Promise<std::string> Rehearse(schema::Worker::Client candidate);
  kj::Promise<std::string> ProbeLive(Generation generation);
  template <typename Results>
  kj::Promise<std::string> Judged(capnp::RemotePromise<Results> verdict);
  void RemoveCanaries();
  void OnCallDone(Generation generation, Call call);
  void TellExited(Generation generation, Generation exited);
  void KillWorker(Generation generation);
  // Armed as long as the promise exists, which `due` must not destroy.
  kj::Promise<void> StartTimer(uint64_t milliseconds, std::function<void()> due);
  void ArmTimer(uint64_t milliseconds);
  // It may live, and counts as dead for this reason from now on.
  void GiveUp(Generation generation, const std::string& reason);
  void OnDisconnected(Generation generation, std::string how = "its connection ended");
  void OnExit(Generation generation);
  void NoteDeath(WorkerProcess* worker, const std::string& reason);
  bool NoteReason(WorkerProcess* worker, const std::string& reason);
  void FinishSwap(const std::string& result);
  // `rollback`: whatever it leaves is not gone back to.
  void AdoptRunningBinary(bool rollback);
  WorkerProcess* Find(Generation generation);
  const char* Role(const WorkerProcess& worker) const;

  // Its failure is told elsewhere, or does not matter.
  void Ignore(kj::Promise<void> promise);
  // Goes on even when the caller hangs up.
  template <typename T>
  kj::Promise<T> Keep(kj::Promise<T> promise) {
    auto shared = promise.fork();
    Ignore(shared.addBranch().ignoreResult());
    return shared.addBranch();
  }

  // Mounts.
  const Mount* FinishMount(uint64_t id, absl::StatusOr<FuseInit> result);
  MountState FinishUnmount(uint64_t id, const absl::StatusOr<bool>& gone);
  void RequireOwner(Generation caller) const;
  kj::Promise<void> WatchMounts();

  // Hangs (hang_watch.cc).
  kj::Promise<void> WatchWorker();
  void LookAt(WorkerProcess* worker);
  void Ping(WorkerProcess* worker);
  void KillHung(Generation generation, const HangVerdict& verdict);

  void NotifyGone(const std::vector<uint64_t>& ids);
  kj::Promise<void> UnmountAll();

  const Options options_;
  kj::AsyncIoContext* const io_;
  kj::Timer& timer_;
  const Clock* const clock_ = Clock::Real();
  const UniqueFd state_dir_;
  SharedFd snapshot_listener_;
  std::vector<std::string> warnings_;
  std::string vault_id_;  // content stored under another one is verified before use
  const int64_t started_wall_nanos_;
  FdStore* const store_;
  FaultPoints* const faults_;
  StateJournal journal_;
  std::unique_ptr<Takeover> takeover_;  // null once it is over
  std::string state_source_ = "new";
  uint64_t restarts_ = 0;

  Vault vault_;
  LedgerStore ledgers_;
  IdFile generations_;

  State state_{.next_generation = 0};
  Generation last_generation_ = 0;
  std::deque<Event> events_;
  bool dispatching_ = false;
  kj::Promise<void> machine_timer_ = nullptr;  // the one armed last
  std::map<Generation, std::unique_ptr<WorkerProcess>> workers_;
  std::shared_ptr<const Executable> running_, previous_, candidate_, last_good_;
  std::string running_build_;
  std::string reverted_;                    // why last-good was brought back; empty: it was not
  uint64_t probation_ends_boot_nanos_ = 0;  // if the build that runs is in one
  Verifiers verifiers_;
  kj::Maybe<kj::Own<Verifiers::Task>> verifier_;  // of the swap under way, from its rehearsal on
  SharedFd touched_;  // what the candidate on trial answered for (schema/touched.h)

  SwapRecord swap_{clock_};
  uint64_t crashes_ = 0, hangs_ = 0, pings_ = 0;
  Death last_death_;
  bool stopping_ = false;
  kj::Promise<void> living_saved_ = kj::READY_NOW;  // by the last write of the workers' file
  kj::Maybe<kj::Own<kj::PromiseFulfiller<void>>> upgrade_waiter_;
  kj::Own<kj::PromiseFulfiller<void>> stopped_;
  kj::TaskSet tasks_;  // last: cancelled first
};

}  // namespace holdfast::supervisor
