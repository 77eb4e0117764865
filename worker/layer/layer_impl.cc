#include "worker/layer/layer_impl.h"

#include <sys/stat.h>

#include <algorithm>
#include <utility>

#include "common/io.h"
#include "glog/logging.h"

namespace holdfast::layer {
namespace {

// Verified on the reading thread; more is left to a completion thread.
constexpr uint64_t kInlineVerifyBytes = 256 * 1024;

}  // namespace

LayerImpl::LayerImpl(std::shared_ptr<ReaderShared> shared, std::shared_ptr<const LayerIndex> index,
                     std::shared_ptr<cache::LayerContent> content, std::shared_ptr<cache::BlobSource> source,
                     const std::string& origin)
    : shared_(std::move(shared)),
      index_(std::move(index)),
      content_(std::move(content)),
      source_(std::move(source)),
      origin_(origin.empty() ? "layer " + std::to_string(reinterpret_cast<uintptr_t>(this)) : origin),
      touched_((index_->chunk_count() + 63) / 64) {}

absl::StatusOr<std::vector<ChunkPart>> LayerImpl::PartsOf(uint64_t nodeid, uint64_t offset,
                                                          uint64_t size) const {
  const NodeRecord* node = index_->node(nodeid);
  if (node == nullptr || !S_ISREG(node->mode)) return InvalidArgument("not a regular file of this layer");
  std::vector<ChunkPart> parts;
  if (offset >= node->size) return parts;
  uint64_t end = offset + std::min(size, node->size - offset);
  while (offset < end) {
    uint64_t id = index_->ChunkAt(*node, offset);
    if (id >= index_->chunk_count()) return DataLoss("the index has no chunk for these bytes");
    const ChunkRecord& chunk = index_->chunks()[id];
    if (offset < chunk.file_offset || offset - chunk.file_offset >= chunk.size) {
      return DataLoss("the index has no chunk for these bytes");
    }
    uint64_t inside = offset - chunk.file_offset;
    uint64_t length = std::min(end - offset, chunk.size - inside);
    parts.push_back({id, inside, length});
    offset += length;
  }
  return parts;
}

void LayerImpl::Touched(const std::vector<ChunkPart>& parts) {
  content_->Touch();
  for (const ChunkPart& part : parts) {
    auto set = [&](uint64_t chunk) {
      uint64_t bit = uint64_t{1} << (chunk % 64);
      std::atomic<uint64_t>& word = touched_[chunk / 64];
      return (word.load(std::memory_order_relaxed) & bit) != 0 || (word.fetch_or(bit) & bit) != 0;
    };
    if ((touched_[part.chunk / 64].load(std::memory_order_relaxed) & (uint64_t{1} << (part.chunk % 64))) != 0)
      continue;
    // A member shared by several chunks is counted with its first.
    uint64_t first = FirstOfMember(index_->chunks(), part.chunk);
    const ChunkRecord& chunk = index_->chunks()[first];
    if (!set(first)) touched_bytes_ += chunk.blob_end - chunk.blob_offset;
    set(part.chunk);
  }
}

bool LayerImpl::VerifyOnDisk(const std::shared_ptr<const Files>& files, uint64_t id) {
  const ChunkRecord& chunk = index_->chunks()[id];
  std::string bytes(chunk.size, '\0');
  absl::Status read = PreadFull(files->data.get(), bytes.data(), bytes.size(), chunk.store_offset);
  if (read.ok() && MatchesDigest(id, bytes)) {
    content_->MarkVerified(*files, id);
    return true;
  }
  damaged_chunks_++;
  LOG(WARNING) << "layer.damaged_on_disk layer=" << index_->info().layer_digest << " chunk=" << id;
  content_->Drop(*files, id, chunk.size);
  return false;
}

std::optional<ReadResult> LayerImpl::ReadNow(uint64_t nodeid, uint64_t offset, uint64_t size) {
  auto parts = PartsOf(nodeid, offset, size);
  if (!parts.ok()) return std::nullopt;
  std::shared_ptr<const Files> files = content_->files();
  ReadResult result;
  uint64_t may_verify = kInlineVerifyBytes;
  for (const ChunkPart& part : *parts) {
    const ChunkRecord& chunk = index_->chunks()[part.chunk];
    cache::ChunkState state = content_->StateOf(*files, part.chunk);
    if (state == cache::ChunkState::kUnverified && chunk.size <= may_verify) {
      may_verify -= chunk.size;
      if (VerifyOnDisk(files, part.chunk)) state = cache::ChunkState::kPresent;
    }
    if (state != cache::ChunkState::kPresent) return std::nullopt;
    AppendSegment(part, {files, chunk.store_offset, nullptr}, &result);
  }
  Touched(*parts);
  FollowSequence(nodeid, *parts, /*missed=*/false);
  return result;
}

bool LayerImpl::IsWanted(const Files& files, uint64_t chunk) const {
  return content_->StateOf(files, chunk) == cache::ChunkState::kAbsent && flights_.count(chunk) == 0;
}

std::vector<PlannedFetch> LayerImpl::PlanLocked(std::vector<uint64_t> demanded, uint64_t neighbourhood) {
  if (demanded.empty()) return {};
  std::shared_ptr<const Files> files = content_->files();
  auto wanted = [&](uint64_t chunk) ABSL_NO_THREAD_SAFETY_ANALYSIS { return IsWanted(*files, chunk); };
  std::vector<PlannedFetch> plans = PlanDemand(index_->chunks(), std::move(demanded), neighbourhood, wanted);
  for (const PlannedFetch& plan : plans) {
    for (uint64_t chunk : plan.chunks) flights_.try_emplace(chunk);
  }
  return plans;
}

void LayerImpl::ReadAsync(uint64_t nodeid, uint64_t offset, uint64_t size, uint64_t deadline_boot_nanos,
                          std::function<void(absl::StatusOr<ReadResult>)> done) {
  auto parts = PartsOf(nodeid, offset, size);
  if (!parts.ok() || parts->empty()) {
    absl::StatusOr<ReadResult> result = ReadResult{};
    if (!parts.ok()) result = parts.status();
    shared_->pool->Post([done = std::move(done), result = std::move(result)] { done(result); });
    return;
  }
  Touched(*parts);
  auto read = std::make_shared<PendingRead>(shared_->pool, *parts, deadline_boot_nanos, std::move(done));
  read->Watch();

  std::vector<uint64_t> demanded;
  std::vector<uint64_t> to_verify;
  std::vector<size_t> present;
  std::vector<PlannedFetch> plans;
  std::shared_ptr<const Files> files = content_->files();
  {
    MutexLock lock(&mutex_);
    for (size_t i = 0; i < parts->size(); i++) {
      uint64_t chunk = (*parts)[i].chunk;
      cache::ChunkState state = content_->StateOf(*files, chunk);
      if (state == cache::ChunkState::kPresent) {
        present.push_back(i);
        continue;
      }
      auto [flight, is_new] = flights_.try_emplace(chunk);
      flight->second.waiters.emplace_back(read, i);
      if (is_new) (state == cache::ChunkState::kUnverified ? to_verify : demanded).push_back(chunk);
    }
    plans = PlanLocked(std::move(demanded), shared_->options.neighbourhood_bytes);
  }
  bool missed = present.size() < parts->size();
  Demand(std::move(plans), deadline_boot_nanos);
  for (uint64_t chunk : to_verify) {
    shared_->pool->Post([self = shared_from_this(), chunk, files] { self->VerifyFlight(chunk, files); });
  }
  if (!present.empty()) {
    // Posted: the read's callback runs on a completion thread only.
    shared_->pool->Post([self = shared_from_this(), read, files, present = std::move(present)] {
      for (size_t i : present) {
        read->Supply(i, {files, self->index_->chunks()[read->parts()[i].chunk].store_offset, nullptr});
      }
    });
  }
  FollowSequence(nodeid, *parts, missed);
}

void LayerImpl::Distrust(uint64_t nodeid, uint64_t offset, uint64_t size) {
  auto parts = PartsOf(nodeid, offset, size);
  if (!parts.ok()) return;
  std::shared_ptr<const Files> files = content_->files();
  for (const ChunkPart& part : *parts) {
    damaged_chunks_++;
    content_->Drop(*files, part.chunk, index_->chunks()[part.chunk].size);
  }
}

LayerStats LayerImpl::stats() const {
  LayerStats stats;
  stats.fetched_bytes = fetched_bytes_;
  stats.fetches = fetches_;
  stats.damaged_chunks = damaged_chunks_;
  stats.touched_compressed_bytes = touched_bytes_;
  return stats;
}

}  // namespace holdfast::layer
