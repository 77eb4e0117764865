// What happens to a fetch: begin, inflate, verify, store, hand out; and what its failure means for whom.
#include <algorithm>
#include <utility>

#include "common/fault.h"
#include "glog/logging.h"
#include "worker/layer/digest.h"
#include "worker/layer/layer_impl.h"
#include "worker/layer/layer_inflate.h"

namespace holdfast::layer {
namespace {

// A table of contents that wants more than this for one piece is not believed: it is all held in memory.
constexpr uint64_t kMaxMemberBytes = 256u << 20;

bool IsTimeError(const absl::Status& status) {
  return status.code() == absl::StatusCode::kDeadlineExceeded ||
         status.code() == absl::StatusCode::kUnavailable;
}

}  // namespace

void LayerImpl::Demand(std::vector<PlannedFetch> plans, uint64_t deadline) {
  for (PlannedFetch& plan : plans) {
    auto fetch = std::make_shared<Fetch>();
    fetch->plan = std::move(plan);
    fetch->deadline = deadline;
    uint64_t bytes = fetch->plan.length;
    shared_->scheduler.Demand(
        {origin_, bytes, [self = shared_from_this(), fetch = std::move(fetch)]() mutable {
           self->StartFetch(std::move(fetch));
         }});
  }
}

void LayerImpl::StartFetch(std::shared_ptr<Fetch> fetch) {
  fetch->started = shared_->options.clock->BootNanos();
  // The source's thread must be free at once, and its callback may even run on this one.
  auto done = [self = shared_from_this(), fetch](absl::StatusOr<std::string> bytes) {
    auto shared_bytes = std::make_shared<absl::StatusOr<std::string>>(std::move(bytes));
    self->shared_->pool->Post([self, fetch, shared_bytes] { self->Fetched(fetch, *shared_bytes); });
  };
  absl::Status fault = PassFault(shared_->options.faults, "layer.before_fetch");
  if (fault.ok() && fetch->plan.length > kMaxMemberBytes)
    fault = DataLoss("a chunk of absurd compressed size");
  if (!fault.ok()) return done(fault);
  fetches_++;
  source_->Fetch(fetch->plan.offset, fetch->plan.length, fetch->priority, fetch->deadline, std::move(done));
}

void LayerImpl::Fetched(const std::shared_ptr<Fetch>& fetch, const absl::StatusOr<std::string>& bytes) {
  absl::Status status = bytes.status();
  if (status.ok() && bytes->size() != fetch->plan.length) status = DataLoss("the source gave another length");
  Trace(*fetch, status);
  if (status.ok()) {
    fetched_bytes_ += bytes->size();
    status = PassFault(shared_->options.faults, "layer.before_verify");
  }
  if (status.ok()) {
    Refetch(Inflate(fetch->plan, *bytes));
  } else {
    Failed(*fetch, status);
  }
  shared_->scheduler.Done(origin_, fetch->plan.length, fetch->priority != cache::Priority::kDemand);
}

std::vector<uint64_t> LayerImpl::Inflate(const PlannedFetch& plan, const std::string& bytes) {
  std::span<const ChunkRecord> chunks = index_->chunks();
  std::vector<uint64_t> bad;
  for (size_t begin = 0; begin < plan.chunks.size();) {
    uint64_t offset = chunks[plan.chunks[begin]].blob_offset;
    std::vector<WantedRange> wanted;
    size_t end = begin;
    uint64_t blob_end = offset;
    for (; end < plan.chunks.size() && chunks[plan.chunks[end]].blob_offset == offset; end++) {
      const ChunkRecord& chunk = chunks[plan.chunks[end]];
      wanted.push_back({chunk.inner_offset, chunk.size});
      blob_end = std::max(blob_end, chunk.blob_end);
    }
    std::vector<bool> arrived(wanted.size());
    std::string_view member = std::string_view(bytes).substr(offset - plan.offset, blob_end - offset);
    absl::Status status = InflateRanges(member, wanted, [&](size_t i, std::string content) {
      uint64_t chunk = plan.chunks[begin + i];
      if (!MatchesDigest(chunk, content)) return;
      arrived[i] = true;
      Arrived(chunk, std::move(content));
    });
    for (size_t i = 0; i < arrived.size(); i++) {
      if (arrived[i]) continue;
      bad.push_back(plan.chunks[begin + i]);
      damaged_chunks_++;
      LOG(WARNING) << "layer.damaged_fetch layer=" << index_->info().layer_digest << " chunk=" << bad.back()
                   << " offset=" << offset << " reason=\""
                   << (status.ok() ? "wrong digest" : status.message()) << "\"";
    }
    begin = end;
  }
  return bad;
}

bool LayerImpl::MatchesDigest(uint64_t chunk, std::string_view bytes) const {
  toc::Digest digest = Sha256Raw(bytes);
  return std::equal(digest.begin(), digest.end(), index_->chunks()[chunk].digest);
}

void LayerImpl::Arrived(uint64_t chunk, std::string bytes) {
  uint64_t store_offset = index_->chunks()[chunk].store_offset;
  ChunkBytes where;
  where.store_offset = store_offset;
  std::shared_ptr<const Files> files = content_->files();
  absl::Status stored = content_->Put(chunk, store_offset, bytes);
  store_full_ = !stored.ok();
  if (stored.ok() && content_->StateOf(*files, chunk) != cache::ChunkState::kPresent)
    files = content_->files();
  if (stored.ok() && content_->StateOf(*files, chunk) == cache::ChunkState::kPresent) {
    where.files = std::move(files);
  } else {
    where.memory = std::make_shared<const std::string>(std::move(bytes));
  }
  Land(chunk, where);
}

void LayerImpl::Land(uint64_t chunk, const ChunkBytes& bytes) {
  std::vector<Waiter> waiters;
  {
    MutexLock lock(&mutex_);
    auto flight = flights_.find(chunk);
    if (flight == flights_.end()) return;
    waiters = std::move(flight->second.waiters);
    flights_.erase(flight);
  }
  for (auto& [read, part] : waiters) read->Supply(part, bytes);
}

void LayerImpl::Failed(const Fetch& fetch, const absl::Status& status) {
  std::vector<Waiter> failed;
  std::vector<uint64_t> again;
  std::vector<PlannedFetch> plans;
  uint64_t deadline = 0;
  {
    MutexLock lock(&mutex_);
    for (uint64_t chunk : fetch.plan.chunks) {
      auto flight = flights_.find(chunk);
      if (flight == flights_.end()) continue;
      // Who may wait longer than this fetch was allowed to gets a fetch that may, too; who joined a prefetch
      // gets one of his own.
      std::vector<Waiter> patient;
      for (Waiter& waiter : flight->second.waiters) {
        if (waiter.first->finished()) continue;
        bool waits = fetch.priority != cache::Priority::kDemand ||
                     (IsTimeError(status) && waiter.first->deadline() > fetch.deadline);
        if (waits) deadline = std::max(deadline, waiter.first->deadline());
        (waits ? patient : failed).push_back(std::move(waiter));
      }
      flight->second.waiters = std::move(patient);
      if (flight->second.waiters.empty()) {
        flights_.erase(flight);
      } else {
        again.push_back(chunk);
      }
    }
    plans = PlanLocked(std::move(again), /*neighbourhood=*/0);
  }
  for (auto& [read, part] : failed) read->Fail(status);
  Demand(std::move(plans), deadline);
}

void LayerImpl::Refetch(const std::vector<uint64_t>& chunks) {
  if (chunks.empty()) return;
  std::vector<Waiter> failed;
  std::vector<uint64_t> again;
  std::vector<PlannedFetch> plans;
  uint64_t deadline = 0;
  {
    MutexLock lock(&mutex_);
    for (uint64_t chunk : chunks) {
      auto flight = flights_.find(chunk);
      if (flight == flights_.end()) continue;
      std::vector<Waiter>& waiters = flight->second.waiters;
      std::erase_if(waiters, [](const Waiter& waiter) { return waiter.first->finished(); });
      if (waiters.empty() || flight->second.refetched) {
        failed.insert(failed.end(), waiters.begin(), waiters.end());
        flights_.erase(flight);
        continue;
      }
      flight->second.refetched = true;
      for (const Waiter& waiter : waiters) deadline = std::max(deadline, waiter.first->deadline());
      again.push_back(chunk);
    }
    plans = PlanLocked(std::move(again), /*neighbourhood=*/0);
  }
  for (auto& [read, part] : failed) {
    read->Fail(DataLoss("content of " + index_->info().layer_digest + " does not match its digest"));
  }
  Demand(std::move(plans), deadline);
}

void LayerImpl::VerifyFlight(uint64_t chunk, const std::shared_ptr<const Files>& files) {
  if (VerifyOnDisk(files, chunk)) {
    return Land(chunk, {files, index_->chunks()[chunk].store_offset, nullptr});
  }
  std::vector<PlannedFetch> plans;
  uint64_t deadline = 0;
  {
    MutexLock lock(&mutex_);
    auto flight = flights_.find(chunk);
    if (flight == flights_.end()) return;
    for (const Waiter& waiter : flight->second.waiters) {
      if (!waiter.first->finished()) deadline = std::max(deadline, waiter.first->deadline());
    }
    if (deadline == 0) {
      flights_.erase(flight);
    } else {
      plans = PlanLocked({chunk}, shared_->options.neighbourhood_bytes);
    }
  }
  Demand(std::move(plans), deadline);
}

void LayerImpl::Trace(const Fetch& fetch, const absl::Status& status) const {
  if (shared_->options.trace == nullptr) return;
  bool demand = fetch.priority == cache::Priority::kDemand;
  shared_->options.trace->Record(
      "layer.fetch",
      "layer=" + index_->info().layer_digest + " offset=" + std::to_string(fetch.plan.offset) + " length=" +
          std::to_string(fetch.plan.length) + " chunks=" + std::to_string(fetch.plan.chunks.size()) +
          " priority=" + (demand ? "demand" : "prefetch") +
          " status=" + std::string(FromAbsl(absl::StatusCodeToString(status.code()))),
      shared_->options.clock->BootNanos() - fetch.started);
}

}  // namespace holdfast::layer
