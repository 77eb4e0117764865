// The stored form of a SnapshotRow: one JSON object on one line, keys sorted. The same bytes are the value of
// snap/<key> in LevelDB and the content of snapshots/<id>/snapshot.json.
//
// Format, version 1:
// {"v":1,"key","parent","kind":"active|view|committed","id","created","updated","labels":{},
// "usage_bytes","usage_inodes"} and for a lazily served layer
// "lazy_digest","lazy_image","lazy_index","lazy_blob_size", "lazy_tenant". Times are wall-clock nanoseconds.
// Fields are only ever added; a reader keeps what it does not know.
#pragma once

#include <string>
#include <string_view>

#include "common/status.h"
#include "worker/metadata/metadata.h"

namespace holdfast::metadata {

// InvalidArgument when a string is not UTF-8.
absl::StatusOr<std::string> EncodeRow(const SnapshotRow& row);
// DataLoss when the bytes are not a row; FailedPrecondition when a newer, incompatible build wrote them.
absl::StatusOr<SnapshotRow> DecodeRow(std::string_view bytes);

}  // namespace holdfast::metadata
