#include "worker/app/worker.h"

#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <utility>

#include "common/log.h"
#include "glog/logging.h"
#include "schema/ledger.h"
#include "worker/app/build_info.h"

namespace holdfast::app {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds kHousekeeping{200};
constexpr uint64_t kFlushEveryNanos = 5'000'000'000;
constexpr uint64_t kMetadataLockWaitNanos = 5'000'000'000;
constexpr milliseconds kDrainLimit{120'000};

// Where the successor will answer snapshots calls: the listening socket is the same for all generations.
absl::StatusOr<std::string> PathOfSocket(int fd) {
  sockaddr_un address{};
  socklen_t size = sizeof address;
  if (getsockname(fd, static_cast<sockaddr*>(static_cast<void*>(&address)), &size) != 0) {
    return ErrnoStatus(errno, "snapshot listener");
  }
  return std::string(address.sun_path, strnlen(address.sun_path, sizeof address.sun_path));
}

fuse::LedgerHandle ToHandle(UniqueFd memory, std::vector<handover::PipePair> pipes) {
  fuse::LedgerHandle handle;
  handle.memory = std::move(memory);
  for (handover::PipePair& pair : pipes) {
    handle.pipes.push_back({std::move(pair.read_end), std::move(pair.write_end)});
  }
  return handle;
}

int PoolThreads(const Config& config) {
  if (config.fuse.threads > 0) return static_cast<int>(config.fuse.threads);
  const long processors = sysconf(_SC_NPROCESSORS_ONLN);
  return static_cast<int>(std::clamp<long>(processors, 2, HF_LEDGER_SLOTS));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Worker>> Worker::Create(const Options& options) {
  std::unique_ptr<Worker> worker(new Worker(options));
  if (!options.fault_spec.empty()) {
    HF_RETURN_IF_ERROR(worker->fault_points_.Parse(options.fault_spec));
    worker->faults_ = &worker->fault_points_;
  }
  worker->Warm();
  return worker;
}

Worker::~Worker() {
  {
    MutexLock lock(&mutex_);
    stopping_ = true;
    changed_.SignalAll();
  }
  if (housekeeping_thread_.joinable()) housekeeping_thread_.join();
  link_.reset();  // no further calls
  if (retire_thread_.joinable()) retire_thread_.join();
  CloseMetadata();
  former_.clear();
  service_.reset();
}

absl::Status Worker::Run(std::unique_ptr<handover::SupervisorLink> link) {
  link_ = std::move(link);
  handover::Welcome* welcome = link_->welcome();
  state_dir_ = welcome->state_dir;
  generation_ = welcome->generation;
  HF_ASSIGN_OR_RETURN(forward_path_, PathOfSocket(welcome->snapshot_listener.get()));
  HF_RETURN_IF_ERROR(BuildLayers(state_dir_, welcome->vault_id));
  HF_RETURN_IF_ERROR(BuildFuse(welcome));
  LayerServiceParts parts;
  parts.files = files_.get();
  parts.resolver = resolver_.get();
  parts.vault = link_.get();
  parts.client = client_.get();
  parts.store = content_.get();
  parts.reader = reader_.get();
  parts.server = server_.get();
  parts.trace = &trace_;
  parts.faults = faults_;
  layers_ = std::make_unique<LayerService>(parts);
  housekeeping_thread_ = std::thread([this] { Housekeeping(); });
  UniqueFd listener = std::move(welcome->snapshot_listener);
  link_->Start(this, this);
  // Reads do not wait for gRPC to start; TakeMetadata does.
  auto service = api::SnapshotService::Create(std::move(listener));
  MutexLock lock(&mutex_);
  service_status_ = service.status();
  if (service.ok()) service_ = std::move(*service);
  service_started_ = true;
  changed_.SignalAll();
  return service_status_;
}

void Worker::Warm() {
  const Config& config = options_.config;
  fetch::ClientOptions fetch_options;
  fetch_options.docker_config = config.fetch.docker_config;
  fetch_options.max_connections_per_host = static_cast<int>(config.fetch.max_connections_per_host);
  for (const auto& [host, entry] : config.registry) {
    fetch_options.hosts[host] = {entry.plain_http, entry.ca_file, entry.username, entry.password};
  }
  fetch_options.trace = &trace_;
  client_ = fetch::RegistryClient::Create(fetch_options);

  layer::LayerReaderOptions reader_options;
  reader_options.trace = &trace_;
  reader_options.faults = faults_;
  reader_ = layer::LayerReader::Create(reader_options);
  reader_->Pause(true);  // until this worker is the owner
}

absl::Status Worker::BuildLayers(const std::string& state_dir, const std::string& vault_id) {
  const Config& config = options_.config;
  cache::StoreOptions store_options;
  store_options.root = state_dir + "/" + kContentFolder;
  store_options.vault_id = vault_id;
  store_options.limit_bytes = config.cache.limit_bytes;
  store_options.free_floor_bytes = config.cache.free_floor_bytes;
  store_options.faults = faults_;
  HF_RETURN_IF_ERROR(MakeDirs(store_options.root));
  HF_ASSIGN_OR_RETURN(content_, cache::ContentStore::Open(store_options));
  files_ = std::make_unique<LayerFiles>(state_dir + "/" + kLayersFolder);
  ResolverOptions resolver_options;
  resolver_options.trace = &trace_;
  resolver_ = std::make_unique<LayerResolver>(resolver_options, files_.get(), client_.get());
  return absl::OkStatus();
}

absl::Status Worker::BuildFuse(handover::Welcome* welcome) {
  void* header = mmap(nullptr, HF_LEDGER_PAGE, PROT_READ, MAP_SHARED, welcome->ledger.get(), 0);
  if (header == MAP_FAILED) return ErrnoStatus(errno, "map ledger");
  ledger_header_ = header;
  fuse::ServerOptions options;
  options.generation = generation_;
  options.threads = PoolThreads(options_.config);
  options.miss_timeout_nanos = options_.config.fetch.miss_timeout_nanos;
  options.trace = &trace_;
  options.faults = faults_;
  HF_ASSIGN_OR_RETURN(server_,
                      fuse::FuseServer::Create(
                          options, ToHandle(std::move(welcome->ledger), std::move(welcome->request_pipes))));
  fuse::InstallCrashRecorder(server_.get());
  server_->OnMountEnded([this](uint64_t mount_id) {
    MutexLock lock(&mutex_);
    ended_mounts_.push_back(mount_id);
    changed_.SignalAll();
  });
  return absl::OkStatus();
}

absl::Status Worker::WaitForService() {
  MutexLock lock(&mutex_);
  while (!service_started_) changed_.Wait(&mutex_);
  return service_status_;
}

absl::Status Worker::SyncMounts() {
  // Asked first: what a Prepare mounts meanwhile may be missing in the list, and is not gone for that.
  const std::vector<uint64_t> served = layers_->ServedMounts();
  HF_ASSIGN_OR_RETURN(std::vector<handover::MountEntry> entries, link_->ListMounts());
  std::set<uint64_t> held;
  for (handover::MountEntry& entry : entries) {
    const uint64_t id = entry.mount_id;
    held.insert(id);
    if (layers_->Serves(id)) continue;
    absl::Status adopted = layers_->AdoptMount(std::move(entry));
    // One broken mount must not keep the others from being served.
    LOG_IF(ERROR, !adopted.ok()) << "worker.mount_not_served mount=" << id << " error=" << adopted;
  }
  std::vector<uint64_t> gone;
  for (uint64_t id : served) {
    if (held.count(id) == 0) gone.push_back(id);
  }
  layers_->ForgetMounts(gone);
  return absl::OkStatus();
}

absl::Status Worker::AdoptLedgers() {
  HF_ASSIGN_OR_RETURN(std::vector<handover::OldLedger> ledgers, link_->OldLedgers());
  size_t failed = 0;
  for (handover::OldLedger& ledger : ledgers) {
    absl::StatusOr<uint64_t> taken = server_->AdoptLedger(
        ledger.generation, ToHandle(std::move(ledger.memory), std::move(ledger.pipes)), ledger.owner_exited,
        /*owner_hung=*/false);
    if (taken.ok()) {
      // Only now: the housekeeping thread reports it as drained, and a ledger not yet walked looks empty.
      MutexLock lock(&mutex_);
      old_ledgers_[ledger.generation] |= ledger.owner_exited;
      continue;
    }
    // One unreadable ledger must not keep this worker, and every one after it, from serving all mounts.
    failed++;
    LOG(ERROR) << "worker.ledger_not_adopted generation=" << ledger.generation
               << " error=" << LogValue(FromAbsl(taken.status().message()));
  }
  LOG_IF(ERROR, failed > 0) << "worker.ledgers_not_adopted count=" << failed << " of=" << ledgers.size()
                            << " effect=\"requests in them stay unanswered\"";
  return absl::OkStatus();
}

absl::Status Worker::Serve() {
  TraceSpan span(&trace_, "worker.serve", "generation=" + std::to_string(generation_));
  HF_RETURN_IF_ERROR(PassFault(faults_, "worker.serve"));
  HF_RETURN_IF_ERROR(SyncMounts());
  HF_RETURN_IF_ERROR(AdoptLedgers());
  server_->Start();
  LOG(INFO) << "worker.serving generation=" << generation_ << " mounts=" << layers_->mount_count();
  return absl::OkStatus();
}

absl::Status Worker::OwnerExited(uint64_t generation) {
  {
    MutexLock lock(&mutex_);
    if (old_ledgers_.count(generation) == 0) return absl::OkStatus();  // its ledger was never ours to empty
  }
  if (parked_) {  // Resume walks it
    exited_while_parked_.push_back(generation);
    return absl::OkStatus();
  }
  // The server knows the ledger from the first walk; it needs no new descriptors.
  HF_RETURN_IF_ERROR(server_
                         ->AdoptLedger(generation, fuse::LedgerHandle(), /*final_walk=*/true,
                                       /*owner_hung=*/false)
                         .status());
  MutexLock lock(&mutex_);
  old_ledgers_[generation] = true;  // not before the walk: see AdoptLedgers
  return absl::OkStatus();
}

absl::Status Worker::TakeMetadata() {
  TraceSpan span(&trace_, "worker.take_metadata", "generation=" + std::to_string(generation_));
  HF_RETURN_IF_ERROR(PassFault(faults_, "worker.take_metadata"));
  HF_RETURN_IF_ERROR(WaitForService());
  HF_RETURN_IF_ERROR(SyncMounts());
  if (snapshotter_ == nullptr) HF_RETURN_IF_ERROR(OpenMetadata());
  content_->AllowEviction(true);
  reader_->Pause(false);
  service_->Attach(snapshotter_.get());
  service_->StartAccepting();
  restore_thread_ = std::thread([snapshotter = snapshotter_.get()] { snapshotter->Restore(); });
  LOG(INFO) << "worker.owner generation=" << generation_;
  return absl::OkStatus();
}

absl::Status Worker::OpenMetadata() {
  HF_ASSIGN_OR_RETURN(
      std::unique_ptr<metadata::MetadataStore> store,
      metadata::MetadataStore::Open(state_dir_ + "/metadata", kMetadataLockWaitNanos, faults_));
  snapshot::Options options;
  options.root = state_dir_;
  options.lazy_deadline_nanos = options_.config.snapshotter.lazy_deadline_nanos;
  options.trace = &trace_;
  options.faults = faults_;
  HF_ASSIGN_OR_RETURN(snapshotter_, snapshot::Snapshotter::Create(options, store.get(), layers_.get()));
  MutexLock lock(&mutex_);
  store_ = std::move(store);
  return absl::OkStatus();
}

void Worker::CloseMetadata() {
  if (content_ != nullptr) content_->AllowEviction(false);
  if (snapshotter_ != nullptr) snapshotter_->Abort();
  if (restore_thread_.joinable()) restore_thread_.join();
  if (snapshotter_ != nullptr) former_.push_back(std::move(snapshotter_));
  std::unique_ptr<metadata::MetadataStore> closing;
  {
    MutexLock lock(&mutex_);
    closing = std::move(store_);
  }
}

absl::Status Worker::Park() {
  TraceSpan span(&trace_, "worker.park", "generation=" + std::to_string(generation_));
  HF_RETURN_IF_ERROR(PassFault(faults_, "worker.park"));
  parked_ = true;
  content_->AllowEviction(false);  // the successor reads by now
  reader_->Pause(true);
  server_->Park();
  return absl::OkStatus();
}

absl::Status Worker::Resume() {
  TraceSpan span(&trace_, "worker.resume", "generation=" + std::to_string(generation_));
  HF_RETURN_IF_ERROR(SyncMounts());
  server_->Resume();
  parked_ = false;
  if (snapshotter_ != nullptr) {  // still the owner
    content_->AllowEviction(true);
    reader_->Pause(false);
  }
  HF_RETURN_IF_ERROR(AdoptLedgers());
  // The supervisor names only ledgers that still hold something; these are let go all the same.
  for (uint64_t generation : std::exchange(exited_while_parked_, {})) {
    HF_RETURN_IF_ERROR(OwnerExited(generation));
  }
  return absl::OkStatus();
}

absl::Status Worker::YieldMetadata() {
  TraceSpan span(&trace_, "worker.yield_metadata", "generation=" + std::to_string(generation_));
  HF_RETURN_IF_ERROR(PassFault(faults_, "worker.yield_metadata"));
  HF_RETURN_IF_ERROR(WaitForService());
  service_->DetachAndForward(forward_path_);
  CloseMetadata();
  LOG(INFO) << "worker.yielded generation=" << generation_;
  return absl::OkStatus();
}

absl::Status Worker::Retire() {
  if (retire_thread_.joinable()) return absl::OkStatus();
  // Never parked: the supervisor shuts down, and there is no successor to whom calls could be forwarded.
  const milliseconds limit = parked_ ? kDrainLimit : milliseconds(0);
  retire_thread_ = std::thread([this, limit] {
    // While old connections age, a new supervisor must be able to listen.
    if (WaitForService().ok()) service_->CloseListener();
    content_->Flush();
    const bool drained = limit.count() == 0 || !WaitForService().ok() || service_->WaitDrained(limit);
    LOG(INFO) << "worker.retired generation=" << generation_ << " connections_left=" << !drained;
    options_.exit(0);
  });
  return absl::OkStatus();
}

void Worker::MountsGone(const std::vector<uint64_t>& mount_ids) { layers_->ForgetMounts(mount_ids); }

void Worker::SupervisorLost() {
  const size_t mounts = layers_->mount_count();
  LOG(ERROR) << "worker.supervisor_lost generation=" << generation_ << " mounts=" << mounts
             << " effect=\"reads go on; nothing can be mounted or unmounted\"";
  if (mounts == 0) options_.exit(0);
  // Parked for a successor that may never serve now. Should it serve after all, both may read: every request
  // reaches one of them.
  if (parked_ && !retire_thread_.joinable()) {
    server_->Resume();
    parked_ = false;
  }
  // Soon, too: the next supervisor cannot listen while we hold the socket.
  if (WaitForService().ok()) service_->CloseListener();
  // Its worker needs the metadata; calls on old connections go to it.
  absl::Status yielded = YieldMetadata();
  LOG_IF(ERROR, !yielded.ok()) << "worker.yield_failed error=" << yielded;
}

uint64_t Worker::PingLoopAgeNanos() {
  const auto* header = static_cast<const hf_ledger_header*>(ledger_header_);
  const uint64_t beat = __atomic_load_n(&header->loop_heartbeat_ns, __ATOMIC_RELAXED);
  const uint64_t now = clock_->BootNanos();
  return beat == 0 || beat > now ? 0 : now - beat;
}

void Worker::Housekeeping() {
  uint64_t next_flush = clock_->BootNanos() + kFlushEveryNanos;
  while (true) {
    bool owner = false;
    std::vector<uint64_t> ended;
    {
      MutexLock lock(&mutex_);
      if (!stopping_) changed_.WaitUntil(&mutex_, std::chrono::steady_clock::now() + kHousekeeping);
      if (stopping_) return;
      owner = store_ != nullptr;
      ended.swap(ended_mounts_);
    }
    if (!ended.empty()) layers_->ForgetMounts(ended);
    // An orphan ends with the last container that needs it.
    if (link_->lost() && layers_->mount_count() == 0) options_.exit(0);
    ReportDrained();
    if (!owner || clock_->BootNanos() < next_flush) continue;
    content_->Flush();
    next_flush = clock_->BootNanos() + kFlushEveryNanos;
  }
}

// The supervisor drops a ledger by itself when nothing is in it; this tells it of records that we answered
// since.
void Worker::ReportDrained() {
  std::vector<uint64_t> candidates;
  {
    MutexLock lock(&mutex_);
    for (const auto& [generation, exited] : old_ledgers_) {
      if (exited) candidates.push_back(generation);
    }
  }
  for (uint64_t generation : candidates) {
    if (!server_->Drained(generation)) continue;
    absl::Status told = link_->Drained(generation);
    if (!told.ok()) return;
    MutexLock lock(&mutex_);
    old_ledgers_.erase(generation);
  }
}

std::vector<handover::LayerInfo> Worker::Layers() { return layers_->Layers(); }

std::vector<handover::SnapshotInfo> Worker::Snapshots() {
  std::vector<metadata::SnapshotRow> rows;
  {
    MutexLock lock(&mutex_);
    if (store_ != nullptr) rows = store_->All();
  }
  std::vector<handover::SnapshotInfo> snapshots;
  for (metadata::SnapshotRow& row : rows) {
    snapshots.push_back({std::move(row.key), std::move(row.parent), metadata::KindName(row.kind),
                         std::move(row.lazy_digest), std::move(row.lazy_image), row.id,
                         row.created_wall_nanos});
  }
  return snapshots;
}

handover::WorkerStats Worker::Stats() {
  const fetch::FetchStats fetch = client_->stats();
  const cache::StoreStats cache = content_->stats();
  handover::WorkerStats stats;
  stats.fetch_requests = fetch.requests;
  stats.fetch_bytes = fetch.bytes;
  stats.fetch_failures = fetch.failures;
  stats.fetch_retries = fetch.retries;
  stats.fetch_in_flight = fetch.in_flight;
  stats.cache_bytes = cache.bytes;
  stats.cache_limit_bytes = cache.limit_bytes;
  stats.cache_evicted_bytes = cache.evicted_bytes;
  stats.cache_damaged_chunks = cache.damaged_chunks;
  stats.cache_unstored_bytes = cache.unstored_bytes;
  return stats;
}

std::vector<TraceEvent> Worker::Trace(uint32_t limit) {
  std::vector<TraceEvent> events = trace_.Snapshot();
  if (events.size() > limit) events.erase(events.begin(), events.end() - limit);
  return events;
}

}  // namespace holdfast::app
