// Makes a layer known: its footer and TOC from the registry (one request when the TOC lies within the tail
// asked for), digest compared, LayerIndex built and stored. A layer known already costs no network.
//
// Thread safety: all methods. One resolution of a layer at a time, whoever asked first; layers named as
// neighbours are resolved ahead by a few threads, so a wanted layer never queues behind them. Callbacks of
// the client only wake a waiter. Errors: FailedPrecondition (this layer cannot be lazy: no footer, no TOC,
// digest missing or different), the client's own (NotFound, PermissionDenied, Unavailable, DeadlineExceeded),
// Cancelled when the resolver ends.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "common/clock.h"
#include "common/mutex.h"
#include "common/status.h"
#include "common/trace.h"
#include "worker/app/layer_files.h"
#include "worker/fetch/registry_client.h"
#include "worker/toc/toc.h"

namespace holdfast::app {

struct ResolveRequest {
  std::string image_ref;
  std::string layer_digest;
  std::string toc_digest;  // empty only for a neighbour: compared when its turn comes
  std::string tenant;
  uint64_t deadline_boot_nanos = 0;
};

struct ResolverOptions {
  uint64_t tail_bytes = 256 * 1024;
  int ahead_threads = 4;
  size_t max_ahead = 256;  // neighbours waiting; more are dropped, which only costs time later
  toc::Limits limits;
  const Clock* clock = Clock::Real();
  TraceRing* trace = nullptr;
};

class LayerResolver {
 public:
  LayerResolver(const ResolverOptions& options, LayerFiles* files, fetch::RegistryClient* client);
  ~LayerResolver();  // waits for resolutions under way
  LayerResolver(const LayerResolver&) = delete;
  LayerResolver& operator=(const LayerResolver&) = delete;

  absl::StatusOr<LayerRecord> Resolve(const ResolveRequest& request);
  // Returns at once.
  void ResolveAhead(const ResolveRequest& request);

 private:
  struct Flight {
    bool done = false;
    absl::StatusOr<LayerRecord> result = Unavailable("not resolved yet");
  };

  void AheadLoop();
  absl::StatusOr<LayerRecord> Join(const ResolveRequest& request);
  absl::StatusOr<LayerRecord> LoadOrFetch(const ResolveRequest& request);
  absl::StatusOr<LayerRecord> Fetch(const ResolveRequest& request);
  absl::StatusOr<LayerRecord> Build(const ResolveRequest& request, const std::string& json,
                                    uint64_t toc_offset, uint64_t blob_size);

  const ResolverOptions options_;
  LayerFiles* const files_;
  fetch::RegistryClient* const client_;

  Mutex mutex_;
  CondVar changed_;
  std::map<std::string, std::shared_ptr<Flight>> flights_ ABSL_GUARDED_BY(mutex_);
  std::deque<ResolveRequest> ahead_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_;
};

}  // namespace holdfast::app
