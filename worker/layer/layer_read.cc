#include "worker/layer/layer_read.h"

#include <utility>

namespace holdfast::layer {

void AppendSegment(const ChunkPart& part, const ChunkBytes& bytes, ReadResult* result) {
  result->length += part.length;
  ReadResult::Segment segment;
  segment.length = part.length;
  if (bytes.files != nullptr) {
    segment.file = bytes.files;
    segment.file_offset = bytes.store_offset + part.offset;
    if (!result->segments.empty()) {
      ReadResult::Segment& last = result->segments.back();
      if (last.file == segment.file && last.file_offset + last.length == segment.file_offset) {
        last.length += segment.length;
        return;
      }
    }
  } else {
    segment.memory = bytes.memory;
    segment.memory_offset = part.offset;
  }
  result->segments.push_back(std::move(segment));
}

PendingRead::PendingRead(std::shared_ptr<CompletionPool> pool, std::vector<ChunkPart> parts,
                         uint64_t deadline_boot_nanos, Done done)
    : pool_(std::move(pool)),
      parts_(std::move(parts)),
      deadline_(deadline_boot_nanos),
      bytes_(parts_.size()),
      missing_(parts_.size()),
      done_(std::move(done)) {}

void PendingRead::Watch() {
  MutexLock lock(&mutex_);
  timer_ = pool_->AddDeadline(deadline_, weak_from_this());
}

PendingRead::Done PendingRead::TakeDone() {
  finished_ = true;
  pool_->RemoveDeadline(timer_);
  return std::exchange(done_, nullptr);
}

void PendingRead::Supply(size_t part, ChunkBytes bytes) {
  ReadResult result;
  Done done;
  {
    MutexLock lock(&mutex_);
    if (finished_) return;
    bytes_[part] = std::move(bytes);
    if (--missing_ > 0) return;
    for (size_t i = 0; i < parts_.size(); i++) AppendSegment(parts_[i], bytes_[i], &result);
    bytes_.clear();
    done = TakeDone();
  }
  done(std::move(result));
}

void PendingRead::Fail(const absl::Status& status) {
  Done done;
  {
    MutexLock lock(&mutex_);
    if (finished_) return;
    bytes_.clear();
    done = TakeDone();
  }
  done(status);
}

bool PendingRead::finished() const {
  MutexLock lock(&mutex_);
  return finished_;
}

void PendingRead::Expire() { Fail(DeadlineExceeded("the content did not arrive in time")); }

void PendingRead::Cancel() { Fail(Cancelled("the layer reader ends")); }

}  // namespace holdfast::layer
