// What a layer does when the network, the disk or the bytes are bad.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>

#include "common/fake_clock.h"
#include "worker/layer/layer_test_support.h"

namespace holdfast::layer {
namespace {

using toc::testing::File;

class LayerFaultTest : public LayerTest {
 protected:
  void SetUp() override {
    MakeBlob({File("a", RandomText(20'000, 1)), File("b", RandomText(20'000, 2)),
              File("big", RandomText(600'000, 3))});
    Start();
  }
  std::string ContentFile() const {
    return store_options_.root + "/" + made_.layer_digest.substr(7) + "/content.1";
  }
  bool StoredAnything() const {
    auto files = content_->files();
    for (uint64_t chunk = 0; chunk < index_->chunk_count(); chunk++) {
      if (content_->StateOf(*files, chunk) != cache::ChunkState::kAbsent) return true;
    }
    return false;
  }
  // Flips a byte of what is stored of a file.
  void DamageOnDisk(const std::string& name) {
    auto file = OpenFile(ContentFile(), O_RDWR);
    ASSERT_TRUE(file.ok());
    uint64_t at = ChunkOf(name).store_offset + 77;
    char byte = 0;
    ASSERT_TRUE(PreadFull(file->get(), &byte, 1, at).ok());
    byte = static_cast<char>(byte ^ 1);
    ASSERT_TRUE(PwriteFull(file->get(), &byte, 1, at).ok());
  }
  // The same, with a byte in every 500 flipped from the 41st on.
  static std::string Corrupt(const std::string& bytes) {
    std::string damaged;
    damaged.reserve(bytes.size());
    for (char byte : bytes) damaged += static_cast<char>(damaged.size() % 500 == 40 ? byte ^ 0x55 : byte);
    return damaged;
  }
};

TEST_F(LayerFaultTest, BytesThatDoNotMatchAreFetchedAgain) {
  source_->AnswerWith([](size_t n, const std::string& bytes) { return n == 0 ? Corrupt(bytes) : bytes; });
  EXPECT_EQ(*Read("big"), Truth("big"));
  EXPECT_EQ(source_->requests().size(), 2u);
  EXPECT_EQ(layer_->stats().damaged_chunks, 1u);
}

TEST_F(LayerFaultTest, BytesThatNeverMatchAreDataLossAndAreNeitherServedNorStored) {
  source_->AnswerWith([](size_t, const std::string& bytes) { return Corrupt(bytes); });
  EXPECT_EQ(Read("big").status().code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(source_->requests().size(), 2u);
  EXPECT_FALSE(StoredAnything());
  // The next read tries anew.
  source_->AnswerWith(nullptr);
  EXPECT_EQ(*Read("big"), Truth("big"));
}

TEST_F(LayerFaultTest, AValidGzipStreamOfOtherBytesIsRefusedAsWell) {
  std::string other = toc::testing::GzipMember(RandomText(20'000, 77));
  uint64_t offset = ChunkOf("a").blob_offset;
  source_->AnswerWith([&](size_t n, std::string bytes) {
    uint64_t at = offset - source_->requests()[n].offset;
    std::string wrong = other;
    wrong.resize(bytes.size() - at, '\0');
    return bytes.substr(0, at) + wrong;
  });
  EXPECT_EQ(Read("a").status().code(), absl::StatusCode::kDataLoss);
  EXPECT_NE(content_->StateOf(*content_->files(), index_->node(NodeOf("a"))->first),
            cache::ChunkState::kPresent);
}

TEST_F(LayerFaultTest, ADamagedNeighbourDoesNotFailTheReadThatBroughtIt) {
  uint64_t begin = ChunkOf("b").blob_offset;
  uint64_t end = ChunkOf("b").blob_end;
  source_->AnswerWith([&](size_t n, std::string bytes) {
    auto request = source_->requests()[n];
    for (uint64_t i = std::max(begin + 40, request.offset);
         i < std::min(end, request.offset + request.length); i += 100) {
      bytes[i - request.offset] = static_cast<char>(bytes[i - request.offset] ^ 0x55);
    }
    return bytes;
  });
  EXPECT_EQ(*Read("a"), Truth("a"));
  ASSERT_GE(source_->requests()[0].offset + source_->requests()[0].length, end) << "b was no neighbour";
  EXPECT_EQ(Read("b").status().code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(*Read("a"), Truth("a"));
}

TEST_F(LayerFaultTest, AFullDiskServesWithoutStoring) {
  faults_.FailAt("cache.before_data", ErrnoStatus(ENOSPC, "injected"), 0);
  EXPECT_EQ(*Read("a"), Truth("a"));
  EXPECT_EQ(*Read("big", 1000, 5000), Truth("big").substr(1000, 5000));
  EXPECT_GE(faults_.fired("cache.before_data"), 2);
  EXPECT_FALSE(StoredAnything());
  EXPECT_GE(store_->stats().unstored_bytes, 620'000u);
}

TEST_F(LayerFaultTest, ASilentRegistryDoesNotHoldUpTheMissesOfAnother) {
  std::vector<toc::testing::WriterEntry> entries;
  for (unsigned i = 0; i < 20; i++) entries.push_back(File("f" + std::to_string(i), RandomText(100'000, i)));
  MakeBlob(entries);
  reader_options_.max_inflight_bytes = 400'000;
  Start();
  auto content =
      store_->OpenLayer("sha256:" + std::string(64, '7'), index_->chunk_count(), index_->content_bytes());
  ASSERT_TRUE(content.ok()) << content.status();
  // Several layers of the silent registry, all with more misses than fit.
  auto silent = std::make_shared<FakeSource>(made_.blob);
  silent->Hold(true);
  std::vector<std::shared_ptr<Layer>> stuck;
  std::atomic<unsigned> answered{0};
  for (int i = 0; i < 5; i++) {
    stuck.push_back(reader_->Open(index_, *content, silent, "silent:5000"));
    for (int j = 0; j < 20; j++) {
      stuck.back()->ReadAsync(NodeOf("f" + std::to_string(j)), 0, 100, In(30 * kSecond),
                              [&](const absl::StatusOr<ReadResult>&) { answered++; });
    }
  }
  ASSERT_TRUE(silent->WaitRequests(2));
  for (int j = 0; j < 20; j++) {
    std::string name = "f" + std::to_string(j);
    EXPECT_EQ(*Read(name), Truth(name));
  }
  EXPECT_EQ(answered, 0u);
  EXPECT_LE(silent->requests().size(), 3u);
  stuck.clear();
  End();  // fails the reads that wait, though only the queue still knows them
  EXPECT_EQ(answered, 100u);
  silent->Stop();
}

TEST_F(LayerFaultTest, SourceErrorsReachTheReader) {
  for (const absl::Status& error : {NotFound("gone"), PermissionDenied("no"), Unavailable("down")}) {
    source_->AnswerWith([&](size_t, std::string) { return absl::StatusOr<std::string>(error); });
    EXPECT_EQ(Read("a").status(), error);
  }
  source_->AnswerWith([&](size_t, std::string bytes) { return bytes.substr(1); });
  EXPECT_EQ(Read("a").status().code(), absl::StatusCode::kDataLoss);
  source_->AnswerWith(nullptr);
  faults_.FailAt("layer.before_fetch", Unavailable("injected"));
  EXPECT_EQ(Read("a").status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(faults_.fired("layer.before_fetch"), 1);
  EXPECT_EQ(*Read("a"), Truth("a"));
}

TEST_F(LayerFaultTest, AReadEndsAtItsDeadlineWhileTheFetchGoesOnForOthers) {
  source_->Hold(true);
  Pending patient = Begin("a", 0, 100, In(30 * kSecond));
  Pending hasty = Begin("a", 0, 100, In(kSecond / 20));
  EXPECT_EQ(Await(&hasty).status().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(patient.wait_for(std::chrono::seconds(0)), std::future_status::timeout);
  source_->Hold(false);
  auto result = Await(&patient);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(BytesOf(*result), Truth("a").substr(0, 100));
  EXPECT_EQ(source_->requests().size(), 1u);
}

TEST_F(LayerFaultTest, WhoMayWaitLongerThanTheFetchGetsAnotherOne) {
  source_->Hold(true);
  uint64_t early = In(20 * kSecond);
  Pending first = Begin("a", 0, 100, early);
  Pending second = Begin("a", 0, 100, early + 5 * kSecond);
  source_->AnswerWith([](size_t n, std::string bytes) {
    return n == 0 ? absl::StatusOr<std::string>(DeadlineExceeded("the source gave up")) : bytes;
  });
  source_->Hold(false);
  EXPECT_EQ(Await(&first).status().code(), absl::StatusCode::kDeadlineExceeded);
  auto result = Await(&second);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(BytesOf(*result), Truth("a").substr(0, 100));
  EXPECT_EQ(source_->requests()[1].deadline, early + 5 * kSecond);
}

TEST_F(LayerFaultTest, ContentCutShortUnderAReaderIsFetchedAgain) {
  EXPECT_EQ(*Read("a"), Truth("a"));
  EXPECT_EQ(*Read("big"), Truth("big"));
  ASSERT_EQ(truncate(ContentFile().c_str(), 10), 0);
  auto cut = layer_->ReadNow(NodeOf("big"), 0, 1 << 20);
  ASSERT_TRUE(cut.has_value());
  ASSERT_NE(BytesOf(*cut), Truth("big"));  // as a splice would come out
  layer_->Distrust(NodeOf("big"), 0, 1 << 20);
  EXPECT_EQ(*Read("big"), Truth("big"));
  EXPECT_EQ(*Read("a"), Truth("a"));  // found by its digest, not served as zeros
  EXPECT_EQ(*Read("b"), Truth("b"));
}

TEST_F(LayerFaultTest, ContentCutShortBetweenWorkersIsFetchedAgain) {
  EXPECT_EQ(*Read("big"), Truth("big"));
  ASSERT_EQ(truncate(ContentFile().c_str(), 10), 0);
  Start();
  EXPECT_EQ(*Read("big"), Truth("big"));
  EXPECT_EQ(source_->requests().size(), 1u);
}

TEST_F(LayerFaultTest, ChunksDamagedOnDiskAreFoundUnderANewVaultAndFetchedAgain) {
  for (const char* name : {"a", "b", "big"}) ASSERT_EQ(*Read(name), Truth(name));
  DamageOnDisk("a");    // verified at once
  DamageOnDisk("big");  // left to a completion thread
  store_options_.vault_id = std::string(32, '2');
  Start();
  for (const char* name : {"a", "b", "big"}) EXPECT_EQ(*Read(name), Truth(name)) << name;
  EXPECT_EQ(layer_->stats().damaged_chunks, 2u);
  EXPECT_EQ(store_->stats().damaged_chunks, 2u);
  EXPECT_EQ(source_->requests().size(), 2u);
}

TEST_F(LayerFaultTest, SoundContentUnderANewVaultIsNotFetched) {
  for (const char* name : {"a", "b", "big"}) ASSERT_EQ(*Read(name), Truth(name));
  store_options_.vault_id = std::string(32, '2');
  Start();
  source_->AnswerWith(
      [](size_t, std::string) { return absl::StatusOr<std::string>(Unavailable("registry down")); });
  for (const char* name : {"a", "b", "big"}) EXPECT_EQ(*Read(name), Truth(name)) << name;
  EXPECT_TRUE(IsCached("big"));
  EXPECT_TRUE(source_->requests().empty());
}

TEST_F(LayerFaultTest, AFailedPrefetchDoesNotFailTheReadThatJoinedIt) {
  MakeBlob({File("p", RandomText(90'000, 8)), toc::testing::Landmark(), File("q", "q")});
  Start();
  source_->Hold(true);
  layer_->StartPrefetch();
  ASSERT_TRUE(source_->WaitRequests(1));
  Pending read = Begin("p", 0, 100, In(30 * kSecond));
  source_->AnswerWith([](size_t n, std::string bytes) {
    return n == 0 ? absl::StatusOr<std::string>(Unavailable("prefetch gives up early")) : bytes;
  });
  source_->Hold(false);
  auto result = Await(&read);
  ASSERT_TRUE(result.ok()) << result.status();
  ASSERT_EQ(source_->requests().size(), 2u);
  EXPECT_EQ(source_->requests()[0].priority, cache::Priority::kPrefetch);
  EXPECT_EQ(source_->requests()[1].priority, cache::Priority::kDemand);
}

TEST_F(LayerFaultTest, UnderRandomFailuresEveryReadIsRightOrAnError) {
  std::atomic<unsigned> failed{0};
  source_->AnswerWith([&](size_t n, std::string bytes) -> absl::StatusOr<std::string> {
    if (n % 5 == 0) return Corrupt(std::move(bytes));
    if (n % 3 == 0) return Unavailable("injected");
    return bytes;
  });
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 4; t++) {
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      for (int i = 0; i < 200; i++) {
        const auto& [name, truth] = files_[random() % files_.size()];
        uint64_t offset = random() % truth.size();
        auto bytes = Read(name, offset, 5000);
        if (!bytes.ok()) {
          failed++;
        } else if (*bytes != truth.substr(offset, 5000)) {
          wrong++;
        }
        if (random() % 4 == 0) layer_->Distrust(NodeOf(name), 0, truth.size());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_GT(failed, 0u);
  source_->AnswerWith(nullptr);
  for (const auto& [name, truth] : files_) EXPECT_EQ(*Read(name), truth);
}

TEST_F(LayerFaultTest, ATaskThatDoesNotEndIsSeenAndARegistryThatDoesNotAnswerIsNotTakenForOne) {
  FakeClock clock;
  LoopWatch watch(&clock);
  reader_options_.watch = &watch;
  Start();
  source_->Hold(true);
  Pending pending = Begin("a", 0, 1000, In(30 * kSecond));
  while (source_->requests().empty()) std::this_thread::yield();
  while (watch.Oldest().nanos != 0) std::this_thread::yield();
  clock.Advance(600 * kSecond);
  EXPECT_EQ(watch.Oldest().nanos, 0u);
  faults_.BlockAt("layer.before_verify");
  source_->Hold(false);
  ASSERT_TRUE(faults_.WaitFired("layer.before_verify", 1, 10));
  clock.Advance(3 * kSecond);
  EXPECT_EQ(watch.Oldest().nanos, 3 * kSecond);
  EXPECT_EQ(watch.Oldest().name, "layer");
  faults_.Release("layer.before_verify");
  EXPECT_TRUE(Await(&pending).ok());
  End();
}

}  // namespace
}  // namespace holdfast::layer
