// Between containerd's messages and worker/snapshot's types. Pure. Includes protobuf headers: for this
// folder's .cc files only.
#pragma once

#include <grpcpp/support/status.h>

#include <string>
#include <vector>

#include "common/status.h"
#include "schema/containerd/snapshots.grpc.pb.h"
#include "worker/snapshot/snapshotter.h"

namespace holdfast::api {

namespace pb = containerd::services::snapshots::v1;

// Codes map one to one. The message ends as containerd's own do (": not found", ": already exists", ...),
// because its clients cut that off and some of its code looks for it.
grpc::Status ToGrpc(const absl::Status& status);
absl::Status FromGrpc(const grpc::Status& status);

snapshot::Labels ToLabels(const google::protobuf::Map<std::string, std::string>& labels);
void ToProto(const snapshot::Info& info, pb::Info* out);
snapshot::Info FromProto(const pb::Info& info);
void ToProto(const std::vector<snapshot::Mount>& mounts,
             google::protobuf::RepeatedPtrField<containerd::types::Mount>* out);

}  // namespace holdfast::api
