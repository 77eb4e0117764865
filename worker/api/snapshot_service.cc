#include "worker/api/snapshot_service.h"

#include <grpcpp/resource_quota.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <grpcpp/server_posix.h>

#include <atomic>
#include <climits>

#include "common/log.h"
#include "glog/logging.h"
#include "worker/api/acceptor.h"
#include "worker/api/convert.h"
#include "worker/api/forwarder.h"
#include "worker/api/limits.h"
#include "worker/api/owner_gate.h"

namespace holdfast::api {
namespace {

using google::protobuf::Empty;
using grpc::ServerContext;
using snapshot::Snapshotter;

// A call that waits for the network holds a thread. Idle threads end, so this bounds only the worst hour.
constexpr int kMaxThreads = 1024;
constexpr int kMinPollers = 2, kMaxPollers = 4;
constexpr std::chrono::milliseconds kDrainPoll{20};

// Ends the Snapshotter's use at the end of the scope.
class Inside {
 public:
  explicit Inside(OwnerGate* gate) : gate_(gate) {}
  ~Inside() { gate_->Leave(); }
  Inside(const Inside&) = delete;
  Inside& operator=(const Inside&) = delete;

 private:
  OwnerGate* const gate_;
};

class CallCounter {
 public:
  explicit CallCounter(std::atomic<int>* count) : count_(count) { (*count_)++; }
  ~CallCounter() { (*count_)--; }
  CallCounter(const CallCounter&) = delete;
  CallCounter& operator=(const CallCounter&) = delete;

 private:
  std::atomic<int>* const count_;
};

class Handlers final : public pb::Snapshots::Service {
 public:
  explicit Handlers(const ServiceOptions& options) : options_(options), forwarder_(options.owner_wait) {}

  OwnerGate& gate() { return gate_; }
  int open_calls() const { return open_calls_; }

  grpc::Status Prepare(ServerContext* context, const pb::PrepareSnapshotRequest* request,
                       pb::PrepareSnapshotResponse* response) override {
    auto local = [&](Snapshotter* s) {
      return SetMounts(s->Prepare(request->key(), request->parent(), ToLabels(request->labels())), response);
    };
    return Answer("Prepare", request->key(), context, *request, response, local,
                  &pb::Snapshots::Stub::Prepare);
  }

  grpc::Status View(ServerContext* context, const pb::ViewSnapshotRequest* request,
                    pb::ViewSnapshotResponse* response) override {
    auto local = [&](Snapshotter* s) {
      return SetMounts(s->View(request->key(), request->parent(), ToLabels(request->labels())), response);
    };
    return Answer("View", request->key(), context, *request, response, local, &pb::Snapshots::Stub::View);
  }

  grpc::Status Mounts(ServerContext* context, const pb::MountsRequest* request,
                      pb::MountsResponse* response) override {
    auto local = [&](Snapshotter* s) { return SetMounts(s->Mounts(request->key()), response); };
    return Answer("Mounts", request->key(), context, *request, response, local, &pb::Snapshots::Stub::Mounts);
  }

  grpc::Status Commit(ServerContext* context, const pb::CommitSnapshotRequest* request,
                      Empty* response) override {
    auto local = [&](Snapshotter* s) {
      return s->Commit(request->name(), request->key(), ToLabels(request->labels()), request->parent());
    };
    return Answer("Commit", request->key(), context, *request, response, local, &pb::Snapshots::Stub::Commit);
  }

  grpc::Status Remove(ServerContext* context, const pb::RemoveSnapshotRequest* request,
                      Empty* response) override {
    auto local = [&](Snapshotter* s) { return s->Remove(request->key()); };
    return Answer("Remove", request->key(), context, *request, response, local, &pb::Snapshots::Stub::Remove);
  }

  grpc::Status Stat(ServerContext* context, const pb::StatSnapshotRequest* request,
                    pb::StatSnapshotResponse* response) override {
    auto local = [&](Snapshotter* s) { return SetInfo(s->Stat(request->key()), response); };
    return Answer("Stat", request->key(), context, *request, response, local, &pb::Snapshots::Stub::Stat);
  }

  grpc::Status Update(ServerContext* context, const pb::UpdateSnapshotRequest* request,
                      pb::UpdateSnapshotResponse* response) override {
    auto local = [&](Snapshotter* s) {
      const auto& paths = request->update_mask().paths();
      return SetInfo(s->Update(FromProto(request->info()), {paths.begin(), paths.end()}), response);
    };
    return Answer("Update", request->info().name(), context, *request, response, local,
                  &pb::Snapshots::Stub::Update);
  }

  grpc::Status Usage(ServerContext* context, const pb::UsageRequest* request,
                     pb::UsageResponse* response) override {
    auto local = [&](Snapshotter* s) -> absl::Status {
      HF_ASSIGN_OR_RETURN(snapshot::Usage usage, s->GetUsage(request->key()));
      response->set_size(usage.bytes);
      response->set_inodes(usage.inodes);
      return absl::OkStatus();
    };
    return Answer("Usage", request->key(), context, *request, response, local, &pb::Snapshots::Stub::Usage);
  }

  grpc::Status Cleanup(ServerContext* context, const pb::CleanupRequest* request, Empty* response) override {
    auto local = [](Snapshotter* s) { return s->Cleanup(); };
    return Answer("Cleanup", "", context, *request, response, local, &pb::Snapshots::Stub::Cleanup);
  }

  grpc::Status List(ServerContext* context, const pb::ListSnapshotsRequest* request,
                    grpc::ServerWriter<pb::ListSnapshotsResponse>* writer) override {
    std::vector<snapshot::Info> infos;
    auto local = [&](Snapshotter* s) -> absl::Status {
      HF_ASSIGN_OR_RETURN(infos, s->List({request->filters().begin(), request->filters().end()}));
      return absl::OkStatus();
    };
    auto forward = [&](const std::string& path) { return forwarder_.List(path, context, *request, writer); };
    bool forwarded = false;
    grpc::Status status = Route("List", "", context, local, forward, &forwarded);
    if (!status.ok() || forwarded) return status;
    // Outside the Snapshotter: a slow reader delays nobody.
    pb::ListSnapshotsResponse block;
    for (size_t i = 0; i < infos.size(); i++) {
      ToProto(infos[i], block.add_info());
      if (block.info_size() < kListBlock && i + 1 < infos.size()) continue;
      if (!writer->Write(block)) return grpc::Status(grpc::StatusCode::CANCELLED, "the caller went away");
      block.Clear();
    }
    return grpc::Status::OK;
  }

 private:
  template <typename Response>
  static absl::Status SetMounts(const absl::StatusOr<std::vector<snapshot::Mount>>& mounts,
                                Response* response) {
    if (mounts.ok()) ToProto(*mounts, response->mutable_mounts());
    return mounts.status();
  }

  template <typename Response>
  static absl::Status SetInfo(const absl::StatusOr<snapshot::Info>& info, Response* response) {
    if (info.ok()) ToProto(*info, response->mutable_info());
    return info.status();
  }

  template <typename Request, typename Response, typename Local>
  grpc::Status Answer(const char* rpc, const std::string& key, ServerContext* context, const Request& request,
                      Response* response, const Local& local,
                      grpc::Status (pb::Snapshots::Stub::*method)(grpc::ClientContext*, const Request&,
                                                                  Response*)) {
    auto forward = [&](const std::string& path) {
      return forwarder_.Call(path, context, request, response, method);
    };
    bool forwarded = false;
    return Route(rpc, key, context, local, forward, &forwarded);
  }

  // Here if this worker is the owner, at the successor if it was; an aborted call was stopped by a hand-over
  // and asks again.
  grpc::Status Route(const char* rpc, const std::string& key, ServerContext* context,
                     const std::function<absl::Status(Snapshotter*)>& local,
                     const std::function<grpc::Status(const std::string&)>& forward, bool* forwarded) {
    CallCounter counter(&open_calls_);
    auto start = std::chrono::steady_clock::now();
    grpc::Status status;
    while (true) {
      absl::StatusOr<OwnerGate::Pass> pass =
          gate_.Enter(options_.owner_wait, [context] { return context->IsCancelled(); });
      if (!pass.ok()) {
        status = ToGrpc(pass.status());
        break;
      }
      if (pass->snapshotter == nullptr) {
        *forwarded = true;
        status = forward(pass->forward_to);
        break;
      }
      absl::Status result;
      {
        Inside inside(&gate_);
        result = local(pass->snapshotter);
      }
      status = ToGrpc(result);
      if (!absl::IsAborted(result) || context->IsCancelled()) break;
    }
    Log(rpc, key, status, *forwarded, std::chrono::steady_clock::now() - start);
    return status;
  }

  void Log(const char* rpc, const std::string& key, const grpc::Status& status, bool forwarded,
           std::chrono::steady_clock::duration took) const {
    bool expected = status.ok() || status.error_code() == grpc::StatusCode::NOT_FOUND ||
                    status.error_code() == grpc::StatusCode::ALREADY_EXISTS;
    if (expected && took < options_.stall_warning) return;
    LOG(WARNING) << "api.call rpc=" << rpc << " key=" << LogValue(key) << " code=" << status.error_code()
                 << " error=" << LogValue(status.error_message()) << " forwarded=" << forwarded
                 << " ms=" << std::chrono::duration_cast<std::chrono::milliseconds>(took).count();
  }

  const ServiceOptions options_;
  OwnerGate gate_;
  Forwarder forwarder_;
  std::atomic<int> open_calls_{0};
};

class ServiceImpl final : public SnapshotService {
 public:
  explicit ServiceImpl(const ServiceOptions& options) : handlers_(options) {}

  ~ServiceImpl() override {
    acceptor_.reset();
    if (server_ == nullptr) return;
    server_->Shutdown(std::chrono::system_clock::now());
    server_->Wait();
  }

  absl::Status Start(UniqueFd listener, const ServiceOptions& options) {
    grpc::ServerBuilder builder;
    builder.RegisterService(&handlers_);
    builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
    builder.SetMaxSendMessageSize(kMaxMessageBytes);
    // Age, so that connections move to the successor; grace without limit, so that no call is cut off by it.
    builder.AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_MS,
                               static_cast<int>(options.max_connection_age.count()));
    builder.AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_GRACE_MS, INT_MAX);
    builder.AddChannelArgument(kBandwidthProbe, 0);
    builder.SetSyncServerOption(grpc::ServerBuilder::NUM_CQS, 1);
    builder.SetSyncServerOption(grpc::ServerBuilder::MIN_POLLERS, kMinPollers);
    builder.SetSyncServerOption(grpc::ServerBuilder::MAX_POLLERS, kMaxPollers);
    grpc::ResourceQuota quota("snapshots");
    quota.SetMaxThreads(kMaxThreads);
    builder.SetResourceQuota(quota);
    server_ = builder.BuildAndStart();
    if (server_ == nullptr) return Internal("the gRPC server did not start");
    auto serve = [this](int fd) { grpc::AddInsecureChannelFromFd(server_.get(), fd); };
    HF_ASSIGN_OR_RETURN(acceptor_, Acceptor::Create(std::move(listener), serve));
    return absl::OkStatus();
  }

  void StartAccepting() override { acceptor_->Start(); }
  void CloseListener() override { acceptor_->Close(); }
  void Attach(Snapshotter* snapshotter) override { handlers_.gate().Attach(snapshotter); }

  void DetachAndForward(const std::string& socket_path) override {
    acceptor_->Stop();  // else a forwarded call could come back to us
    handlers_.gate().Forward(socket_path);
  }

  bool WaitDrained(std::chrono::milliseconds limit) override {
    auto deadline = std::chrono::steady_clock::now() + limit;
    while (OpenConnections() > 0 || OpenCalls() > 0) {
      if (std::chrono::steady_clock::now() >= deadline) return false;
      std::this_thread::sleep_for(kDrainPoll);
    }
    return true;
  }

  int OpenConnections() const override { return acceptor_->OpenConnections(); }
  int OpenCalls() const override { return handlers_.open_calls(); }

 private:
  Handlers handlers_;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<Acceptor> acceptor_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<SnapshotService>> SnapshotService::Create(UniqueFd listener,
                                                                         const ServiceOptions& options) {
  auto service = std::make_unique<ServiceImpl>(options);
  HF_RETURN_IF_ERROR(service->Start(std::move(listener), options));
  return std::unique_ptr<SnapshotService>(std::move(service));
}

}  // namespace holdfast::api
