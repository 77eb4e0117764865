// Authorization headers for (host, repository): learned from the registry's challenge, obtained once for all
// who wait, kept until they expire. The first request to a repository goes out without any and finds out what
// is wanted; others wait for its answer. While it is silent one of them after the other goes out in the same
// way, so an answer that never comes (a connection that a middlebox forgot) holds up nobody for long, and a
// registry that is silent altogether gets few requests. Used on the client's thread only (Post brings the
// results of credential helpers there).
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "common/clock.h"
#include "common/status.h"
#include "worker/fetch/auth_challenge.h"
#include "worker/fetch/credentials.h"
#include "worker/fetch/http_transport.h"
#include "worker/fetch/registry_client.h"
#include "worker/fetch/timer_queue.h"

namespace holdfast::fetch {

class Authenticator {
 public:
  struct Grant {
    absl::Status status;      // PermissionDenied: final. Anything else that is not OK: try again later
    std::string header;       // value of the Authorization header; "" = none needed
    uint64_t generation = 0;  // for Rejected
    bool probe = false;       // the caller's request finds out for all; it must call ProbeEnded
  };
  using Ready = std::function<void(const Grant&)>;
  using Post = std::function<void(std::function<void()>)>;

  Authenticator(const ClientOptions& options, std::string docker_config_path, HttpTransport* transport,
                TimerQueue* timers, Post post);
  ~Authenticator();  // kills helpers and waits for them; nothing is called any more
  Authenticator(const Authenticator&) = delete;
  Authenticator& operator=(const Authenticator&) = delete;

  // `ready` may be called before this returns.
  void Authorize(const std::string& host, const std::string& repository, Ready ready);
  // The registry answered something else than 401 to a probe.
  void Accepted(const std::string& host, const std::string& repository);
  // The registry answered 401 to a request with the grant of `generation`; `challenges` = its
  // WWW-Authenticate lines.
  void Rejected(const std::string& host, const std::string& repository, uint64_t generation,
                const std::vector<std::string>& challenges);
  // A probing request is over, with or without an answer.
  void ProbeEnded(const std::string& host, const std::string& repository);

 private:
  enum class Mode : uint8_t { kUnknown, kProbing, kOpen, kBasic, kBearer };
  struct State {
    std::string host, repository;
    Mode mode = Mode::kUnknown;
    AuthChallenge challenge;
    std::string header;
    uint64_t valid_until = 0;  // BootNanos
    uint64_t generation = 1;
    bool obtaining = false;
    std::deque<Ready> waiting;
    TimerQueue::Id patience;  // of those who wait for a probe
    bool silent = false;      // the newest probe has used it up
  };
  struct HelperRun {
    std::thread thread;
    std::shared_ptr<std::atomic<bool>> ended;
  };

  State* StateOf(const std::string& host, const std::string& repository);
  void Probe(State* state, const Ready& ready);
  void EndProbing(State* state, Mode mode);
  void Flush(State* state, const Grant& grant);
  void Fail(State* state, absl::Status status);
  void Succeed(State* state, std::string header, uint64_t lifetime_nanos);
  void Obtain(State* state);
  void ObtainWith(State* state, const Credentials& credentials, const std::string& problem);
  void RunHelper(State* state, const CredentialStore::Source& source);
  void AskForToken(State* state, const Credentials& credentials, const std::string& problem);
  void OnToken(State* state, bool had_credentials, const std::string& problem, const HttpResult& result);

  const ClientOptions options_;
  CredentialStore store_;
  HttpTransport* const transport_;
  TimerQueue* const timers_;
  const Post post_;
  std::map<std::pair<std::string, std::string>, std::unique_ptr<State>> states_;
  std::list<HelperRun> helpers_;
  std::atomic<bool> stopping_{false};
};

// Value and lifetime of a token endpoint's answer: {"token" or "access_token": ..., "expires_in": seconds}.
struct TokenAnswer {
  std::string token;
  uint64_t lifetime_nanos = 0;
};
absl::StatusOr<TokenAnswer> ParseTokenAnswer(std::string_view text);

// Whether plain http to `authority` is allowed: loopback, or so configured.
bool PlainHttpAllowed(const ClientOptions& options, const std::string& authority);
// The CA file configured for `authority`, or "".
std::string CaFileFor(const ClientOptions& options, const std::string& authority);

}  // namespace holdfast::fetch
