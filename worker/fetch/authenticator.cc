#include "worker/fetch/authenticator.h"

#include <algorithm>

#include "worker/fetch/url.h"

namespace holdfast::fetch {
namespace {

constexpr uint64_t kSecond = 1'000'000'000;
constexpr uint64_t kHelperLimitNanos = 5 * kSecond;
constexpr uint64_t kBasicLifetimeNanos = 300 * kSecond;  // then the configuration is looked at again
constexpr uint64_t kMaxTokenAnswerBytes = 1 << 20;

}  // namespace

bool PlainHttpAllowed(const ClientOptions& options, const std::string& authority) {
  const auto host = options.hosts.find(authority);
  return IsLoopback(authority) || (host != options.hosts.end() && host->second.plain_http);
}

std::string CaFileFor(const ClientOptions& options, const std::string& authority) {
  const auto host = options.hosts.find(authority);
  return host == options.hosts.end() ? "" : host->second.ca_file;
}

Authenticator::Authenticator(const ClientOptions& options, std::string docker_config_path,
                             HttpTransport* transport, TimerQueue* timers, Post post)
    : options_(options),
      store_(std::move(docker_config_path)),
      transport_(transport),
      timers_(timers),
      post_(std::move(post)) {}

Authenticator::~Authenticator() {
  stopping_ = true;
  for (HelperRun& run : helpers_) run.thread.join();
}

Authenticator::State* Authenticator::StateOf(const std::string& host, const std::string& repository) {
  std::unique_ptr<State>& state = states_[{host, repository}];
  if (state == nullptr) {
    state = std::make_unique<State>();
    state->host = host;
    state->repository = repository;
  }
  return state.get();
}

void Authenticator::Authorize(const std::string& host, const std::string& repository, Ready ready) {
  State* const state = StateOf(host, repository);
  switch (state->mode) {
    case Mode::kUnknown:
      state->mode = Mode::kProbing;
      Probe(state, ready);
      return;
    case Mode::kOpen:
      ready({absl::OkStatus(), "", state->generation, false});
      return;
    case Mode::kBasic:
    case Mode::kBearer:
      if (!state->header.empty() && options_.clock->BootNanos() < state->valid_until) {
        ready({absl::OkStatus(), state->header, state->generation, false});
        return;
      }
      state->waiting.push_back(std::move(ready));
      if (!state->obtaining) Obtain(state);
      return;
    case Mode::kProbing:
      if (state->silent) {
        Probe(state, ready);
      } else {
        state->waiting.push_back(std::move(ready));
      }
      return;
  }
}

void Authenticator::Probe(State* state, const Ready& ready) {
  state->silent = false;
  state->patience = timers_->Add(options_.clock->BootNanos() + options_.probe_patience_nanos, [this, state] {
    state->silent = true;
    if (state->waiting.empty()) return;  // whoever comes next does not wait
    const Ready next = std::move(state->waiting.front());
    state->waiting.pop_front();
    Probe(state, next);
  });
  ready({absl::OkStatus(), "", state->generation, true});
}

void Authenticator::EndProbing(State* state, Mode mode) {
  timers_->Cancel(state->patience);
  state->mode = mode;
}

void Authenticator::Flush(State* state, const Grant& grant) {
  std::deque<Ready> waiting;
  waiting.swap(state->waiting);
  for (const Ready& ready : waiting) ready(grant);
}

void Authenticator::Accepted(const std::string& host, const std::string& repository) {
  State* const state = StateOf(host, repository);
  if (state->mode != Mode::kProbing) return;
  EndProbing(state, Mode::kOpen);
  Flush(state, {absl::OkStatus(), "", state->generation, false});
}

void Authenticator::ProbeEnded(const std::string& host, const std::string& repository) {
  State* const state = StateOf(host, repository);
  if (state->mode != Mode::kProbing) return;
  // No answer. Those who waited try for themselves rather than one after the other.
  EndProbing(state, Mode::kUnknown);
  Flush(state, {absl::OkStatus(), "", state->generation, false});
}

void Authenticator::Rejected(const std::string& host, const std::string& repository, uint64_t generation,
                             const std::vector<std::string>& challenges) {
  State* const state = StateOf(host, repository);
  // Somebody else met the same refusal first, and there is something newer already.
  if (generation != state->generation) return;
  const std::optional<AuthChallenge> challenge = ChooseChallenge(challenges);
  state->generation++;
  state->header.clear();
  if (!challenge) {
    EndProbing(state, Mode::kUnknown);
    Flush(state, {PermissionDenied("HTTP 401 without a challenge that could be answered"), "",
                  state->generation, false});
    return;
  }
  EndProbing(state, challenge->scheme == "bearer" ? Mode::kBearer : Mode::kBasic);
  state->challenge = *challenge;
  if (!state->waiting.empty() && !state->obtaining) Obtain(state);
}

void Authenticator::Fail(State* state, absl::Status status) {
  state->obtaining = false;
  // Not remembered, nor is the challenge: whoever comes next asks the registry anew, which may want something
  // else by then or nothing at all.
  state->mode = Mode::kUnknown;
  Flush(state, {std::move(status), "", state->generation, false});
}

void Authenticator::Succeed(State* state, std::string header, uint64_t lifetime_nanos) {
  state->obtaining = false;
  state->header = std::move(header);
  state->generation++;
  const uint64_t margin = std::min(30 * kSecond, lifetime_nanos / 4);
  state->valid_until = options_.clock->BootNanos() + lifetime_nanos - margin;
  Flush(state, {absl::OkStatus(), state->header, state->generation, false});
}

void Authenticator::Obtain(State* state) {
  state->obtaining = true;
  const auto host = options_.hosts.find(state->host);
  if (host != options_.hosts.end() && !host->second.username.empty()) {
    ObtainWith(state, {host->second.username, host->second.password, ""}, "");
    return;
  }
  const CredentialStore::Source source = store_.Find(state->host);
  if (source.helper.empty()) {
    ObtainWith(state, source.stored, source.problem);
  } else {
    RunHelper(state, source);
  }
}

void Authenticator::RunHelper(State* state, const CredentialStore::Source& source) {
  for (auto run = helpers_.begin(); run != helpers_.end();) {
    if (!*run->ended) {
      ++run;
      continue;
    }
    run->thread.join();
    run = helpers_.erase(run);
  }
  auto ended = std::make_shared<std::atomic<bool>>(false);
  std::thread thread([this, state, source, ended] {
    absl::StatusOr<Credentials> found =
        RunCredentialHelper(source.helper, source.server, kHelperLimitNanos, &stopping_);
    // States live as long as this object, which waits for this thread; what is posted later runs before it
    // dies or never.
    if (!stopping_) {
      post_([this, state, source, found = std::move(found)] {
        const std::string problem =
            found.ok() ? source.problem : std::string(FromAbsl(found.status().message()));
        ObtainWith(state, found.ok() ? *found : source.stored, problem);
      });
    }
    *ended = true;
  });
  helpers_.push_back({std::move(thread), ended});
}

void Authenticator::ObtainWith(State* state, const Credentials& credentials, const std::string& problem) {
  if (state->mode == Mode::kBearer) {
    AskForToken(state, credentials, problem);
    return;
  }
  if (credentials.username.empty()) {
    std::string message =
        "the registry asks for a user name and password, and none is configured for " + state->host;
    if (!problem.empty()) message += " (" + problem + ")";
    Fail(state, PermissionDenied(message));
    return;
  }
  Succeed(state, "Basic " + Base64Encode(credentials.username + ":" + credentials.password),
          kBasicLifetimeNanos);
}

void Authenticator::AskForToken(State* state, const Credentials& credentials, const std::string& problem) {
  auto& params = state->challenge.params;
  const absl::StatusOr<Url> realm = ParseUrl(params["realm"]);
  if (!realm.ok()) return Fail(state, PermissionDenied("the registry names a token endpoint that is no URL"));
  if (realm->scheme == "http" && !PlainHttpAllowed(options_, realm->authority)) {
    return Fail(state,
                PermissionDenied("the registry names a token endpoint on plain http, " + realm->authority));
  }
  const std::string scope =
      params["scope"].empty() ? "repository:" + state->repository + ":pull" : params["scope"];
  std::string query = "scope=" + PercentEncode(scope);
  if (!params["service"].empty()) query = "service=" + PercentEncode(params["service"]) + "&" + query;
  HttpRequest request;
  request.ca_file = CaFileFor(options_, realm->authority);
  request.url = realm->full;
  if (!credentials.identity_token.empty()) {
    request.form = "grant_type=refresh_token&client_id=holdfast&" + query +
                   "&refresh_token=" + PercentEncode(credentials.identity_token);
  } else {
    request.url += (realm->full.find('?') == std::string::npos ? "?" : "&") + query;
    if (!credentials.username.empty()) {
      request.authorization = "Basic " + Base64Encode(credentials.username + ":" + credentials.password);
    }
  }
  transport_->Start(
      request,
      [](const HttpHeaders& headers) {
        BodyPlan plan;
        plan.discard = headers.status != 200;
        // Its length may be unknown; a body that ends sooner is judged in OnToken.
        plan.take = std::min(headers.content_length.value_or(kMaxTokenAnswerBytes), kMaxTokenAnswerBytes);
        return plan;
      },
      [this, state, had = !credentials.empty(), problem](const HttpResult& result) {
        OnToken(state, had, problem, result);
      });
}

void Authenticator::OnToken(State* state, bool had_credentials, const std::string& problem,
                            const HttpResult& result) {
  const int status = result.headers.status;
  const bool whole =
      result.complete || (result.failure == Failure::kShortBody && !result.headers.content_length);
  if (!result.answered || (!whole && status == 200)) {
    return Fail(state, Unavailable("token endpoint: " + result.why));
  }
  const std::string told = "token endpoint: HTTP " + std::to_string(status);
  if (status == 408 || status == 429 || status >= 500) return Fail(state, Unavailable(told));
  if (status != 200) {
    std::string message = told + (had_credentials ? ", the configured credentials were not accepted"
                                                  : ", and no credentials are configured for " + state->host);
    if (!problem.empty()) message += " (" + problem + ")";
    return Fail(state, PermissionDenied(message));
  }
  const absl::StatusOr<TokenAnswer> answer = ParseTokenAnswer(result.body);
  if (!answer.ok())
    return Fail(state, Unavailable("token endpoint: " + std::string(FromAbsl(answer.status().message()))));
  Succeed(state, "Bearer " + answer->token, answer->lifetime_nanos);
}

}  // namespace holdfast::fetch
