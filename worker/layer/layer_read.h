// A read that waits for chunks. Made by ReadAsync, held by the flights it waits for; answers once.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "common/mutex.h"
#include "worker/layer/layer.h"
#include "worker/layer/layer_pool.h"

namespace holdfast::layer {

// What a read takes from one chunk.
struct ChunkPart {
  uint64_t chunk = 0;
  uint64_t offset = 0;  // in the chunk
  uint64_t length = 0;
};

// Where the bytes of a chunk are: in files, at its store offset, or in memory.
struct ChunkBytes {
  std::shared_ptr<const cache::LayerContent::Files> files;
  uint64_t store_offset = 0;
  std::shared_ptr<const std::string> memory;
};

// Appends the part; joins what follows on disk.
void AppendSegment(const ChunkPart& part, const ChunkBytes& bytes, ReadResult* result);

// Thread safety: all methods. `done` runs on the thread that supplies the last part, fails the read, or
// expires it.
class PendingRead final : public Expiring, public std::enable_shared_from_this<PendingRead> {
 public:
  using Done = std::function<void(absl::StatusOr<ReadResult>)>;
  PendingRead(std::shared_ptr<CompletionPool> pool, std::vector<ChunkPart> parts,
              uint64_t deadline_boot_nanos, Done done);

  const std::vector<ChunkPart>& parts() const { return parts_; }
  uint64_t deadline() const { return deadline_; }
  // From now on the deadline counts.
  void Watch();
  void Supply(size_t part, ChunkBytes bytes);
  void Fail(const absl::Status& status);
  bool finished() const;

  void Expire() override;
  void Cancel() override;

 private:
  Done TakeDone() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::shared_ptr<CompletionPool> pool_;
  const std::vector<ChunkPart> parts_;
  const uint64_t deadline_;
  mutable Mutex mutex_;
  std::vector<ChunkBytes> bytes_ ABSL_GUARDED_BY(mutex_);
  size_t missing_ ABSL_GUARDED_BY(mutex_);
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
  CompletionPool::TimerId timer_ ABSL_GUARDED_BY(mutex_);
  Done done_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace holdfast::layer
