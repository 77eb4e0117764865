#include "worker/api/convert.h"

#include "absl/strings/match.h"

namespace holdfast::api {
namespace {

constexpr int64_t kNanosPerSecond = 1'000'000'000;

const char* SuffixFor(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kNotFound:
      return ": not found";
    case absl::StatusCode::kAlreadyExists:
      return ": already exists";
    case absl::StatusCode::kFailedPrecondition:
      return ": failed precondition";
    case absl::StatusCode::kInvalidArgument:
      return ": invalid argument";
    case absl::StatusCode::kUnavailable:
      return ": unavailable";
    default:
      return "";
  }
}

void ToProto(int64_t wall_nanos, google::protobuf::Timestamp* out) {
  int64_t seconds = wall_nanos / kNanosPerSecond;
  int64_t nanos = wall_nanos % kNanosPerSecond;
  if (nanos < 0) {
    nanos += kNanosPerSecond;
    seconds--;
  }
  out->set_seconds(seconds);
  out->set_nanos(static_cast<int32_t>(nanos));
}

pb::Kind ToProto(metadata::Kind kind) {
  switch (kind) {
    case metadata::Kind::kActive:
      return pb::ACTIVE;
    case metadata::Kind::kView:
      return pb::VIEW;
    case metadata::Kind::kCommitted:
      return pb::COMMITTED;
  }
  return pb::UNKNOWN;
}

}  // namespace

grpc::Status ToGrpc(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  std::string message(FromAbsl(status.message()));
  const char* suffix = SuffixFor(status.code());
  if (!absl::EndsWith(message, suffix)) message += suffix;
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), message);
}

absl::Status FromGrpc(const grpc::Status& status) {
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
}

snapshot::Labels ToLabels(const google::protobuf::Map<std::string, std::string>& labels) {
  return snapshot::Labels(labels.begin(), labels.end());
}

void ToProto(const snapshot::Info& info, pb::Info* out) {
  out->set_name(info.name);
  out->set_parent(info.parent);
  out->set_kind(ToProto(info.kind));
  ToProto(info.created_wall_nanos, out->mutable_created_at());
  ToProto(info.updated_wall_nanos, out->mutable_updated_at());
  out->mutable_labels()->insert(info.labels.begin(), info.labels.end());
}

// Only what Update may use: the rest of an Info is not the caller's to say.
snapshot::Info FromProto(const pb::Info& info) {
  snapshot::Info result;
  result.name = info.name();
  result.labels = ToLabels(info.labels());
  return result;
}

void ToProto(const std::vector<snapshot::Mount>& mounts,
             google::protobuf::RepeatedPtrField<containerd::types::Mount>* out) {
  for (const snapshot::Mount& mount : mounts) {
    containerd::types::Mount* entry = out->Add();
    entry->set_type(mount.type);
    entry->set_source(mount.source);
    for (const std::string& option : mount.options) entry->add_options(option);
  }
}

}  // namespace holdfast::api
