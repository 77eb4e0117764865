// Shared by the tests of reading: a real eStargz blob, its real index and content store, and a source whose
// network is a variable.
#pragma once

#include <sys/stat.h>

#include <deque>
#include <functional>
#include <future>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "common/io.h"
#include "common/mutex.h"
#include "gtest/gtest.h"
#include "worker/layer/layer.h"
#include "worker/toc/testing/estargz_writer.h"

namespace holdfast::layer {

inline constexpr uint64_t kSecond = 1'000'000'000;

inline uint64_t In(uint64_t nanos) { return Clock::Real()->BootNanos() + nanos; }

// Half compressible, so that chunks of a few KiB stay of that size.
inline std::string RandomText(uint64_t size, unsigned seed) {
  std::mt19937 random(seed);
  std::string text(size, '\0');
  for (char& c : text) c = static_cast<char>(random() & 0xf ? random() : 'e');
  return text;
}

// Answers from a blob on a thread of its own. Records what was asked for.
class FakeSource final : public cache::BlobSource {
 public:
  struct Request {
    uint64_t offset, length;
    cache::Priority priority;
    uint64_t deadline;
  };
  // What becomes of request number n (from 0); nullptr: the true bytes.
  using Answer = std::function<absl::StatusOr<std::string>(size_t n, std::string bytes)>;

  explicit FakeSource(std::string blob) : blob_(std::move(blob)), thread_([this] { Serve(); }) {}
  // Answers what is left and ends the thread. Explicit, because the last reference may go on that very
  // thread.
  void Stop() {
    {
      MutexLock lock(&mutex_);
      stopping_ = true;
      held_ = false;
      changed_.SignalAll();
    }
    thread_.join();
  }

  void Fetch(uint64_t offset, uint64_t length, cache::Priority priority, uint64_t deadline_boot_nanos,
             std::function<void(absl::StatusOr<std::string>)> done) override {
    MutexLock lock(&mutex_);
    requests_.push_back({offset, length, priority, deadline_boot_nanos});
    queue_.emplace_back(requests_.size() - 1, std::move(done));
    changed_.SignalAll();
  }

  void AnswerWith(Answer answer) {
    MutexLock lock(&mutex_);
    answer_ = std::move(answer);
  }
  // While held, nothing is answered.
  void Hold(bool held) {
    MutexLock lock(&mutex_);
    held_ = held;
    changed_.SignalAll();
  }
  std::vector<Request> requests() const {
    MutexLock lock(&mutex_);
    return requests_;
  }
  size_t waiting() const {
    MutexLock lock(&mutex_);
    return queue_.size();
  }
  // False when there were not `count` requests within 20 s.
  bool WaitRequests(size_t count) const {
    auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    MutexLock lock(&mutex_);
    while (requests_.size() < count) {
      if (!changed_.WaitUntil(&mutex_, limit)) return requests_.size() >= count;
    }
    return true;
  }

 private:
  void Serve() {
    for (;;) {
      std::pair<size_t, std::function<void(absl::StatusOr<std::string>)>> next;
      absl::StatusOr<std::string> bytes = std::string();
      Answer answer;
      {
        MutexLock lock(&mutex_);
        while ((queue_.empty() || held_) && !(stopping_ && queue_.empty())) changed_.Wait(&mutex_);
        if (queue_.empty()) return;
        next = std::move(queue_.front());
        queue_.pop_front();
        const Request& request = requests_[next.first];
        EXPECT_LE(request.offset + request.length, blob_.size());
        bytes = blob_.substr(request.offset, request.length);
        answer = answer_;
      }
      if (answer) bytes = answer(next.first, *std::move(bytes));
      next.second(std::move(bytes));
    }
  }

  const std::string blob_;
  mutable Mutex mutex_;
  mutable CondVar changed_;
  std::vector<Request> requests_ ABSL_GUARDED_BY(mutex_);
  std::deque<std::pair<size_t, std::function<void(absl::StatusOr<std::string>)>>> queue_
      ABSL_GUARDED_BY(mutex_);
  Answer answer_ ABSL_GUARDED_BY(mutex_);
  bool held_ ABSL_GUARDED_BY(mutex_) = false;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

// The bytes of a result, or why they cannot be had.
inline std::string BytesOf(const ReadResult& result) {
  std::string bytes;
  for (const ReadResult::Segment& segment : result.segments) {
    if (segment.file != nullptr) {
      std::string part(segment.length, '\0');
      absl::Status read = PreadFull(segment.file->data.get(), part.data(), part.size(), segment.file_offset);
      if (!read.ok()) return "short: " + read.ToString();
      bytes += part;
    } else if (segment.memory != nullptr) {
      bytes += segment.memory->substr(segment.memory_offset, segment.length);
    } else {
      bytes.append(segment.length, '\0');
    }
  }
  return bytes.size() == result.length ? bytes : "length differs";
}

class LayerTest : public testing::Test {
 protected:
  using Pending = std::future<absl::StatusOr<ReadResult>>;

  LayerTest() {
    store_options_.root = dir_.path() + "/content";
    store_options_.vault_id = std::string(32, '1');
    store_options_.faults = &faults_;
    reader_options_.faults = &faults_;
  }
  ~LayerTest() override {
    // Whatever a test left held is answered before what it refers to goes.
    End();
  }

  void MakeBlob(std::vector<toc::testing::WriterEntry> entries,
                const toc::testing::WriterOptions& options = {}) {
    for (const auto& entry : entries) {
      if (entry.type == toc::Type::kRegular) files_.emplace_back(entry.name, entry.content);
    }
    made_ = toc::testing::WriteEstargz(entries, options);
    auto parsed = toc::ParseEstargzToc(made_.toc_json, made_.toc_offset, made_.blob.size(), {});
    ASSERT_TRUE(parsed.ok()) << parsed.status();
    IndexInfo info{made_.layer_digest, made_.blob.size(), made_.toc_digest, parsed->prefetch_end};
    auto built = BuildLayerIndex(*parsed, info, [](const std::string&) { return std::nullopt; });
    ASSERT_TRUE(built.ok()) << built.status();
    ASSERT_TRUE(WriteFileAtomic(dir_.path() + "/index", built->bytes).ok());
    auto index = LayerIndex::Open(dir_.path() + "/index", built->sha256);
    ASSERT_TRUE(index.ok()) << index.status();
    index_ = *index;
  }

  // A new worker process: store, reader, layer and source anew, over the same folder.
  void Start() {
    End();
    content_.reset();
    store_.reset();
    auto store = cache::ContentStore::Open(store_options_);
    ASSERT_TRUE(store.ok()) << store.status();
    store_ = std::move(*store);
    auto content = store_->OpenLayer(made_.layer_digest, index_->chunk_count(), index_->content_bytes());
    ASSERT_TRUE(content.ok()) << content.status();
    content_ = std::move(*content);
    source_ = std::make_shared<FakeSource>(made_.blob);
    reader_ = LayerReader::Create(reader_options_);
    layer_ = reader_->Open(index_, content_, source_);
  }

  void End() {
    layer_.reset();
    reader_.reset();
    if (source_ != nullptr) source_->Stop();
    source_.reset();
  }

  uint64_t NodeOf(const std::string& name) const { return index_->LookupPath(name); }
  const ChunkRecord& ChunkOf(const std::string& name, uint64_t n = 0) const {
    return index_->chunks()[index_->node(NodeOf(name))->first + n];
  }
  const std::string& Truth(const std::string& name) const {
    for (const auto& [file, content] : files_) {
      if (file == name) return content;
    }
    static const std::string kNone = "no such file";
    return kNone;
  }

  Pending Begin(const std::string& name, uint64_t offset, uint64_t size, uint64_t deadline) {
    auto promise = std::make_shared<std::promise<absl::StatusOr<ReadResult>>>();
    Pending pending = promise->get_future();
    layer_->ReadAsync(NodeOf(name), offset, size, deadline, [promise](absl::StatusOr<ReadResult> result) {
      promise->set_value(std::move(result));
    });
    return pending;
  }
  static absl::StatusOr<ReadResult> Await(Pending* pending) {
    if (pending->wait_for(std::chrono::seconds(40)) != std::future_status::ready) {
      return Internal("the read was never answered");
    }
    return pending->get();
  }
  // As FUSE does it: now if possible, else later.
  absl::StatusOr<std::string> Read(const std::string& name, uint64_t offset = 0, uint64_t size = 1 << 20) {
    if (auto now = layer_->ReadNow(NodeOf(name), offset, size)) return BytesOf(*now);
    Pending pending = Begin(name, offset, size, In(30 * kSecond));
    auto result = Await(&pending);
    if (!result.ok()) return result.status();
    return BytesOf(*result);
  }
  bool IsCached(const std::string& name) { return layer_->ReadNow(NodeOf(name), 0, 1 << 20).has_value(); }

  TempDir dir_;
  FaultPoints faults_;
  cache::StoreOptions store_options_;
  LayerReaderOptions reader_options_;
  std::vector<std::pair<std::string, std::string>> files_;
  toc::testing::EstargzLayer made_;
  std::shared_ptr<const LayerIndex> index_;
  std::unique_ptr<cache::ContentStore> store_;
  std::shared_ptr<cache::LayerContent> content_;
  std::shared_ptr<FakeSource> source_;
  std::unique_ptr<LayerReader> reader_;
  std::shared_ptr<Layer> layer_;
};

}  // namespace holdfast::layer
