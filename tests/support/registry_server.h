// A registry for tests, in the test's own process: HTTP/1.1 on a loopback port, keep-alive, one thread a
// connection. Serves blobs and manifests from memory (OCI distribution spec, pull side): ranges, suffix
// ranges, HEAD, basic and bearer authentication with a token endpoint (GET with basic, POST with a refresh
// token), redirects, optionally TLS. Faults are chosen request by request; everything asked is counted and
// logged.
//
// Thread-safe: all methods. Hooks run on connection threads. The destructor cuts every connection and joins
// every thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "common/io.h"
#include "common/mutex.h"
#include "common/status.h"

struct ssl_ctx_st;

namespace holdfast::test {

enum class RegistryAuth { kNone, kBasic, kBearer };

struct RegistryOptions {
  RegistryAuth auth = RegistryAuth::kNone;
  std::string username,
      password;                // for basic, and for the token endpoint; empty username = tokens for anybody
  std::string identity_token;  // accepted by POST /token as refresh_token; "" = POST is refused
  int token_lifetime_seconds = 300;
  bool protect_blobs_only = false;  // manifests and /v2/ without authentication
  std::string
      redirect_blobs_to;  // "http://127.0.0.1:1234": blobs answer 307 to there, with a signed-looking query
  uint64_t delay_nanos = 0;                        // before every answer
  std::string tls_certificate_file, tls_key_file;  // PEM; both set = the server speaks TLS
  std::string bind_address = "127.0.0.1";
  uint16_t port = 0;  // 0 = any free one
};

struct RegistryRequest {
  std::string method, path, query;             // path without the query
  std::map<std::string, std::string> headers;  // names in lower case
  std::string body;
  std::string Header(const std::string& lower_case_name) const;
  bool IsBlob() const { return path.find("/blobs/") != std::string::npos; }
};

// What goes wrong with one answer. Default-made: nothing does.
struct RegistryFault {
  int status = 0;  // answer with it and an OCI error body
  std::vector<std::pair<std::string, std::string>>
      headers;                          // added to the answer (Retry-After, Location, ...)
  std::optional<uint64_t> cut_after;    // close the connection after so many body bytes
  std::optional<uint64_t> stall_after;  // stop after so many body bytes, until ReleaseStalls() or Stop()
  bool stall = false;                   // no answer at all until then; then the connection is cut
  std::string content_range;            // instead of the true one
  std::string append;                   // more body than asked for (Content-Length says so too)
  bool ignore_range = false;            // 200 with the whole blob
  bool no_content_length = false;       // body ends with the connection
  bool corrupt = false;                 // every body byte flipped
  std::string raw;           // these bytes instead of an HTTP answer, then the connection is closed
  uint64_t delay_nanos = 0;  // before the answer
};

struct RegistryLogEntry {
  std::string method, path, query, range;
  bool had_authorization = false;
  std::string authorization_scheme;  // "Basic", "Bearer" or ""
  int status = 0;                    // 0 = no answer was sent (stall, raw bytes)
};

class RegistryServer {
 public:
  using Hook = std::function<std::optional<RegistryFault>(const RegistryRequest&)>;

  explicit RegistryServer(const RegistryOptions& options = {});
  ~RegistryServer();
  RegistryServer(const RegistryServer&) = delete;
  RegistryServer& operator=(const RegistryServer&) = delete;

  // Stop: connections cut, port closed (connection refused). Start: again on the same port, same content.
  void Stop();
  void Start();

  uint16_t port() const { return port_; }
  std::string host() const;  // "127.0.0.1:<port>"
  std::string url() const;   // "http://127.0.0.1:<port>" or https

  // Returns the digest ("sha256:<hex>"). Blobs belong to every repository.
  std::string AddBlob(const std::string& bytes);
  void AddBlobAs(const std::string& digest,
                 const std::string& bytes);  // under a digest that need not be true
  void RemoveBlob(const std::string& digest);
  // Under its digest, and under `tag` if given. Returns the digest.
  std::string AddManifest(const std::string& repository, const std::string& tag,
                          const std::string& media_type, const std::string& bytes);

  // Asked for every request except the token endpoint's, before the FailNext list; an empty optional = answer
  // properly.
  void SetHook(Hook hook);
  // The next `count` blob requests (any but token requests with `blobs_only` false) get `fault`; several
  // queue up.
  void FailNext(const RegistryFault& fault, int count = 1, bool blobs_only = true);
  void ClearFaults();
  void ReleaseStalls();
  // Accepts and reads, never answers, until switched off (stalled requests are then cut).
  void SetBlackHole(bool on);
  void SetDelay(uint64_t nanos);
  void SetRedirect(const std::string& base_url);  // "" = off
  void SetPassword(const std::string& username, const std::string& password);
  void RevokeTokens();

  uint64_t requests() const;  // all, token endpoint included
  uint64_t blob_requests() const;
  uint64_t token_requests() const;
  uint64_t body_bytes() const;     // of blob answers, as handed to the socket
  uint64_t connections() const;    // accepted so far
  uint64_t faults_served() const;  // a test that did not see its fault happen fails
  int in_flight() const;           // requests read and not yet answered
  std::vector<RegistryLogEntry> log() const;
  void ResetCounters();
  // Waits until `predicate` holds (tested after every request begun or answered); false after `seconds`.
  bool WaitFor(const std::function<bool()>& predicate, int seconds = 20) const;

 private:
  class Stream;
  struct Connection {
    int fd = -1;
    std::atomic<bool> finished{false};
    std::thread thread;
  };
  struct Content {
    std::string media_type;
    std::shared_ptr<const std::string> bytes;
    std::string digest;
  };
  struct Answer {
    int status = 200;
    std::vector<std::pair<std::string, std::string>> headers;
    std::shared_ptr<const std::string> bytes;
    uint64_t offset = 0, length = 0;
  };

  void AcceptLoop(int listen_fd);
  void Serve(Connection* connection);
  bool ServeOne(Stream* stream, const RegistryRequest& request);
  std::optional<RegistryFault> FaultFor(const RegistryRequest& request);
  Answer Respond(const RegistryRequest& request, const RegistryFault& fault);
  Answer RespondToken(const RegistryRequest& request);
  Answer RespondContent(const RegistryRequest& request, const RegistryFault& fault);
  std::optional<Answer> Challenge(const RegistryRequest& request);
  bool Send(Stream* stream, const RegistryRequest& request, Answer answer, const RegistryFault& fault);
  bool SendBody(Stream* stream, const RegistryRequest& request, const Answer& answer,
                const RegistryFault& fault);
  bool IsAuthorized(const RegistryRequest& request) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void WaitWhileStalled(uint64_t epoch);  // until the epoch is over
  void Delay(uint64_t nanos);
  void Changed() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  static Answer Error(int status, const std::string& code);
  static Answer Json(const std::string& body);

  RegistryOptions options_ ABSL_GUARDED_BY(mutex_);
  const bool tls_;
  uint16_t port_ = 0;
  ssl_ctx_st* ssl_context_ = nullptr;

  mutable Mutex mutex_;
  mutable CondVar changed_;
  UniqueFd listen_fd_;
  std::thread accept_thread_;
  std::list<Connection> open_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  bool black_hole_ ABSL_GUARDED_BY(mutex_) = false;
  uint64_t stall_epoch_ ABSL_GUARDED_BY(mutex_) = 0;
  std::map<std::string, Content> blobs_ ABSL_GUARDED_BY(mutex_);  // by digest
  std::map<std::string, Content> manifests_
      ABSL_GUARDED_BY(mutex_);  // by "<repository>/manifests/<reference>"
  struct QueuedFault {
    RegistryFault fault;
    int count = 1;
    bool blobs_only = true;
  };
  Hook hook_ ABSL_GUARDED_BY(mutex_);
  std::list<QueuedFault> queued_faults_ ABSL_GUARDED_BY(mutex_);
  std::map<std::string, std::string> tokens_ ABSL_GUARDED_BY(mutex_);  // token -> scope
  uint64_t next_token_ ABSL_GUARDED_BY(mutex_) = 1;
  uint64_t requests_ ABSL_GUARDED_BY(mutex_) = 0, blob_requests_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t token_requests_ ABSL_GUARDED_BY(mutex_) = 0, body_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t connections_ ABSL_GUARDED_BY(mutex_) = 0, faults_served_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t changes_ ABSL_GUARDED_BY(mutex_) = 0;  // any counter moved
  int in_flight_ ABSL_GUARDED_BY(mutex_) = 0;
  std::vector<RegistryLogEntry> log_ ABSL_GUARDED_BY(mutex_);
};

// A certificate authority and a server certificate for 127.0.0.1 and localhost, as PEM files in `folder`:
// ca.pem, server.pem, server.key.
absl::Status MakeTestCertificates(const std::string& folder);

}  // namespace holdfast::test
