// The composition root: owns every object of a worker, starts them in order, and does what the supervisor
// asks.
//
// What is exclusive comes and goes: reads between Serve/Resume and Park, metadata between TakeMetadata and
// YieldMetadata. Everything else lives as long as the process. From Prepare until it is told to serve without
// trial, or until its trial ends, what it stores is not believed by anybody
// (cache::ContentStore::SetWriting).
//
// Threads: calls of the supervisor arrive one at a time (SupervisorLink's action thread), Distrust on its
// slow thread, Reattaching on the thread that looks for a supervisor; one housekeeping thread; the threads of
// the parts. How it fails: without a supervisor it serves reads on and, where that was agreed on, keeps the
// metadata and looks for the next supervisor. Refused by that one, or without the agreement, it gives up the
// metadata and the listening socket. It ends on SIGTERM then, or by itself when it serves no mount; one that
// never served ends at once.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "common/clock.h"
#include "common/fault.h"
#include "common/loop_watch.h"
#include "common/mutex.h"
#include "common/status.h"
#include "common/trace.h"
#include "common/urgency.h"
#include "worker/api/snapshot_service.h"
#include "worker/app/config.h"
#include "worker/app/layer_files.h"
#include "worker/app/layer_resolver.h"
#include "worker/app/layer_service.h"
#include "worker/cache/content_store.h"
#include "worker/fetch/registry_client.h"
#include "worker/fuse/fuse_server.h"
#include "worker/handover/supervisor_link.h"
#include "worker/layer/layer.h"
#include "worker/metadata/metadata.h"
#include "worker/snapshot/snapshotter.h"

namespace holdfast::app {

// The longest that a worker is urgent (common/urgency.h): from its start, and once more from being told to
// serve.
inline constexpr std::chrono::milliseconds kUrgentAtMost{5'000};

class Worker final : public handover::WorkerActions, public handover::AdminActions {
 public:
  struct Options {
    Config config;
    std::string fault_spec;  // HOLDFAST_FAULTS; empty: no faults
    std::string build;       // what the live probe answers
    // A worker that waits for a supervisor and serves no mount ends after this.
    uint64_t orphan_limit_nanos = 10'000'000'000;
    // How often a worker that waits to serve looks for new mounts, and every worker for evicted content.
    uint64_t refresh_nanos = 2'000'000'000;
    uint64_t sync_every_refresh = 150;  // then also for mounts that are gone
    // How long the snapshots API waits with its start for Prepare or Serve, which usually follow at once.
    int64_t api_wait_nanos = 100'000'000;
    std::string oom_score_file = "/proc/self/oom_score_adj";  // set to 0 when told to serve
    UrgentTime* urgency = nullptr;                            // outlives the worker
    bool drill = false;  // of a private instance for `holdfastctl drill`, which may ask for mounts
    // Ends the process: the worker has retired (0) or has nothing left to do. Called once, on any thread.
    std::function<void(int exit_code)> exit;
  };

  // Makes what needs no supervisor. Do it before registering: once registered, the predecessor parks and
  // reads wait for us.
  static absl::StatusOr<std::unique_ptr<Worker>> Create(const Options& options);
  ~Worker() override;

  // Call before registering: a fault point.
  absl::Status BeforeRegister() { return PassFault(faults_, "worker.register"); }
  // `link` is connected and not started. Makes the rest and opens the link's gate: from then on the
  // supervisor's calls are carried out.
  absl::Status Run(std::unique_ptr<handover::SupervisorLink> link);
  bool supervisor_lost() const { return link_->lost(); }

  absl::Status Serve(handover::ServeOrder order) override;
  absl::Status OwnerExited(uint64_t generation) override;
  absl::Status TakeMetadata() override;
  absl::Status Park() override;
  absl::Status Resume() override;
  absl::Status YieldMetadata() override;
  absl::Status Retire() override;
  void MountsGone(const std::vector<uint64_t>& mount_ids) override;
  absl::Status Prepare() override;
  absl::StatusOr<handover::SampleSet> Samples(uint32_t limit) override;
  absl::StatusOr<handover::ReplayResult> Replay(
      const std::vector<handover::SampleRequest>& requests) override;
  absl::Status AddMounts(std::vector<handover::MountEntry> entries) override;
  absl::Status EndTrial() override;
  absl::Status Distrust(uint64_t generation, UniqueFd touched, const std::string& vault_id) override;
  absl::StatusOr<handover::Page<handover::HeldMount>> HeldMounts(uint64_t after) override;
  absl::StatusOr<handover::Page<handover::OldLedger>> HeldLedgers(uint64_t after) override;
  absl::StatusOr<UniqueFd> HeldListener() override;
  AfterLoss SupervisorLost() override;
  absl::StatusOr<bool> Reattaching() override;
  void Reattached(const std::string& vault_id) override;
  void ReattachRefused(const absl::Status& why) override;
  handover::Health Ping() override;
  void SwapAhead(bool over) override;

  std::vector<handover::LayerInfo> Layers() override;
  std::vector<handover::SnapshotInfo> Snapshots() override;
  handover::WorkerStats Stats() override;
  std::vector<TraceEvent> Trace(uint32_t limit) override;
  absl::StatusOr<std::string> MountPrivate(const std::string& name, const std::string& blob) override;

 private:
  explicit Worker(const Options& options) : options_(options) {}
  void Warm();
  absl::Status BuildFuse(handover::Welcome* welcome);
  absl::Status BuildLayers(const std::string& state_dir, const std::string& vault_id);

  absl::Status WaitForService();

  // Serves every mount of the vault that is not served yet, and forgets those it no longer holds.
  absl::Status SyncMounts();
  // Those with an id above every one seen so far; forgets none.
  absl::Status AddNewMounts();
  void AdoptMounts(std::vector<handover::MountEntry> entries);
  // The own ledger or another one, from what is kept for HeldLedgers.
  absl::Status Keep(const handover::OldLedger& ledger);
  void MayWrite();  // eviction and prefetch, if this worker is the owner and trusted
  void GiveUpMetadata();
  absl::Status UseVaultId(const std::string& vault_id);
  uint64_t PoolAgeNanos() const;
  absl::Status AdoptLedgers();  // those that the supervisor names
  absl::Status AdoptLedgers(std::vector<handover::OldLedger> ledgers);
  absl::Status TakeOverReads(handover::ServeOrder order);
  absl::Status OpenMetadata();
  void CloseMetadata();
  void Housekeeping();
  void EndIfUnneeded();
  void Refresh();
  bool ExitWasTold(uint64_t generation);
  void Ready();
  void ReportDrained();

  const Options options_;
  const Clock* const clock_ = Clock::Real();
  FaultPoints fault_points_;
  FaultPoints* faults_ = nullptr;
  TraceRing trace_;
  LoopWatch watch_{clock_};  // the parts report to it, so it outlives them

  // Destroyed last to first: whoever uses another stands below it.
  std::unique_ptr<handover::SupervisorLink> link_;
  std::string state_dir_, forward_path_;
  uint64_t generation_ = 0;
  uint64_t capabilities_ = 0;  // agreed on
  bool may_reattach_ = false;
  const void* ledger_header_ =
      nullptr;  // a read-only mapping of the own ledger's header page, never unmapped
  std::unique_ptr<fetch::RegistryClient> client_;
  std::unique_ptr<cache::ContentStore> content_;
  std::unique_ptr<layer::LayerReader> reader_;
  std::unique_ptr<fuse::FuseServer> server_;
  std::unique_ptr<LayerFiles> files_;
  std::unique_ptr<LayerResolver> resolver_;
  std::unique_ptr<LayerService> layers_;
  std::unique_ptr<api::SnapshotService> service_;  // set once service_started_

  // Action thread only.
  bool trial_ = false;
  bool refused_ = false;  // by the next supervisor
  std::vector<uint64_t> exited_while_parked_;
  std::vector<std::unique_ptr<snapshot::Snapshotter>>
      former_;  // aborted; may wait for an overdue mount when destroyed
  std::unique_ptr<snapshot::Snapshotter> snapshotter_;
  std::thread restore_thread_;
  std::thread retire_thread_;

  Mutex mutex_;
  CondVar changed_;
  std::unique_ptr<metadata::MetadataStore> store_
      ABSL_GUARDED_BY(mutex_);  // set while this worker is the owner
  struct OldLedgerState {
    bool exited = false;  // its owner's exit is proven
    bool hung = false;
  };
  std::map<uint64_t, OldLedgerState> old_ledgers_ ABSL_GUARDED_BY(mutex_);  // by generation
  std::set<uint64_t> told_exits_ ABSL_GUARDED_BY(mutex_);  // of generations whose ledger we had not got
  bool service_started_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status service_status_ ABSL_GUARDED_BY(mutex_);
  bool ready_ ABSL_GUARDED_BY(mutex_) = false;  // prepared or serving
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  bool sync_due_ ABSL_GUARDED_BY(mutex_) = false;
  std::string vault_id_ ABSL_GUARDED_BY(mutex_);
  std::map<uint64_t, handover::OldLedger> held_ledgers_ ABSL_GUARDED_BY(mutex_);  // the own one too
  UniqueFd listener_ ABSL_GUARDED_BY(mutex_);
  std::vector<uint64_t> ended_mounts_
      ABSL_GUARDED_BY(mutex_);  // the kernel said so; housekeeping forgets them
  // Written on the action thread, read on any.
  std::atomic<bool> prepared_{false}, served_{false}, parked_{false}, looks_for_next_{false};
  std::atomic<uint64_t> last_mount_seen_{0};   // every mount up to it is served here, if it was there then
  std::atomic<uint64_t> lost_since_nanos_{0};  // 0: there is a supervisor

  std::unique_ptr<LoopWatch::Loop> housekeeping_loop_;
  uint64_t refreshes_ = 0;  // housekeeping thread only: while it waits to serve
  std::thread housekeeping_thread_;
};

}  // namespace holdfast::app
