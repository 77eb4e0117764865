#include <grpcpp/grpcpp.h>

#include <chrono>

#include "schema/containerd/snapshots.grpc.pb.h"
#include "tests/integration/node.h"

namespace holdfast::test {
namespace {

namespace pb = containerd::services::snapshots::v1;

constexpr auto kCallLimit = std::chrono::seconds(60);

absl::Status FromGrpc(const grpc::Status& status) {
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()), ToAbsl(status.error_message()));
}

// Clients of one process would share a connection. Without the probe of the bandwidth: worker/api/limits.h.
grpc::ChannelArguments OwnConnection() {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  return arguments;
}

class ClientImpl final : public SnapshotsClient {
 public:
  explicit ClientImpl(const std::string& socket)
      : stub_(pb::Snapshots::NewStub(grpc::CreateCustomChannel(
            "unix:" + socket, grpc::InsecureChannelCredentials(), OwnConnection()))) {}

  absl::StatusOr<std::vector<Mount>> Prepare(const std::string& key, const std::string& parent,
                                             const Labels& labels) override {
    pb::PrepareSnapshotRequest request;
    request.set_key(key);
    request.set_parent(parent);
    for (const auto& [name, value] : labels) (*request.mutable_labels())[name] = value;
    pb::PrepareSnapshotResponse response;
    grpc::ClientContext context;
    Limit(&context);
    grpc::Status status = stub_->Prepare(&context, request, &response);
    if (!status.ok()) return FromGrpc(status);
    std::vector<Mount> mounts;
    for (const auto& from : response.mounts()) {
      mounts.push_back({from.type(), from.source(), {from.options().begin(), from.options().end()}});
    }
    return mounts;
  }

  absl::StatusOr<std::vector<std::string>> List(const std::string& filter) override {
    pb::ListSnapshotsRequest request;
    if (!filter.empty()) request.add_filters(filter);
    grpc::ClientContext context;
    Limit(&context);
    auto reader = stub_->List(&context, request);
    std::vector<std::string> names;
    pb::ListSnapshotsResponse response;
    while (reader->Read(&response)) {
      for (const auto& info : response.info()) names.push_back(info.name());
    }
    grpc::Status status = reader->Finish();
    if (!status.ok()) return FromGrpc(status);
    return names;
  }

  absl::Status Stat(const std::string& key) override {
    pb::StatSnapshotRequest request;
    request.set_key(key);
    pb::StatSnapshotResponse response;
    grpc::ClientContext context;
    Limit(&context);
    return FromGrpc(stub_->Stat(&context, request, &response));
  }

  absl::Status Remove(const std::string& key) override {
    pb::RemoveSnapshotRequest request;
    request.set_key(key);
    google::protobuf::Empty response;
    grpc::ClientContext context;
    Limit(&context);
    return FromGrpc(stub_->Remove(&context, request, &response));
  }

  absl::Status Cleanup() override {
    pb::CleanupRequest request;
    google::protobuf::Empty response;
    grpc::ClientContext context;
    Limit(&context);
    return FromGrpc(stub_->Cleanup(&context, request, &response));
  }

 private:
  static void Limit(grpc::ClientContext* context) {
    context->set_deadline(std::chrono::system_clock::now() + kCallLimit);
    context->set_wait_for_ready(true);
  }

  std::unique_ptr<pb::Snapshots::Stub> stub_;
};

}  // namespace

std::unique_ptr<SnapshotsClient> SnapshotsClient::Connect(const std::string& socket) {
  return std::make_unique<ClientImpl>(socket);
}

}  // namespace holdfast::test
