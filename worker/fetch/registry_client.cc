#include "worker/fetch/registry_client.h"

#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <cstdlib>
#include <thread>
#include <utility>

#include "common/log.h"
#include "common/mutex.h"
#include "common/urgency.h"
#include "glog/logging.h"
#include "worker/fetch/fetch_engine.h"
#include "worker/fetch/http_transport.h"

namespace holdfast::fetch {
namespace {

constexpr double kNotReadySeconds = 10;  // between two lines of the log

constexpr uint64_t kDefaultTimeNanos = 60'000'000'000;

std::string DockerConfigPath(const ClientOptions& options) {
  if (!options.docker_config.empty()) return options.docker_config;
  const char* const folder = std::getenv("DOCKER_CONFIG");
  return (folder != nullptr && *folder != '\0' ? std::string(folder) : "/root/.docker") + "/config.json";
}

// What the client and the sources it gave out share. Outlives the client's thread if a source is kept longer.
class Core {
 public:
  explicit Core(const ClientOptions& options)
      : options_(options), loop_(LoopWatch::Add(options.watch, "fetch")) {}

  void Start() {
    thread_ = std::thread([this] { Run(); });
  }

  void Prepare() {
    MutexLock lock(&mutex_);
    wanted_ = true;
    changed_.Signal();
  }

  void Stop() {
    {
      MutexLock lock(&mutex_);
      stopping_ = true;
    }
    Wake();
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
        counters_.in_flight++;
        jobs_.push_back(std::move(job));
      }
    }
    if (refused) return FailJob(job, Cancelled("the registry client is going away"));
    Wake();
  }

  FetchStats stats() const {
    return {counters_.requests, counters_.bytes, counters_.failures, counters_.retries, counters_.in_flight};
  }

 private:
  void Post(std::function<void()> run) {
    {
      MutexLock lock(&mutex_);
      posted_.push_back(std::move(run));
    }
    Wake();
  }

  // Call it after what it is to see was put into an inbox.
  void Wake() {
    changed_.Signal();
    if (HttpTransport* transport = running_.load()) transport->Wake();
  }

  void Run() {
    LeaveUrgency();  // what is on the disk comes first, when a worker takes over
    // OpenSSL writes to sockets without MSG_NOSIGNAL, and CURLOPT_NOSIGNAL leaves SIGPIPE to us.
    sigset_t pipe;
    sigemptyset(&pipe);
    sigaddset(&pipe, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &pipe, nullptr);
    if (!WaitForWork()) return;
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

  // Until there is something to do and the means for it. False: told to stop.
  bool WaitForWork() {
    while (true) {
      bool stop = false;
      {
        MutexLock lock(&mutex_);
        while (!stopping_ && !wanted_ && jobs_.empty()) changed_.Wait(&mutex_);
        wanted_ = false;
        stop = stopping_;
      }
      const absl::Status opened = stop ? Cancelled("the registry client is going away") : Open();
      if (opened.ok()) return true;
      std::vector<FetchJob> jobs;
      {
        MutexLock lock(&mutex_);
        jobs.swap(jobs_);
      }
      for (const FetchJob& job : jobs) {
        counters_.failures++;
        counters_.in_flight--;
        FailJob(job, opened);
      }
      if (stop) return false;
    }
  }

  // Loads libcurl; the next job tries again if that fails.
  absl::Status Open() {
    LoopWatch::Turn turn(loop_.get());
    HttpLimits limits;
    limits.connect_timeout_nanos = options_.connect_timeout_nanos;
    limits.stall_timeout_nanos = options_.stall_timeout_nanos;
    limits.kept_connections = options_.max_requests + options_.max_connections_per_host;
    auto transport = HttpTransport::Create(
        limits, options_.clock, [bytes = &counters_.bytes](uint64_t count) { *bytes += count; }, loop_.get());
    if (!transport.ok()) {
      // It is tried again several times a second.
      LOG_EVERY_T(ERROR, kNotReadySeconds)
          << "fetch.not_ready error=" << LogValue(FromAbsl(transport.status().message()));
      return transport.status();
    }
    transport_ = *std::move(transport);
    engine_ = std::make_unique<FetchEngine>(
        options_, DockerConfigPath(options_), transport_.get(),
        [this](std::function<void()> run) { Post(std::move(run)); }, &counters_);
    running_ = transport_.get();
    return absl::OkStatus();
  }

  const ClientOptions options_;
  FetchCounters counters_;
  std::unique_ptr<LoopWatch::Loop> loop_;
  std::unique_ptr<HttpTransport> transport_;  // the thread's, but for Wake
  std::atomic<HttpTransport*> running_{nullptr};
  std::unique_ptr<FetchEngine> engine_;  // the thread's
  std::thread thread_;
  Mutex mutex_;
  CondVar changed_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  bool wanted_ ABSL_GUARDED_BY(mutex_) = false;
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

  void Prepare() override { core_->Prepare(); }

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

absl::Status RegistryClient::Check() {
  return HttpTransport::Create({}, Clock::Real(), [](uint64_t) {}).status();
}

std::unique_ptr<RegistryClient> RegistryClient::Create(const ClientOptions& options) {
  auto core = std::make_shared<Core>(options);
  core->Start();
  return std::make_unique<Client>(std::move(core));
}

}  // namespace holdfast::fetch
