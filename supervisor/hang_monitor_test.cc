// Simulated time: each test feeds looks half a second apart.
#include "supervisor/hang_monitor.h"

#include <functional>

#include "gtest/gtest.h"

namespace holdfast::supervisor {
namespace {

constexpr uint64_t kMillis = 1'000'000;
constexpr uint64_t kSecond = 1'000 * kMillis;
constexpr uint64_t kStart = 1'000 * kSecond;

// What a healthy worker shows at `now`: it beats, answers pings, reads.
HangSample Healthy(uint64_t now) {
  return {.now_ns = now, .received = now / kMillis, .heartbeat_ns = now - 100 * kMillis};
}

struct Outcome {
  uint64_t at = 0;  // seconds*1e9 after the start; 0: no verdict
  std::string what;
};

// Looks for `duration`; `change` makes the sample of that moment what the case is about.
Outcome Watch(uint64_t duration, const std::function<void(HangSample*)>& change,
              uint64_t step = kHangTickMillis * kMillis) {
  HangMonitor monitor({});
  for (uint64_t after = 0; after <= duration; after += step) {
    HangSample sample = Healthy(kStart + after);
    change(&sample);
    if (auto verdict = monitor.Tick(sample)) return {after, verdict->what};
  }
  return {};
}

uint64_t After(const HangSample& sample) { return sample.now_ns - kStart; }

struct Case {
  const char* name;
  std::function<void(HangSample*)> change;
  const char* what;  // "" = never a verdict
};

std::string NameOf(const ::testing::TestParamInfo<Case>& info) { return info.param.name; }

class HangVerdictTest : public ::testing::TestWithParam<Case> {};

TEST_P(HangVerdictTest, IsReachedWithinFiveSecondsAndSaysWhatWasSeen) {
  Outcome outcome = Watch(20 * kSecond, GetParam().change);
  ASSERT_NE(outcome.at, 0u) << "no verdict";
  EXPECT_NE(outcome.what.find(GetParam().what), std::string::npos) << outcome.what;
  EXPECT_LE(outcome.at, 5 * kSecond);
  EXPECT_GT(outcome.at, 2 * kSecond);
}

const Case kHangs[] = {
    {"OneSlotIsExecutedTooLong",
     [](HangSample* s) {
       s->executing = {{.index = 0, .opcode = 15, .received_ns = s->now_ns, .mount = 1},
                       {.index = 1, .opcode = 3, .received_ns = kStart - 9, .mount = 12}};
     },
     "slot 1 executing for 3.5 s, mount 12, opcode 3"},
    {"ARecordIsPastItsDeadline",
     [](HangSample* s) {
       s->overdue_deadline_ns = kStart;
       s->overdue_mount = 7;
     },
     "a READ of mount 7 unanswered 2.5 s past its deadline"},
    {"TheHeartbeatStops", [](HangSample* s) { s->heartbeat_ns = kStart; }, "no pool thread turned for 3.5 s"},
    {"ThePingIsNotAnswered", [](HangSample* s) { s->ping = 5; }, "ping unanswered for 3.5 s"},
    {"ALoopDoesNotTurn",
     [](HangSample* s) {
       s->loop = "fetch";
       s->loop_age_ns = After(*s);
     },
     "loop fetch at one turn for 3.5 s"},
    {"ARequestIsNotRead",
     [](HangSample* s) {
       s->readable = {3, 9};
       s->held_back = {3};
       s->received = 100;
     },
     "a request of mount 9 unread for 3.5 s, and no other was read"},
};
INSTANTIATE_TEST_SUITE_P(All, HangVerdictTest, ::testing::ValuesIn(kHangs), NameOf);

class NoHangTest : public ::testing::TestWithParam<Case> {};

TEST_P(NoHangTest, IsNeverTakenForOneInTenMinutes) {
  Outcome outcome = Watch(600 * kSecond, GetParam().change);
  EXPECT_EQ(outcome.what, "") << outcome.at / kMillis << " ms";
}

uint64_t Every(uint64_t now, uint64_t period) { return now / period; }

const Case kHealthy[] = {
    {"IdleWorkerWithoutAnyRequest",
     [](HangSample* s) {
       s->received = 4;
       s->heartbeat_ns = Every(s->now_ns, kSecond) * kSecond;  // an idle pool turns once a second
     },
     ""},
    {"WorkerOfABuildWithoutHeartbeat",
     [](HangSample* s) {
       s->received = 4;
       s->heartbeat_ns = 0;
     },
     ""},
    {"StalledRegistryWithMountsAtTheirCap",
     [](HangSample* s) {
       s->received = 70'000;  // nothing more is read
       s->readable = {1, 2, 3};
       s->held_back = {1, 2, 3};
       s->heartbeat_ns = Every(s->now_ns, kSecond) * kSecond;
     },
     ""},
    {"StalledRegistryWhoseReadsAreAnsweredAtTheirDeadlines",
     [](HangSample* s) {
       s->overdue_deadline_ns =
           Every(s->now_ns, kSecond) * kSecond;  // always one, each answered a second late
       s->loop = "fetch";
       s->loop_age_ns = 900 * kMillis;
     },
     ""},
    {"BusyWorkerWhoseSlotsAreAlwaysInUse",
     [](HangSample* s) {
       for (uint32_t i = 0; i < 16; ++i)
         s->executing.push_back({.index = i,
                                 .opcode = 15,
                                 .received_ns = Every(s->now_ns + i * kMillis, 2'900 * kMillis),
                                 .mount = 1});
       s->readable = {1};
     },
     ""},
    {"OneLongTurnNowAndThen",
     [](HangSample* s) {
       s->loop_age_ns = After(*s) % (3 * kSecond);
       s->ping = Every(s->now_ns, 2'500 * kMillis);
     },
     ""},
    {"AMountThatIsHeldBackOnlyNowAndThen",
     [](HangSample* s) {
       s->received = 100;
       s->readable = {5};
       if (After(*s) % (2 * kSecond) == 0) s->held_back = {5};
     },
     ""},
    {"ThrottledWorkerThatIsSixTimesSlower",
     [](HangSample* s) {
       s->throttled_ns = After(*s) / 6 * 5;
       s->executing = {
           {.index = 1, .opcode = 15, .received_ns = Every(s->now_ns, 15 * kSecond), .mount = 12}};
       s->heartbeat_ns = Every(s->now_ns, 6 * kSecond);
     },
     ""},
};
INSTANTIATE_TEST_SUITE_P(All, NoHangTest, ::testing::ValuesIn(kHealthy), NameOf);

TEST(HangMonitorTest, AMachineThatWasPausedBeginsAnew) {
  HangMonitor monitor({});
  auto look = [&](uint64_t after) {
    HangSample sample = Healthy(kStart + after);
    sample.executing = {{.index = 1, .opcode = 15, .received_ns = kStart, .mount = 12}};
    sample.overdue_deadline_ns = kStart;
    sample.loop_age_ns = after;
    return monitor.Tick(sample).has_value();
  };
  EXPECT_FALSE(look(0));
  EXPECT_FALSE(look(500 * kMillis));
  EXPECT_FALSE(look(600 * kSecond)) << "ten minutes later";
  EXPECT_FALSE(look(601 * kSecond)) << "it gets its time";
  EXPECT_TRUE(look(602 * kSecond + 300 * kMillis)) << "but not for ever";
}

TEST(HangMonitorTest, AWorkerThatIsAlwaysThrottledIsNoticedLate) {
  Outcome outcome = Watch(600 * kSecond, [](HangSample* s) {
    s->throttled_ns = 16 * After(*s);  // the sum over many processors
    s->ping = 1;
  });
  EXPECT_GT(outcome.at, 20 * kSecond);
  EXPECT_LE(outcome.at, 30 * kSecond);
}

TEST(HangMonitorTest, TheLimitIsAsGiven) {
  HangMonitor monitor({.limit_ns = kSecond});
  uint64_t at = 0;
  for (uint64_t after = 0; at == 0 && after < 10 * kSecond; after += 500 * kMillis) {
    HangSample sample = Healthy(kStart + after);
    sample.ping = 3;
    if (monitor.Tick(sample)) at = after;
  }
  EXPECT_EQ(at, 1'500 * kMillis);
}

}  // namespace
}  // namespace holdfast::supervisor
