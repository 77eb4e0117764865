#include "worker/fetch/retry_policy.h"

#include <algorithm>

namespace holdfast::fetch {
namespace {

// A registry whose answers make no sense this often in a row is not going to recover while somebody waits.
constexpr int kMaxBadAnswers = 4;

RetryDecision Fail(absl::StatusCode code) { return {RetryAction::kFail, 0, code}; }

// Between first and first * 2^(waits+1), at most max.
uint64_t Backoff(const RetryHistory& history, const RetryLimits& limits, double random) {
  uint64_t ceiling = limits.first_backoff_nanos;
  for (int i = 0; i <= history.waits && ceiling < limits.max_backoff_nanos; i++) ceiling *= 2;
  ceiling = std::max(std::min(ceiling, limits.max_backoff_nanos), limits.first_backoff_nanos);
  const auto spread = static_cast<double>(ceiling - limits.first_backoff_nanos);
  return limits.first_backoff_nanos + static_cast<uint64_t>(spread * random);
}

RetryDecision Wait(const AttemptOutcome& outcome, const RetryHistory& history, const RetryLimits& limits,
                   uint64_t now, uint64_t deadline, double random, absl::StatusCode code) {
  if (now >= deadline) return Fail(code);
  const uint64_t remaining = deadline - now;
  const uint64_t backoff = Backoff(history, limits, random);
  if (outcome.retry_after_nanos) {
    // The server was asked not to be asked sooner: if that is after the deadline, waiting helps nobody.
    const uint64_t wait = std::max(*outcome.retry_after_nanos, limits.first_backoff_nanos);
    return wait < remaining ? RetryDecision{RetryAction::kWait, wait, code} : Fail(code);
  }
  if (backoff < remaining) return {RetryAction::kWait, backoff, code};
  // Not enough time for the whole back-off: the rest of it is worth another try, unless it is next to
  // nothing.
  if (remaining / 2 < limits.first_backoff_nanos) return Fail(code);
  return {RetryAction::kWait, remaining / 2, code};
}

bool IsTransient(int status) {
  return status == 408 || status == 425 || status == 429 || (status >= 500 && status != 501 && status != 505);
}

absl::StatusCode FinalCode(int status) {
  switch (status) {
    case 401:
    case 403:
      return absl::StatusCode::kPermissionDenied;
    case 404:
    case 410:
      return absl::StatusCode::kNotFound;
    case 416:
      return absl::StatusCode::kDataLoss;  // the blob is shorter than it must be
    default:
      return absl::StatusCode::kFailedPrecondition;
  }
}

}  // namespace

RetryDecision DecideRetry(const AttemptOutcome& outcome, const RetryHistory& history,
                          const RetryLimits& limits, uint64_t now_nanos, uint64_t deadline_nanos,
                          double random) {
  const auto wait = [&](absl::StatusCode code) {
    return Wait(outcome, history, limits, now_nanos, deadline_nanos, random, code);
  };
  switch (outcome.failure) {
    case Failure::kRefused:
      return Fail(absl::StatusCode::kFailedPrecondition);
    case Failure::kBadAnswer:
    case Failure::kShortBody:
      return history.bad_answers >= kMaxBadAnswers ? Fail(absl::StatusCode::kDataLoss)
                                                   : wait(absl::StatusCode::kDataLoss);
    case Failure::kTimeout:
      return wait(absl::StatusCode::kDeadlineExceeded);
    case Failure::kDns:
    case Failure::kConnect:
    case Failure::kCut:
    case Failure::kAuth:
      return wait(absl::StatusCode::kUnavailable);
    case Failure::kHttpStatus:
      break;
  }
  const int status = outcome.http_status;
  if (IsTransient(status)) return wait(absl::StatusCode::kUnavailable);
  // A signed URL that ran out answers 401 or 403, on some stores 400, and once its object moved 404: the
  // registry knows the new one. For a URL it gave a moment ago only the former are worth asking again.
  const bool stale = status == 401 || status == 403 || (outcome.redirect_remembered && status >= 400);
  if (outcome.behind_redirect && stale && !history.resolved_anew) {
    return {RetryAction::kResolveRedirect, 0, FinalCode(status)};
  }
  if (status == 401 && !outcome.behind_redirect && !history.authenticated_anew) {
    return {RetryAction::kAuthenticate, 0, FinalCode(status)};
  }
  return Fail(FinalCode(status));
}

}  // namespace holdfast::fetch
