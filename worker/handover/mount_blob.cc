#include "worker/handover/mount_blob.h"

#include <capnp/message.h>
#include <capnp/serialize.h>
#include <kj/exception.h>

#include <cstring>

#include "schema/mount_blob.capnp.h"

namespace holdfast::handover {
namespace {

constexpr size_t kMaxBlobBytes = 64 * 1024;

std::string ToString(capnp::Text::Reader text) { return std::string(text.cStr(), text.size()); }

}  // namespace

std::string EncodeMountBlob(const MountBlob& blob) {
  capnp::MallocMessageBuilder message;
  auto root = message.initRoot<schema::MountBlob>();
  root.setLayerDigest(blob.layer_digest.c_str());
  root.setIndexDigest(blob.index_digest.c_str());
  root.setNumberingVersion(blob.numbering_version);
  root.setImageRef(blob.image_ref.c_str());
  root.setSnapshotId(blob.snapshot_id);
  root.setBlobSize(blob.blob_size);
  root.setNoXattrs(blob.no_xattrs);
  root.setZeroOpen(blob.zero_open);
  root.setOverlayOpaqueUser(blob.overlay_opaque_user);
  kj::Array<capnp::word> words = capnp::messageToFlatArray(message);
  kj::ArrayPtr<kj::byte> bytes = words.asBytes();
  return std::string(bytes.begin(), bytes.end());
}

absl::StatusOr<MountBlob> DecodeMountBlob(std::string_view bytes) {
  if (bytes.empty() || bytes.size() > kMaxBlobBytes || bytes.size() % sizeof(capnp::word) != 0) {
    return DataLoss("mount blob: " + std::to_string(bytes.size()) + " bytes are no Cap'n Proto message");
  }
  // The words must be aligned, the bytes need not be.
  auto words = kj::heapArray<capnp::word>(bytes.size() / sizeof(capnp::word));
  memcpy(words.begin(), bytes.data(), bytes.size());
  MountBlob blob;
  try {
    capnp::FlatArrayMessageReader message(words);
    auto root = message.getRoot<schema::MountBlob>();
    blob.layer_digest = ToString(root.getLayerDigest());
    blob.index_digest = ToString(root.getIndexDigest());
    blob.numbering_version = root.getNumberingVersion();
    blob.image_ref = ToString(root.getImageRef());
    blob.snapshot_id = root.getSnapshotId();
    blob.blob_size = root.getBlobSize();
    blob.no_xattrs = root.getNoXattrs();
    blob.zero_open = root.getZeroOpen();
    blob.overlay_opaque_user = root.getOverlayOpaqueUser();
  } catch (const kj::Exception& error) {
    return DataLoss(std::string("mount blob: ") + error.getDescription().cStr());
  }
  if (blob.layer_digest.empty() || blob.index_digest.empty()) {
    return DataLoss("mount blob names no layer or no index");
  }
  return blob;
}

}  // namespace holdfast::handover
