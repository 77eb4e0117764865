#include "common/loop_watch.h"

#include "common/fake_clock.h"
#include "gtest/gtest.h"

namespace holdfast {
namespace {

constexpr uint64_t kSecond = 1'000'000'000;

TEST(LoopWatchTest, ATurnAgesAndAWaitDoesNot) {
  FakeClock clock;
  LoopWatch watch(&clock);
  LoopWatch::Loop loop(&watch, "fetch");
  clock.Advance(600 * kSecond);
  EXPECT_EQ(watch.Oldest().nanos, 0u);
  loop.AtWork();
  clock.Advance(3 * kSecond);
  EXPECT_EQ(watch.Oldest().nanos, 3 * kSecond);
  EXPECT_EQ(watch.Oldest().name, "fetch");
  loop.AtWork();  // the next turn
  EXPECT_EQ(watch.Oldest().nanos, 0u);
  loop.Idle();
  clock.Advance(600 * kSecond);
  EXPECT_EQ(watch.Oldest().nanos, 0u);
}

TEST(LoopWatchTest, TheOldestIsNamedAndOneThatEndsIsForgotten) {
  FakeClock clock;
  LoopWatch watch(&clock);
  LoopWatch::Loop young(&watch, "young");
  {
    LoopWatch::Loop old(&watch, "old");
    old.AtWork();
    clock.Advance(kSecond);
    young.AtWork();
    clock.Advance(kSecond);
    EXPECT_EQ(watch.Oldest().name, "old");
    EXPECT_EQ(watch.Oldest().nanos, 2 * kSecond);
  }
  EXPECT_EQ(watch.Oldest().name, "young");
  EXPECT_EQ(watch.Oldest().nanos, kSecond);
}

TEST(LoopWatchTest, AWaitInsideATurnIsNotWorkAndWhatFollowsBeginsAnew) {
  FakeClock clock;
  LoopWatch watch(&clock);
  LoopWatch::Loop loop(&watch, "loop");
  LoopWatch::Turn turn(&loop);
  clock.Advance(kSecond);
  {
    LoopWatch::Pause waiting(&loop);
    clock.Advance(600 * kSecond);
    EXPECT_EQ(watch.Oldest().nanos, 0u);
  }
  EXPECT_EQ(watch.Oldest().nanos, 0u);
  clock.Advance(kSecond);
  EXPECT_EQ(watch.Oldest().nanos, kSecond);
}

TEST(LoopWatchTest, WithoutAWatchNothingIsWatched) {
  EXPECT_EQ(LoopWatch::Add(nullptr, "loop"), nullptr);
  LoopWatch::Turn turn(nullptr);
}

}  // namespace
}  // namespace holdfast
