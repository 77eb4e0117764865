#include "worker/layer/digest.h"

#include "gtest/gtest.h"
#include "worker/layer/crc32c.h"

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

TEST(Crc32cTest, MatchesThePublishedVectorsInBothForms) {
  // RFC 3720 B.4.
  EXPECT_EQ(Crc32c("123456789"), 0xe3069283u);
  EXPECT_EQ(Crc32c(std::string(32, '\0')), 0x8a9136aau);
  EXPECT_EQ(Crc32c(std::string(32, '\xff')), 0x62a8ab43u);
  std::string text;
  for (int i = 0; i < 100; i++) {
    text += static_cast<char>(i * 7);
    EXPECT_EQ(Crc32c(text), Crc32cPortable(text)) << i;
    size_t half = text.size() / 2;
    EXPECT_EQ(Crc32c(text.substr(half), Crc32c(text.substr(0, half))), Crc32c(text)) << i;
  }
}

}  // namespace
}  // namespace holdfast::layer
