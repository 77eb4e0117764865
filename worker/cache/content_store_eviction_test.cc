#include <fcntl.h>
#include <sys/stat.h>

#include "worker/cache/content_store.h"
#include "worker/cache/store_test_util.h"

namespace holdfast::cache {
namespace {

constexpr uint64_t kHour = 3'600'000'000'000;
constexpr uint64_t kMinute = 60'000'000'000;
constexpr uint64_t kChunks = 8;
constexpr uint64_t kPresenceBlocks = 8192;  // header page and one page of marks

class EvictionTest : public StoreTest {
 protected:
  // Room for `layers` full layers of kChunks.
  void LimitTo(uint64_t layers) {
    options_.limit_bytes = layers * (kChunks * kChunkBytes + kPresenceBlocks) + 4096;
  }
  static void FillLayer(LayerContent* content) {
    for (uint64_t chunk = 0; chunk < kChunks; chunk++) ASSERT_TRUE(PutChunk(content, chunk).ok());
  }
  static bool Stored(LayerContent* content) {
    return content->StateOf(*content->files(), 0) == ChunkState::kPresent;
  }
};

TEST_F(EvictionTest, TheLimitHoldsAndNothingIsEvictedWithoutPermission) {
  LimitTo(1);
  auto store = OpenStore(options_);
  auto one = OpenLayer(store.get(), 1, kChunks);
  FillLayer(one.get());
  auto two = OpenLayer(store.get(), 2, kChunks);
  EXPECT_EQ(PutChunk(two.get(), 0).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_LE(store->stats().bytes, options_.limit_bytes + kPresenceBlocks);
  EXPECT_EQ(store->stats().evicted_bytes, 0u);
  EXPECT_TRUE(Stored(one.get()));
}

TEST_F(EvictionTest, LayersNobodyHoldsGoFirstLeastRecentlyReadFirst) {
  LimitTo(3);
  auto store = OpenStore(options_);
  for (int layer : {2, 1}) {  // 2 was read an hour before 1
    auto content = OpenLayer(store.get(), layer, kChunks);
    FillLayer(content.get());
    content->Touch();
    clock_.Advance(kHour);
  }
  auto held = OpenLayer(store.get(), 3, kChunks);
  FillLayer(held.get());
  clock_.Advance(kHour);
  store->AllowEviction(true);
  auto fresh = OpenLayer(store.get(), 4, kChunks);
  ASSERT_TRUE(PutChunk(fresh.get(), 0).ok());
  for (int layer : {1, 3, 4}) EXPECT_TRUE(PathExists(FolderOf(layer))) << layer;
  EXPECT_FALSE(PathExists(FolderOf(2)));
  EXPECT_TRUE(Stored(held.get()));
  EXPECT_GE(store->stats().evicted_bytes, kChunks * kChunkBytes);
}

TEST_F(EvictionTest, AnIdleHeldLayerIsEmptiedAndItsReadersKeepValidBytes) {
  LimitTo(1);
  auto store = OpenStore(options_);
  store->AllowEviction(true);
  auto idle = OpenLayer(store.get(), 1, kChunks);
  FillLayer(idle.get());
  auto reader = idle->files();
  clock_.Advance(2 * kMinute);

  auto fresh = OpenLayer(store.get(), 2, kChunks);
  ASSERT_TRUE(PutChunk(fresh.get(), 0).ok());
  EXPECT_FALSE(Stored(idle.get()));
  EXPECT_EQ(idle->files()->generation, 2u);
  EXPECT_EQ(idle->StateOf(*reader, 3), ChunkState::kPresent);
  EXPECT_EQ(ReadChunk(*reader, 3), ChunkContent(3));
  EXPECT_FALSE(PathExists(FolderOf(1) + "/content.1"));
  // What was evicted can be stored again once there is room.
  fresh.reset();
  clock_.Advance(2 * kMinute);
  ASSERT_TRUE(PutChunk(idle.get(), 3).ok());
  EXPECT_EQ(ReadChunk(*idle->files(), 3), ChunkContent(3));
}

TEST_F(EvictionTest, ALayerReadInTheLastMinuteIsNeverEvicted) {
  LimitTo(1);
  auto store = OpenStore(options_);
  store->AllowEviction(true);
  auto busy = OpenLayer(store.get(), 1, kChunks);
  FillLayer(busy.get());
  clock_.Advance(10 * kMinute);
  busy->Touch();
  auto fresh = OpenLayer(store.get(), 2, kChunks);
  EXPECT_EQ(PutChunk(fresh.get(), 0).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(Stored(busy.get()));
  EXPECT_EQ(store->stats().unstored_bytes, kChunkBytes);
  clock_.Advance(2 * kMinute);
  EXPECT_TRUE(PutChunk(fresh.get(), 0).ok());
  EXPECT_FALSE(Stored(busy.get()));
}

TEST_F(EvictionTest, AnotherWorkerThatStillHoldsAnEvictedLayerStoresIntoTheNewFiles) {
  LimitTo(1);
  auto parked = OpenStore(options_);
  auto theirs = OpenLayer(parked.get(), 1, kChunks);
  ASSERT_TRUE(PutChunk(theirs.get(), 0).ok());
  auto before = theirs->files();
  auto owner = OpenStore(options_);
  owner->AllowEviction(true);
  FillLayer(OpenLayer(owner.get(), 2, kChunks).get());
  ASSERT_FALSE(PathExists(FolderOf(1)));
  EXPECT_EQ(ReadChunk(*before, 0), ChunkContent(0));
  ASSERT_TRUE(PutChunk(theirs.get(), 1).ok());
  auto ours = OpenLayer(owner.get(), 1, kChunks);
  EXPECT_EQ(ours->StateOf(*ours->files(), 0), ChunkState::kAbsent);
  EXPECT_EQ(ours->StateOf(*ours->files(), 1), ChunkState::kPresent);
  EXPECT_EQ(ReadChunk(*ours->files(), 1), ChunkContent(1));
}

TEST_F(EvictionTest, AWorkerThatWaitsSeesThatALayerItHoldsWasEvictedAndFindsTheNewFiles) {
  LimitTo(1);
  auto owner = OpenStore(options_), waiting = OpenStore(options_);
  owner->AllowEviction(true);
  auto idle = OpenLayer(owner.get(), 1, kChunks);
  FillLayer(idle.get());
  auto held = waiting->FindLayer(LayerName(1), kChunks, kChunks * kChunkBytes);
  ASSERT_TRUE(held.ok()) << held.status();
  EXPECT_TRUE(Stored(held->get()));
  EXPECT_FALSE((*held)->unlinked());
  clock_.Advance(2 * kMinute);
  auto fresh = OpenLayer(owner.get(), 2, kChunks);
  ASSERT_TRUE(PutChunk(fresh.get(), 0).ok());
  EXPECT_FALSE(idle->unlinked()) << "who evicts has the new files";
  EXPECT_TRUE((*held)->unlinked());
  held->reset();
  held = waiting->FindLayer(LayerName(1), kChunks, kChunks * kChunkBytes);
  ASSERT_TRUE(held.ok()) << held.status();
  EXPECT_FALSE((*held)->unlinked());
  EXPECT_FALSE(Stored(held->get()));
}

TEST_F(EvictionTest, AChunkLargerThanTheLimitIsNotStored) {
  options_.limit_bytes = kChunkBytes / 2;
  auto store = OpenStore(options_);
  store->AllowEviction(true);
  auto content = OpenLayer(store.get(), 1, kChunks);
  EXPECT_EQ(PutChunk(content.get(), 0).code(), absl::StatusCode::kResourceExhausted);
}

}  // namespace
}  // namespace holdfast::cache
