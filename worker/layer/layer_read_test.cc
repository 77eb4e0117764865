#include <algorithm>
#include <atomic>

#include "worker/layer/layer_test_support.h"

namespace holdfast::layer {
namespace {

using toc::testing::Dir;
using toc::testing::File;
using toc::testing::WriterOptions;

std::vector<toc::testing::WriterEntry> ManyFiles() {
  std::vector<toc::testing::WriterEntry> entries = {Dir("d")};
  for (unsigned i = 0; i < 120; i++) {
    uint64_t size = i % 10 == 0 ? 0 : i % 7 == 0 ? 300'000 + i * 1000 : 200 + i * 150;
    entries.push_back(File("d/f" + std::to_string(i), RandomText(size, i)));
  }
  return entries;
}

struct Shape {
  const char* name;
  WriterOptions options;
};

class ReadsOf : public LayerTest, public testing::WithParamInterface<Shape> {};

TEST_P(ReadsOf, RandomRangesAreRightColdAndWarmFromManyThreads) {
  MakeBlob(ManyFiles(), GetParam().options);
  Start();
  for (const char* round : {"cold", "warm"}) {
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < 4; t++) {
      threads.emplace_back([&, t] {
        std::mt19937 random(t);
        for (int i = 0; i < 150; i++) {
          const auto& [name, truth] = files_[random() % files_.size()];
          uint64_t offset = random() % (truth.size() + 10);
          uint64_t size = random() % 200'000;
          auto bytes = Read(name, offset, size);
          if (!bytes.ok() || *bytes != (offset < truth.size() ? truth.substr(offset, size) : "")) wrong++;
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(wrong, 0) << round;
  }
  for (const auto& [name, truth] : files_) ASSERT_EQ(*Read(name), truth) << name;
  size_t fetches = source_->requests().size();
  Start();  // a new worker of the same vault: nothing is fetched, nothing hashed
  for (const auto& [name, truth] : files_) {
    ASSERT_TRUE(IsCached(name)) << name;
    ASSERT_EQ(*Read(name), truth) << name;
  }
  EXPECT_GT(fetches, 0u);
  EXPECT_TRUE(source_->requests().empty());
}

INSTANTIATE_TEST_SUITE_P(Blobs, ReadsOf,
                         testing::Values(Shape{"OneChunkAFile", {}},
                                         Shape{"SmallChunks", {.chunk_size = 32 * 1024}},
                                         Shape{"SharedMembers", {.min_chunk_size = 50'000}},
                                         Shape{"Both", {.chunk_size = 100'000, .min_chunk_size = 250'000}}),
                         [](const auto& param) { return param.param.name; });

using LayerReadTest = LayerTest;

TEST_F(LayerReadTest, ReadNowNeverAsksTheSource) {
  MakeBlob({File("a", RandomText(5000, 1)), Dir("d")});
  Start();
  EXPECT_FALSE(layer_->ReadNow(NodeOf("a"), 0, 5000).has_value());
  EXPECT_FALSE(layer_->ReadNow(NodeOf("d"), 0, 10).has_value());
  EXPECT_FALSE(layer_->ReadNow(99'999, 0, 10).has_value());
  EXPECT_TRUE(layer_->ReadNow(NodeOf("a"), 5000, 10).has_value());  // the end of the file needs no content
  EXPECT_TRUE(source_->requests().empty());
}

TEST_F(LayerReadTest, WhatIsNoRegularFileIsInvalid) {
  MakeBlob({Dir("d")});
  Start();
  EXPECT_EQ(Read("d").status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(LayerReadTest, FiftyReadersOfOneChunkShareOneFetch) {
  MakeBlob({File("a", RandomText(200'000, 1))});
  Start();
  source_->Hold(true);
  std::vector<Pending> reads;
  for (uint64_t i = 0; i < 50; i++) reads.push_back(Begin("a", i * 100, 1000, In(30 * kSecond)));
  source_->Hold(false);
  for (uint64_t i = 0; i < 50; i++) {
    auto result = Await(&reads[i]);
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(BytesOf(*result), Truth("a").substr(i * 100, 1000));
  }
  EXPECT_EQ(source_->requests().size(), 1u);
  EXPECT_EQ(layer_->stats().fetches, 1u);
  EXPECT_EQ(layer_->stats().fetched_bytes, source_->requests()[0].length);
}

TEST_F(LayerReadTest, AMissBringsItsNeighbourhoodOfSmallFiles) {
  std::vector<toc::testing::WriterEntry> entries;
  for (unsigned i = 0; i < 60; i++) entries.push_back(File("f" + std::to_string(i), RandomText(4000, i)));
  MakeBlob(entries);
  Start();
  ASSERT_EQ(*Read("f20"), Truth("f20"));
  ASSERT_EQ(source_->requests().size(), 1u);
  uint64_t window = ChunkOf("f20").blob_offset / 65536;
  size_t near = 0;
  for (const auto& [name, truth] : files_) {
    bool inside =
        ChunkOf(name).blob_offset / 65536 == window && ChunkOf(name).blob_end <= (window + 1) * 65536;
    if (inside) {
      // The read was answered as soon as its own chunk was there: the others follow within the same fetch.
      ASSERT_EQ(*Read(name), truth);
      near++;
    } else if (name != "f20") {
      EXPECT_FALSE(IsCached(name)) << name;
    }
  }
  EXPECT_GT(near, 10u);
  EXPECT_LT(near, 20u);
  EXPECT_EQ(source_->requests().size(), 1u);
}

TEST_F(LayerReadTest, OneFetchBringsAllFilesOfAMember) {
  std::vector<toc::testing::WriterEntry> entries;
  for (unsigned i = 0; i < 8; i++) entries.push_back(File("f" + std::to_string(i), RandomText(9000, i)));
  MakeBlob(entries, {.min_chunk_size = 1 << 20});
  reader_options_.neighbourhood_bytes = 0;
  Start();
  ASSERT_GT(ChunkOf("f5").inner_offset, 0u);
  for (const char* name : {"f5", "f0", "f7"}) ASSERT_EQ(*Read(name), Truth(name));
  EXPECT_EQ(source_->requests().size(), 1u);
}

TEST_F(LayerReadTest, TouchedBytesCountEachChunkOnce) {
  MakeBlob({File("a", RandomText(300'000, 1)), File("b", RandomText(1000, 2))}, {.chunk_size = 100'000});
  reader_options_.neighbourhood_bytes = 0;
  Start();
  EXPECT_EQ(layer_->stats().touched_compressed_bytes, 0u);
  for (int i = 0; i < 3; i++) ASSERT_TRUE(Read("a", 100'000, 10).ok());
  EXPECT_EQ(layer_->stats().touched_compressed_bytes, ChunkOf("a", 1).blob_end - ChunkOf("a", 1).blob_offset);
  ASSERT_TRUE(Read("b").ok());
  EXPECT_EQ(layer_->stats().touched_compressed_bytes, ChunkOf("a", 1).blob_end - ChunkOf("a", 1).blob_offset +
                                                          ChunkOf("b").blob_end - ChunkOf("b").blob_offset);
}

TEST_F(LayerReadTest, ReadingForwardBringsTheNextChunkAtLowerPriority) {
  MakeBlob({File("a", RandomText(500'000, 1))}, {.chunk_size = 100'000});
  Start();
  ASSERT_TRUE(Read("a", 0, 10).ok());
  EXPECT_EQ(source_->requests().size(), 1u);
  ASSERT_TRUE(Read("a", 100'000, 10).ok());  // chunk 1 follows chunk 0
  ASSERT_TRUE(source_->WaitRequests(3));
  EXPECT_EQ(source_->requests()[2].offset, ChunkOf("a", 2).blob_offset);
  EXPECT_EQ(source_->requests()[2].priority, cache::Priority::kPrefetch);
  ASSERT_EQ(*Read("a", 250'000, 10), Truth("a").substr(250'000, 10));
  ASSERT_TRUE(source_->WaitRequests(4));  // reading on, without a miss, keeps one ahead
  EXPECT_EQ(source_->requests()[3].offset, ChunkOf("a", 3).blob_offset);
}

TEST_F(LayerReadTest, PrefetchStopsAtTheLandmarkAndWhileParked) {
  std::vector<toc::testing::WriterEntry> entries;
  for (unsigned i = 0; i < 30; i++) entries.push_back(File("f" + std::to_string(i), RandomText(100'000, i)));
  entries.push_back(toc::testing::Landmark());
  entries.push_back(File("late", RandomText(100'000, 99)));
  MakeBlob(entries);
  Start();
  reader_->Pause(true);
  layer_->StartPrefetch();
  ASSERT_EQ(*Read("f3"), Truth("f3"));  // demand goes on
  ASSERT_EQ(source_->requests().size(), 1u);
  EXPECT_EQ(source_->requests()[0].priority, cache::Priority::kDemand);
  reader_->Pause(false);
  for (const auto& [name, truth] : files_) {
    if (name == "late" || name[0] == '.') continue;
    ASSERT_EQ(*Read(name), truth) << name;
  }
  EXPECT_FALSE(IsCached("late"));
  for (const FakeSource::Request& request : source_->requests()) {
    EXPECT_LE(request.offset + request.length, index_->info().prefetch_end + 4096);
    EXPECT_LE(request.length, 1u << 20);
  }
}

TEST_F(LayerReadTest, BytesOnTheirWayAreBoundedAndAllReadsAreServed) {
  std::vector<toc::testing::WriterEntry> entries;
  for (unsigned i = 0; i < 20; i++) entries.push_back(File("f" + std::to_string(i), RandomText(100'000, i)));
  MakeBlob(entries);
  reader_options_.max_inflight_bytes = 450'000;  // one origin leaves a quarter free
  Start();
  source_->Hold(true);
  std::vector<Pending> reads;
  for (const auto& [name, truth] : files_) reads.push_back(Begin(name, 0, 100'000, In(30 * kSecond)));
  EXPECT_EQ(source_->requests().size(), 3u);
  source_->Hold(false);
  for (size_t i = 0; i < reads.size(); i++) {
    auto result = Await(&reads[i]);
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(BytesOf(*result), files_[i].second);
  }
}

TEST_F(LayerReadTest, AReaderThatEndsWithFetchesInFlightAnswersItsReads) {
  MakeBlob({File("a", RandomText(200'000, 1)), File("b", RandomText(200'000, 2))});
  reader_options_.max_inflight_bytes = 1;
  Start();
  source_->Hold(true);
  Pending in_flight = Begin("a", 0, 100, In(30 * kSecond));
  Pending queued = Begin("b", 0, 100, In(30 * kSecond));
  layer_.reset();
  reader_.reset();
  EXPECT_EQ(Await(&in_flight).status().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(Await(&queued).status().code(), absl::StatusCode::kCancelled);
  source_->Hold(false);  // the late answer finds nobody, and harms nothing
}

TEST_F(LayerReadTest, ALayerThatIsDroppedWithFetchesInFlightStillAnswers) {
  MakeBlob({File("a", RandomText(200'000, 1))});
  Start();
  source_->Hold(true);
  Pending read = Begin("a", 0, 100, In(30 * kSecond));
  layer_.reset();
  source_->Hold(false);
  auto result = Await(&read);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(BytesOf(*result), Truth("a").substr(0, 100));
}

}  // namespace
}  // namespace holdfast::layer
