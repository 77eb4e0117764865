#include "worker/fetch/retry_policy.h"

#include <tuple>

#include "gtest/gtest.h"
#include "worker/fetch/answer_check.h"
#include "worker/fetch/blob_table.h"
#include "worker/fetch/transfer_queue.h"

namespace holdfast::fetch {
namespace {

using absl::StatusCode;
using cache::Priority;

constexpr uint64_t kMilli = 1'000'000;
constexpr RetryLimits kLimits{50 * kMilli, 5000 * kMilli};

RetryDecision After(const AttemptOutcome& outcome, const RetryHistory& history = {}, double random = 0.5) {
  return DecideRetry(outcome, history, kLimits, 1'000'000 * kMilli, 1'060'000 * kMilli, random);
}

AttemptOutcome HttpStatus(int status, bool behind_redirect = false, bool remembered = false) {
  AttemptOutcome outcome;
  outcome.http_status = status;
  outcome.behind_redirect = behind_redirect;
  outcome.redirect_remembered = remembered;
  return outcome;
}

AttemptOutcome Broken(Failure failure) {
  AttemptOutcome outcome;
  outcome.failure = failure;
  return outcome;
}

TEST(RetryPolicyTest, EveryStatusHasItsRule) {
  for (const int status : {408, 425, 429, 500, 502, 503, 504, 521}) {
    EXPECT_EQ(After(HttpStatus(status)).action, RetryAction::kWait) << status;
  }
  for (const auto& [status, code] : {std::pair{403, StatusCode::kPermissionDenied},
                                     {404, StatusCode::kNotFound},
                                     {410, StatusCode::kNotFound},
                                     {416, StatusCode::kDataLoss},
                                     {400, StatusCode::kFailedPrecondition},
                                     {501, StatusCode::kFailedPrecondition},
                                     {204, StatusCode::kFailedPrecondition}}) {
    EXPECT_EQ(After(HttpStatus(status)).action, RetryAction::kFail) << status;
    EXPECT_EQ(After(HttpStatus(status)).code, code) << status;
  }
}

TEST(RetryPolicyTest, A401IsAuthenticatedAnewOnce) {
  RetryHistory history;
  EXPECT_EQ(After(HttpStatus(401), history).action, RetryAction::kAuthenticate);
  history.authenticated_anew = true;
  EXPECT_EQ(After(HttpStatus(401), history).action, RetryAction::kFail);
  EXPECT_EQ(After(HttpStatus(401), history).code, StatusCode::kPermissionDenied);
}

TEST(RetryPolicyTest, AStaleRedirectIsResolvedOnce) {
  RetryHistory history;
  EXPECT_EQ(After(HttpStatus(403, true)).action, RetryAction::kResolveRedirect);
  EXPECT_EQ(After(HttpStatus(401, true)).action, RetryAction::kResolveRedirect);
  EXPECT_EQ(After(HttpStatus(404, true, true)).action, RetryAction::kResolveRedirect);
  EXPECT_EQ(After(HttpStatus(404, true, false)).action, RetryAction::kFail);
  history.resolved_anew = true;
  EXPECT_EQ(After(HttpStatus(403, true), history).action, RetryAction::kFail);
  EXPECT_EQ(After(HttpStatus(404, true, true), history).code, StatusCode::kNotFound);
}

TEST(RetryPolicyTest, BrokenConnectionsAreTriedAgainAndRefusalsAreNot) {
  for (const Failure failure : {Failure::kDns, Failure::kConnect, Failure::kCut, Failure::kAuth,
                                Failure::kTimeout, Failure::kShortBody, Failure::kBadAnswer}) {
    EXPECT_EQ(After(Broken(failure)).action, RetryAction::kWait);
  }
  EXPECT_EQ(After(Broken(Failure::kRefused)).action, RetryAction::kFail);
  EXPECT_EQ(After(Broken(Failure::kTimeout)).code, StatusCode::kDeadlineExceeded);
  RetryHistory history;
  history.bad_answers = 4;
  EXPECT_EQ(After(Broken(Failure::kBadAnswer), history).action, RetryAction::kFail);
  EXPECT_EQ(After(Broken(Failure::kShortBody), history).code, StatusCode::kDataLoss);
}

TEST(RetryPolicyTest, BackoffGrowsWithJitterBetweenItsBounds) {
  RetryHistory history;
  uint64_t previous = 0;
  for (history.waits = 0; history.waits < 70; history.waits++) {
    const uint64_t least = After(Broken(Failure::kCut), history, 0).wait_nanos;
    const uint64_t most = After(Broken(Failure::kCut), history, 0.999999).wait_nanos;
    EXPECT_EQ(least, kLimits.first_backoff_nanos);
    EXPECT_GE(most, previous);
    EXPECT_LE(most, kLimits.max_backoff_nanos);
    previous = most;
  }
  EXPECT_GT(previous, kLimits.max_backoff_nanos / 10 * 9);
}

TEST(RetryPolicyTest, NothingWaitsBeyondTheDeadline) {
  const auto decide = [](const AttemptOutcome& outcome, uint64_t remaining) {
    return DecideRetry(outcome, {}, kLimits, 1000, 1000 + remaining, 0.9);
  };
  AttemptOutcome busy = HttpStatus(429);
  busy.retry_after_nanos = 2000 * kMilli;
  EXPECT_EQ(decide(busy, 3000 * kMilli).wait_nanos, 2000 * kMilli);
  EXPECT_EQ(decide(busy, 1999 * kMilli).action, RetryAction::kFail);
  EXPECT_EQ(decide(busy, 1999 * kMilli).code, StatusCode::kUnavailable);
  EXPECT_EQ(decide(HttpStatus(503), 0).action, RetryAction::kFail);
  EXPECT_EQ(decide(HttpStatus(503), 90 * kMilli).action, RetryAction::kFail);
  RetryHistory long_history;
  long_history.waits = 20;
  const RetryDecision last = DecideRetry(HttpStatus(503), long_history, kLimits, 0, 1000 * kMilli, 0.99);
  EXPECT_EQ(last.action, RetryAction::kWait);
  EXPECT_EQ(last.wait_nanos, 500 * kMilli);
}

TEST(AnswerCheckTest, TakesOnlyThePartAskedFor) {
  HttpHeaders headers;
  headers.status = 206;
  headers.content_range = "bytes 10-19/100";
  const AnswerPlan plan = CheckAnswer({10, 10, false}, headers, 100);
  EXPECT_EQ(plan.kind, AnswerPlan::Kind::kTake);
  EXPECT_EQ(plan.take, 10u);
  EXPECT_EQ(plan.blob_size, 100u);
  EXPECT_EQ(CheckAnswer({10, 11, false}, headers, 100).kind, AnswerPlan::Kind::kFailed);
  EXPECT_EQ(CheckAnswer({10, 10, false}, headers, 101).kind, AnswerPlan::Kind::kFailed);
  EXPECT_EQ(CheckAnswer({95, 10, false}, headers, 100).kind, AnswerPlan::Kind::kFinal);
  headers.content_range = "bytes 90-99/100";
  EXPECT_EQ(CheckAnswer({0, 10, true}, headers, {}).kind, AnswerPlan::Kind::kTake);
  EXPECT_EQ(CheckAnswer({0, 11, true}, headers, {}).kind, AnswerPlan::Kind::kFailed);
  headers.content_range = "bytes 90-99/*";
  EXPECT_EQ(CheckAnswer({0, 10, true}, headers, {}).kind, AnswerPlan::Kind::kNoSuffix);
}

TEST(BlobTableTest, ForgetsTargetsInTimeAndTheLeastUsedWhenFull) {
  BlobTable table;
  BlobRef blob{{"h", "r", ""}, "d", ""};
  BlobTable::Entry* entry = table.Find(blob, 1);
  entry->target = Url{"http://t/", "http", "t"};
  entry->target_until = 100;
  EXPECT_TRUE(table.Find(blob, 99)->target.has_value());
  EXPECT_FALSE(table.Find(blob, 100)->target.has_value());
  table.Find(blob, 101)->size = 7;
  for (uint64_t i = 0; i < 10'000; i++) {
    table.Find({{"h", "r", ""}, std::to_string(i), ""}, 200 + i);
    if (i == 2000) table.Find(blob, 200 + i);
  }
  EXPECT_LE(table.size(), 4096u);
  EXPECT_FALSE(table.Find(blob, 20'000)->size.has_value());
}

TransferQueue::Item Item(uint64_t id, Priority priority, const std::string& tenant = "t",
                         const std::string& host = "h") {
  return {id, priority, tenant, host};
}

std::vector<uint64_t> PopAll(TransferQueue* queue) {
  std::vector<uint64_t> ids;
  while (const auto item = queue->Pop()) ids.push_back(item->id);
  return ids;
}

TEST(TransferQueueTest, DemandBeforePrefetchBeforeBackground) {
  TransferQueue queue(64, 64);
  queue.Push(Item(1, Priority::kBackground));
  queue.Push(Item(2, Priority::kPrefetch));
  queue.Push(Item(3, Priority::kDemand));
  EXPECT_EQ(PopAll(&queue), (std::vector<uint64_t>{3, 2, 1}));
}

TEST(TransferQueueTest, TenantsTakeTurns) {
  TransferQueue queue(64, 64);
  for (uint64_t i = 0; i < 4; i++) queue.Push(Item(i, Priority::kDemand, "a"));
  queue.Push(Item(10, Priority::kDemand, "b"));
  queue.Push(Item(11, Priority::kDemand, "b", "other host"));
  queue.Push(Item(20, Priority::kDemand, "c"));
  EXPECT_EQ(PopAll(&queue), (std::vector<uint64_t>{0, 10, 20, 1, 11, 2, 3}));
}

TEST(TransferQueueTest, AHostThatIsFullDoesNotHoldUpAnother) {
  TransferQueue queue(64, 2);
  for (uint64_t i = 0; i < 5; i++) queue.Push(Item(i, Priority::kDemand, "a", "slow"));
  queue.Push(Item(10, Priority::kDemand, "a", "fast"));
  EXPECT_EQ(PopAll(&queue).size(), 3u);
  queue.Finish(Item(0, Priority::kDemand, "a", "slow"));
  EXPECT_EQ(PopAll(&queue).size(), 1u);
  EXPECT_EQ(queue.queued(), 2u);
}

TEST(TransferQueueTest, WhatNobodyWaitsForLeavesRoomForDemand) {
  TransferQueue queue(64, 8);
  for (uint64_t i = 0; i < 20; i++) queue.Push(Item(i, Priority::kBackground));
  EXPECT_EQ(PopAll(&queue).size(), 4u);
  for (uint64_t i = 20; i < 40; i++) queue.Push(Item(i, Priority::kPrefetch));
  EXPECT_EQ(PopAll(&queue).size(), 2u);
  for (uint64_t i = 40; i < 60; i++) queue.Push(Item(i, Priority::kDemand));
  EXPECT_EQ(PopAll(&queue).size(), 2u);
}

TEST(TransferQueueTest, TheTotalIsLimitedAcrossHostsAndASingleConnectionStillServesAll) {
  TransferQueue queue(4, 8);
  for (uint64_t i = 0; i < 8; i++) queue.Push(Item(i, Priority::kDemand, "t", "h" + std::to_string(i)));
  EXPECT_EQ(PopAll(&queue).size(), 4u);
  TransferQueue narrow(1, 1);
  narrow.Push(Item(1, Priority::kBackground));
  EXPECT_EQ(PopAll(&narrow).size(), 1u);
}

}  // namespace
}  // namespace holdfast::fetch
