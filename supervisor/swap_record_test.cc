#include "supervisor/swap_record.h"

#include <capnp/message.h>
#include <kj/async-io.h>

#include <string>
#include <vector>

#include "common/fake_clock.h"
#include "gtest/gtest.h"

// Generated server bases have a protected life cycle (kj::Own) and no virtual destructor.
#pragma GCC diagnostic ignored "-Wnon-virtual-dtor"

namespace holdfast::supervisor {
namespace {

class ProgressServer final : public schema::Progress::Server {
 public:
  explicit ProgressServer(std::vector<std::string>* told) : told_(*told) {}
  kj::Promise<void> step(StepContext context) override {
    auto params = context.getParams();
    told_.push_back(std::string(params.getDone() ? "done " : "begun ") + params.getStep().getName().cStr());
    return kj::READY_NOW;
  }

 private:
  std::vector<std::string>& told_;
};

class SwapRecordTest : public ::testing::Test {
 protected:
  ~SwapRecordTest() noexcept override {}
  schema::SwapStatus::Reader Last() {
    auto out = message_.initRoot<schema::SwapStatus>();
    record_.FillLast(out);
    return out.asReader();
  }
  std::vector<std::string> Steps() {
    std::vector<std::string> steps;
    for (auto step : Last().getSteps())
      steps.push_back(std::string(step.getName().cStr()) + ": " + step.getDetail().cStr());
    return steps;
  }
  void Pass(uint64_t nanos) { clock_.Advance(nanos); }

  kj::AsyncIoContext io_ = kj::setupAsyncIo();
  FakeClock clock_;
  capnp::MallocMessageBuilder message_;
  SwapRecord record_{&clock_};
};

TEST_F(SwapRecordTest, ThePauseOfARolledBackSwapIsWhatReadersWaitedBothTimes) {
  record_.Ask("upgrade", nullptr);
  record_.BeginAsked("old", 8);
  record_.CarriesOver(3);
  record_.ReadsStopped(clock_.BootNanos());
  Pass(5);
  record_.ReadsTakenOver(2, true);
  Pass(1'000);
  record_.ReadsStopped(clock_.BootNanos());
  record_.ReadsStopped(clock_.BootNanos() + 7);  // they had stopped already
  record_.ReadsStopped(clock_.BootNanos() - 100);
  Pass(20);
  record_.ReadsTakenOver(1, false);
  record_.Finish("failed: why", "old");
  EXPECT_EQ(Last().getPauseNanos(), 125u);
  EXPECT_EQ(record_.carried_over(), 3u) << "back to its own worker they were not carried over";
  EXPECT_EQ(record_.swaps(), 0u);
  record_.Begin("crash", "old");
  EXPECT_EQ(Last().getPauseNanos(), 0u) << "each swap has its own";
}

TEST_F(SwapRecordTest, AWorkerThatGoesOnThoughNobodyHadStoppedReadingIsNoPause) {
  record_.Begin("supervisor", "b");
  Pass(1'000);
  record_.ReadsTakenOver(1, false);
  EXPECT_EQ(Last().getPauseNanos(), 0u);
}

TEST_F(SwapRecordTest, StepsEndWithTheOneThatFailedWhateverThePhasesAreAfterIt) {
  record_.Ask("upgrade", nullptr);
  record_.BeginStep("copy");
  record_.NotePhase(Phase::kRunning, Phase::kStarting, true);
  record_.BeginAsked("old", 8);
  record_.NotePhase(Phase::kStarting, Phase::kPreparing, true);
  record_.NotePhase(Phase::kPreparing, Phase::kStarting, false);  // both died: the running build is restarted
  record_.NotePhase(Phase::kStarting, Phase::kServing, false);
  record_.Finish("failed: died", "old");
  EXPECT_EQ(Steps(), (std::vector<std::string>{"copy: ", "start: ", "prepare: failed: died"}));
  EXPECT_STREQ(Last().getKind().cStr(), "upgrade");
  EXPECT_STREQ(Last().getResult().cStr(), "failed: died");
}

TEST_F(SwapRecordTest, ACrashWhileAnUpgradeIsStillCopiedIsASwapOfItsOwnAndEndsNoStep) {
  record_.Ask("upgrade", nullptr);
  record_.BeginStep("copy");
  EXPECT_FALSE(record_.begun());
  record_.ReadsStopped(clock_.BootNanos());
  record_.Begin("crash", "b");
  record_.NotePhase(Phase::kRunning, Phase::kStarting, false);
  record_.NotePhase(Phase::kStarting, Phase::kServing, false);
  Pass(1'000);
  record_.ReadsTakenOver(3, true);
  record_.NotePhase(Phase::kServing, Phase::kRunning, false);
  record_.Finish("done", "b");
  EXPECT_STREQ(Last().getKind().cStr(), "crash");
  EXPECT_EQ(Last().getPauseNanos(), 1'000u);
  EXPECT_TRUE(Steps().empty());
  record_.EndStep(true);
  record_.NotePhase(Phase::kRunning, Phase::kStarting, true);
  record_.BeginAsked("b", 8);
  EXPECT_TRUE(record_.begun());
  record_.Finish("done", "c");
  EXPECT_EQ(Steps(), (std::vector<std::string>{"copy: ", "start: "}));
  EXPECT_EQ(record_.swaps(), 2u);
}

TEST_F(SwapRecordTest, WhoWatchesHearsOfParkAndServeOnlyWhenReadsGoOn) {
  std::vector<std::string> told;
  record_.Ask("rollback", schema::Progress::Client(kj::heap<ProgressServer>(&told)));
  record_.BeginAsked("old", 8);
  auto after = [&](Phase from, Phase to) {
    record_.NotePhase(from, to, true);
    kj::evalLast([] {}).wait(io_.waitScope);
    return told;
  };
  using Told = std::vector<std::string>;
  EXPECT_EQ(after(Phase::kRunning, Phase::kStarting), (Told{"begun start"}));
  EXPECT_EQ(after(Phase::kStarting, Phase::kParking), (Told{"begun start"}));
  EXPECT_EQ(after(Phase::kParking, Phase::kServing), (Told{"begun start"}));
  EXPECT_EQ(after(Phase::kServing, Phase::kYielding),
            (Told{"begun start", "done start", "begun park", "done park", "begun serve", "done serve",
                  "begun yield"}));
}

TEST_F(SwapRecordTest, OnlyASwapThatIsUnderWayCanFinishAndOnlyOneThatWasAskedForHasSteps) {
  record_.Finish("done", "b");
  EXPECT_EQ(record_.swaps(), 0u);
  record_.Begin("crash", "a");
  record_.Detail("nobody asked");
  record_.Finish("done", "b");
  record_.Finish("failed: later", "c");
  EXPECT_STREQ(Last().getResult().cStr(), "done");
  EXPECT_STREQ(Last().getToBuild().cStr(), "b");
  EXPECT_EQ(record_.swaps(), 1u);
  EXPECT_TRUE(Steps().empty());
}

TEST_F(SwapRecordTest, WhatWasAskedForIsUnfinishedUntilItsResult) {
  record_.Begin("crash", "old");
  EXPECT_EQ(record_.unfinished(), "") << "nobody asked for it";
  record_.Finish("done", "old");
  record_.Ask("rollback", nullptr);
  EXPECT_EQ(record_.unfinished(), "") << "it is copied, say";
  record_.BeginAsked("old", 8);
  EXPECT_EQ(record_.unfinished(), "rollback");
  EXPECT_EQ(record_.candidate(), 8u);
  record_.Finish("failed: why", "old");
  EXPECT_EQ(record_.unfinished(), "");
}

}  // namespace
}  // namespace holdfast::supervisor
