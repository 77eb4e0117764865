// Registry client on libcurl: byte ranges of blobs over HTTP(S) (OCI distribution spec, pull side). One
// thread drives all transfers; connections are kept alive and reused.
//
// Credentials: docker config (auths, credHelpers, credsStore, identity token), read anew when it changed;
// bearer tokens per (host, repository) are cached until they expire; basic auth. Never sent to another host
// on a redirect, never logged. Plain http only for loopback hosts or where the configuration says so.
//
// Retries with exponential back-off and jitter until the request's deadline: connection errors, time-outs,
// cut bodies, 429 (Retry-After honoured), 5xx. 401 re-authenticates once, 403 behind a redirect resolves the
// redirect anew once. 404 and 410 are final at once. A 200 to a range request is accepted and cut when the
// blob is small, else refused.
//
// libcurl is loaded by the first request, or by Prepare: a worker that takes over serves what is cached
// without it. Should that fail, every request fails with the reason.
//
// Thread safety: all methods. Callbacks run on the client's thread and must not block.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "common/clock.h"
#include "common/loop_watch.h"
#include "common/status.h"
#include "common/trace.h"
#include "worker/cache/blob_source.h"

namespace holdfast::fetch {

// "host[:port]/repository[:tag][@digest]" taken apart. docker.io rules applied (index.docker.io, library/).
struct ImageReference {
  std::string host;  // where to connect: registry-1.docker.io for docker.io
  std::string repository;
  std::string tag_or_digest;
};
absl::StatusOr<ImageReference> ParseImageReference(const std::string& reference);

struct BlobRef {
  ImageReference image;
  std::string digest;  // sha256:<hex>, of the compressed blob
  std::string tenant;  // for fairness and statistics; the containerd namespace
};

struct HostOptions {  // [registry."host:port"] in the configuration
  bool plain_http = false;
  std::string ca_file;             // PEM, instead of the system's
  std::string username, password;  // static; else docker config
};

struct ClientOptions {
  std::string docker_config;  // path of config.json; "" = $DOCKER_CONFIG or /root/.docker/config.json
  std::map<std::string, HostOptions> hosts;
  int max_connections_per_host = 8;
  int max_requests = 64;  // in flight; demand goes first in the queue
  uint64_t connect_timeout_nanos = 5'000'000'000;
  uint64_t stall_timeout_nanos = 10'000'000'000;  // no byte for so long: the attempt failed
  // A first request to a repository that is not answered for so long holds up nobody else.
  uint64_t probe_patience_nanos = 500'000'000;
  uint64_t first_backoff_nanos = 50'000'000;
  uint64_t max_backoff_nanos = 5'000'000'000;
  const Clock* clock = Clock::Real();
  TraceRing* trace = nullptr;
  LoopWatch* watch = nullptr;  // the client's thread, but for its waits for the network
};

struct FetchStats {
  uint64_t requests = 0, bytes = 0, failures = 0, retries = 0, in_flight = 0;
};

class RegistryClient {
 public:
  virtual ~RegistryClient() = default;  // cancels what is in flight: callbacks get Cancelled
  static std::unique_ptr<RegistryClient> Create(const ClientOptions& options);
  // Whether fetching can work on this machine: libcurl is there and starts.
  static absl::Status Check();

  // Loads libcurl now, beside everything else. Without it the first request does, and waits some
  // milliseconds. If that fails, requests do, until it works.
  virtual void Prepare() = 0;

  // As BlobSource::Fetch, for any blob.
  virtual void FetchRange(const BlobRef& blob, uint64_t offset, uint64_t length, cache::Priority priority,
                          uint64_t deadline_boot_nanos,
                          std::function<void(absl::StatusOr<std::string>)> done) = 0;

  // The last `length` bytes of a blob and the blob's size, in one request (suffix range).
  struct Tail {
    std::string bytes;
    uint64_t blob_size = 0;
  };
  virtual void FetchTail(const BlobRef& blob, uint64_t length, uint64_t deadline_boot_nanos,
                         std::function<void(absl::StatusOr<Tail>)> done) = 0;

  virtual std::shared_ptr<cache::BlobSource> Source(const BlobRef& blob) = 0;
  virtual FetchStats stats() const = 0;
};

}  // namespace holdfast::fetch
