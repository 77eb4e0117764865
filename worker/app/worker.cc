#include "worker/app/worker.h"

#include <fcntl.h>
#include <sys/epoll.h>
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
#include "common/unhurried.h"
#include "glog/logging.h"
#include "schema/ledger.h"
#include "worker/app/build_info.h"

namespace holdfast::app {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds kHousekeeping{200};
constexpr milliseconds kUrgentServing{200};
constexpr uint64_t kHurryNanos = 5'000'000'000;  // several times what a swap takes until the park
constexpr uint64_t kFlushEveryNanos = 5'000'000'000;
constexpr uint64_t kMetadataLockWaitNanos = 5'000'000'000;
constexpr milliseconds kDrainLimit{570'000};    // short of the supervisor's limit of 10 minutes
constexpr uint64_t kSampleNanos = 500'000'000;  // of requests, and of files; a swap waits for it, no reader
constexpr uint64_t kOpenAheadNanos = 1'000'000'000;  // nobody waits for a worker that prepares
constexpr int kReservedDescriptors = 4096;           // for 1,000 mounts, one and two a layer; 33 KiB
constexpr size_t kHeldMountsPerPage = 200, kHeldLedgersPerPage = 7;  // 253 descriptors a message

// Where the successor will answer snapshots calls: the listening socket is the same for all generations.
absl::StatusOr<std::string> PathOfSocket(int fd) {
  sockaddr_un address{};
  socklen_t size = sizeof address;
  if (getsockname(fd, static_cast<sockaddr*>(static_cast<void*>(&address)), &size) != 0) {
    return ErrnoStatus(errno, "snapshot listener");
  }
  return std::string(address.sun_path, strnlen(address.sun_path, sizeof address.sun_path));
}

// The table of descriptors grows now, while the process has one thread. Once it has more, the kernel waits on
// each doubling until no CPU can still be looking at the old table (synchronize_rcu): some milliseconds each,
// and a fresh worker at 70 mounts doubles it three times before its first answer.
void ReserveDescriptors() {
  UniqueFd some(epoll_create1(EPOLL_CLOEXEC));
  UniqueFd highest(fcntl(some.get(), F_DUPFD_CLOEXEC, kReservedDescriptors - 1));
  PLOG_IF(WARNING, !highest.valid()) << "worker.descriptors_not_reserved";  // it is only slower
}

absl::StatusOr<handover::OldLedger> DupLedger(const handover::OldLedger& ledger) {
  handover::OldLedger copy;
  copy.generation = ledger.generation;
  copy.owner_exited = ledger.owner_exited;
  copy.owner_hung = ledger.owner_hung;
  HF_ASSIGN_OR_RETURN(copy.memory, DupFd(ledger.memory.get()));
  for (const handover::PipePair& pair : ledger.pipes) {
    handover::PipePair both;
    HF_ASSIGN_OR_RETURN(both.read_end, DupFd(pair.read_end.get()));
    HF_ASSIGN_OR_RETURN(both.write_end, DupFd(pair.write_end.get()));
    copy.pipes.push_back(std::move(both));
  }
  return copy;
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
  constexpr long kMost = HF_LEDGER_SLOTS - 1;  // the last slot is for adopted requests
  if (config.fuse.threads > 0) return static_cast<int>(std::min<long>(config.fuse.threads, kMost));
  const long processors = sysconf(_SC_NPROCESSORS_ONLN);
  return static_cast<int>(std::clamp<long>(processors, 2, kMost));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Worker>> Worker::Create(const Options& options) {
  ReserveDescriptors();
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
  capabilities_ = welcome->capabilities;
  {
    MutexLock lock(&mutex_);
    vault_id_ = welcome->vault_id;
  }
  may_reattach_ = (capabilities_ & handover::kCapReattach) != 0 && !welcome->control_socket.empty() &&
                  welcome->state.valid();
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
  housekeeping_loop_ = LoopWatch::Add(&watch_, "housekeeping");
  housekeeping_thread_ = std::thread([this] { Housekeeping(); });
  UniqueFd listener = std::move(welcome->snapshot_listener);
  if (may_reattach_) {
    HF_ASSIGN_OR_RETURN(UniqueFd copy, DupFd(listener.get()));
    MutexLock lock(&mutex_);
    listener_ = std::move(copy);
  }
  link_->Start(this, this);
  // Reads do not wait for gRPC to start, nor for the processor that it keeps busy meanwhile; TakeMetadata
  // does.
  LeaveUrgency();
  {
    const auto limit = std::chrono::steady_clock::now() + std::chrono::nanoseconds(options_.api_wait_nanos);
    MutexLock lock(&mutex_);
    while (!ready_ && std::chrono::steady_clock::now() < limit) changed_.WaitUntil(&mutex_, limit);
  }
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
  fetch_options.watch = &watch_;
  client_ = fetch::RegistryClient::Create(fetch_options);

  layer::LayerReaderOptions reader_options;
  reader_options.trace = &trace_;
  reader_options.faults = faults_;
  reader_options.watch = &watch_;
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
  options.build = options_.build;
  options.threads = PoolThreads(options_.config);
  options.miss_timeout_nanos = options_.config.fetch.miss_timeout_nanos;
  options.trace = &trace_;
  options.watch = &watch_;
  options.faults = faults_;
  options.find_mounts = [this] {
    absl::Status synced = SyncMounts();
    LOG_IF(ERROR, !synced.ok()) << "worker.mounts_not_asked error=" << LogValue(FromAbsl(synced.message()));
  };
  handover::OldLedger own;
  own.generation = generation_;
  own.memory = std::move(welcome->ledger);
  own.pipes = std::move(welcome->request_pipes);
  if (may_reattach_) HF_RETURN_IF_ERROR(Keep(own));
  HF_ASSIGN_OR_RETURN(
      server_, fuse::FuseServer::Create(options, ToHandle(std::move(own.memory), std::move(own.pipes))));
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

absl::Status Worker::Keep(const handover::OldLedger& ledger) {
  HF_ASSIGN_OR_RETURN(handover::OldLedger copy, DupLedger(ledger));
  MutexLock lock(&mutex_);
  held_ledgers_[ledger.generation] = std::move(copy);
  return absl::OkStatus();
}

void Worker::AdoptMounts(std::vector<handover::MountEntry> entries) {
  for (handover::MountEntry& entry : entries) {
    const uint64_t id = entry.mount_id;
    if (layers_->Serves(id)) continue;
    absl::Status adopted = layers_->AdoptMount(std::move(entry));
    // One broken mount must not keep the others from being served.
    LOG_IF(ERROR, !adopted.ok()) << "worker.mount_not_served mount=" << id << " error=" << adopted;
  }
}

absl::Status Worker::SyncMounts() {
  // Asked first: what a Prepare mounts meanwhile may be missing in the list, and is not gone for that.
  const std::vector<uint64_t> served = layers_->ServedMounts();
  HF_ASSIGN_OR_RETURN(std::vector<handover::MountEntry> entries, link_->ListMounts(0));
  std::set<uint64_t> held;
  for (const handover::MountEntry& entry : entries) held.insert(entry.mount_id);
  AdoptMounts(std::move(entries));
  std::vector<uint64_t> gone;
  for (uint64_t id : served) {
    if (held.count(id) == 0) gone.push_back(id);
  }
  layers_->ForgetMounts(gone);
  return absl::OkStatus();
}

absl::Status Worker::AddNewMounts() {
  uint64_t seen = last_mount_seen_;
  HF_ASSIGN_OR_RETURN(std::vector<handover::MountEntry> entries, link_->ListMounts(seen));
  if (entries.empty()) return absl::OkStatus();
  const uint64_t last = entries.back().mount_id;
  AdoptMounts(std::move(entries));
  // Not before: Serve may come here while the housekeeping does, and must not go on without them.
  while (seen < last && !last_mount_seen_.compare_exchange_weak(seen, last)) {
  }
  return absl::OkStatus();
}

absl::Status Worker::AdoptLedgers() {
  HF_ASSIGN_OR_RETURN(std::vector<handover::OldLedger> ledgers, link_->OldLedgers());
  return AdoptLedgers(std::move(ledgers));
}

absl::Status Worker::AdoptLedgers(std::vector<handover::OldLedger> ledgers) {
  size_t failed = 0;
  for (handover::OldLedger& ledger : ledgers) {
    const uint64_t generation = ledger.generation;
    const bool exited = ledger.owner_exited || ExitWasTold(generation);
    absl::Status kept = may_reattach_ ? Keep(ledger) : absl::OkStatus();
    LOG_IF(ERROR, !kept.ok()) << "worker.ledger_not_kept generation=" << generation << " error=" << kept;
    absl::StatusOr<uint64_t> taken = server_->AdoptLedger(
        generation, ToHandle(std::move(ledger.memory), std::move(ledger.pipes)), exited, ledger.owner_hung);
    if (taken.ok()) {
      // Only now: the housekeeping thread reports it as drained, and a ledger not yet walked looks empty.
      MutexLock lock(&mutex_);
      OldLedgerState& state = old_ledgers_[generation];
      state.exited |= exited;
      state.hung |= ledger.owner_hung;
      continue;
    }
    // One unreadable ledger must not keep this worker, and every one after it, from serving all mounts.
    failed++;
    LOG(ERROR) << "worker.ledger_not_adopted generation=" << generation
               << " error=" << LogValue(FromAbsl(taken.status().message()));
  }
  LOG_IF(ERROR, failed > 0) << "worker.ledgers_not_adopted count=" << failed << " of=" << ledgers.size()
                            << " effect=\"requests in them stay unanswered\"";
  return absl::OkStatus();
}

absl::Status Worker::Prepare() {
  TraceSpan span(&trace_, "worker.prepare", "generation=" + std::to_string(generation_));
  HF_RETURN_IF_ERROR(PassFault(faults_, "worker.prepare"));
  // Nothing that it stores is believed before it has proved itself.
  if (!served_ && (capabilities_ & handover::kCapTrial) != 0) {
    content_->SetWriting(cache::ContentStore::Writing::kOnTrial);
  }
  HF_RETURN_IF_ERROR(SyncMounts());
  const std::vector<uint64_t> served = layers_->ServedMounts();
  if (!served.empty()) last_mount_seen_ = std::max(last_mount_seen_.load(), served.back());
  prepared_ = true;
  layers_->OpenAhead(kOpenAheadNanos);
  Ready();
  client_->Prepare();
  LOG(INFO) << "worker.prepared generation=" << generation_ << " mounts=" << served.size();
  // Whoever starts gRPC holds locks of libc that a thread needs to start others; Serve would wait for them.
  return WaitForService();
}

absl::Status Worker::Serve(handover::ServeOrder order) {
  // Reads wait for this. Refused, it goes on without; the supervisor has told so.
  if (options_.urgency != nullptr) options_.urgency->Begin(kUrgentAtMost).IgnoreError();
  absl::Status status = TakeOverReads(std::move(order));
  // What has piled up is answered first.
  if (options_.urgency != nullptr) options_.urgency->EndIn(kUrgentServing);
  return status;
}

absl::Status Worker::TakeOverReads(handover::ServeOrder order) {
  TraceSpan span(&trace_, "worker.serve", "generation=" + std::to_string(generation_));
  HF_RETURN_IF_ERROR(PassFault(faults_, "worker.serve"));
  const uint64_t begin = clock_->BootNanos();
  if (order.trial) HF_RETURN_IF_ERROR(server_->BeginTrial(std::move(order.touched)));
  trial_ = order.trial;
  content_->SetWriting(order.trial ? cache::ContentStore::Writing::kOnTrial
                                   : cache::ContentStore::Writing::kTrusted);
  if (!prepared_) {
    HF_RETURN_IF_ERROR(SyncMounts());
  } else if (!order.takeover || order.takeover->last_mount > last_mount_seen_) {
    HF_RETURN_IF_ERROR(AddNewMounts());
  }
  const uint64_t mounted = clock_->BootNanos();
  HF_RETURN_IF_ERROR(order.takeover ? AdoptLedgers(std::move(order.takeover->ledgers)) : AdoptLedgers());
  const uint64_t adopted = clock_->BootNanos();
  served_ = true;
  server_->Start();
  const uint64_t started = server_->stats().reading_since_nanos;
  LOG(INFO) << "worker.serving generation=" << generation_ << " mounts=" << layers_->mount_count()
            << " prepared=" << prepared_ << " trial=" << order.trial
            << " mounts_us=" << (mounted - begin) / 1000 << " ledgers_us=" << (adopted - mounted) / 1000
            << " start_us=" << (started - adopted) / 1000 << " us=" << (started - begin) / 1000;
  // The supervisor starts workers so that a spare is not the OOM killer's choice.
  if (absl::StatusOr<UniqueFd> score = OpenFile(options_.oom_score_file, O_WRONLY); score.ok()) {
    static_cast<void>(PwriteFull(score->get(), "0", 1, 0));
  }
  Ready();
  MutexLock lock(&mutex_);
  // A mount that was being made while Prepare asked may have got an id below one that was there already.
  sync_due_ = prepared_;
  changed_.SignalAll();
  return absl::OkStatus();
}

// What the supervisor waits for first is done.
void Worker::Ready() {
  MutexLock lock(&mutex_);
  ready_ = true;
  changed_.SignalAll();
}

absl::Status Worker::AddMounts(std::vector<handover::MountEntry> entries) {
  HF_RETURN_IF_ERROR(PassFault(faults_, "worker.add_mounts"));
  for (handover::MountEntry& entry : entries) {
    HF_RETURN_IF_ERROR(layers_->AdoptMount(std::move(entry), /*private_mount=*/true));
  }
  return absl::OkStatus();
}

absl::StatusOr<handover::SampleSet> Worker::Samples(uint32_t limit) {
  TraceSpan span(&trace_, "worker.samples", "limit=" + std::to_string(limit));
  HF_RETURN_IF_ERROR(PassFault(faults_, "worker.samples"));
  const uint64_t begin = clock_->BootNanos();
  handover::SampleSet set;
  for (fuse::Sample& sample : server_->Samples(limit, begin + kSampleNanos)) {
    set.requests.push_back({sample.mount_id, std::move(sample.request), std::move(sample.reply_digest)});
  }
  set.files = layers_->Samples(limit, clock_->BootNanos() + kSampleNanos);
  LOG(INFO) << "worker.sampled requests=" << set.requests.size() << " files=" << set.files.size()
            << " us=" << (clock_->BootNanos() - begin) / 1000;
  return set;
}

absl::StatusOr<handover::ReplayResult> Worker::Replay(const std::vector<handover::SampleRequest>& requests) {
  TraceSpan span(&trace_, "worker.replay", "requests=" + std::to_string(requests.size()));
  HF_RETURN_IF_ERROR(PassFault(faults_, "worker.replay"));
  handover::ReplayResult result;
  Unhurried unhurried;
  for (uint32_t i = 0; i < requests.size(); ++i) {
    unhurried.Rest();
    const handover::SampleRequest& sample = requests[i];
    absl::StatusOr<std::string> digest = server_->Replay(sample.mount_id, sample.request);
    if (digest.ok() && *digest == sample.reply_digest) continue;
    // Unmounted meanwhile, content evicted meanwhile, or a kind of request that this build does not sample.
    const absl::StatusCode code = digest.status().code();
    if (code == absl::StatusCode::kNotFound || code == absl::StatusCode::kUnavailable ||
        code == absl::StatusCode::kInvalidArgument) {
      result.skipped++;
      continue;
    }
    result.different.push_back(i);
    LOG(ERROR) << "worker.replay_differs mount=" << sample.mount_id << " index=" << i
               << " status=" << LogValue(FromAbsl(digest.status().ToString()));
  }
  return result;
}

void Worker::MayWrite() {
  const bool owner_and_trusted = snapshotter_ != nullptr && !trial_ && !parked_;
  content_->AllowEviction(owner_and_trusted);
  reader_->Pause(!owner_and_trusted);
}

absl::Status Worker::EndTrial() {
  HF_RETURN_IF_ERROR(PassFault(faults_, "worker.end_trial"));
  server_->EndTrial();
  trial_ = false;
  content_->SetWriting(cache::ContentStore::Writing::kTrusted);
  MayWrite();
  LOG(INFO) << "worker.trial_ended generation=" << generation_;
  return absl::OkStatus();
}

absl::Status Worker::Distrust(uint64_t generation, UniqueFd touched, const std::string& vault_id) {
  TraceSpan span(&trace_, "worker.distrust", "generation=" + std::to_string(generation));
  HF_RETURN_IF_ERROR(PassFault(faults_, "worker.distrust"));
  // The store first: what the kernel forgets is read again at once.
  HF_RETURN_IF_ERROR(UseVaultId(vault_id));
  absl::StatusOr<uint64_t> forgotten = server_->ForgetCached(std::move(touched));
  LOG(WARNING) << "worker.distrusted generation=" << generation
               << " nodes=" << (forgotten.ok() ? *forgotten : 0)
               << " status=" << LogValue(FromAbsl(forgotten.status().ToString()));
  return forgotten.status();
}

bool Worker::ExitWasTold(uint64_t generation) {
  MutexLock lock(&mutex_);
  return told_exits_.contains(generation);
}

absl::Status Worker::OwnerExited(uint64_t generation) {
  bool hung = false;
  {
    MutexLock lock(&mutex_);
    auto it = old_ledgers_.find(generation);
    if (it == old_ledgers_.end()) {  // its ledger is not ours to empty, or not yet
      told_exits_.insert(generation);
      return absl::OkStatus();
    }
    hung = it->second.hung;
    if (auto held = held_ledgers_.find(generation); held != held_ledgers_.end())
      held->second.owner_exited = true;
  }
  if (parked_) {  // Resume walks it
    exited_while_parked_.push_back(generation);
    return absl::OkStatus();
  }
  // The server knows the ledger from the first walk; it needs no new descriptors.
  HF_RETURN_IF_ERROR(
      server_->AdoptLedger(generation, fuse::LedgerHandle(), /*final_walk=*/true, hung).status());
  MutexLock lock(&mutex_);
  old_ledgers_[generation].exited = true;  // not before the walk: see AdoptLedgers
  return absl::OkStatus();
}

absl::Status Worker::TakeMetadata() {
  TraceSpan span(&trace_, "worker.take_metadata", "generation=" + std::to_string(generation_));
  HF_RETURN_IF_ERROR(PassFault(faults_, "worker.take_metadata"));
  HF_RETURN_IF_ERROR(WaitForService());
  HF_RETURN_IF_ERROR(SyncMounts());
  const bool opened = snapshotter_ == nullptr;
  if (opened) HF_RETURN_IF_ERROR(OpenMetadata());
  MayWrite();
  service_->Attach(snapshotter_.get());
  service_->StartAccepting();
  if (opened) restore_thread_ = std::thread([snapshotter = snapshotter_.get()] { snapshotter->Restore(); });
  LOG(INFO) << "worker.owner generation=" << generation_;
  return absl::OkStatus();
}

absl::Status Worker::OpenMetadata() {
  HF_ASSIGN_OR_RETURN(
      std::unique_ptr<metadata::MetadataStore> store,
      metadata::MetadataStore::Open(state_dir_ + "/metadata", kMetadataLockWaitNanos, faults_, &watch_));
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
  // Before the successor is granted anything: no eviction, no prefetch, nothing stored any more.
  MayWrite();
  content_->SetWriting(cache::ContentStore::Writing::kNone);
  server_->Park();
  return absl::OkStatus();
}

absl::Status Worker::Resume() {
  TraceSpan span(&trace_, "worker.resume", "generation=" + std::to_string(generation_));
  HF_RETURN_IF_ERROR(PassFault(faults_, "worker.resume"));
  content_->SetWriting(cache::ContentStore::Writing::kTrusted);
  if (options_.urgency != nullptr) options_.urgency->Begin(kUrgentAtMost).IgnoreError();
  server_->Resume();  // first of all: readers wait
  if (options_.urgency != nullptr) options_.urgency->EndIn(kUrgentServing);
  parked_ = false;
  trial_ = false;
  MayWrite();
  HF_RETURN_IF_ERROR(SyncMounts());
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
    {
      MutexLock lock(&mutex_);
      listener_.Reset();
    }
    content_->Flush();
    const bool drained = limit.count() == 0 || !WaitForService().ok() || service_->WaitDrained(limit);
    LOG(INFO) << "worker.retired generation=" << generation_ << " connections_left=" << !drained;
    options_.exit(0);
  });
  return absl::OkStatus();
}

void Worker::MountsGone(const std::vector<uint64_t>& mount_ids) { layers_->ForgetMounts(mount_ids); }

absl::StatusOr<handover::Page<handover::HeldMount>> Worker::HeldMounts(uint64_t after) {
  return layers_->HeldMounts(after, kHeldMountsPerPage);
}

absl::StatusOr<handover::Page<handover::OldLedger>> Worker::HeldLedgers(uint64_t after) {
  handover::Page<handover::OldLedger> page;
  MutexLock lock(&mutex_);
  for (auto it = held_ledgers_.upper_bound(after); it != held_ledgers_.end(); ++it) {
    if (page.elements.size() == kHeldLedgersPerPage) {
      page.more = true;
      break;
    }
    HF_ASSIGN_OR_RETURN(handover::OldLedger copy, DupLedger(it->second));
    page.elements.push_back(std::move(copy));
  }
  return page;
}

absl::StatusOr<UniqueFd> Worker::HeldListener() {
  MutexLock lock(&mutex_);
  if (!listener_.valid()) return FailedPrecondition("the listening socket is closed");
  return DupFd(listener_.get());
}

handover::WorkerActions::AfterLoss Worker::SupervisorLost() {
  const size_t mounts = layers_->mount_count();
  const bool retiring = retire_thread_.joinable();
  const bool looks_for_next = may_reattach_ && !refused_ && !retiring;
  LOG(ERROR) << "worker.supervisor_lost generation=" << generation_ << " mounts=" << mounts
             << " looks_for_next=" << looks_for_next
             << " effect=\"reads go on; nothing can be mounted or unmounted\"";
  looks_for_next_ = looks_for_next;
  lost_since_nanos_ = clock_->BootNanos();
  if (!served_ || (mounts == 0 && !looks_for_next)) options_.exit(0);
  // Parked for a successor that may never serve now. Should it serve after all, both may read: every request
  // reaches one of them.
  if (parked_ && !retiring) {
    content_->SetWriting(cache::ContentStore::Writing::kTrusted);
    server_->Resume();
    parked_ = false;
  }
  if (looks_for_next) return AfterLoss::kReattach;
  GiveUpMetadata();
  return AfterLoss::kServeOn;
}

void Worker::GiveUpMetadata() {
  // Soon: the next supervisor cannot listen while we hold the socket.
  if (WaitForService().ok()) service_->CloseListener();
  {
    MutexLock lock(&mutex_);
    listener_.Reset();
  }
  // Its worker needs the metadata; calls on old connections go to it.
  absl::Status yielded = YieldMetadata();
  LOG_IF(ERROR, !yielded.ok()) << "worker.yield_failed error=" << yielded;
}

absl::StatusOr<bool> Worker::Reattaching() {
  HF_RETURN_IF_ERROR(PassFault(faults_, "worker.reattach"));
  MutexLock lock(&mutex_);
  return store_ != nullptr;
}

void Worker::Reattached(const std::string& vault_id) {
  lost_since_nanos_ = 0;
  LOG(INFO) << "worker.reattached generation=" << generation_ << " mounts=" << layers_->mount_count();
  {
    MutexLock lock(&mutex_);
    if (vault_id.empty() || vault_id == vault_id_) return;
  }
  absl::Status used = UseVaultId(vault_id);
  LOG_IF(ERROR, !used.ok()) << "worker.vault_id_refused error=" << LogValue(FromAbsl(used.message()));
}

absl::Status Worker::UseVaultId(const std::string& vault_id) {
  absl::Status renewed = content_->SetVaultId(vault_id);
  if (absl::IsInvalidArgument(renewed)) return renewed;
  // The marks are distrusted all the same, and the file is renamed when it is opened next.
  LOG_IF(ERROR, !renewed.ok()) << "worker.vault_id_not_written error="
                               << LogValue(FromAbsl(renewed.message()));
  MutexLock lock(&mutex_);
  vault_id_ = vault_id;
  return absl::OkStatus();
}

void Worker::ReattachRefused(const absl::Status& why) {
  refused_ = true;
  looks_for_next_ = false;
  LOG(ERROR) << "worker.reattach_refused generation=" << generation_
             << " reason=" << LogValue(FromAbsl(why.message()))
             << " effect=\"reads go on until the last mount ends\"";
  GiveUpMetadata();
  if (layers_->mount_count() == 0) options_.exit(0);
}

uint64_t Worker::PoolAgeNanos() const {
  if (!served_) return 0;  // there is no pool yet
  const auto* header = static_cast<const hf_ledger_header*>(ledger_header_);
  const uint64_t beat = __atomic_load_n(&header->loop_heartbeat_ns, __ATOMIC_RELAXED);
  const uint64_t now = clock_->BootNanos();
  return beat == 0 || beat > now ? 0 : now - beat;
}

handover::Health Worker::Ping() {
  handover::Health health;
  LoopWatch::Age oldest = watch_.Oldest();
  health.loop_age_nanos = PoolAgeNanos();
  health.loop = "fuse";
  if (oldest.nanos > health.loop_age_nanos) {
    health.loop_age_nanos = oldest.nanos;
    health.loop = std::move(oldest.name);
  }
  health.held_back = server_->HeldBack();
  return health;
}

void Worker::SwapAhead(bool over) { server_->Hurry(over ? 0 : kHurryNanos); }

void Worker::Housekeeping() {
  uint64_t next_flush = clock_->BootNanos() + kFlushEveryNanos;
  uint64_t next_refresh = clock_->BootNanos() + options_.refresh_nanos;
  while (true) {
    bool owner = false, sync = false;
    std::vector<uint64_t> ended;
    housekeeping_loop_->Idle();
    {
      MutexLock lock(&mutex_);
      if (!stopping_ && !sync_due_) {
        changed_.WaitUntil(&mutex_, std::chrono::steady_clock::now() + kHousekeeping);
      }
      if (stopping_) return;
      owner = store_ != nullptr;
      sync = std::exchange(sync_due_, false);
      ended.swap(ended_mounts_);
    }
    if (sync) {
      absl::Status synced = SyncMounts();  // waits for the supervisor, so it is not the loop's work
      LOG_IF(ERROR, !synced.ok()) << "worker.sync_failed error=" << LogValue(FromAbsl(synced.message()));
    }
    if (clock_->BootNanos() >= next_refresh) {
      Refresh();
      next_refresh = clock_->BootNanos() + options_.refresh_nanos;
    }
    if (served_) client_->Prepare();
    ReportDrained();
    LoopWatch::Turn turn(housekeeping_loop_.get());
    if (!ended.empty()) layers_->ForgetMounts(ended);
    EndIfUnneeded();
    if (!owner || clock_->BootNanos() < next_flush) continue;
    content_->Flush();
    next_flush = clock_->BootNanos() + kFlushEveryNanos;
  }
}

// What the first requests of a worker that waits to serve will need is open when they come, and nothing that
// was evicted meanwhile.
void Worker::Refresh() {
  layers_->LetGoOfEvicted();
  if (!prepared_ || served_) return;
  // New ones cost nothing to ask for. Now and then all: one that went just as it was added is let go of.
  absl::Status known = ++refreshes_ % options_.sync_every_refresh == 0 ? SyncMounts() : AddNewMounts();
  if (known.ok()) layers_->OpenAhead(kOpenAheadNanos);  // else the supervisor is gone
}

// An orphan ends with the last container that needs it; one that looks for a supervisor waits a little first.
void Worker::EndIfUnneeded() {
  const uint64_t lost_since = lost_since_nanos_;
  if (lost_since == 0 || !link_->lost() || layers_->mount_count() > 0) return;
  const uint64_t limit = looks_for_next_ ? options_.orphan_limit_nanos : 0;
  if (clock_->BootNanos() - lost_since >= limit) options_.exit(0);
}

// The supervisor drops a ledger by itself when nothing is in it; this tells it of records that we answered
// since.
void Worker::ReportDrained() {
  std::vector<uint64_t> candidates;
  {
    MutexLock lock(&mutex_);
    for (const auto& [generation, state] : old_ledgers_) {
      if (state.exited) candidates.push_back(generation);
    }
  }
  for (uint64_t generation : candidates) {
    if (!server_->Drained(generation)) continue;
    absl::Status told = link_->Drained(generation);
    if (!told.ok()) return;
    MutexLock lock(&mutex_);
    old_ledgers_.erase(generation);
    held_ledgers_.erase(generation);
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

absl::StatusOr<std::string> Worker::MountPrivate(const std::string& name, const std::string& blob) {
  if (!options_.drill)
    return FailedPrecondition("only the private instance of a drill mounts for holdfastctl");
  const bool plain = !name.empty() && name.find_first_not_of("0123456789") == std::string::npos;
  if (!plain) return InvalidArgument("'" + name + "' is no number");
  const std::string path = state_dir_ + "/drill/" + name;
  HF_RETURN_IF_ERROR(MakeDirs(path));
  HF_RETURN_IF_ERROR(layers_->MountPrivate(path, blob));
  return path;
}

}  // namespace holdfast::app
