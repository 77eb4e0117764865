#include "tests/support/link/shaper.h"

#include "gtest/gtest.h"

namespace holdfast::link {
namespace {

constexpr uint64_t kMs = 1'000'000;

TEST(ShaperTest, APacketNeedsItsTransmissionTimeAndTheDelay) {
  Shaper shaper(100'000'000, 10 * kMs, 1 << 20);
  ASSERT_TRUE(shaper.Push(0, std::string(1250, 'x')));  // 10,000 bits: 0.1 ms at 100 Mbit/s
  EXPECT_EQ(*shaper.NextDue(), 10 * kMs + kMs / 10);
}

TEST(ShaperTest, PacketsQueueBehindEachOtherAtTheBottleneck) {
  Shaper shaper(100'000'000, 0, 1 << 20);
  for (int i = 0; i < 3; i++) ASSERT_TRUE(shaper.Push(0, std::string(1250, 'x')));
  EXPECT_EQ(*shaper.NextDue(), kMs / 10);
  shaper.Pop();
  shaper.Pop();
  EXPECT_EQ(*shaper.NextDue(), 3 * kMs / 10);
}

TEST(ShaperTest, AFullQueueDropsAndRecovers) {
  Shaper shaper(8'000'000, 0, 2000);  // one byte a microsecond
  ASSERT_TRUE(shaper.Push(0, std::string(1000, 'x')));
  ASSERT_TRUE(shaper.Push(0, std::string(1000, 'x')));
  EXPECT_FALSE(shaper.Push(0, std::string(1000, 'x')));
  EXPECT_TRUE(shaper.Push(kMs, std::string(1000, 'x')));
  EXPECT_EQ(shaper.dropped(), 1u);
}

}  // namespace
}  // namespace holdfast::link
