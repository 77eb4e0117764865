// The Layer of layer.h: parts of a read, flights, and what becomes of a fetch.
//
// A *flight* is a chunk that is being fetched or verified, with the reads that wait for it; at most one a
// chunk. A chunk that is stored gets its mark before its flight ends, so whoever looks under mutex_ sees the
// one or the other.
//
// Threads: ReadNow and ReadAsync on the callers' threads; everything that touches the disk or the bytes on
// completion threads; the source's callbacks only post. Locks: mutex_ (flights), sequence_mutex_
// (read-ahead); never both, and neither is held while a read, the scheduler, the source or the content
// store's Put is called.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "common/mutex.h"
#include "worker/layer/layer.h"
#include "worker/layer/layer_plan.h"
#include "worker/layer/layer_pool.h"
#include "worker/layer/layer_read.h"
#include "worker/layer/layer_scheduler.h"

namespace holdfast::layer {

// What all layers of a reader share.
struct ReaderShared {
  explicit ReaderShared(const LayerReaderOptions& reader_options)
      : options(reader_options),
        pool(std::make_shared<CompletionPool>(options.completion_threads, options.clock, options.watch)),
        scheduler(options.max_inflight_bytes) {}
  const LayerReaderOptions options;
  const std::shared_ptr<CompletionPool> pool;
  FetchScheduler scheduler;
};

class LayerImpl final : public Layer, public std::enable_shared_from_this<LayerImpl> {
 public:
  LayerImpl(std::shared_ptr<ReaderShared> shared, std::shared_ptr<const LayerIndex> index,
            std::shared_ptr<cache::LayerContent> content, std::shared_ptr<cache::BlobSource> source,
            const std::string& origin);

  const LayerIndex& index() const override { return *index_; }
  std::shared_ptr<cache::LayerContent> content() const override { return content_; }
  std::optional<ReadResult> ReadNow(uint64_t nodeid, uint64_t offset, uint64_t size) override;
  void ReadAsync(uint64_t nodeid, uint64_t offset, uint64_t size, uint64_t deadline_boot_nanos,
                 std::function<void(absl::StatusOr<ReadResult>)> done) override;
  bool VerifyOnDisk(const std::shared_ptr<const cache::LayerContent::Files>& files, uint64_t chunk) override;
  void Distrust(uint64_t nodeid, uint64_t offset, uint64_t size) override;
  void StartPrefetch() override;
  LayerStats stats() const override;

 private:
  using Files = cache::LayerContent::Files;
  using Waiter = std::pair<std::shared_ptr<PendingRead>, size_t>;  // a read, and which part of it
  struct Flight {
    std::vector<Waiter> waiters;
    bool refetched = false;  // its bytes did not match once
  };
  struct Fetch {
    PlannedFetch plan;
    cache::Priority priority = cache::Priority::kDemand;
    uint64_t deadline = 0;
    uint64_t started = 0;
  };

  // --- reads (layer_impl.cc)
  absl::StatusOr<std::vector<ChunkPart>> PartsOf(uint64_t nodeid, uint64_t offset, uint64_t size) const;
  void Touched(const std::vector<ChunkPart>& parts);
  bool IsWanted(const Files& files, uint64_t chunk) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Plans the fetches for chunks that have flights and gives their company flights.
  std::vector<PlannedFetch> PlanLocked(std::vector<uint64_t> demanded, uint64_t neighbourhood)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  // --- read-ahead and prefetch (layer_prefetch.cc)
  void FollowSequence(uint64_t nodeid, const std::vector<ChunkPart>& parts, bool missed);
  FetchScheduler::PrefetchJob ReadAheadJob(uint64_t chunk);
  FetchScheduler::PrefetchJob RangeJob(uint64_t blob_end);
  std::optional<FetchScheduler::Start> NextPrefetch(uint64_t* cursor, uint64_t blob_end);
  std::optional<FetchScheduler::Start> PrefetchOne(uint64_t chunk);
  FetchScheduler::Start PrefetchStart(PlannedFetch plan);

  // --- fetches (layer_fetch.cc)
  void Demand(std::vector<PlannedFetch> plans, uint64_t deadline);
  void StartFetch(std::shared_ptr<Fetch> fetch);
  void Fetched(const std::shared_ptr<Fetch>& fetch, const absl::StatusOr<std::string>& bytes);
  // Takes the members apart; returns the chunks that were not delivered whole.
  std::vector<uint64_t> Inflate(const PlannedFetch& plan, const std::string& bytes);
  bool MatchesDigest(uint64_t chunk, std::string_view bytes) const;
  void Arrived(uint64_t chunk, std::string bytes);
  void Land(uint64_t chunk, const ChunkBytes& bytes);
  void Failed(const Fetch& fetch, const absl::Status& status);
  void Refetch(const std::vector<uint64_t>& chunks);
  void VerifyFlight(uint64_t chunk, const std::shared_ptr<const Files>& files);
  void Trace(const Fetch& fetch, const absl::Status& status) const;

  const std::shared_ptr<ReaderShared> shared_;
  const std::shared_ptr<const LayerIndex> index_;
  const std::shared_ptr<cache::LayerContent> content_;
  const std::shared_ptr<cache::BlobSource> source_;
  const std::string origin_;

  Mutex mutex_;
  std::unordered_map<uint64_t, Flight> flights_ ABSL_GUARDED_BY(mutex_);

  Mutex sequence_mutex_;
  // Per node: the chunk that, when an application reaches it, shows that it reads forward.
  std::unordered_map<uint64_t, uint64_t> expected_ ABSL_GUARDED_BY(sequence_mutex_);

  std::vector<std::atomic<uint64_t>> touched_;  // bit a chunk
  std::atomic<bool> store_full_{false};         // nothing is prefetched that could not be kept
  std::atomic<uint64_t> fetched_bytes_{0};
  std::atomic<uint64_t> fetches_{0};
  std::atomic<uint64_t> damaged_chunks_{0};
  std::atomic<uint64_t> touched_bytes_{0};
};

}  // namespace holdfast::layer
