#include "worker/metadata/row_codec.h"

#include "gtest/gtest.h"

namespace holdfast::metadata {
namespace {

// Bytes as released: every later build must read them, and write them for the same row.
constexpr char kGoldenLazy[] =
    R"({"created":5,"id":7,"key":"remote/7","kind":"committed","labels":{"containerd.io/snapshot.ref":"sha256:aa"},)"
    R"("lazy_blob_size":99,"lazy_digest":"sha256:bb","lazy_image":"localhost/x:1","lazy_index":"cc","lazy_tenant":"default",)"
    R"("parent":"","updated":6,"usage_bytes":0,"usage_inodes":0,"v":1})";
constexpr char kGoldenActive[] =
    R"({"created":5,"id":8,"key":"default/3/a key","kind":"active","labels":{},"parent":"remote/7","updated":6,)"
    R"("usage_bytes":10,"usage_inodes":2,"v":1})";

SnapshotRow LazyRow() {
  SnapshotRow row;
  row.key = "remote/7";
  row.kind = Kind::kCommitted;
  row.id = 7;
  row.created_wall_nanos = 5;
  row.updated_wall_nanos = 6;
  row.labels = {{"containerd.io/snapshot.ref", "sha256:aa"}};
  row.lazy_digest = "sha256:bb";
  row.lazy_image = "localhost/x:1";
  row.lazy_index = "cc";
  row.lazy_blob_size = 99;
  row.lazy_tenant = "default";
  return row;
}

TEST(RowCodec, WritesTheReleasedBytes) { EXPECT_EQ(EncodeRow(LazyRow()).value(), kGoldenLazy); }

TEST(RowCodec, ReadsTheReleasedBytes) {
  for (const char* golden : {kGoldenLazy, kGoldenActive}) {
    absl::StatusOr<SnapshotRow> row = DecodeRow(golden);
    ASSERT_TRUE(row.ok()) << row.status();
    EXPECT_EQ(EncodeRow(*row).value(), golden);
  }
  EXPECT_EQ(DecodeRow(kGoldenActive)->parent, "remote/7");
  EXPECT_EQ(DecodeRow(kGoldenLazy)->lazy_blob_size, 99u);
}

TEST(RowCodec, KeepsFieldsOfANewerBuildWhenTheRowIsRewritten) {
  std::string newer = kGoldenActive;
  newer.insert(1, R"("a_future_field":[1,2],)");
  absl::StatusOr<SnapshotRow> row = DecodeRow(newer);
  ASSERT_TRUE(row.ok()) << row.status();
  row->labels["x"] = "y";
  std::string rewritten = EncodeRow(*row).value();
  EXPECT_NE(rewritten.find(R"("a_future_field":[1,2])"), std::string::npos);
  EXPECT_NE(rewritten.find(R"("x":"y")"), std::string::npos);
}

TEST(RowCodec, RefusesWhatIsNotARow) {
  for (const char* bytes :
       {"", "[]", "{}", "{\"v\":1}", "\xff\xfe", R"({"v":1,"key":7,"id":1,"kind":"active"})",
        R"({"v":1,"key":"k","id":1,"kind":"what"})", R"({"v":1,"key":"k","kind":"active"})"}) {
    EXPECT_EQ(DecodeRow(bytes).status().code(), absl::StatusCode::kDataLoss) << bytes;
  }
  EXPECT_EQ(DecodeRow(R"({"v":2,"key":"k","id":1,"kind":"active"})").status().code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST(RowCodec, RefusesTextThatIsNotUtf8) {
  SnapshotRow row = LazyRow();
  row.labels["bad"] = "\xff";
  EXPECT_EQ(EncodeRow(row).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace holdfast::metadata
