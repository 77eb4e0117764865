#include "worker/fetch/http_transport.h"

#include <algorithm>
#include <map>
#include <utility>
#include <vector>

#include "worker/fetch/libcurl.h"

namespace holdfast::fetch {
namespace {

constexpr uint64_t kDrainBytes = 64 * 1024;  // reading so much is cheaper than a new connection
constexpr size_t kReserveBytes = 8 << 20;    // an answer's promise is believed so far
constexpr char kUserAgent[] = "holdfast/0.1.0";

struct Exchange {
  const Libcurl* curl = nullptr;
  uint64_t id = 0;
  const Clock* clock = nullptr;
  const HttpTransport::OnBytes* on_bytes = nullptr;
  HttpTransport::OnHeaders on_headers;
  HttpTransport::OnDone done;
  std::string form;
  CurlHandle<curl_slist, &Libcurl::curl_slist_free_all> header_list;
  CurlHandle<CURL, &Libcurl::curl_easy_cleanup> easy;
  uint64_t last_progress = 0;
  bool connected = false;        // from here on silence is a stall; before, the connect timeout rules
  bool stopped_by_plan = false;  // we ended it: all we wanted is there
  uint64_t seen = 0;             // body bytes so far
  BodyPlan plan;
  HttpResult result;
};

int OnPrerequest(void* context, char*, char*, int, int) {
  auto* exchange = static_cast<Exchange*>(context);
  exchange->connected = true;
  exchange->last_progress = exchange->clock->BootNanos();
  return CURL_PREREQFUNC_OK;
}

size_t OnHeaderLine(char* data, size_t, size_t size, void* context) {
  auto* exchange = static_cast<Exchange*>(context);
  exchange->last_progress = exchange->clock->BootNanos();
  const std::string_view line(data, size);
  HttpResult& result = exchange->result;
  if (line.rfind("HTTP/", 0) == 0) {
    result.headers = {};
    long status = 0;
    exchange->curl->curl_easy_getinfo(exchange->easy.get(), CURLINFO_RESPONSE_CODE, &status);
    result.headers.status = static_cast<int>(status);
    return size;
  }
  if (line != "\r\n" && line != "\n") {
    AddHeaderLine(line, &result.headers);
    return size;
  }
  if (result.headers.status < 200) return size;  // 100 Continue and the like: the real one follows
  if (result.answered) return size;              // trailers
  result.answered = true;
  exchange->plan = exchange->on_headers(result.headers);
  const BodyPlan& plan = exchange->plan;
  const bool nothing_wanted = plan.discard && result.headers.content_length.value_or(0) > kDrainBytes;
  if (nothing_wanted || (!plan.discard && plan.take == 0)) {
    exchange->stopped_by_plan = true;
    return 0;
  }
  if (!plan.discard) result.body.reserve(std::min<uint64_t>(plan.take, kReserveBytes));
  return size;
}

size_t OnBody(char* data, size_t, size_t size, void* context) {
  auto* exchange = static_cast<Exchange*>(context);
  exchange->last_progress = exchange->clock->BootNanos();
  (*exchange->on_bytes)(size);
  const BodyPlan& plan = exchange->plan;
  const uint64_t begin = exchange->seen;
  exchange->seen += size;
  if (plan.discard) {
    exchange->stopped_by_plan = exchange->seen > kDrainBytes;
    return exchange->stopped_by_plan ? 0 : size;
  }
  std::string_view bytes(data, size);
  if (begin < plan.skip) bytes.remove_prefix(std::min<uint64_t>(plan.skip - begin, size));
  std::string& body = exchange->result.body;
  const uint64_t room = plan.take - body.size();
  body.append(bytes.substr(0, room));
  // More is coming than is wanted. (Exactly enough is left to libcurl, which then keeps the connection.)
  exchange->stopped_by_plan = bytes.size() > room;
  const std::optional<uint64_t> length = exchange->result.headers.content_length;
  if (body.size() == plan.take && length != exchange->seen) exchange->stopped_by_plan = true;
  return exchange->stopped_by_plan ? 0 : size;
}

// Sorts libcurl's errors into what the retry policy knows.
void Judge(const Libcurl& curl, CURLcode code, bool connected, CURL* easy, HttpResult* result) {
  result->why = curl.curl_easy_strerror(code);
  // libcurl reports a certificate whose signature is wrong like any broken handshake.
  long verdict = 0;
  curl.curl_easy_getinfo(easy, CURLINFO_SSL_VERIFYRESULT, &verdict);
  if (code == CURLE_SSL_CONNECT_ERROR && verdict != 0) code = CURLE_PEER_FAILED_VERIFICATION;
  switch (code) {
    case CURLE_COULDNT_RESOLVE_HOST:
    case CURLE_COULDNT_RESOLVE_PROXY:
      result->failure = Failure::kDns;
      result->why = "the host name cannot be resolved (DNS)";
      return;
    case CURLE_OPERATION_TIMEDOUT:
      result->failure = Failure::kTimeout;
      result->why = connected ? "no answer in time" : "no connection in time";
      return;
    case CURLE_PEER_FAILED_VERIFICATION:
      result->failure = Failure::kRefused;
      result->why = "the server's certificate is not trusted";
      return;
    case CURLE_SSL_CACERT_BADFILE:
    case CURLE_SSL_ISSUER_ERROR:
      result->failure = Failure::kRefused;
      result->why = "the configured CA file cannot be used";
      return;
    case CURLE_URL_MALFORMAT:
      result->failure = Failure::kRefused;
      return;
    case CURLE_PARTIAL_FILE:
    case CURLE_RECV_ERROR:
    case CURLE_GOT_NOTHING:
    case CURLE_SEND_ERROR:
    case CURLE_HTTP2:
    case CURLE_HTTP2_STREAM:
      result->failure = Failure::kCut;
      result->why = "the connection was cut";
      return;
    case CURLE_WEIRD_SERVER_REPLY:
    case CURLE_UNSUPPORTED_PROTOCOL:  // said of an answer in HTTP/0.9's manner: no status line
      result->failure = Failure::kBadAnswer;
      result->why = "the server does not answer with HTTP";
      return;
    default:
      result->failure = connected ? Failure::kCut : Failure::kConnect;
      return;
  }
}

class CurlTransport final : public HttpTransport {
 public:
  CurlTransport(const Libcurl& curl, const HttpLimits& limits, const Clock* clock, OnBytes on_bytes,
                LoopWatch::Loop* loop)
      : limits_(limits),
        clock_(clock),
        on_bytes_(std::move(on_bytes)),
        loop_(loop),
        curl_(curl),
        share_(curl_.curl_share_init(), {&curl_}),
        multi_(curl_.curl_multi_init(), {&curl_}) {}

  ~CurlTransport() override {
    for (auto& [id, exchange] : exchanges_)
      curl_.curl_multi_remove_handle(multi_.get(), exchange->easy.get());
  }

  bool Init() {
    if (share_ == nullptr || multi_ == nullptr) return false;
    curl_.curl_share_setopt(share_.get(), CURLSHOPT_SHARE, CURL_LOCK_DATA_DNS);
    curl_.curl_share_setopt(share_.get(), CURLSHOPT_SHARE, CURL_LOCK_DATA_SSL_SESSION);
    curl_.curl_multi_setopt(multi_.get(), CURLMOPT_MAXCONNECTS, static_cast<long>(limits_.kept_connections));
    return true;
  }

  uint64_t Start(const HttpRequest& request, OnHeaders on_headers, OnDone done) override {
    auto exchange = std::make_unique<Exchange>();
    exchange->id = ++next_id_;
    exchange->curl = &curl_;
    exchange->clock = clock_;
    exchange->on_bytes = &on_bytes_;
    exchange->on_headers = std::move(on_headers);
    exchange->done = std::move(done);
    exchange->form = request.form;
    exchange->last_progress = clock_->BootNanos();
    exchange->easy = {curl_.curl_easy_init(), {&curl_}};
    SetRequest(request, exchange.get());
    SetBehaviour(exchange.get());
    const uint64_t id = exchange->id;
    starting_.push_back(id);
    exchanges_[id] = std::move(exchange);
    return id;
  }

  void Cancel(uint64_t id) override { Take(id); }

  void Poll(uint64_t wait_nanos) override {
    for (const uint64_t id : std::exchange(starting_, {})) {
      const auto it = exchanges_.find(id);
      if (it != exchanges_.end()) curl_.curl_multi_add_handle(multi_.get(), it->second->easy.get());
    }
    int running = 0;
    curl_.curl_multi_perform(multi_.get(), &running);
    if (FinishEnded() + FinishStalled() > 0 || !starting_.empty()) return;
    const uint64_t millis = std::min<uint64_t>((wait_nanos + 999'999) / 1'000'000, NextStallMillis());
    {
      LoopWatch::Pause waiting(loop_);
      curl_.curl_multi_poll(multi_.get(), nullptr, 0, static_cast<int>(millis), nullptr);
    }
    curl_.curl_multi_perform(multi_.get(), &running);
    FinishEnded();
    FinishStalled();
  }

  void Wake() override { curl_.curl_multi_wakeup(multi_.get()); }

 private:
  void SetRequest(const HttpRequest& request, Exchange* exchange) {
    CURL* const easy = exchange->easy.get();
    curl_slist* list = nullptr;
    if (!request.range.empty()) list = curl_.curl_slist_append(list, ("Range: " + request.range).c_str());
    if (!request.authorization.empty()) {
      list = curl_.curl_slist_append(list, ("Authorization: " + request.authorization).c_str());
    }
    exchange->header_list = {list, {&curl_}};
    curl_.curl_easy_setopt(easy, CURLOPT_URL, request.url.c_str());
    curl_.curl_easy_setopt(easy, CURLOPT_HTTPHEADER, list);
    if (!exchange->form.empty()) {
      curl_.curl_easy_setopt(easy, CURLOPT_POSTFIELDSIZE_LARGE,
                             static_cast<curl_off_t>(exchange->form.size()));
      curl_.curl_easy_setopt(easy, CURLOPT_POSTFIELDS, exchange->form.c_str());
    }
    if (!request.ca_file.empty()) {
      curl_.curl_easy_setopt(easy, CURLOPT_CAINFO, request.ca_file.c_str());
      curl_.curl_easy_setopt(easy, CURLOPT_CAPATH, nullptr);
    }
  }

  void SetBehaviour(Exchange* exchange) {
    CURL* const easy = exchange->easy.get();
    curl_.curl_easy_setopt(easy, CURLOPT_PRIVATE, exchange);
    curl_.curl_easy_setopt(easy, CURLOPT_SHARE, share_.get());
    curl_.curl_easy_setopt(easy, CURLOPT_NOSIGNAL, 1L);
    // A resolver thread that hangs in getaddrinfo must not be waited for when its exchange is given up.
    curl_.curl_easy_setopt(easy, CURLOPT_QUICK_EXIT, 1L);
    curl_.curl_easy_setopt(easy, CURLOPT_PROTOCOLS_STR, "http,https");
    curl_.curl_easy_setopt(easy, CURLOPT_FOLLOWLOCATION, 0L);
    curl_.curl_easy_setopt(easy, CURLOPT_HTTP_VERSION, static_cast<long>(CURL_HTTP_VERSION_2TLS));
    curl_.curl_easy_setopt(easy, CURLOPT_SSLVERSION, static_cast<long>(CURL_SSLVERSION_TLSv1_2));
    curl_.curl_easy_setopt(easy, CURLOPT_USERAGENT, kUserAgent);
    curl_.curl_easy_setopt(easy, CURLOPT_SUPPRESS_CONNECT_HEADERS, 1L);
    curl_.curl_easy_setopt(easy, CURLOPT_TCP_KEEPALIVE, 1L);
    curl_.curl_easy_setopt(easy, CURLOPT_BUFFERSIZE, 256 * 1024L);
    curl_.curl_easy_setopt(
        easy, CURLOPT_CONNECTTIMEOUT_MS,
        static_cast<long>(std::max<uint64_t>(limits_.connect_timeout_nanos / 1'000'000, 1)));
    curl_.curl_easy_setopt(easy, CURLOPT_PREREQFUNCTION, OnPrerequest);
    curl_.curl_easy_setopt(easy, CURLOPT_PREREQDATA, exchange);
    curl_.curl_easy_setopt(easy, CURLOPT_HEADERFUNCTION, OnHeaderLine);
    curl_.curl_easy_setopt(easy, CURLOPT_HEADERDATA, exchange);
    curl_.curl_easy_setopt(easy, CURLOPT_WRITEFUNCTION, OnBody);
    curl_.curl_easy_setopt(easy, CURLOPT_WRITEDATA, exchange);
  }

  std::unique_ptr<Exchange> Take(uint64_t id) {
    const auto it = exchanges_.find(id);
    if (it == exchanges_.end()) return nullptr;
    std::unique_ptr<Exchange> exchange = std::move(it->second);
    exchanges_.erase(it);
    curl_.curl_multi_remove_handle(multi_.get(), exchange->easy.get());
    return exchange;
  }

  void Deliver(std::unique_ptr<Exchange> exchange) {
    HttpResult result = std::move(exchange->result);
    OnDone done = std::move(exchange->done);
    exchange.reset();
    done(std::move(result));
  }

  int FinishEnded() {
    // Collected first: handlers start and cancel exchanges, which changes libcurl's list.
    std::vector<std::pair<uint64_t, CURLcode>> ended;
    int left = 0;
    while (const CURLMsg* message = curl_.curl_multi_info_read(multi_.get(), &left)) {
      if (message->msg != CURLMSG_DONE) continue;
      void* context = nullptr;
      curl_.curl_easy_getinfo(message->easy_handle, CURLINFO_PRIVATE, &context);
      ended.emplace_back(static_cast<Exchange*>(context)->id, message->data.result);
    }
    for (const auto& [id, code] : ended) {
      std::unique_ptr<Exchange> exchange = Take(id);
      if (exchange == nullptr) continue;
      HttpResult& result = exchange->result;
      result.complete =
          result.answered && (code == CURLE_OK || exchange->stopped_by_plan || exchange->plan.discard);
      if (!result.complete) {
        Judge(curl_, code == CURLE_OK ? CURLE_GOT_NOTHING : code, exchange->connected, exchange->easy.get(),
              &result);
      }
      if (result.complete && !exchange->plan.discard && result.body.size() < exchange->plan.take) {
        result.complete = false;
        result.failure = Failure::kShortBody;
        result.why = "the answer ended after " + std::to_string(result.body.size()) + " of " +
                     std::to_string(exchange->plan.take) + " bytes";
      }
      Deliver(std::move(exchange));
    }
    return static_cast<int>(ended.size());
  }

  int FinishStalled() {
    std::vector<uint64_t> stalled;
    const uint64_t now = clock_->BootNanos();
    for (const auto& [id, exchange] : exchanges_) {
      if (exchange->connected && now - exchange->last_progress >= limits_.stall_timeout_nanos)
        stalled.push_back(id);
    }
    for (const uint64_t id : stalled) {
      std::unique_ptr<Exchange> exchange = Take(id);
      if (exchange == nullptr) continue;
      exchange->result.complete = false;
      exchange->result.failure = Failure::kTimeout;
      exchange->result.why = exchange->result.answered
                                 ? "the answer stalled after " + std::to_string(exchange->seen) + " bytes"
                                 : std::string("no answer in time");
      Deliver(std::move(exchange));
    }
    return static_cast<int>(stalled.size());
  }

  uint64_t NextStallMillis() const {
    uint64_t earliest = limits_.stall_timeout_nanos;
    const uint64_t now = clock_->BootNanos();
    for (const auto& [id, exchange] : exchanges_) {
      if (!exchange->connected) continue;
      const uint64_t quiet = now - exchange->last_progress;
      earliest =
          std::min(earliest, quiet >= limits_.stall_timeout_nanos ? 0 : limits_.stall_timeout_nanos - quiet);
    }
    return earliest / 1'000'000 + 1;
  }

  const HttpLimits limits_;
  const Clock* const clock_;
  const OnBytes on_bytes_;
  LoopWatch::Loop* const loop_;
  const Libcurl& curl_;
  // Destroyed in reverse order: easy handles, then the multi, then what they share.
  const CurlHandle<CURLSH, &Libcurl::curl_share_cleanup> share_;
  const CurlHandle<CURLM, &Libcurl::curl_multi_cleanup> multi_;
  std::map<uint64_t, std::unique_ptr<Exchange>> exchanges_;
  // Begun, not yet with libcurl: Start may be called from OnHeaders, where libcurl forbids adding.
  std::vector<uint64_t> starting_;
  uint64_t next_id_ = 0;
};

}  // namespace

absl::StatusOr<std::unique_ptr<HttpTransport>> HttpTransport::Create(const HttpLimits& limits,
                                                                     const Clock* clock, OnBytes on_bytes,
                                                                     LoopWatch::Loop* loop) {
  HF_ASSIGN_OR_RETURN(const Libcurl* curl, LoadLibcurl());
  auto transport = std::make_unique<CurlTransport>(*curl, limits, clock, std::move(on_bytes), loop);
  if (!transport->Init()) return Internal("libcurl cannot be set up");
  return std::unique_ptr<HttpTransport>(std::move(transport));
}

}  // namespace holdfast::fetch
