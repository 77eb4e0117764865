#include "worker/handover/mount_blob.h"

#include "absl/strings/escaping.h"
#include "gtest/gtest.h"

namespace holdfast::handover {
namespace {

MountBlob Example() {
  MountBlob blob;
  blob.layer_digest = "sha256:aa";
  blob.index_digest = "bb";
  blob.numbering_version = 1;
  blob.image_ref = "host:5000/repo:tag";
  blob.snapshot_id = 7;
  blob.blob_size = 4096;
  blob.no_xattrs = true;
  blob.zero_open = true;
  return blob;
}

// The bytes that the first release writes for Example(). They may never stop being readable.
constexpr char kGoldenHex[] =
    "000000000d000000000000000300030001000000030000000700000000000000001000000000000009000000520000000d000000"
    "1a00"
    "00000d0000009a0000007368613235363a6161000000000000006262000000000000686f73743a353030302f7265706f3a746167"
    "0000"
    "00000000";

TEST(MountBlobTest, ABlobComesBackAsItWas) {
  absl::StatusOr<MountBlob> decoded = DecodeMountBlob(EncodeMountBlob(Example()));
  ASSERT_TRUE(decoded.ok()) << decoded.status();
  EXPECT_EQ(*decoded, Example());
}

TEST(MountBlobTest, TheBytesOfTheFirstReleaseAreReadAndWrittenUnchanged) {
  EXPECT_EQ(std::string(absl::BytesToHexString(ToAbsl(EncodeMountBlob(Example())))), kGoldenHex);
  absl::StatusOr<MountBlob> decoded = DecodeMountBlob(std::string(absl::HexStringToBytes(kGoldenHex)));
  ASSERT_TRUE(decoded.ok()) << decoded.status();
  EXPECT_EQ(*decoded, Example());
}

TEST(MountBlobTest, EveryTruncationIsRefusedNotGuessed) {
  const std::string bytes = EncodeMountBlob(Example());
  for (size_t length = 0; length < bytes.size(); ++length) {
    EXPECT_FALSE(DecodeMountBlob(std::string_view(bytes).substr(0, length)).ok()) << length;
  }
}

TEST(MountBlobTest, ABlobWithoutALayerOrAnIndexIsRefused) {
  MountBlob blob = Example();
  blob.index_digest.clear();
  EXPECT_EQ(DecodeMountBlob(EncodeMountBlob(blob)).status().code(), absl::StatusCode::kDataLoss);
  blob = Example();
  blob.layer_digest.clear();
  EXPECT_EQ(DecodeMountBlob(EncodeMountBlob(blob)).status().code(), absl::StatusCode::kDataLoss);
}

}  // namespace
}  // namespace holdfast::handover
