#include "worker/metadata/row_codec.h"

#include <nlohmann/json.hpp>

namespace holdfast::metadata {
const char* KindName(Kind kind) {
  switch (kind) {
    case Kind::kActive:
      return "active";
    case Kind::kView:
      return "view";
    case Kind::kCommitted:
      return "committed";
  }
  return "active";
}

namespace {

using Json = nlohmann::json;

constexpr int kRowVersion = 1;

bool ParseKind(const std::string& name, Kind* kind) {
  for (Kind candidate : {Kind::kActive, Kind::kView, Kind::kCommitted}) {
    if (name != KindName(candidate)) continue;
    *kind = candidate;
    return true;
  }
  return false;
}

// Moves the field out of the object, so what is left at the end is what this build does not know.
template <typename T>
void Take(Json& object, const char* name, T* value) {
  auto it = object.find(name);
  if (it == object.end()) return;
  *value = it->get<T>();
  object.erase(it);
}

}  // namespace

absl::StatusOr<std::string> EncodeRow(const SnapshotRow& row) {
  try {
    Json object = row.unknown_fields.empty() ? Json::object() : Json::parse(row.unknown_fields);
    object["v"] = kRowVersion;
    object["key"] = row.key;
    object["parent"] = row.parent;
    object["kind"] = KindName(row.kind);
    object["id"] = row.id;
    object["created"] = row.created_wall_nanos;
    object["updated"] = row.updated_wall_nanos;
    object["labels"] = row.labels;
    object["usage_bytes"] = row.usage_bytes;
    object["usage_inodes"] = row.usage_inodes;
    if (!row.lazy_digest.empty()) {
      object["lazy_digest"] = row.lazy_digest;
      object["lazy_image"] = row.lazy_image;
      object["lazy_index"] = row.lazy_index;
      object["lazy_blob_size"] = row.lazy_blob_size;
      object["lazy_tenant"] = row.lazy_tenant;
    }
    return object.dump();
  } catch (const Json::exception& e) {
    return InvalidArgument(std::string("snapshot cannot be stored: ") + e.what());
  }
}

absl::StatusOr<SnapshotRow> DecodeRow(std::string_view bytes) {
  try {
    Json object = Json::parse(bytes);
    if (!object.is_object()) return DataLoss("snapshot row is not a JSON object");
    int version = 0;
    Take(object, "v", &version);
    if (version < 1) return DataLoss("snapshot row has no version");
    if (version > kRowVersion) return FailedPrecondition("snapshot row was written by a newer holdfast");
    SnapshotRow row;
    std::string kind;
    Take(object, "key", &row.key);
    Take(object, "parent", &row.parent);
    Take(object, "kind", &kind);
    Take(object, "id", &row.id);
    Take(object, "created", &row.created_wall_nanos);
    Take(object, "updated", &row.updated_wall_nanos);
    Take(object, "labels", &row.labels);
    Take(object, "usage_bytes", &row.usage_bytes);
    Take(object, "usage_inodes", &row.usage_inodes);
    Take(object, "lazy_digest", &row.lazy_digest);
    Take(object, "lazy_image", &row.lazy_image);
    Take(object, "lazy_index", &row.lazy_index);
    Take(object, "lazy_blob_size", &row.lazy_blob_size);
    Take(object, "lazy_tenant", &row.lazy_tenant);
    if (!object.empty()) row.unknown_fields = object.dump();
    if (row.key.empty() || row.id == 0 || !ParseKind(kind, &row.kind)) {
      return DataLoss("snapshot row lacks its key, id or kind");
    }
    return row;
  } catch (const Json::exception& e) {
    return DataLoss(std::string("snapshot row is not readable: ") + e.what());
  }
}

}  // namespace holdfast::metadata
