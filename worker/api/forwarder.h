// Sends calls to the successor over its unix socket and relays the answers. One connection, made on first
// use. Thread-safe.
#pragma once

#include <grpcpp/channel.h>
#include <grpcpp/server_context.h>

#include <chrono>
#include <map>
#include <memory>
#include <string>

#include "common/mutex.h"
#include "schema/containerd/snapshots.grpc.pb.h"

namespace holdfast::api {

class Forwarder {
 public:
  using Stub = containerd::services::snapshots::v1::Snapshots::Stub;

  // `limit`: how long a call waits until the successor answers at all; after that it takes as long as it
  // takes.
  explicit Forwarder(std::chrono::milliseconds limit) : limit_(limit) {}

  template <typename Request, typename Response>
  grpc::Status Call(const std::string& path, grpc::ServerContext* caller, const Request& request,
                    Response* response,
                    grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*)) {
    std::shared_ptr<Connection> connection;
    grpc::Status status = Connect(path, &connection);
    if (!status.ok()) return status;
    std::unique_ptr<grpc::ClientContext> context = ContextFor(caller);
    return (connection->stub.get()->*method)(context.get(), request, response);
  }

  grpc::Status List(const std::string& path, grpc::ServerContext* caller,
                    const containerd::services::snapshots::v1::ListSnapshotsRequest& request,
                    grpc::ServerWriter<containerd::services::snapshots::v1::ListSnapshotsResponse>* writer);

 private:
  struct Connection {
    std::shared_ptr<grpc::Channel> channel;
    std::unique_ptr<Stub> stub;
  };
  grpc::Status Connect(const std::string& path, std::shared_ptr<Connection>* out);
  // The caller's deadline and cancellation go along.
  static std::unique_ptr<grpc::ClientContext> ContextFor(grpc::ServerContext* caller);

  const std::chrono::milliseconds limit_;
  Mutex mutex_;
  std::map<std::string, std::shared_ptr<Connection>> connections_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace holdfast::api
