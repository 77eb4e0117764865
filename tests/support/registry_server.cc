#include "tests/support/registry_server.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/evp.h>
#include <openssl/ssl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "tests/support/registry_stream.h"

namespace holdfast::test {
namespace {

std::string Sha256Digest(const std::string& bytes) {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int size = 0;
  EVP_Digest(bytes.data(), bytes.size(), digest, &size, EVP_sha256(), nullptr);
  std::string text = "sha256:";
  char hex[3];
  for (unsigned int i = 0; i < size; i++) {
    std::snprintf(hex, sizeof hex, "%02x", digest[i]);
    text += hex;
  }
  return text;
}

std::string Base64(const std::string& plain) {
  std::string encoded(4 * ((plain.size() + 2) / 3) + 1, '\0');
  const int size =
      EVP_EncodeBlock(reinterpret_cast<unsigned char*>(encoded.data()),
                      reinterpret_cast<const unsigned char*>(plain.data()), static_cast<int>(plain.size()));
  encoded.resize(static_cast<size_t>(size));
  return encoded;
}

// The decoded value of `name` in a query or form body; "" when absent.
std::string FormValue(const std::string& form, const std::string& name) {
  for (size_t at = 0; at < form.size();) {
    const size_t end = std::min(form.find('&', at), form.size());
    const std::string pair = form.substr(at, end - at);
    at = end + 1;
    if (pair.rfind(name + "=", 0) != 0) continue;
    std::string value;
    for (size_t i = name.size() + 1; i < pair.size(); i++) {
      if (pair[i] == '%' && i + 2 < pair.size()) {
        value += static_cast<char>(std::strtoul(pair.substr(i + 1, 2).c_str(), nullptr, 16));
        i += 2;
      } else {
        value += pair[i] == '+' ? ' ' : pair[i];
      }
    }
    return value;
  }
  return "";
}

// "repository:<name>:pull" for /v2/<name>/(blobs|manifests)/<reference>.
std::string ScopeOf(const std::string& path) {
  size_t end = path.find("/blobs/");
  if (end == std::string::npos) end = path.find("/manifests/");
  if (end == std::string::npos || end <= 4) return "";
  return "repository:" + path.substr(4, end - 4) + ":pull";
}

// The part of a `size` byte body that a Range header asks for; false = not satisfiable.
bool ParseRange(const std::string& header, uint64_t size, uint64_t* offset, uint64_t* length) {
  const std::string spec = header.substr(std::strlen("bytes="));
  const size_t dash = spec.find('-');
  if (dash == std::string::npos) return false;
  if (dash == 0) {
    const uint64_t wanted = std::min<uint64_t>(std::strtoull(spec.c_str() + 1, nullptr, 10), size);
    *offset = size - wanted;
    *length = wanted;
    return wanted > 0;
  }
  const uint64_t first = std::strtoull(spec.c_str(), nullptr, 10);
  if (first >= size) return false;
  const uint64_t last =
      dash + 1 == spec.size() ? size - 1 : std::strtoull(spec.c_str() + dash + 1, nullptr, 10);
  *offset = first;
  *length = std::min(last, size - 1) - first + 1;
  return last >= first;
}

}  // namespace

std::string RegistryRequest::Header(const std::string& lower_case_name) const {
  const auto it = headers.find(lower_case_name);
  return it == headers.end() ? "" : it->second;
}

RegistryServer::RegistryServer(const RegistryOptions& options)
    : options_(options), tls_(!options.tls_certificate_file.empty()), port_(options.port) {
  if (tls_) {
    ssl_context_ = SSL_CTX_new(TLS_server_method());
    if (SSL_CTX_use_certificate_chain_file(ssl_context_, options.tls_certificate_file.c_str()) != 1 ||
        SSL_CTX_use_PrivateKey_file(ssl_context_, options.tls_key_file.c_str(), SSL_FILETYPE_PEM) != 1) {
      std::fprintf(stderr, "registry: cannot use certificate %s\n", options.tls_certificate_file.c_str());
      std::abort();
    }
  }
  Start();
}

RegistryServer::~RegistryServer() {
  Stop();
  if (ssl_context_ != nullptr) SSL_CTX_free(ssl_context_);
}

void RegistryServer::Start() {
  Stop();
  listen_fd_.Reset(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const int on = 1;
  setsockopt(listen_fd_.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port_);
  socklen_t size = sizeof address;
  {
    MutexLock lock(&mutex_);
    inet_pton(AF_INET, options_.bind_address.c_str(), &address.sin_addr);
    stopping_ = false;
  }
  if (bind(listen_fd_.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) != 0 ||
      listen(listen_fd_.get(), 1024) != 0 ||
      getsockname(listen_fd_.get(), reinterpret_cast<sockaddr*>(&address), &size) != 0) {
    std::perror("registry: cannot listen");
    std::abort();
  }
  port_ = ntohs(address.sin_port);
  accept_thread_ = std::thread([this, fd = listen_fd_.get()] { AcceptLoop(fd); });
}

void RegistryServer::Stop() {
  if (!accept_thread_.joinable()) return;
  {
    MutexLock lock(&mutex_);
    stopping_ = true;
    changed_.SignalAll();
  }
  shutdown(listen_fd_.get(), SHUT_RDWR);
  accept_thread_.join();
  listen_fd_.Reset();
  std::list<Connection> connections;
  {
    MutexLock lock(&mutex_);
    connections.swap(open_);
    for (Connection& connection : connections) shutdown(connection.fd, SHUT_RDWR);
  }
  for (Connection& connection : connections) {
    connection.thread.join();
    close(connection.fd);
  }
}

void RegistryServer::AcceptLoop(int listen_fd) {
  // SSL_write has no MSG_NOSIGNAL; threads started here inherit the mask.
  sigset_t pipe;
  sigemptyset(&pipe);
  sigaddset(&pipe, SIGPIPE);
  pthread_sigmask(SIG_BLOCK, &pipe, nullptr);
  while (true) {
    const int fd = accept4(listen_fd, nullptr, nullptr, SOCK_CLOEXEC);
    if (fd < 0 && (errno == EINTR || errno == ECONNABORTED)) continue;
    if (fd < 0) return;
    const int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    MutexLock lock(&mutex_);
    for (auto it = open_.begin(); it != open_.end();) {
      if (!it->finished) {
        ++it;
        continue;
      }
      it->thread.join();
      close(it->fd);
      it = open_.erase(it);
    }
    connections_++;
    Connection& connection = open_.emplace_back();
    connection.fd = fd;
    connection.thread = std::thread([this, &connection] { Serve(&connection); });
  }
}

void RegistryServer::Serve(Connection* connection) {
  {
    Stream stream(connection->fd, ssl_context_);
    RegistryRequest request;
    while (stream.ReadRequest(&request)) {
      {
        MutexLock lock(&mutex_);
        in_flight_++;
        requests_++;
        if (request.path == "/token") token_requests_++;
        if (request.IsBlob()) blob_requests_++;
        Changed();
      }
      const bool keep = ServeOne(&stream, request);
      MutexLock lock(&mutex_);
      in_flight_--;
      Changed();
      if (!keep || stopping_) break;
      request = {};
    }
  }
  shutdown(connection->fd, SHUT_RDWR);
  connection->finished = true;
}

void RegistryServer::Changed() {
  changes_++;
  changed_.SignalAll();
}

bool RegistryServer::ServeOne(Stream* stream, const RegistryRequest& request) {
  const std::optional<RegistryFault> chosen = FaultFor(request);
  const RegistryFault fault = chosen.value_or(RegistryFault{});
  RegistryLogEntry entry;
  entry.method = request.method;
  entry.path = request.path;
  entry.query = request.query;
  entry.range = request.Header("range");
  const std::string authorization = request.Header("authorization");
  entry.had_authorization = !authorization.empty();
  entry.authorization_scheme = authorization.substr(0, authorization.find(' '));
  Answer answer;
  uint64_t delay = fault.delay_nanos;
  bool stall = fault.stall;
  uint64_t epoch = 0;
  if (!stall && fault.raw.empty()) {
    answer = Respond(request, fault);
    entry.status = answer.status;
  }
  {
    MutexLock lock(&mutex_);
    stall = stall || black_hole_;
    epoch = stall_epoch_;  // from here on a release counts, also one during the delay
    if (stall) entry.status = 0;
    log_.push_back(entry);
    if (chosen) faults_served_++;
    delay += options_.delay_nanos;
    Changed();
  }
  Delay(delay);
  if (stall) {
    WaitWhileStalled(epoch);
    return false;
  }
  if (!fault.raw.empty()) {
    stream->Write(fault.raw);
    return false;
  }
  return Send(stream, request, std::move(answer), fault);
}

std::optional<RegistryFault> RegistryServer::FaultFor(const RegistryRequest& request) {
  if (request.path == "/token") return std::nullopt;
  Hook hook;
  {
    MutexLock lock(&mutex_);
    hook = hook_;
  }
  if (hook) {
    if (std::optional<RegistryFault> fault = hook(request)) return fault;
  }
  MutexLock lock(&mutex_);
  for (auto it = queued_faults_.begin(); it != queued_faults_.end(); ++it) {
    if (it->blobs_only && !request.IsBlob()) continue;
    const RegistryFault fault = it->fault;
    if (--it->count == 0) queued_faults_.erase(it);
    return fault;
  }
  return std::nullopt;
}

RegistryServer::Answer RegistryServer::Respond(const RegistryRequest& request, const RegistryFault& fault) {
  if (request.path == "/token") return RespondToken(request);
  if (fault.status != 0) {
    Answer answer = Error(fault.status, "FAULT");
    answer.headers = fault.headers;
    return answer;
  }
  if (std::optional<Answer> challenge = Challenge(request)) return *challenge;
  if (request.path == "/v2/") return Json("{}");
  Answer answer = RespondContent(request, fault);
  answer.headers.insert(answer.headers.end(), fault.headers.begin(), fault.headers.end());
  return answer;
}

RegistryServer::Answer RegistryServer::RespondToken(const RegistryRequest& request) {
  MutexLock lock(&mutex_);
  std::string scope;
  if (request.method == "POST") {
    if (options_.identity_token.empty() || FormValue(request.body, "grant_type") != "refresh_token" ||
        FormValue(request.body, "refresh_token") != options_.identity_token) {
      return Error(401, "UNAUTHORIZED");
    }
    scope = FormValue(request.body, "scope");
  } else {
    const std::string wanted = "Basic " + Base64(options_.username + ":" + options_.password);
    if (!options_.username.empty() && request.Header("authorization") != wanted)
      return Error(401, "UNAUTHORIZED");
    scope = FormValue(request.query, "scope");
  }
  const std::string token = "token-" + std::to_string(next_token_++);
  tokens_[token] = scope;
  const char* name = request.method == "POST" ? "access_token" : "token";
  return Json("{\"" + std::string(name) + "\":\"" + token +
              "\",\"expires_in\":" + std::to_string(options_.token_lifetime_seconds) + "}");
}

bool RegistryServer::IsAuthorized(const RegistryRequest& request) {
  if (options_.auth == RegistryAuth::kNone) return true;
  if (options_.protect_blobs_only && !request.IsBlob()) return true;
  const std::string authorization = request.Header("authorization");
  if (options_.auth == RegistryAuth::kBasic) {
    return authorization == "Basic " + Base64(options_.username + ":" + options_.password);
  }
  if (authorization.rfind("Bearer ", 0) != 0) return false;
  const auto token = tokens_.find(authorization.substr(std::strlen("Bearer ")));
  const std::string scope = ScopeOf(request.path);
  return token != tokens_.end() && (scope.empty() || token->second.find(scope) != std::string::npos);
}

std::optional<RegistryServer::Answer> RegistryServer::Challenge(const RegistryRequest& request) {
  MutexLock lock(&mutex_);
  if (IsAuthorized(request)) return std::nullopt;
  Answer answer = Error(401, "UNAUTHORIZED");
  std::string challenge = "Basic realm=\"test registry\"";
  if (options_.auth == RegistryAuth::kBearer) {
    challenge = "Bearer realm=\"" + url() + "/token\",service=\"test-registry\"";
    const std::string scope = ScopeOf(request.path);
    if (!scope.empty()) challenge += ",scope=\"" + scope + "\"";
  }
  answer.headers.emplace_back("WWW-Authenticate", challenge);
  return answer;
}

RegistryServer::Answer RegistryServer::RespondContent(const RegistryRequest& request,
                                                      const RegistryFault& fault) {
  Content content;
  std::string redirect;
  {
    MutexLock lock(&mutex_);
    if (request.IsBlob()) {
      const auto blob =
          blobs_.find(request.path.substr(request.path.find("/blobs/") + std::strlen("/blobs/")));
      if (blob != blobs_.end()) content = blob->second;
      redirect = options_.redirect_blobs_to;
    } else if (request.path.rfind("/v2/", 0) == 0) {
      const auto manifest = manifests_.find(request.path.substr(4));
      if (manifest != manifests_.end()) content = manifest->second;
    }
  }
  if (content.bytes == nullptr) return Error(404, request.IsBlob() ? "BLOB_UNKNOWN" : "MANIFEST_UNKNOWN");
  Answer answer;
  if (!redirect.empty()) {
    answer.status = 307;
    answer.headers.emplace_back("Location", redirect + request.path + "?X-Signature=secret-signature");
    return answer;
  }
  const uint64_t size = content.bytes->size();
  answer.bytes = content.bytes;
  answer.length = size;
  answer.headers.emplace_back("Content-Type", content.media_type);
  answer.headers.emplace_back("Docker-Content-Digest", content.digest);
  const std::string range = request.Header("range");
  if (range.rfind("bytes=", 0) != 0 || fault.ignore_range) return answer;
  if (!ParseRange(range, size, &answer.offset, &answer.length)) {
    Answer unsatisfiable = Error(416, "RANGE_INVALID");
    unsatisfiable.headers.emplace_back("Content-Range", "bytes */" + std::to_string(size));
    return unsatisfiable;
  }
  answer.status = 206;
  const std::string truth = "bytes " + std::to_string(answer.offset) + "-" +
                            std::to_string(answer.offset + answer.length - 1) + "/" + std::to_string(size);
  answer.headers.emplace_back("Content-Range", fault.content_range.empty() ? truth : fault.content_range);
  return answer;
}

bool RegistryServer::Send(Stream* stream, const RegistryRequest& request, Answer answer,
                          const RegistryFault& fault) {
  std::string head = "HTTP/1.1 " + std::to_string(answer.status) + " Test\r\n";
  for (const auto& [name, value] : answer.headers) head += name + ": " + value + "\r\n";
  if (fault.no_content_length) {
    head += "Connection: close\r\n";
  } else {
    head += "Content-Length: " + std::to_string(answer.length + fault.append.size()) + "\r\n";
  }
  if (!stream->Write(head + "\r\n")) return false;
  if (request.method == "HEAD") return true;
  return SendBody(stream, request, answer, fault) && !fault.no_content_length;
}

bool RegistryServer::SendBody(Stream* stream, const RegistryRequest& request, const Answer& answer,
                              const RegistryFault& fault) {
  const uint64_t cut = fault.cut_after.value_or(UINT64_MAX);
  uint64_t stall = fault.stall_after.value_or(UINT64_MAX);
  uint64_t epoch = 0;
  {
    MutexLock lock(&mutex_);
    epoch = stall_epoch_;
  }
  for (uint64_t sent = 0; sent < answer.length && sent < cut;) {
    if (sent == stall) {
      WaitWhileStalled(epoch);
      stall = UINT64_MAX;
    }
    const uint64_t piece = std::min(
        {answer.length - sent, cut - sent, stall > sent ? stall - sent : UINT64_MAX, uint64_t{256 * 1024}});
    std::string bytes = answer.bytes->substr(answer.offset + sent, piece);
    if (fault.corrupt) {
      for (char& byte : bytes) byte = static_cast<char>(~byte);
    }
    if (!stream->Write(bytes)) return false;
    sent += piece;
    MutexLock lock(&mutex_);
    if (request.IsBlob()) body_bytes_ += piece;
  }
  if (cut < answer.length) return false;
  if (stall == answer.length) WaitWhileStalled(epoch);
  return stream->Write(fault.append);
}

void RegistryServer::WaitWhileStalled(uint64_t epoch) {
  MutexLock lock(&mutex_);
  while (!stopping_ && stall_epoch_ == epoch) changed_.Wait(&mutex_);
}

void RegistryServer::Delay(uint64_t nanos) {
  if (nanos == 0) return;
  const auto until = std::chrono::steady_clock::now() + std::chrono::nanoseconds(nanos);
  MutexLock lock(&mutex_);
  while (!stopping_ && std::chrono::steady_clock::now() < until) changed_.WaitUntil(&mutex_, until);
}

RegistryServer::Answer RegistryServer::Error(int status, const std::string& code) {
  Answer answer = Json(R"({"errors":[{"code":")" + code + R"(","message":"test registry"}]})");
  answer.status = status;
  return answer;
}

RegistryServer::Answer RegistryServer::Json(const std::string& body) {
  Answer answer;
  answer.headers.emplace_back("Content-Type", "application/json");
  answer.bytes = std::make_shared<const std::string>(body);
  answer.length = body.size();
  return answer;
}

std::string RegistryServer::host() const { return "127.0.0.1:" + std::to_string(port_); }
std::string RegistryServer::url() const { return (tls_ ? "https://" : "http://") + host(); }

std::string RegistryServer::AddBlob(const std::string& bytes) {
  const std::string digest = Sha256Digest(bytes);
  AddBlobAs(digest, bytes);
  return digest;
}

void RegistryServer::AddBlobAs(const std::string& digest, const std::string& bytes) {
  auto shared = std::make_shared<const std::string>(bytes);
  MutexLock lock(&mutex_);
  blobs_[digest] = {"application/octet-stream", std::move(shared), digest};
}

void RegistryServer::RemoveBlob(const std::string& digest) {
  MutexLock lock(&mutex_);
  blobs_.erase(digest);
}

std::string RegistryServer::AddManifest(const std::string& repository, const std::string& tag,
                                        const std::string& media_type, const std::string& bytes) {
  const Content content{media_type, std::make_shared<const std::string>(bytes), Sha256Digest(bytes)};
  MutexLock lock(&mutex_);
  manifests_[repository + "/manifests/" + content.digest] = content;
  if (!tag.empty()) manifests_[repository + "/manifests/" + tag] = content;
  return content.digest;
}

void RegistryServer::SetHook(Hook hook) {
  MutexLock lock(&mutex_);
  hook_ = std::move(hook);
}

void RegistryServer::FailNext(const RegistryFault& fault, int count, bool blobs_only) {
  MutexLock lock(&mutex_);
  if (count > 0) queued_faults_.push_back({fault, count, blobs_only});
}

void RegistryServer::ClearFaults() {
  MutexLock lock(&mutex_);
  hook_ = nullptr;
  queued_faults_.clear();
}

void RegistryServer::ReleaseStalls() {
  MutexLock lock(&mutex_);
  stall_epoch_++;
  Changed();
}

void RegistryServer::SetBlackHole(bool on) {
  MutexLock lock(&mutex_);
  black_hole_ = on;
  if (!on) stall_epoch_++;
  Changed();
}

void RegistryServer::SetDelay(uint64_t nanos) {
  MutexLock lock(&mutex_);
  options_.delay_nanos = nanos;
}

void RegistryServer::SetRedirect(const std::string& base_url) {
  MutexLock lock(&mutex_);
  options_.redirect_blobs_to = base_url;
}

void RegistryServer::SetPassword(const std::string& username, const std::string& password) {
  MutexLock lock(&mutex_);
  options_.username = username;
  options_.password = password;
}

void RegistryServer::RevokeTokens() {
  MutexLock lock(&mutex_);
  tokens_.clear();
}

uint64_t RegistryServer::requests() const {
  MutexLock lock(&mutex_);
  return requests_;
}

uint64_t RegistryServer::blob_requests() const {
  MutexLock lock(&mutex_);
  return blob_requests_;
}

uint64_t RegistryServer::token_requests() const {
  MutexLock lock(&mutex_);
  return token_requests_;
}

uint64_t RegistryServer::body_bytes() const {
  MutexLock lock(&mutex_);
  return body_bytes_;
}

uint64_t RegistryServer::connections() const {
  MutexLock lock(&mutex_);
  return connections_;
}

uint64_t RegistryServer::faults_served() const {
  MutexLock lock(&mutex_);
  return faults_served_;
}

int RegistryServer::in_flight() const {
  MutexLock lock(&mutex_);
  return in_flight_;
}

std::vector<RegistryLogEntry> RegistryServer::log() const {
  MutexLock lock(&mutex_);
  return log_;
}

void RegistryServer::ResetCounters() {
  MutexLock lock(&mutex_);
  requests_ = blob_requests_ = token_requests_ = body_bytes_ = connections_ = faults_served_ = 0;
  log_.clear();
}

bool RegistryServer::WaitFor(const std::function<bool()>& predicate, int seconds) const {
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  while (true) {
    uint64_t seen;
    {
      MutexLock lock(&mutex_);
      seen = changes_;
    }
    if (predicate()) return true;
    if (std::chrono::steady_clock::now() >= until) return false;
    // The predicate may also look at something the server does not know of: look again soon in any case.
    const auto soon = std::chrono::steady_clock::now() + std::chrono::milliseconds(5);
    MutexLock lock(&mutex_);
    if (changes_ == seen) changed_.WaitUntil(&mutex_, std::min(soon, until));
  }
}

}  // namespace holdfast::test
