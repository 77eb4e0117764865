// What a worker attaches to each mount so that any successor can serve it: schema/mount_blob.capnp as a plain
// struct. Pure functions. Golden bytes in mount_blob_test.cc: every later build must decode them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "common/status.h"

namespace holdfast::handover {

struct MountBlob {
  std::string layer_digest;  // sha256:...
  std::string index_digest;  // hex
  uint32_t numbering_version = 0;
  std::string image_ref;
  uint64_t snapshot_id = 0;
  uint64_t blob_size = 0;
  bool no_xattrs = false;
  bool zero_open = false;
  bool overlay_opaque_user = false;

  bool operator==(const MountBlob&) const = default;
};

std::string EncodeMountBlob(const MountBlob& blob);
// DataLoss for bytes that are no blob or lack a layer digest or an index digest.
absl::StatusOr<MountBlob> DecodeMountBlob(std::string_view bytes);

}  // namespace holdfast::handover
