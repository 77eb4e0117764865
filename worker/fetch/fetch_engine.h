// The life of each request, from queue to callback: authorization, redirects, checks of the answer, retries,
// deadline. Used on the client's thread only.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <variant>
#include <vector>

#include "worker/fetch/answer_check.h"
#include "worker/fetch/authenticator.h"
#include "worker/fetch/blob_table.h"
#include "worker/fetch/http_transport.h"
#include "worker/fetch/registry_client.h"
#include "worker/fetch/retry_policy.h"
#include "worker/fetch/timer_queue.h"
#include "worker/fetch/transfer_queue.h"
#include "worker/fetch/url.h"

namespace holdfast::fetch {

using RangeDone = std::function<void(absl::StatusOr<std::string>)>;
using TailDone = std::function<void(absl::StatusOr<RegistryClient::Tail>)>;

// A request as it was made.
struct FetchJob {
  BlobRef blob;
  WantedRange wanted;
  cache::Priority priority = cache::Priority::kDemand;
  uint64_t deadline_nanos = 0;
  std::variant<RangeDone, TailDone> done;
};
void FailJob(const FetchJob& job, absl::Status status);

struct FetchCounters {
  std::atomic<uint64_t> requests{0}, bytes{0}, failures{0}, retries{0}, in_flight{0};
};

class FetchEngine {
 public:
  FetchEngine(const ClientOptions& options, const std::string& docker_config, HttpTransport* transport,
              Authenticator::Post post, FetchCounters* counters);

  void Submit(FetchJob job);
  // Runs what is due and starts what may start. Returns how long nothing is due, in nanoseconds.
  uint64_t Advance();
  // Every request gets Cancelled.
  void CancelAll();

 private:
  struct Operation {
    FetchJob job;
    TransferQueue::Item item;
    bool holds_slot = false;
    uint64_t started_nanos = 0;
    TimerQueue::Id deadline_timer, wait_timer;
    WantedRange wanted;          // of the present step
    bool learning_size = false;  // (tail) asks for one byte to learn the blob's size
    std::optional<uint64_t> blob_size;
    // The present attempt.
    Url registry, url;
    std::vector<std::string> visited;
    bool redirect_remembered = false, probe = false;
    std::string authorization;
    uint64_t generation = 0, exchange = 0;
    AnswerPlan plan;
    // What went before.
    RetryHistory history;
    absl::StatusCode last_code = absl::StatusCode::kDeadlineExceeded;
    std::string last_error;
    bool behind_redirect() const { return !url.SameOrigin(registry); }
  };
  using Id = uint64_t;

  Operation* Find(Id id);
  void Attempt(Id id, Operation* op);
  void OnGrant(Id id, const Authenticator::Grant& grant);
  void Send(Id id, Operation* op);
  BodyPlan OnHeaders(Id id, const HttpHeaders& headers);
  void OnResult(Id id, HttpResult result);
  void OnRangeAnswer(Id id, Operation* op, HttpResult result);
  void OnStatus(Id id, Operation* op, const HttpHeaders& headers);
  void OnRedirect(Id id, Operation* op, const HttpHeaders& headers);
  bool FallBackFromSuffix(Id id, Operation* op, const HttpHeaders& headers);
  void LearnSize(Id id, Operation* op);
  void OnSizeLearnt(Id id, Operation* op, uint64_t size);
  void Remember(Operation* op);
  void Fail(Id id, Operation* op, AttemptOutcome outcome, const std::string& why);
  void Refuse(Id id, Operation* op, const std::string& why);
  void WaitAndRetry(Id id, Operation* op, uint64_t wait_nanos);
  void OnDeadline(Id id);
  void EndProbe(Operation* op);
  void ReleaseSlot(Operation* op);
  void Finish(Id id, absl::StatusOr<std::string> bytes);
  absl::Status Error(const Operation& op, absl::StatusCode code, const std::string& why) const;

  const ClientOptions options_;
  HttpTransport* const transport_;
  FetchCounters* const counters_;
  TimerQueue timers_;
  Authenticator authenticator_;
  TransferQueue queue_;
  BlobTable blobs_;
  std::map<Id, std::unique_ptr<Operation>> operations_;
  Id next_id_ = 0;
  std::mt19937_64 random_;
};

}  // namespace holdfast::fetch
