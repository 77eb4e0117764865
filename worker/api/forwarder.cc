#include "worker/api/forwarder.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>

#include "worker/api/limits.h"

namespace holdfast::api {
namespace {

namespace pb = containerd::services::snapshots::v1;

grpc::ChannelArguments Arguments() {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
  arguments.SetMaxSendMessageSize(kMaxMessageBytes);
  // The successor is there in milliseconds; gRPC's own pauses would be a second.
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 5);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 5);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 50);
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  arguments.SetInt(kBandwidthProbe, 0);
  return arguments;
}

}  // namespace

grpc::Status Forwarder::Connect(const std::string& path, std::shared_ptr<Connection>* out) {
  {
    MutexLock lock(&mutex_);
    std::shared_ptr<Connection>& connection = connections_[path];
    if (connection == nullptr) {
      connection = std::make_shared<Connection>();
      connection->channel =
          grpc::CreateCustomChannel("unix:" + path, grpc::InsecureChannelCredentials(), Arguments());
      connection->stub = pb::Snapshots::NewStub(connection->channel);
    }
    *out = connection;
  }
  if ((*out)->channel->WaitForConnected(std::chrono::system_clock::now() + limit_)) return grpc::Status::OK;
  return grpc::Status(grpc::StatusCode::UNAVAILABLE,
                      "the successor of this worker does not answer: unavailable");
}

std::unique_ptr<grpc::ClientContext> Forwarder::ContextFor(grpc::ServerContext* caller) {
  std::unique_ptr<grpc::ClientContext> context = grpc::ClientContext::FromServerContext(*caller);
  context->set_wait_for_ready(true);
  return context;
}

grpc::Status Forwarder::List(const std::string& path, grpc::ServerContext* caller,
                             const pb::ListSnapshotsRequest& request,
                             grpc::ServerWriter<pb::ListSnapshotsResponse>* writer) {
  std::shared_ptr<Connection> connection;
  grpc::Status status = Connect(path, &connection);
  if (!status.ok()) return status;
  std::unique_ptr<grpc::ClientContext> context = ContextFor(caller);
  std::unique_ptr<grpc::ClientReader<pb::ListSnapshotsResponse>> reader =
      connection->stub->List(context.get(), request);
  pb::ListSnapshotsResponse block;
  while (reader->Read(&block)) {
    if (!writer->Write(block)) context->TryCancel();
  }
  return reader->Finish();
}

}  // namespace holdfast::api
