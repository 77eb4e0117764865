#include "worker/app/layer_resolver.h"

#include <chrono>
#include <functional>
#include <utility>

#include "glog/logging.h"
#include "worker/layer/digest.h"
#include "worker/layer/layer_index.h"

namespace holdfast::app {
namespace {

// Turns one asynchronous fetch into a blocking call. The callback may come after the waiter gave up.
template <typename T>
class Waiter {
 public:
  std::function<void(absl::StatusOr<T>)> Callback() {
    return [state = state_](absl::StatusOr<T> result) {
      MutexLock lock(&state->mutex);
      state->result = std::move(result);
      state->done = true;
      state->changed.SignalAll();
    };
  }
  absl::StatusOr<T> Wait() {
    MutexLock lock(&state_->mutex);
    while (!state_->done) state_->changed.Wait(&state_->mutex);
    return std::move(state_->result);
  }

 private:
  struct State {
    Mutex mutex;
    CondVar changed;
    bool done ABSL_GUARDED_BY(mutex) = false;
    absl::StatusOr<T> result ABSL_GUARDED_BY(mutex) = Internal("no answer");
  };
  std::shared_ptr<State> state_ = std::make_shared<State>();
};

// What a malformed layer means here: it cannot be lazy.
absl::Status CannotBeLazy(const absl::Status& status, const char* what) {
  return FailedPrecondition(std::string(what) + ": " + std::string(FromAbsl(status.message())));
}

absl::Status CheckTocDigest(const std::string& wanted, const std::string& found) {
  if (wanted.empty() || wanted == found) return absl::OkStatus();
  return FailedPrecondition("the TOC's digest is " + found + ", the image says " + wanted);
}

}  // namespace

LayerResolver::LayerResolver(const ResolverOptions& options, LayerFiles* files, fetch::RegistryClient* client)
    : options_(options), files_(files), client_(client) {
  for (int i = 0; i < options_.ahead_threads; ++i) threads_.emplace_back([this] { AheadLoop(); });
}

LayerResolver::~LayerResolver() {
  {
    MutexLock lock(&mutex_);
    stopping_ = true;
    ahead_.clear();
    changed_.SignalAll();
  }
  for (std::thread& thread : threads_) thread.join();
}

absl::StatusOr<LayerRecord> LayerResolver::Resolve(const ResolveRequest& request) {
  if (!layer::IsSha256Digest(request.layer_digest)) {
    return FailedPrecondition("not a layer digest: " + request.layer_digest);
  }
  if (request.toc_digest.empty()) {
    return FailedPrecondition(
        "the image names no TOC digest for this layer, so its content could not be verified");
  }
  TraceSpan span(options_.trace, "layer.resolve", "layer=" + request.layer_digest);
  HF_ASSIGN_OR_RETURN(LayerRecord record, Join(request));
  if (!CheckTocDigest(request.toc_digest, record.toc_digest).ok()) {
    // Resolved ahead, unverified, or by an image that lied: only this image's own word counts for it.
    HF_ASSIGN_OR_RETURN(record, Fetch(request));
  }
  return record;
}

void LayerResolver::ResolveAhead(const ResolveRequest& request) {
  if (!layer::IsSha256Digest(request.layer_digest)) return;
  MutexLock lock(&mutex_);
  if (stopping_ || ahead_.size() >= options_.max_ahead || flights_.count(request.layer_digest) != 0) return;
  ahead_.push_back(request);
  changed_.SignalAll();
}

void LayerResolver::AheadLoop() {
  while (true) {
    ResolveRequest request;
    {
      MutexLock lock(&mutex_);
      while (!stopping_ && ahead_.empty()) changed_.Wait(&mutex_);
      if (stopping_) return;
      request = std::move(ahead_.front());
      ahead_.pop_front();
    }
    absl::StatusOr<LayerRecord> record = Join(request);
    VLOG_IF(1, !record.ok()) << "layer.ahead_failed layer=" << request.layer_digest
                             << " error=" << record.status();
  }
}

absl::StatusOr<LayerRecord> LayerResolver::Join(const ResolveRequest& request) {
  std::shared_ptr<Flight> flight;
  bool leader = false;
  {
    MutexLock lock(&mutex_);
    std::shared_ptr<Flight>& slot = flights_[request.layer_digest];
    leader = slot == nullptr;
    if (leader) slot = std::make_shared<Flight>();
    flight = slot;
    while (!leader && !flight->done && !stopping_) {
      uint64_t now = options_.clock->BootNanos();
      if (now >= request.deadline_boot_nanos) return DeadlineExceeded("layer not resolved in time");
      auto left =
          std::chrono::nanoseconds(std::min<uint64_t>(request.deadline_boot_nanos - now, 1'000'000'000));
      changed_.WaitUntil(&mutex_, std::chrono::steady_clock::now() + left);
    }
    if (!leader) return flight->done ? flight->result : Cancelled("the worker is ending");
  }
  absl::StatusOr<LayerRecord> result = LoadOrFetch(request);
  MutexLock lock(&mutex_);
  flight->result = result;
  flight->done = true;
  flights_.erase(request.layer_digest);
  changed_.SignalAll();
  return result;
}

absl::StatusOr<LayerRecord> LayerResolver::LoadOrFetch(const ResolveRequest& request) {
  absl::StatusOr<LayerRecord> known = files_->Load(request.layer_digest);
  if (known.ok()) {
    // The index may be damaged or gone: then the layer is as good as unknown.
    auto index = layer::LayerIndex::Open(files_->IndexPath(known->layer_digest, known->index_sha256),
                                         known->index_sha256);
    if (index.ok() && CheckTocDigest(request.toc_digest, known->toc_digest).ok()) {
      absl::Status noted = files_->AddImage(request.layer_digest, request.image_ref);
      LOG_IF(WARNING, !noted.ok()) << "layer.image_not_noted layer=" << request.layer_digest
                                   << " error=" << noted;
      return known;
    }
  }
  return Fetch(request);
}

absl::StatusOr<LayerRecord> LayerResolver::Fetch(const ResolveRequest& request) {
  fetch::BlobRef blob;
  HF_ASSIGN_OR_RETURN(blob.image, fetch::ParseImageReference(request.image_ref));
  blob.digest = request.layer_digest;
  blob.tenant = request.tenant;

  Waiter<fetch::RegistryClient::Tail> tail_waiter;
  client_->FetchTail(blob, options_.tail_bytes, request.deadline_boot_nanos, tail_waiter.Callback());
  HF_ASSIGN_OR_RETURN(fetch::RegistryClient::Tail tail, tail_waiter.Wait());

  const std::string_view bytes = tail.bytes;
  const size_t footer_bytes = std::min<size_t>(bytes.size(), toc::kFooterTailBytes);
  absl::StatusOr<toc::Footer> footer =
      toc::ParseFooter(bytes.substr(bytes.size() - footer_bytes), tail.blob_size);
  if (!footer.ok()) return CannotBeLazy(footer.status(), "no eStargz layer");
  const uint64_t toc_end = tail.blob_size - footer->footer_size;
  if (footer->toc_offset >= toc_end || toc_end - footer->toc_offset > options_.limits.max_toc_bytes) {
    return FailedPrecondition("no eStargz layer: its footer points to a TOC of impossible size");
  }

  const uint64_t tail_start = tail.blob_size - bytes.size();
  std::string member;
  if (footer->toc_offset < tail_start) {
    Waiter<std::string> waiter;
    client_->FetchRange(blob, footer->toc_offset, tail_start - footer->toc_offset, cache::Priority::kDemand,
                        request.deadline_boot_nanos, waiter.Callback());
    HF_ASSIGN_OR_RETURN(member, waiter.Wait());
  }
  const uint64_t from = std::max(footer->toc_offset, tail_start) - tail_start;
  member += bytes.substr(from, toc_end - tail_start - from);

  absl::StatusOr<std::string> json = toc::ExtractTocJson(member, options_.limits);
  if (!json.ok()) return CannotBeLazy(json.status(), "TOC");
  return Build(request, *json, footer->toc_offset, tail.blob_size);
}

absl::StatusOr<LayerRecord> LayerResolver::Build(const ResolveRequest& request, const std::string& json,
                                                 uint64_t toc_offset, uint64_t blob_size) {
  LayerRecord record;
  record.layer_digest = request.layer_digest;
  record.toc_digest = layer::Sha256Name(json);
  record.blob_size = blob_size;
  record.numbering_version = layer::kNumberingVersion;
  HF_RETURN_IF_ERROR(CheckTocDigest(request.toc_digest, record.toc_digest));

  absl::StatusOr<toc::Toc> parsed = toc::ParseEstargzToc(json, toc_offset, blob_size, options_.limits);
  if (!parsed.ok()) return CannotBeLazy(parsed.status(), "TOC");
  layer::IndexInfo info;
  info.layer_digest = record.layer_digest;
  info.blob_size = blob_size;
  info.toc_digest = record.toc_digest;
  info.prefetch_end = parsed->prefetch_end;
  absl::StatusOr<layer::BuiltIndex> built =
      layer::BuildLayerIndex(*parsed, info, [](const std::string&) { return std::nullopt; });
  if (!built.ok()) return CannotBeLazy(built.status(), "index");
  record.index_sha256 = built->sha256;
  if (absl::StatusOr<LayerRecord> known = files_->Load(request.layer_digest); known.ok()) {
    record.images = known->images;
  }
  record.images.insert(request.image_ref);
  HF_RETURN_IF_ERROR(files_->StoreIndex(record.layer_digest, record.index_sha256, built->bytes));
  HF_RETURN_IF_ERROR(files_->Store(record));
  LOG(INFO) << "layer.resolved layer=" << record.layer_digest << " toc=" << record.toc_digest
            << " index=" << record.index_sha256 << " blob_bytes=" << blob_size
            << " entries=" << parsed->entries.size();
  return record;
}

}  // namespace holdfast::app
