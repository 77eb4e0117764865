// What is fetched before it is asked for: the range the image's author marked, and the next chunk of a file
// that is read forward.
#include <utility>

#include "worker/layer/layer_impl.h"

namespace holdfast::layer {
namespace {

constexpr uint64_t kPrefetchNanos = 60'000'000'000;
constexpr size_t kMaxSequences = 256;

}  // namespace

void LayerImpl::FollowSequence(uint64_t nodeid, const std::vector<ChunkPart>& parts, bool missed) {
  const NodeRecord* node = index_->node(nodeid);
  if (parts.empty() || node->count < 2) return;
  uint64_t last = parts.back().chunk;
  uint64_t next = last + 1;
  bool forward = false;
  {
    MutexLock lock(&sequence_mutex_);
    auto it = expected_.find(nodeid);
    for (const ChunkPart& part : parts)
      forward = forward || (it != expected_.end() && it->second == part.chunk);
    if (!forward && !missed) return;
    if (expected_.size() >= kMaxSequences && it == expected_.end()) expected_.clear();
    expected_[nodeid] = next;
  }
  if (!forward || next >= node->first + node->count || next >= index_->chunk_count()) return;
  if (content_->StateOf(*content_->files(), next) != cache::ChunkState::kAbsent) return;
  // Posted: the caller may be a thread that must not even begin a fetch.
  shared_->pool->Post([self = shared_from_this(), next] {
    self->shared_->scheduler.Prefetch(self->ReadAheadJob(next), /*soon=*/true);
  });
}

FetchScheduler::PrefetchJob LayerImpl::ReadAheadJob(uint64_t chunk) {
  return [weak = weak_from_this(), chunk, spent = false]() mutable -> std::optional<FetchScheduler::Start> {
    auto self = weak.lock();
    if (self == nullptr || std::exchange(spent, true)) return std::nullopt;
    return self->PrefetchOne(chunk);
  };
}

FetchScheduler::PrefetchJob LayerImpl::RangeJob(uint64_t blob_end) {
  return [weak = weak_from_this(), blob_end,
          cursor = uint64_t{0}]() mutable -> std::optional<FetchScheduler::Start> {
    auto self = weak.lock();
    if (self == nullptr) return std::nullopt;
    return self->NextPrefetch(&cursor, blob_end);
  };
}

std::optional<FetchScheduler::Start> LayerImpl::PrefetchOne(uint64_t chunk) {
  std::vector<PlannedFetch> plans;
  {
    MutexLock lock(&mutex_);
    if (store_full_ || !IsWanted(*content_->files(), chunk)) return std::nullopt;
    plans = PlanLocked({chunk}, /*neighbourhood=*/0);
  }
  if (plans.empty()) return std::nullopt;
  return PrefetchStart(std::move(plans.front()));
}

std::optional<FetchScheduler::Start> LayerImpl::NextPrefetch(uint64_t* cursor, uint64_t blob_end) {
  std::optional<PlannedFetch> plan;
  {
    MutexLock lock(&mutex_);
    if (store_full_) return std::nullopt;
    std::shared_ptr<const Files> files = content_->files();
    auto wanted = [&](uint64_t chunk) ABSL_NO_THREAD_SAFETY_ANALYSIS { return IsWanted(*files, chunk); };
    plan = PlanPrefetch(index_->chunks(), cursor, blob_end, wanted);
    if (!plan.has_value()) return std::nullopt;
    for (uint64_t chunk : plan->chunks) flights_.try_emplace(chunk);
  }
  return PrefetchStart(std::move(*plan));
}

FetchScheduler::Start LayerImpl::PrefetchStart(PlannedFetch plan) {
  auto fetch = std::make_shared<Fetch>();
  fetch->plan = std::move(plan);
  fetch->priority = cache::Priority::kPrefetch;
  fetch->deadline = shared_->options.clock->BootNanos() + kPrefetchNanos;
  uint64_t bytes = fetch->plan.length;
  return {origin_, bytes, [self = shared_from_this(), fetch = std::move(fetch)]() mutable {
            self->StartFetch(std::move(fetch));
          }};
}

void LayerImpl::StartPrefetch() {
  if (index_->info().prefetch_end == 0) return;
  shared_->pool->Post([self = shared_from_this()] {
    self->shared_->scheduler.Prefetch(self->RangeJob(self->index_->info().prefetch_end), /*soon=*/false);
  });
}

}  // namespace holdfast::layer
