#include "worker/layer/digest.h"

#include "gtest/gtest.h"

namespace holdfast::layer {
namespace {

const char kAbc[] = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";  // FIPS 180-4, "abc"

TEST(DigestTest, AllFormsOfADigestAgree) {
  EXPECT_EQ(Sha256Hex("abc"), kAbc);
  EXPECT_EQ(Sha256Name("abc"), std::string("sha256:") + kAbc);
  EXPECT_EQ(DigestHex(Sha256Raw("abc")), kAbc);
  EXPECT_EQ(DigestName(Sha256Raw("abc")), Sha256Name("abc"));
  auto parsed = ParseSha256(Sha256Name("abc"));
  ASSERT_TRUE(parsed.ok());
  EXPECT_EQ(*parsed, Sha256Raw("abc"));
}

TEST(DigestTest, OnlyWholeLowerCaseDigestsAreValid) {
  EXPECT_TRUE(IsSha256Digest(Sha256Name("")));
  for (const std::string& bad :
       {std::string(), std::string("sha256:"), std::string(kAbc), "sha256:" + std::string(64, 'A'),
        "sha256:../" + std::string(61, 'a'), Sha256Name("") + "\n", "sha256:" + std::string(65, 'a')}) {
    EXPECT_FALSE(IsSha256Digest(bad)) << bad;
  }
}

TEST(DigestTest, AStreamStartsAnewAfterItsEnd) {
  DigestStream stream;
  stream.Update("a");
  stream.Update("bc", 2);
  EXPECT_EQ(stream.FinishHex(), kAbc);
  EXPECT_EQ(stream.FinishHex(), Sha256Hex(""));
  stream.Update("abc");
  DigestStream moved = std::move(stream);
  EXPECT_EQ(moved.Finish(), Sha256Raw("abc"));
}

}  // namespace
}  // namespace holdfast::layer
