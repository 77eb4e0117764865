#include "worker/fetch/registry_client.h"

#include <pthread.h>
#include <signal.h>

#include <cstdlib>
#include <thread>
#include <utility>

#include "common/mutex.h"
#include "glog/logging.h"
#include "worker/fetch/fetch_engine.h"
#include "worker/fetch/http_transport.h"

namespace holdfast::fetch {
namespace {

constexpr uint64_t kDefaultTimeNanos = 60'000'000'000;

std::string DockerConfigPath(const ClientOptions& options) {
  if (!options.docker_config.empty()) return options.docker_config;
  const char* const folder = std::getenv("DOCKER_CONFIG");
  return (folder != nullptr && *folder != '\0' ? std::string(folder) : "/root/.docker") + "/config.json";
}

// What the client and the sources it gave out share. Outlives the client's thread if a source is kept longer.
class Core {
 public:
  Core(const ClientOptions& options, std::unique_ptr<LoopWatch::Loop> loop,
       std::unique_ptr<HttpTransport> transport, std::unique_ptr<FetchCounters> counters)
      : options_(options),
        counters_(std::move(counters)),
        loop_(std::move(loop)),
        transport_(std::move(transport)) {}

  void Start() {
    engine_ = std::make_unique<FetchEngine>(
        options_, DockerConfigPath(options_), transport_.get(),
        [this](std::function<void()> run) { Post(std::move(run)); }, counters_.get());
    thread_ = std::thread([this] { Run(); });
  }

  void Stop() {
    {
      MutexLock lock(&mutex_);
      stopping_ = true;
    }
    transport_->Wake();
    thread_.join();
    loop_.reset();  // the watch need not live as long as the sources
  }

  void Submit(FetchJob job) {
    if (job.deadline_nanos == 0) job.deadline_nanos = options_.clock->BootNanos() + kDefaultTimeNanos;
    bool refused = false;
    {
      MutexLock lock(&mutex_);
      refused = stopping_;
      if (!refused) {
        counters_->in_flight++;
        jobs_.push_back(std::move(job));
      }
    }
    if (refused) return FailJob(job, Cancelled("the registry client is going away"));
    transport_->Wake();
  }

  FetchStats stats() const {
    return {counters_->requests, counters_->bytes, counters_->failures, counters_->retries,
            counters_->in_flight};
  }

 private:
  void Post(std::function<void()> run) {
    {
      MutexLock lock(&mutex_);
      posted_.push_back(std::move(run));
    }
    transport_->Wake();
  }

  void Run() {
    // OpenSSL writes to sockets without MSG_NOSIGNAL, and CURLOPT_NOSIGNAL leaves SIGPIPE to us.
    sigset_t pipe;
    sigemptyset(&pipe);
    sigaddset(&pipe, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &pipe, nullptr);
    bool stop = false;
    LoopWatch::Turn turns(loop_.get());
    while (!stop) {
      if (loop_ != nullptr) loop_->AtWork();  // the next turn
      std::vector<FetchJob> jobs;
      std::vector<std::function<void()>> posted;
      {
        MutexLock lock(&mutex_);
        jobs.swap(jobs_);
        posted.swap(posted_);
        stop = stopping_;
      }
      for (FetchJob& job : jobs) engine_->Submit(std::move(job));
      for (const auto& run : posted) run();
      const uint64_t idle_nanos = engine_->Advance();
      if (!stop) transport_->Poll(idle_nanos);
    }
    engine_->CancelAll();
    // Here, because libcurl's handles are used by this thread only.
    engine_.reset();
  }

  const ClientOptions options_;
  const std::unique_ptr<FetchCounters> counters_;
  std::unique_ptr<LoopWatch::Loop> loop_;
  const std::unique_ptr<HttpTransport> transport_;
  std::unique_ptr<FetchEngine> engine_;  // the thread's, once it runs
  std::thread thread_;
  Mutex mutex_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<FetchJob> jobs_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::function<void()>> posted_ ABSL_GUARDED_BY(mutex_);
};

class Source final : public cache::BlobSource {
 public:
  Source(std::shared_ptr<Core> core, const BlobRef& blob) : core_(std::move(core)), blob_(blob) {}

  void Fetch(uint64_t offset, uint64_t length, cache::Priority priority, uint64_t deadline_boot_nanos,
             std::function<void(absl::StatusOr<std::string>)> done) override {
    core_->Submit(
        {blob_, {offset, length, false}, priority, deadline_boot_nanos, RangeDone(std::move(done))});
  }

 private:
  const std::shared_ptr<Core> core_;
  const BlobRef blob_;
};

class Client final : public RegistryClient {
 public:
  explicit Client(std::shared_ptr<Core> core) : core_(std::move(core)) {}
  ~Client() override { core_->Stop(); }

  void FetchRange(const BlobRef& blob, uint64_t offset, uint64_t length, cache::Priority priority,
                  uint64_t deadline_boot_nanos,
                  std::function<void(absl::StatusOr<std::string>)> done) override {
    core_->Submit({blob, {offset, length, false}, priority, deadline_boot_nanos, RangeDone(std::move(done))});
  }

  void FetchTail(const BlobRef& blob, uint64_t length, uint64_t deadline_boot_nanos,
                 std::function<void(absl::StatusOr<Tail>)> done) override {
    // The start of everything a mount waits for.
    core_->Submit(
        {blob, {0, length, true}, cache::Priority::kDemand, deadline_boot_nanos, TailDone(std::move(done))});
  }

  std::shared_ptr<cache::BlobSource> Source(const BlobRef& blob) override {
    return std::make_shared<fetch::Source>(core_, blob);
  }

  FetchStats stats() const override { return core_->stats(); }

 private:
  const std::shared_ptr<Core> core_;
};

}  // namespace

std::unique_ptr<RegistryClient> RegistryClient::Create(const ClientOptions& options) {
  auto counters = std::make_unique<FetchCounters>();
  HttpLimits limits;
  limits.connect_timeout_nanos = options.connect_timeout_nanos;
  limits.stall_timeout_nanos = options.stall_timeout_nanos;
  limits.kept_connections = options.max_requests + options.max_connections_per_host;
  std::unique_ptr<LoopWatch::Loop> loop = LoopWatch::Add(options.watch, "fetch");
  absl::StatusOr<std::unique_ptr<HttpTransport>> transport = HttpTransport::Create(
      limits, options.clock, [bytes = &counters->bytes](uint64_t count) { *bytes += count; }, loop.get());
  CHECK(transport.ok()) << transport.status().ToString();
  auto core = std::make_shared<Core>(options, std::move(loop), std::move(*transport), std::move(counters));
  core->Start();
  return std::make_unique<Client>(std::move(core));
}

}  // namespace holdfast::fetch
