#include "worker/fetch/registry_client.h"

#include <algorithm>
#include <vector>

#include "common/fake_clock.h"
#include "worker/fetch/client_test_support.h"

namespace holdfast::fetch {
namespace {

using absl::StatusCode;

using RegistryClientTest = ClientTest;

TEST_F(RegistryClientTest, FetchesExactlyTheRangeAskedFor) {
  const std::string bytes = Pattern(100'000);
  const BlobRef blob = Blob(bytes);
  EXPECT_EQ(Fetch(blob, 0, 1).value(), bytes.substr(0, 1));
  EXPECT_EQ(Fetch(blob, 12'345, 6'789).value(), bytes.substr(12'345, 6'789));
  EXPECT_EQ(Fetch(blob, 99'999, 1).value(), bytes.substr(99'999, 1));
  EXPECT_EQ(Fetch(blob, 5, 0).value(), "");
  EXPECT_EQ(registry_.blob_requests(), 3u);
  EXPECT_EQ(registry_.log()[1].range, "bytes=12345-19133");
  EXPECT_EQ(client().stats().bytes, 6'791u);
  EXPECT_EQ(client().stats().in_flight, 0u);
}

TEST_F(RegistryClientTest, KeepsItsConnectionAlive) {
  const BlobRef blob = Blob(Pattern(50'000));
  for (uint64_t i = 0; i < 10; i++) ASSERT_TRUE(Fetch(blob, i * 100, 100).ok());
  EXPECT_EQ(registry_.connections(), 1u);
}

TEST_F(RegistryClientTest, TwoHundredConcurrentRangesAllArriveIntactOverFewConnections) {
  const std::string bytes = Pattern(400'000);
  const BlobRef blob = Blob(bytes);
  registry_.SetDelay(2 * kMilli);
  std::vector<Waiter<std::string>> waiters(200);
  for (size_t i = 0; i < waiters.size(); i++) {
    client().FetchRange(blob, i * 2000, 2000, Priority::kDemand, In(20 * kSecond), waiters[i].Callback());
  }
  for (size_t i = 0; i < waiters.size(); i++)
    EXPECT_EQ(waiters[i].Get().value(), bytes.substr(i * 2000, 2000));
  EXPECT_LE(registry_.connections(), 8u);
  EXPECT_EQ(client().stats().requests, 200u);
}

TEST_F(RegistryClientTest, ASourceFetchesAndOutlivesTheClientHarmlessly) {
  const std::string bytes = Pattern(1000);
  const std::shared_ptr<cache::BlobSource> source = client().Source(Blob(bytes));
  Waiter<std::string> first, second;
  source->Fetch(10, 20, Priority::kPrefetch, 0, first.Callback());
  EXPECT_EQ(first.Get().value(), bytes.substr(10, 20));
  client_.reset();
  source->Fetch(10, 20, Priority::kPrefetch, 0, second.Callback());
  EXPECT_THAT(second.Get(), FailsWith(StatusCode::kCancelled, "going away"));
}

TEST_F(RegistryClientTest, FetchesTheTailAndLearnsTheSizeInOneRequest) {
  const std::string bytes = Pattern(10'000);
  const absl::StatusOr<RegistryClient::Tail> tail = FetchTail(Blob(bytes), 51);
  EXPECT_EQ(tail.value().bytes, bytes.substr(10'000 - 51));
  EXPECT_EQ(tail.value().blob_size, 10'000u);
  EXPECT_EQ(registry_.requests(), 1u);
}

TEST_F(RegistryClientTest, TheTailOfABlobShorterThanItIsTheWholeBlob) {
  const absl::StatusOr<RegistryClient::Tail> tail = FetchTail(Blob("short"), 51);
  EXPECT_EQ(tail.value().bytes, "short");
  EXPECT_EQ(tail.value().blob_size, 5u);
}

TEST_F(RegistryClientTest, TheTailOfAnEmptyBlobIsEmpty) {
  const absl::StatusOr<RegistryClient::Tail> tail = FetchTail(Blob(""), 51);
  EXPECT_EQ(tail.value().bytes, "");
  EXPECT_EQ(tail.value().blob_size, 0u);
}

TEST_F(RegistryClientTest, TheTailComesByOtherMeansWhereSuffixRangesAreNotServed) {
  const std::string bytes = Pattern(100'000);
  const BlobRef blob = Blob(bytes);
  std::vector<RegistryFault> ways;
  for (const int status : {400, 416, 501}) ways.push_back(Status(status));
  RegistryFault whole;
  whole.ignore_range = true;
  ways.push_back(whole);
  whole.no_content_length = true;
  ways.push_back(whole);
  for (const RegistryFault& way : ways) {
    registry_.ResetCounters();
    registry_.SetHook([&](const test::RegistryRequest& request) -> std::optional<RegistryFault> {
      if (request.Header("range").rfind("bytes=-", 0) != 0) return std::nullopt;
      return way;
    });
    const absl::StatusOr<RegistryClient::Tail> tail = FetchTail(blob, 51);
    ASSERT_TRUE(tail.ok()) << tail.status();
    EXPECT_EQ(tail->bytes, bytes.substr(bytes.size() - 51));
    EXPECT_EQ(tail->blob_size, bytes.size());
    EXPECT_EQ(registry_.faults_served(), 1u);
  }
}

TEST_F(RegistryClientTest, A200ToARangeIsCutWhenItIsCheap) {
  const std::string bytes = Pattern(3'000'000);
  RegistryFault fault;
  fault.ignore_range = true;
  registry_.FailNext(fault, 2);
  EXPECT_EQ(Fetch(Blob(bytes), 1'000'000, 1000).value(), bytes.substr(1'000'000, 1000));
  EXPECT_EQ(Fetch(Blob(bytes), 0, 3'000'000).value(), bytes);
  EXPECT_EQ(registry_.faults_served(), 2u);
}

TEST_F(RegistryClientTest, A200ToARangeFarIntoALargeBlobIsRefused) {
  const BlobRef blob = Blob(std::string(20 << 20, 'x'));
  RegistryFault fault;
  fault.ignore_range = true;
  registry_.FailNext(fault);
  EXPECT_THAT(Fetch(blob, 17 << 20, 1000),
              FailsWith(StatusCode::kFailedPrecondition, "does not serve ranges"));
  EXPECT_LT(client().stats().bytes, 1u << 20);
}

TEST_F(RegistryClientTest, ABodyThatEndsTooSoonIsFetchedAgain) {
  const std::string bytes = Pattern(100'000);
  RegistryFault cut;
  cut.cut_after = 5000;
  registry_.FailNext(cut, 2);
  RegistryFault silent_cut = cut;
  silent_cut.no_content_length = true;
  registry_.FailNext(silent_cut);
  EXPECT_EQ(Fetch(Blob(bytes), 100, 50'000).value(), bytes.substr(100, 50'000));
  EXPECT_EQ(registry_.faults_served(), 3u);
  EXPECT_EQ(client().stats().retries, 3u);
}

TEST_F(RegistryClientTest, ABodyLongerThanAskedIsCutOff) {
  const std::string bytes = Pattern(10'000);
  RegistryFault longer;
  longer.append = std::string(1'000'000, '!');
  registry_.FailNext(longer);
  EXPECT_EQ(Fetch(Blob(bytes), 100, 500).value(), bytes.substr(100, 500));
  EXPECT_EQ(registry_.faults_served(), 1u);
}

TEST_F(RegistryClientTest, AWrongContentRangeIsAskedForAgainAndAtLastDataLoss) {
  const std::string bytes = Pattern(10'000);
  for (const char* wrong :
       {"bytes 0-9/10000", "bytes 100-199/9999", "bytes 100-199", "rubbish", "bytes 199-100/10000"}) {
    RegistryFault fault;
    fault.content_range = wrong;
    ASSERT_TRUE(Fetch(Blob(bytes), 0, 10).ok());  // the size is known from here
    registry_.FailNext(fault);
    EXPECT_EQ(Fetch(Blob(bytes), 100, 100).value(), bytes.substr(100, 100)) << wrong;
    registry_.FailNext(fault, 100);
    EXPECT_THAT(Fetch(Blob(bytes), 100, 100), FailsWith(StatusCode::kDataLoss, "Content-Range")) << wrong;
    registry_.ClearFaults();
  }
}

TEST_F(RegistryClientTest, ARangeBeyondTheEndOfATruncatedBlobIsDataLossAtOnce) {
  const BlobRef blob = Blob(Pattern(1000));
  EXPECT_THAT(Fetch(blob, 900, 200), FailsWith(StatusCode::kDataLoss, "ends at byte 1000"));
  EXPECT_THAT(Fetch(blob, 5000, 200), FailsWith(StatusCode::kDataLoss, "HTTP 416"));
  EXPECT_EQ(client().stats().retries, 0u);
}

TEST_F(RegistryClientTest, NotFoundAndGoneAreFinalAtOnce) {
  const BlobRef blob = Blob("x");
  for (const int status : {404, 410}) {
    registry_.ResetCounters();
    registry_.FailNext(Status(status));
    EXPECT_THAT(Fetch(blob, 0, 1), FailsWith(StatusCode::kNotFound, "HTTP " + std::to_string(status)));
    EXPECT_EQ(registry_.blob_requests(), 1u);
  }
}

TEST_F(RegistryClientTest, ForbiddenIsFinalAndNamesHostRepositoryAndDigest) {
  const BlobRef blob = Blob("x");
  registry_.FailNext(Status(403));
  const absl::StatusOr<std::string> result = Fetch(blob, 0, 1);
  EXPECT_THAT(result, FailsWith(StatusCode::kPermissionDenied, "HTTP 403"));
  EXPECT_THAT(result,
              FailsWith(StatusCode::kPermissionDenied, registry_.host() + "/demo/app " + blob.digest));
}

TEST_F(RegistryClientTest, BusyAndBrokenServersAreAskedAgain) {
  const std::string bytes = Pattern(1000);
  for (const int status : {429, 500, 502, 503, 504}) registry_.FailNext(Status(status));
  RegistryFault garbage;
  garbage.raw = "\x16\x03\x01 this is no HTTP\r\n\r\n";
  registry_.FailNext(garbage);
  EXPECT_EQ(Fetch(Blob(bytes), 1, 10).value(), bytes.substr(1, 10));
  EXPECT_EQ(registry_.faults_served(), 6u);
  EXPECT_EQ(client().stats().retries, 6u);
}

TEST_F(RegistryClientTest, AServerThatStaysBrokenIsUnavailableAtTheDeadlineWithItsLastStatus) {
  registry_.FailNext(Status(503), 100'000);
  const uint64_t before = Clock::Real()->BootNanos();
  EXPECT_THAT(Fetch(Blob("x"), 0, 1, 300 * kMilli), FailsWith(StatusCode::kUnavailable, "HTTP 503"));
  EXPECT_GE(Clock::Real()->BootNanos() - before, 200 * kMilli);
  EXPECT_GT(registry_.faults_served(), 3u);
}

TEST_F(RegistryClientTest, RetryAfterIsHonoured) {
  RegistryFault fault = Status(429);
  fault.headers.emplace_back("Retry-After", "1");
  registry_.FailNext(fault);
  const uint64_t before = Clock::Real()->BootNanos();
  EXPECT_TRUE(Fetch(Blob("x"), 0, 1).ok());
  EXPECT_GE(Clock::Real()->BootNanos() - before, kSecond);
}

TEST_F(RegistryClientTest, ARetryAfterBeyondTheDeadlineEndsTheRequestAtOnce) {
  RegistryFault fault = Status(429);
  fault.headers.emplace_back("Retry-After", "3600");
  registry_.FailNext(fault);
  const uint64_t before = Clock::Real()->BootNanos();
  EXPECT_THAT(Fetch(Blob("x"), 0, 1), FailsWith(StatusCode::kUnavailable, "HTTP 429"));
  EXPECT_LT(Clock::Real()->BootNanos() - before, 10 * kSecond);
}

TEST_F(RegistryClientTest, AServerThatComesBackInTimeIsNotAnError) {
  const BlobRef blob = Blob("content");
  registry_.Stop();
  Waiter<std::string> waiter;
  client().FetchRange(blob, 0, 7, Priority::kDemand, In(20 * kSecond), waiter.Callback());
  ASSERT_TRUE(registry_.WaitFor([&] { return client().stats().retries >= 3; }));
  registry_.Start();
  EXPECT_EQ(waiter.Get().value(), "content");
}

TEST_F(RegistryClientTest, AServerThatIsDownIsUnavailableAtTheDeadline) {
  const BlobRef blob = Blob("content");
  registry_.Stop();
  EXPECT_THAT(Fetch(blob, 0, 7, 200 * kMilli), FailsWith(StatusCode::kUnavailable, "connect"));
}

TEST_F(RegistryClientTest, AnUnknownHostNameIsTriedUntilTheDeadlineAndSaysSo) {
  BlobRef blob = Blob("x");
  blob.image.host = "registry.invalid:5000";
  EXPECT_THAT(Fetch(blob, 0, 1, 2 * kSecond),
              FailsWith(StatusCode::kUnavailable, "cannot be resolved (DNS)"));
  EXPECT_GE(client().stats().retries, 1u);
}

TEST_F(RegistryClientTest, ABlackHoledServerIsGivenUpAfterTheStallTimeTriedAgainAndAtLastTheDeadline) {
  options_.stall_timeout_nanos = 100 * kMilli;
  registry_.SetBlackHole(true);
  const BlobRef blob = Blob("content");
  EXPECT_THAT(Fetch(blob, 0, 7, 700 * kMilli), FailsWith(StatusCode::kDeadlineExceeded, "no answer in time"));
  EXPECT_GE(registry_.blob_requests(), 3u);
  registry_.SetBlackHole(false);
  EXPECT_EQ(Fetch(blob, 0, 7).value(), "content");
}

TEST_F(RegistryClientTest, AnAnswerThatStallsInTheMiddleIsFetchedAgain) {
  options_.stall_timeout_nanos = 100 * kMilli;
  const std::string bytes = Pattern(10'000);
  RegistryFault stall;
  stall.stall_after = 500;
  registry_.FailNext(stall, 2);
  EXPECT_EQ(Fetch(Blob(bytes), 0, 10'000).value(), bytes);
  EXPECT_EQ(registry_.faults_served(), 2u);
}

TEST_F(RegistryClientTest, DestroyingTheClientCancelsWhatIsInFlightAndWhatIsQueued) {
  registry_.SetBlackHole(true);
  const BlobRef blob = Blob("content");
  std::vector<Waiter<std::string>> waiters(100);
  for (auto& waiter : waiters) {
    client().FetchRange(blob, 0, 7, Priority::kDemand, In(60 * kSecond), waiter.Callback());
  }
  ASSERT_TRUE(registry_.WaitFor([&] { return registry_.blob_requests() >= 1; }));
  const uint64_t before = Clock::Real()->BootNanos();
  client_.reset();
  EXPECT_LT(Clock::Real()->BootNanos() - before, 2 * kSecond);
  for (auto& waiter : waiters) EXPECT_THAT(waiter.Get(), FailsWith(StatusCode::kCancelled, "going away"));
}

TEST_F(RegistryClientTest, DemandOvertakesQueuedPrefetchAndAlwaysFindsAConnection) {
  const BlobRef blob = Blob(Pattern(10'000));
  ASSERT_TRUE(Fetch(blob, 0, 1).ok());
  registry_.SetBlackHole(true);
  std::vector<Waiter<std::string>> prefetches(50);
  for (auto& waiter : prefetches) {
    client().FetchRange(blob, 100, 100, Priority::kPrefetch, In(20 * kSecond), waiter.Callback());
  }
  // Eight connections a host, of which two are kept for demand.
  ASSERT_TRUE(registry_.WaitFor([&] { return registry_.in_flight() == 6; }));
  Waiter<std::string> demand;
  client().FetchRange(blob, 7, 1, Priority::kDemand, In(20 * kSecond), demand.Callback());
  EXPECT_TRUE(registry_.WaitFor([&] {
    const std::vector<RegistryLogEntry> log = registry_.log();
    return std::any_of(log.begin(), log.end(),
                       [](const RegistryLogEntry& e) { return e.range == "bytes=7-7"; });
  }));
  EXPECT_EQ(registry_.in_flight(), 7);
  registry_.SetBlackHole(false);
  EXPECT_TRUE(demand.Get().ok());
  for (auto& waiter : prefetches) EXPECT_TRUE(waiter.Get().ok());
}

TEST_F(RegistryClientTest, ATenantWithALongQueueDelaysAnotherByOneTurn) {
  options_.max_connections_per_host = 1;
  BlobRef blob = Blob(Pattern(10'000));
  ASSERT_TRUE(Fetch(blob, 0, 1).ok());
  registry_.SetDelay(2 * kMilli);
  std::vector<Waiter<std::string>> many(100);
  blob.tenant = "greedy";
  for (auto& waiter : many) {
    client().FetchRange(blob, 100, 100, Priority::kDemand, In(20 * kSecond), waiter.Callback());
  }
  Waiter<std::string> one;
  blob.tenant = "modest";
  client().FetchRange(blob, 7, 1, Priority::kDemand, In(20 * kSecond), one.Callback());
  ASSERT_TRUE(one.Get().ok());
  EXPECT_LT(registry_.blob_requests(), 60u);
  for (auto& waiter : many) EXPECT_TRUE(waiter.Get().ok());
}

TEST_F(RegistryClientTest, CraftedNamesNeverReachTheNetwork) {
  const BlobRef good = Blob("x");
  for (const char* repository :
       {"../../etc", "a/../b", "A", "a?b", "a b", "a\r\nX: y", "", "a//b", "a#b", "%2e%2e"}) {
    BlobRef blob = good;
    blob.image.repository = repository;
    EXPECT_THAT(Fetch(blob, 0, 1), FailsWith(StatusCode::kInvalidArgument, "repository")) << repository;
  }
  for (const char* host : {"user@127.0.0.1:1", "127.0.0.1:99999", "a/b", "", "h\r\nX", "h?x"}) {
    BlobRef blob = good;
    blob.image.host = host;
    EXPECT_THAT(Fetch(blob, 0, 1), FailsWith(StatusCode::kInvalidArgument, "host")) << host;
  }
  BlobRef blob = good;
  blob.digest = "sha256:../../x";
  EXPECT_THAT(Fetch(blob, 0, 1), FailsWith(StatusCode::kInvalidArgument, "digest"));
  EXPECT_THAT(Fetch(good, UINT64_MAX - 5, 100), FailsWith(StatusCode::kInvalidArgument, "range"));
  EXPECT_EQ(registry_.requests(), 0u);
}

TEST_F(RegistryClientTest, ADeadlineThatHasPassedIsAnsweredAtOnce) {
  Waiter<std::string> waiter;
  client().FetchRange(Blob("x"), 0, 1, Priority::kDemand, 1, waiter.Callback());
  EXPECT_THAT(waiter.Get(), FailsWith(StatusCode::kDeadlineExceeded, "deadline passed"));
}

TEST_F(RegistryClientTest, CallbacksMayAskForMore) {
  const BlobRef blob = Blob("content");
  Waiter<std::string> second;
  client().FetchRange(blob, 0, 3, Priority::kDemand, 0, [&](const absl::StatusOr<std::string>& first) {
    ASSERT_TRUE(first.ok());
    client().FetchRange(blob, 3, 4, Priority::kDemand, 0, second.Callback());
  });
  EXPECT_EQ(second.Get().value(), "tent");
}

TEST_F(RegistryClientTest, TenMinutesWithoutAnAnswerNeverLookLikeALoopThatHangs) {
  FakeClock clock;
  LoopWatch watch(&clock);
  options_.watch = &watch;
  options_.stall_timeout_nanos = 50 * kMilli;  // so that the loop has things to do meanwhile
  RegistryFault silence;
  silence.stall = true;
  registry_.FailNext(silence, 1000);
  Waiter<std::string> waiter;
  client().FetchRange(Blob("content"), 0, 7, Priority::kDemand, In(60 * kSecond), waiter.Callback());
  while (registry_.requests() < 3) std::this_thread::yield();
  for (int i = 0; i < 600; i++) {
    clock.Advance(kSecond);
    // At most the turn that is just under way began before the clock went on.
    const uint64_t give_up = In(10 * kSecond);
    while (watch.Oldest().nanos > kSecond && Clock::Real()->BootNanos() < give_up) std::this_thread::yield();
    ASSERT_LE(watch.Oldest().nanos, kSecond) << i;
  }
  client_.reset();
  EXPECT_FALSE(waiter.Get().ok());
}

TEST_F(RegistryClientTest, ACallbackThatDoesNotReturnIsSeen) {
  FakeClock clock;
  LoopWatch watch(&clock);
  options_.watch = &watch;
  std::promise<void> called, release;
  client().FetchRange(Blob("content"), 0, 7, Priority::kDemand, In(20 * kSecond),
                      [&](const absl::StatusOr<std::string>&) {
                        called.set_value();
                        release.get_future().wait();
                      });
  called.get_future().wait();
  clock.Advance(5 * kSecond);
  EXPECT_EQ(watch.Oldest().nanos, 5 * kSecond);
  EXPECT_EQ(watch.Oldest().name, "fetch");
  release.set_value();
  client_.reset();
}

}  // namespace
}  // namespace holdfast::fetch
