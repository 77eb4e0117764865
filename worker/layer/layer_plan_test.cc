#include "worker/layer/layer_plan.h"

#include "gtest/gtest.h"

namespace holdfast::layer {
namespace {

constexpr uint64_t kWindow = 64 * 1024;

ChunkRecord Chunk(uint64_t blob_offset, uint64_t blob_end, uint64_t size = 1000, uint64_t inner_offset = 0) {
  ChunkRecord chunk{};
  chunk.blob_offset = blob_offset;
  chunk.blob_end = blob_end;
  chunk.size = size;
  chunk.inner_offset = inner_offset;
  return chunk;
}

bool Everything(uint64_t) { return true; }
bool Nothing(uint64_t) { return false; }

TEST(PlanDemand, BringsSmallChunksOfTheSameAlignedWindowOnly) {
  std::vector<ChunkRecord> chunks = {Chunk(60'000, 65'000), Chunk(65'000, 66'000), Chunk(66'000, 70'000),
                                     Chunk(70'000, 130'000), Chunk(130'000, 140'000)};
  auto plans = PlanDemand(chunks, {2}, kWindow, Everything);
  ASSERT_EQ(plans.size(), 1u);
  // Chunk 1 begins in the window before, chunk 4 ends in the one behind.
  EXPECT_EQ(plans[0].chunks, (std::vector<uint64_t>{2, 3}));
  EXPECT_EQ(plans[0].offset, 66'000u);
  EXPECT_EQ(plans[0].length, 64'000u);
}

TEST(PlanDemand, ALargeChunkBringsNoCompanyAndIsNone) {
  std::vector<ChunkRecord> chunks = {Chunk(0, 1000), Chunk(1000, 2000, 1 << 20), Chunk(2000, 3000)};
  auto large = PlanDemand(chunks, {1}, kWindow, Everything);
  ASSERT_EQ(large.size(), 1u);
  EXPECT_EQ(large[0].chunks, std::vector<uint64_t>{1});
  auto small = PlanDemand(chunks, {0}, kWindow, Everything);
  ASSERT_EQ(small.size(), 1u);
  EXPECT_EQ(small[0].chunks, (std::vector<uint64_t>{0, 2}));  // the gap is small enough to join them
}

TEST(PlanDemand, NeighboursBehindAGapAreLeftAlone) {
  std::vector<ChunkRecord> chunks = {Chunk(0, 1000), Chunk(1000, 20'000), Chunk(20'000, 21'000)};
  auto plans = PlanDemand(chunks, {0}, kWindow, [](uint64_t chunk) { return chunk == 2; });
  ASSERT_EQ(plans.size(), 1u);
  EXPECT_EQ(plans[0].chunks, std::vector<uint64_t>{0});
}

TEST(PlanDemand, JoinsAcrossSmallGapsAndStaysBounded) {
  std::vector<ChunkRecord> chunks;
  for (uint64_t i = 0; i < 10; i++) chunks.push_back(Chunk(i << 20, (i << 20) + (1 << 20) - 4000, 1 << 20));
  auto plans = PlanDemand(chunks, {0, 1, 2, 3, 4, 5, 9}, kWindow, Nothing);
  ASSERT_EQ(plans.size(), 3u);
  EXPECT_EQ(plans[0].chunks, (std::vector<uint64_t>{0, 1, 2, 3}));
  EXPECT_EQ(plans[1].chunks, (std::vector<uint64_t>{4, 5}));
  EXPECT_EQ(plans[2].chunks, std::vector<uint64_t>{9});
  for (const PlannedFetch& plan : plans) EXPECT_LE(plan.length, kMaxFetchBytes);
}

TEST(PlanDemand, AMemberBringsAllItsChunks) {
  std::vector<ChunkRecord> chunks = {Chunk(0, 50'000, 1 << 20, 0), Chunk(0, 50'000, 1 << 20, 1 << 20),
                                     Chunk(50'000, 60'000)};
  auto plans = PlanDemand(chunks, {1}, 0, Everything);
  ASSERT_EQ(plans.size(), 1u);
  EXPECT_EQ(plans[0].chunks, (std::vector<uint64_t>{0, 1}));
  EXPECT_EQ(plans[0].length, 50'000u);
}

TEST(PlanDemand, OverlappingCompanyOfAHostileMemberIsLeftOut) {
  std::vector<ChunkRecord> chunks;
  for (uint64_t i = 0; i < 100'000; i++) chunks.push_back(Chunk(0, 1000, 1 << 20, i));
  auto plans = PlanDemand(chunks, {500}, kWindow, Everything);
  ASSERT_EQ(plans.size(), 1u);
  EXPECT_LE(plans[0].chunks.size(), 2u);
  EXPECT_NE(std::find(plans[0].chunks.begin(), plans[0].chunks.end(), 500u), plans[0].chunks.end());
}

TEST(PlanDemand, ChunksOfAHostileIndexInAnyOrderGiveRangesThatHoldThem) {
  std::vector<ChunkRecord> chunks = {Chunk(90'000, 91'000), Chunk(10, 20), Chunk(50'000, 60'000),
                                     Chunk(30, 90'000)};
  auto plans = PlanDemand(chunks, {0, 1, 2, 3}, kWindow, Everything);
  size_t found = 0;
  for (const PlannedFetch& plan : plans) {
    for (uint64_t id : plan.chunks) {
      EXPECT_GE(chunks[id].blob_offset, plan.offset);
      EXPECT_LT(chunks[id].blob_offset, plan.offset + plan.length);
      found++;
    }
  }
  EXPECT_EQ(found, 4u);
}

TEST(PlanDemand, AFarAwayMemberEndIsNotFetched) {
  std::vector<ChunkRecord> chunks = {Chunk(0, 1ull << 40, 1000)};
  auto plans = PlanDemand(chunks, {0}, kWindow, Everything);
  ASSERT_EQ(plans.size(), 1u);
  EXPECT_LT(plans[0].length, 100'000u);
}

TEST(PlanPrefetch, GoesThroughTheRangeInBoundedPiecesAndSkipsWhatIsThere) {
  std::vector<ChunkRecord> chunks;
  for (uint64_t i = 0; i < 40; i++) chunks.push_back(Chunk(i * 100'000, (i + 1) * 100'000, 100'000));
  std::vector<uint64_t> taken;
  uint64_t cursor = 0;
  auto wanted = [](uint64_t chunk) { return chunk != 7; };
  while (auto plan = PlanPrefetch(chunks, &cursor, 3'000'000, wanted)) {
    EXPECT_LE(plan->length, kPrefetchPieceBytes);
    taken.insert(taken.end(), plan->chunks.begin(), plan->chunks.end());
  }
  EXPECT_EQ(taken.size(), 29u);
  EXPECT_EQ(taken.back(), 29u);
  EXPECT_EQ(std::count(taken.begin(), taken.end(), 7u), 0);
}

}  // namespace
}  // namespace holdfast::layer
