// Single HTTP exchanges on libcurl's multi interface. No policy: no retries, no redirects followed, no
// authentication of its own. Everything runs, and every callback is called, on the thread that calls Poll;
// only Wake is thread-safe.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "common/clock.h"
#include "common/loop_watch.h"
#include "common/status.h"
#include "worker/fetch/http_headers.h"
#include "worker/fetch/retry_policy.h"

namespace holdfast::fetch {

struct HttpRequest {
  std::string url;
  std::string range;          // value of the Range header; "" = none
  std::string authorization;  // value of the Authorization header; "" = none
  std::string form;           // non-empty: POST of application/x-www-form-urlencoded
  std::string ca_file;        // "" = the system's
};

// What to do with the body, decided when the headers are there.
struct BodyPlan {
  uint64_t skip = 0, take = 0;  // bytes beyond are not waited for: the exchange ends, successfully
  bool discard = false;         // an answer whose body does not matter (errors): drained if it is short
};

struct HttpResult {
  bool answered = false;  // the headers of a final answer came
  bool complete = false;  // and the body as planned; else `failure`
  Failure failure = Failure::kCut;
  std::string why;  // for people; holds no URL
  HttpHeaders headers;
  std::string body;
};

struct HttpLimits {
  uint64_t connect_timeout_nanos = 0, stall_timeout_nanos = 0;
  int kept_connections = 0;
};

class HttpTransport {
 public:
  using OnHeaders = std::function<BodyPlan(const HttpHeaders&)>;
  using OnDone = std::function<void(HttpResult)>;
  // Body bytes as they arrive, for statistics.
  using OnBytes = std::function<void(uint64_t)>;

  // Internal if libcurl cannot be set up. `loop`, if any, is idle while Poll waits for the network.
  static absl::StatusOr<std::unique_ptr<HttpTransport>> Create(const HttpLimits& limits, const Clock* clock,
                                                               OnBytes on_bytes,
                                                               LoopWatch::Loop* loop = nullptr);
  virtual ~HttpTransport() = default;  // pending exchanges end without a call

  // Returns an id, never 0. `done` is called from Poll, once. May be called from any of the callbacks.
  virtual uint64_t Start(const HttpRequest& request, OnHeaders on_headers, OnDone done) = 0;
  // `done` will not be called. Unknown ids are ignored. Not to be called from OnHeaders.
  virtual void Cancel(uint64_t id) = 0;
  // Moves everything on, and waits up to `wait_nanos` if nothing ended.
  virtual void Poll(uint64_t wait_nanos) = 0;
  // Makes a waiting Poll return. Thread-safe.
  virtual void Wake() = 0;
};

}  // namespace holdfast::fetch
