// One readable layer: index + content on disk + where the rest comes from. Turns (node, offset, size) into
// bytes that are verified against their chunk digests.
//
// Thread safety: all methods. ReadNow never waits for anything but the local disk. ReadAsync returns at once;
// its callback runs on a completion thread of the LayerReader pool and may block on the local disk, never on
// the network. One fetch serves all that wait for a chunk; a miss brings its aligned 64 KiB neighbourhood of
// small content along; reads that go forward in a large file bring the next chunk.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/clock.h"
#include "common/loop_watch.h"
#include "common/status.h"
#include "common/trace.h"
#include "worker/cache/blob_source.h"
#include "worker/cache/content_store.h"
#include "worker/layer/layer_index.h"

namespace holdfast::layer {

// Bytes of a file, in order, ready for a reply by splice or copy.
struct ReadResult {
  struct Segment {
    std::shared_ptr<const cache::LayerContent::Files> file;  // set: bytes at file_offset of file->data
    uint64_t file_offset = 0;
    std::shared_ptr<const std::string> memory;  // else, set: bytes at memory_offset
    uint64_t memory_offset = 0;
    uint64_t length = 0;  // neither set: zeros
  };
  std::vector<Segment> segments;
  uint64_t length = 0;  // sum; less than asked for only at the end of the file
};

struct LayerStats {
  uint64_t fetched_bytes = 0;  // compressed, from the network
  uint64_t fetches = 0;
  uint64_t damaged_chunks = 0;  // bytes from the disk or the network that did not match their digest
  uint64_t touched_compressed_bytes = 0;  // compressed size of the distinct chunks that applications read;
                                          // members that hold several chunks count once
};

class Layer {
 public:
  virtual ~Layer() = default;
  virtual const LayerIndex& index() const = 0;
  virtual std::shared_ptr<cache::LayerContent> content() const = 0;

  // The bytes if all of them are on disk and verified; nullopt: ask ReadAsync. `nodeid` must be a regular
  // file.
  virtual std::optional<ReadResult> ReadNow(uint64_t nodeid, uint64_t offset, uint64_t size) = 0;

  // Fetches what is missing, then calls `done` once. Errors are those of BlobSource; DataLoss when content
  // does not match its digest even when fetched again. `deadline_boot_nanos` bounds the waiting
  // (CLOCK_BOOTTIME).
  virtual void ReadAsync(uint64_t nodeid, uint64_t offset, uint64_t size, uint64_t deadline_boot_nanos,
                         std::function<void(absl::StatusOr<ReadResult>)> done) = 0;

  // What lies in `files` of a chunk that is marked unverified matches its digest; it is read and hashed here,
  // on the caller's thread, and then marked. What does not match is dropped.
  virtual bool VerifyOnDisk(const std::shared_ptr<const cache::LayerContent::Files>& /*files*/,
                            uint64_t /*chunk*/) {
    return false;
  }

  // A reply by splice came out short, so the content file was cut off behind our back: forgets what is stored
  // of these bytes. ReadAsync then fetches them again.
  virtual void Distrust(uint64_t /*nodeid*/, uint64_t /*offset*/, uint64_t /*size*/) {}

  // Fetches blob bytes [0, index().info().prefetch_end) and what else is known to be needed, at
  // Priority::kPrefetch.
  virtual void StartPrefetch() = 0;
  virtual LayerStats stats() const = 0;
};

struct LayerReaderOptions {
  int completion_threads = 2;
  uint64_t neighbourhood_bytes = 64 * 1024;  // 0 = only what was asked for
  uint64_t max_inflight_bytes = 32u << 20;   // compressed bytes on their way for all layers; the rest queues.
                                             // See layer_scheduler.h for what one origin gets of it
  const Clock* clock = Clock::Real();
  TraceRing* trace = nullptr;     // layer.fetch
  FaultPoints* faults = nullptr;  // layer.before_fetch, layer.before_verify
  LoopWatch* watch = nullptr;     // each completion thread while it is at a task
};

// Owns the completion threads that inflate, verify and store. Outlives every Layer it made; its destructor
// fails reads that still wait with Cancelled, and must not run on one of its own threads.
class LayerReader {
 public:
  virtual ~LayerReader() = default;
  static std::unique_ptr<LayerReader> Create(const LayerReaderOptions& options);
  // `origin` names what `source` shares its fate with, its registry: fetches that an origin does not answer
  // do not hold up those of the others. Empty: this layer alone.
  virtual std::shared_ptr<Layer> Open(std::shared_ptr<const LayerIndex> index,
                                      std::shared_ptr<cache::LayerContent> content,
                                      std::shared_ptr<cache::BlobSource> source,
                                      const std::string& origin) = 0;
  std::shared_ptr<Layer> Open(std::shared_ptr<const LayerIndex> index,
                              std::shared_ptr<cache::LayerContent> content,
                              std::shared_ptr<cache::BlobSource> source) {
    return Open(std::move(index), std::move(content), std::move(source), "");
  }
  // No new fetches are started at kPrefetch or kBackground (a parked worker writes nothing it was not asked
  // for).
  virtual void Pause(bool paused) = 0;
};

}  // namespace holdfast::layer
