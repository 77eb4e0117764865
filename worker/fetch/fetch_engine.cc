#include "worker/fetch/fetch_engine.h"

#include <algorithm>
#include <utility>

#include "worker/fetch/image_reference.h"

namespace holdfast::fetch {
namespace {

constexpr uint64_t kSecond = 1'000'000'000;
constexpr uint64_t kRedirectLifetimeNanos = 600 * kSecond;
constexpr size_t kMaxRedirects = 5;
constexpr uint64_t kIdleNanos = 3600 * kSecond;
constexpr uint64_t kMaxRangeBytes = uint64_t{1} << 31;  // an answer is held in memory

bool IsRedirect(int status) {
  return status == 301 || status == 302 || status == 303 || status == 307 || status == 308;
}

absl::Status CheckJob(const FetchJob& job) {
  // Reaches the URL: image authors can write labels.
  if (!IsValidRegistryHost(job.blob.image.host)) return InvalidArgument("malformed registry host");
  if (!IsValidRepository(job.blob.image.repository)) return InvalidArgument("malformed repository name");
  if (!IsValidDigest(job.blob.digest)) return InvalidArgument("malformed blob digest");
  if (job.wanted.length > kMaxRangeBytes || job.wanted.offset > UINT64_MAX - job.wanted.length) {
    return InvalidArgument("range is too long");
  }
  return absl::OkStatus();
}

// http where it is allowed, unless a CA file says that the loopback host speaks TLS.
std::string SchemeFor(const ClientOptions& options, const std::string& host) {
  const auto it = options.hosts.find(host);
  if (it != options.hosts.end() && it->second.plain_http) return "http";
  if (it != options.hosts.end() && !it->second.ca_file.empty()) return "https";
  return IsLoopback(host) ? "http" : "https";
}

}  // namespace

void FailJob(const FetchJob& job, absl::Status status) {
  std::visit([&](const auto& done) { done(std::move(status)); }, job.done);
}

FetchEngine::FetchEngine(const ClientOptions& options, const std::string& docker_config,
                         HttpTransport* transport, Authenticator::Post post, FetchCounters* counters)
    : options_(options),
      transport_(transport),
      counters_(counters),
      authenticator_(options, docker_config, transport, &timers_, std::move(post)),
      queue_(options.max_requests, options.max_connections_per_host),
      random_(std::random_device{}()) {}

FetchEngine::Operation* FetchEngine::Find(Id id) {
  const auto it = operations_.find(id);
  return it == operations_.end() ? nullptr : it->second.get();
}

void FetchEngine::Submit(FetchJob job) {
  const Id id = ++next_id_;
  Operation& op = *(operations_[id] = std::make_unique<Operation>());
  op.job = std::move(job);
  op.wanted = op.job.wanted;
  op.started_nanos = options_.clock->BootNanos();
  op.item = {id, op.job.priority, op.job.blob.tenant, op.job.blob.image.host};
  const std::string& host = op.job.blob.image.host;
  absl::Status valid = CheckJob(op.job);
  if (valid.ok()) {
    const absl::StatusOr<Url> url = ParseUrl(SchemeFor(options_, host) + "://" + host + "/v2/" +
                                             op.job.blob.image.repository + "/blobs/" + op.job.blob.digest);
    if (url.ok()) {
      op.registry = *url;
    } else {
      valid = InvalidArgument("malformed registry host");
    }
  }
  if (!valid.ok()) return Finish(id, std::move(valid));
  if (op.wanted.length == 0 && !op.wanted.suffix) return Finish(id, std::string());
  op.deadline_timer = timers_.Add(op.job.deadline_nanos, [this, id] { OnDeadline(id); });
  queue_.Push(op.item);
}

uint64_t FetchEngine::Advance() {
  timers_.RunExpired(options_.clock->BootNanos());
  while (std::optional<TransferQueue::Item> item = queue_.Pop()) {
    Operation* const op = Find(item->id);
    if (op == nullptr) {
      queue_.Finish(*item);  // its deadline passed in the queue
      continue;
    }
    op->holds_slot = true;
    Attempt(item->id, op);
  }
  const uint64_t now = options_.clock->BootNanos();
  const uint64_t next = timers_.NextAt().value_or(now + kIdleNanos);
  return next > now ? next - now : 0;
}

void FetchEngine::CancelAll() {
  while (!operations_.empty()) {
    const Operation& op = *operations_.begin()->second;
    Finish(operations_.begin()->first, Error(op, absl::StatusCode::kCancelled, "the client is going away"));
  }
}

void FetchEngine::Attempt(Id id, Operation* op) {
  op->visited.clear();
  op->authorization.clear();
  op->url = op->registry;
  const BlobTable::Entry* const known = blobs_.Find(op->job.blob, options_.clock->BootNanos());
  op->redirect_remembered = known->target.has_value();
  if (known->target) {
    op->url = *known->target;
    Send(id, op);
    return;
  }
  authenticator_.Authorize(op->job.blob.image.host, op->job.blob.image.repository,
                           [this, id](const Authenticator::Grant& grant) { OnGrant(id, grant); });
}

void FetchEngine::OnGrant(Id id, const Authenticator::Grant& grant) {
  Operation* const op = Find(id);
  if (op == nullptr) return;
  if (!grant.status.ok()) {
    const std::string why(FromAbsl(grant.status.message()));
    if (absl::IsPermissionDenied(grant.status)) return Finish(id, Error(*op, grant.status.code(), why));
    AttemptOutcome outcome;
    outcome.failure = Failure::kAuth;
    return Fail(id, op, outcome, why);
  }
  op->authorization = grant.header;
  op->generation = grant.generation;
  op->probe = grant.probe;
  Send(id, op);
}

void FetchEngine::Send(Id id, Operation* op) {
  HttpRequest request;
  request.url = op->url.full;
  request.range = op->wanted.HeaderValue();
  // Also at the end of a chain of redirects: what the registry gave us is for the registry.
  if (!op->behind_redirect()) request.authorization = op->authorization;
  request.ca_file = CaFileFor(options_, op->url.authority);
  op->visited.push_back(op->url.full);
  op->plan = {};
  counters_->requests++;
  op->exchange = transport_->Start(
      request, [this, id](const HttpHeaders& headers) { return OnHeaders(id, headers); },
      [this, id](HttpResult result) { OnResult(id, std::move(result)); });
}

BodyPlan FetchEngine::OnHeaders(Id id, const HttpHeaders& headers) {
  BodyPlan body;
  body.discard = true;
  Operation* const op = Find(id);
  if (op == nullptr) return body;
  if (!op->behind_redirect() && headers.status != 401) {
    authenticator_.Accepted(op->job.blob.image.host, op->job.blob.image.repository);
    op->history.authenticated_anew = false;
  }
  if (headers.status != 200 && headers.status != 206) return body;
  op->plan = CheckAnswer(op->wanted, headers, blobs_.Find(op->job.blob, options_.clock->BootNanos())->size);
  if (op->plan.kind == AnswerPlan::Kind::kTake || op->plan.kind == AnswerPlan::Kind::kTakeAll) {
    body = {op->plan.skip, op->plan.take, false};
  }
  return body;
}

void FetchEngine::OnResult(Id id, HttpResult result) {
  Operation* const op = Find(id);
  if (op == nullptr) return;
  op->exchange = 0;
  if (result.answered && result.headers.status == 401 && !op->behind_redirect()) {
    authenticator_.Rejected(op->job.blob.image.host, op->job.blob.image.repository, op->generation,
                            result.headers.www_authenticate);
  }
  EndProbe(op);
  if (!result.complete) {
    AttemptOutcome outcome;
    outcome.failure = result.failure;
    return Fail(id, op, outcome, result.why);
  }
  const int status = result.headers.status;
  if (status == 200 || status == 206) {
    OnRangeAnswer(id, op, std::move(result));
  } else if (IsRedirect(status)) {
    OnRedirect(id, op, result.headers);
  } else {
    OnStatus(id, op, result.headers);
  }
}

void FetchEngine::OnRangeAnswer(Id id, Operation* op, HttpResult result) {
  if (op->learning_size && result.headers.content_length == 0) return OnSizeLearnt(id, op, 0);
  switch (op->plan.kind) {
    case AnswerPlan::Kind::kFailed:
      return Fail(id, op, op->plan.outcome, op->plan.why);
    case AnswerPlan::Kind::kFinal:
      blobs_.Forget(op->job.blob);
      return Finish(id, Error(*op, op->plan.final_code, op->plan.why));
    case AnswerPlan::Kind::kNoSuffix:
      return LearnSize(id, op);
    case AnswerPlan::Kind::kTake:
    case AnswerPlan::Kind::kTakeAll:
      break;
  }
  if (op->plan.blob_size) op->blob_size = op->plan.blob_size;
  Remember(op);
  if (op->learning_size) {
    if (op->blob_size) return OnSizeLearnt(id, op, *op->blob_size);
    return Finish(
        id, Error(*op, absl::StatusCode::kFailedPrecondition, "the server does not tell the blob's size"));
  }
  if (op->plan.kind == AnswerPlan::Kind::kTakeAll) {
    const uint64_t length = std::min<uint64_t>(op->wanted.length, result.body.size());
    result.body.erase(0, result.body.size() - length);
  }
  Finish(id, std::move(result.body));
}

void FetchEngine::OnStatus(Id id, Operation* op, const HttpHeaders& headers) {
  if (FallBackFromSuffix(id, op, headers)) return;
  AttemptOutcome outcome;
  outcome.http_status = headers.status;
  outcome.retry_after_nanos = ParseRetryAfter(headers.retry_after, options_.clock->WallNanos());
  std::string why = "HTTP " + std::to_string(headers.status);
  if (op->behind_redirect()) why += " from " + op->url.authority + ", where the registry redirected to";
  Fail(id, op, outcome, why);
}

// Some servers refuse a suffix range that they do not know, or that is longer than the blob.
bool FetchEngine::FallBackFromSuffix(Id id, Operation* op, const HttpHeaders& headers) {
  if (op->learning_size && headers.status == 416) {
    const std::optional<ContentRange> range = ParseContentRange(headers.content_range);
    if (range && range->total != uint64_t{0}) return false;
    OnSizeLearnt(id, op, 0);
    return true;
  }
  if (!op->wanted.suffix || (headers.status != 416 && headers.status != 400 && headers.status != 501))
    return false;
  LearnSize(id, op);
  return true;
}

// With a GET of one byte rather than HEAD: signed URLs behind redirects are signed for GET, and several
// registries answer HEAD differently.
void FetchEngine::LearnSize(Id id, Operation* op) {
  op->learning_size = true;
  op->wanted = {0, 1, false};
  Attempt(id, op);
}

void FetchEngine::OnSizeLearnt(Id id, Operation* op, uint64_t size) {
  op->learning_size = false;
  op->blob_size = size;
  const uint64_t length = std::min(op->job.wanted.length, size);
  if (length == 0) return Finish(id, std::string());
  op->wanted = {size - length, length, false};
  Attempt(id, op);
}

void FetchEngine::OnRedirect(Id id, Operation* op, const HttpHeaders& headers) {
  const std::string status = "HTTP " + std::to_string(headers.status);
  if (headers.location.empty()) {
    AttemptOutcome outcome;
    outcome.failure = Failure::kBadAnswer;
    return Fail(id, op, outcome, status + " without a Location");
  }
  const absl::StatusOr<Url> target = ResolveUrl(op->url, headers.location);
  if (!target.ok()) return Refuse(id, op, status + " to something that is no usable http(s) URL");
  if (target->scheme == "http" && op->url.scheme == "https") {
    return Refuse(id, op, "redirect from https to plain http (" + target->authority + ") refused");
  }
  if (target->scheme == "http" && !PlainHttpAllowed(options_, target->authority)) {
    return Refuse(id, op, "redirect to plain http (" + target->authority + ") refused");
  }
  if (std::find(op->visited.begin(), op->visited.end(), target->full) != op->visited.end()) {
    return Refuse(id, op, "redirect loop at " + target->authority);
  }
  if (op->visited.size() > kMaxRedirects) {
    return Refuse(id, op, "more than " + std::to_string(kMaxRedirects) + " redirects");
  }
  op->url = *target;
  op->redirect_remembered = false;
  Send(id, op);
}

void FetchEngine::Remember(Operation* op) {
  const uint64_t now = options_.clock->BootNanos();
  BlobTable::Entry* const entry = blobs_.Find(op->job.blob, now);
  if (op->blob_size) entry->size = op->blob_size;
  if (op->behind_redirect() && !op->redirect_remembered) {
    entry->target = op->url;
    entry->target_until = now + kRedirectLifetimeNanos;
  }
}

void FetchEngine::Refuse(Id id, Operation* op, const std::string& why) {
  AttemptOutcome outcome;
  outcome.failure = Failure::kRefused;
  Fail(id, op, outcome, why);
}

void FetchEngine::Fail(Id id, Operation* op, AttemptOutcome outcome, const std::string& why) {
  outcome.behind_redirect = op->behind_redirect();
  outcome.redirect_remembered = op->redirect_remembered;
  if (outcome.failure == Failure::kBadAnswer || outcome.failure == Failure::kShortBody)
    op->history.bad_answers++;
  const double random = std::uniform_real_distribution<double>(0, 1)(random_);
  const RetryLimits limits{options_.first_backoff_nanos, options_.max_backoff_nanos};
  const RetryDecision decision =
      DecideRetry(outcome, op->history, limits, options_.clock->BootNanos(), op->job.deadline_nanos, random);
  op->last_code = decision.code;
  op->last_error = why;
  if (op->redirect_remembered) blobs_.ForgetTarget(op->job.blob);
  switch (decision.action) {
    case RetryAction::kFail:
      if (decision.code == absl::StatusCode::kDataLoss) blobs_.Forget(op->job.blob);
      return Finish(id, Error(*op, decision.code, why));
    case RetryAction::kWait:
      return WaitAndRetry(id, op, decision.wait_nanos);
    case RetryAction::kAuthenticate:
      op->history.authenticated_anew = true;
      return Attempt(id, op);
    case RetryAction::kResolveRedirect:
      op->history.resolved_anew = true;
      blobs_.ForgetTarget(op->job.blob);
      return Attempt(id, op);
  }
}

void FetchEngine::WaitAndRetry(Id id, Operation* op, uint64_t wait_nanos) {
  op->history.waits++;
  counters_->retries++;
  ReleaseSlot(op);
  op->wait_timer = timers_.Add(options_.clock->BootNanos() + wait_nanos, [this, id] {
    if (Operation* const waiting = Find(id)) queue_.Push(waiting->item);
  });
}

void FetchEngine::OnDeadline(Id id) {
  Operation* const op = Find(id);
  if (op == nullptr) return;
  const std::string last = op->last_error.empty() ? std::string() : "; last: " + op->last_error;
  Finish(id, Error(*op, op->last_code, "the deadline passed" + last));
}

void FetchEngine::EndProbe(Operation* op) {
  if (!std::exchange(op->probe, false)) return;
  authenticator_.ProbeEnded(op->job.blob.image.host, op->job.blob.image.repository);
}

void FetchEngine::ReleaseSlot(Operation* op) {
  if (std::exchange(op->holds_slot, false)) queue_.Finish(op->item);
}

void FetchEngine::Finish(Id id, absl::StatusOr<std::string> bytes) {
  const auto it = operations_.find(id);
  const std::unique_ptr<Operation> op = std::move(it->second);
  operations_.erase(it);
  if (op->exchange != 0) transport_->Cancel(op->exchange);
  timers_.Cancel(op->deadline_timer);
  timers_.Cancel(op->wait_timer);
  ReleaseSlot(op.get());
  EndProbe(op.get());
  if (!bytes.ok()) counters_->failures++;
  counters_->in_flight--;
  if (options_.trace != nullptr) {
    options_.trace->Record("fetch.range",
                           "blob=" + BlobTable::Key(op->job.blob) + " range=" + op->job.wanted.HeaderValue() +
                               " retries=" + std::to_string(op->history.waits) + " result=" +
                               std::string(FromAbsl(absl::StatusCodeToString(bytes.status().code()))),
                           options_.clock->BootNanos() - op->started_nanos);
  }
  if (const auto* done = std::get_if<RangeDone>(&op->job.done)) {
    (*done)(std::move(bytes));
    return;
  }
  const TailDone& done = std::get<TailDone>(op->job.done);
  if (!bytes.ok()) return done(std::move(bytes).status());
  done(RegistryClient::Tail{std::move(*bytes), op->blob_size.value_or(0)});
}

absl::Status FetchEngine::Error(const Operation& op, absl::StatusCode code, const std::string& why) const {
  std::string message = op.job.blob.image.host + "/" + op.job.blob.image.repository + " " +
                        op.job.blob.digest + " " + op.job.wanted.HeaderValue() + ": " + why;
  if (op.history.waits > 0) message += " (after " + std::to_string(op.history.waits) + " retries)";
  return absl::Status(code, ToAbsl(message));
}

}  // namespace holdfast::fetch
