#include "common/crc32c.h"

#include <string>

#include "gtest/gtest.h"

namespace holdfast {
namespace {

TEST(Crc32cTest, MatchesThePublishedVectors) {
  const std::string zeros(32, '\0'), ones(32, '\xff');
  for (auto* crc32c : {&Crc32c, &Crc32cPortable}) {
    EXPECT_EQ(crc32c("", 0, 0), 0u);
    EXPECT_EQ(crc32c("123456789", 9, 0), 0xe3069283u);
    EXPECT_EQ(crc32c(zeros.data(), zeros.size(), 0), 0x8a9136aau);
    EXPECT_EQ(crc32c(ones.data(), ones.size(), 0), 0x62a8ab43u);
  }
}

TEST(Crc32cTest, BothFormsAgreeForEveryLengthAndStartAndContinue) {
  std::string text;
  for (int i = 0; i < 300; i++) text.push_back(static_cast<char>(i * 37 + 11));
  for (size_t start = 0; start < 9; start++) {
    for (size_t size = 0; start + size <= text.size(); size++) {
      const char* data = text.data() + start;
      uint32_t crc = Crc32c(data, size);
      ASSERT_EQ(crc, Crc32cPortable(data, size)) << start << ' ' << size;
      size_t half = size / 2;
      ASSERT_EQ(crc, Crc32c(data + half, size - half, Crc32c(data, half))) << start << ' ' << size;
    }
  }
}

}  // namespace
}  // namespace holdfast
