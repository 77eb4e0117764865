// What to do after a failed attempt: a pure function, so every rule is a unit test. docs: README.md.
#pragma once

#include <cstdint>
#include <optional>

#include "common/status.h"

namespace holdfast::fetch {

enum class Failure : uint8_t {
  kHttpStatus,  // an answer, with `http_status`
  kDns,         // host name not resolved
  kConnect,     // refused, unreachable, TLS handshake broken off
  kTimeout,     // connecting took too long, or no byte came for too long
  kCut,         // connection lost in the middle of an answer
  kShortBody,   // fewer bytes than the answer promised, or the asked range
  kBadAnswer,   // an answer that contradicts itself or the request (Content-Range, redirect without Location)
  kAuth,        // no token could be had just now (token endpoint down)
  kRefused,     // will not become better: certificate not trusted, redirect to plain http, redirect loop
};

struct AttemptOutcome {
  Failure failure = Failure::kHttpStatus;
  int http_status = 0;
  std::optional<uint64_t> retry_after_nanos;
  bool behind_redirect = false;      // the answer came from where a redirect led
  bool redirect_remembered = false;  // and that redirect was learned by an earlier request
};

// What the request has been through. The caller keeps it; Decide only reads.
struct RetryHistory {
  int waits = 0;        // back-offs so far
  int bad_answers = 0;  // kBadAnswer and kShortBody so far, this one included
  bool authenticated_anew = false;
  bool resolved_anew = false;
};

struct RetryLimits {
  uint64_t first_backoff_nanos = 0, max_backoff_nanos = 0;
};

enum class RetryAction : uint8_t {
  kFail,             // with `code`
  kWait,             // `wait_nanos`, then again
  kAuthenticate,     // at once, with fresh authorization
  kResolveRedirect,  // at once, from the registry itself
};

struct RetryDecision {
  RetryAction action = RetryAction::kFail;
  uint64_t wait_nanos = 0;
  absl::StatusCode code =
      absl::StatusCode::kUnavailable;  // of the error, if this is the end (now or at the deadline)
};

// `random` is uniform in [0, 1).
RetryDecision DecideRetry(const AttemptOutcome& outcome, const RetryHistory& history,
                          const RetryLimits& limits, uint64_t now_nanos, uint64_t deadline_nanos,
                          double random);

}  // namespace holdfast::fetch
