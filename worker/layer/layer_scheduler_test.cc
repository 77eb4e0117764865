#include "worker/layer/layer_scheduler.h"

#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace holdfast::layer {
namespace {

class FetchSchedulerTest : public testing::Test {
 protected:
  FetchScheduler::Start Fetch(const std::string& origin, uint64_t bytes, const std::string& name) {
    return {origin, bytes, [this, name] { begun_.push_back(name); }};
  }
  // What began since the last call, in order.
  std::vector<std::string> Begun() { return std::exchange(begun_, {}); }

  using Names = std::vector<std::string>;
  FetchScheduler scheduler_{100};
  Names begun_;
};

TEST_F(FetchSchedulerTest, OneOriginMayUseAllButTheQuarterThatIsLeftToOthers) {
  for (const char* name : {"a1", "a2", "a3", "a4"}) scheduler_.Demand(Fetch("a", 25, name));
  EXPECT_EQ(Begun(), (Names{"a1", "a2", "a3"}));
  scheduler_.Done("a", 25, false);
  EXPECT_EQ(Begun(), Names{"a4"});
}

TEST_F(FetchSchedulerTest, BehindASilentOriginTheOthersBeginInTheirOwnOrder) {
  for (const char* name : {"a1", "a2", "a3", "a4", "a5"}) scheduler_.Demand(Fetch("a", 25, name));
  for (const char* name : {"b1", "b2", "b3"}) scheduler_.Demand(Fetch("b", 10, name));
  EXPECT_EQ(Begun(), (Names{"a1", "a2", "a3", "b1", "b2"}));
  scheduler_.Done("b", 10, false);
  EXPECT_EQ(Begun(), Names{"b3"});
}

TEST_F(FetchSchedulerTest, HoweverManyOriginsAreSilentAnotherOneMayBegin) {
  for (const char* origin : {"a", "b", "c"}) {
    for (int i = 0; i < 9; i++) scheduler_.Demand(Fetch(origin, 25, origin));
  }
  Begun();
  scheduler_.Demand(Fetch("d", 25, "d1"));
  scheduler_.Demand(Fetch("d", 25, "d2"));
  EXPECT_EQ(Begun(), Names{"d1"});
  scheduler_.Done("d", 25, false);
  EXPECT_EQ(Begun(), Names{"d2"});
}

TEST_F(FetchSchedulerTest, TheBytesOfManyOriginsAreBoundedByTwiceTheBudget) {
  for (int i = 0; i < 50; i++) scheduler_.Demand(Fetch("o" + std::to_string(i), 25, "x"));
  EXPECT_EQ(Begun().size(), 8u);
}

TEST_F(FetchSchedulerTest, WhenThereIsRoomAgainTheOldestThatMayBeginGoesFirst) {
  scheduler_.Demand(Fetch("b", 25, "b1"));
  for (const char* name : {"a1", "a2"}) scheduler_.Demand(Fetch("a", 25, name));
  scheduler_.Demand(Fetch("b", 25, "b2"));
  scheduler_.Demand(Fetch("a", 25, "a3"));
  EXPECT_EQ(Begun(), (Names{"b1", "a1", "a2"}));
  scheduler_.Done("a", 25, false);
  EXPECT_EQ(Begun(), Names{"b2"});
}

TEST_F(FetchSchedulerTest, AFetchLargerThanTheBudgetBeginsAlone) {
  scheduler_.Demand(Fetch("a", 150, "a1"));
  scheduler_.Demand(Fetch("a", 1, "a2"));
  EXPECT_EQ(Begun(), Names{"a1"});
  scheduler_.Done("a", 150, false);
  EXPECT_EQ(Begun(), Names{"a2"});
}

TEST_F(FetchSchedulerTest, APrefetchThatIsNotAnsweredDoesNotHoldUpDemandOfItsOrigin) {
  for (int i = 0; i < 2; i++) {
    scheduler_.Prefetch([&]() -> std::optional<FetchScheduler::Start> { return Fetch("a", 40, "p"); }, false);
  }
  EXPECT_EQ(Begun(), (Names{"p", "p"}));
  scheduler_.Demand(Fetch("a", 90, "a1"));
  EXPECT_EQ(Begun(), Names{"a1"});
}

}  // namespace
}  // namespace holdfast::layer
