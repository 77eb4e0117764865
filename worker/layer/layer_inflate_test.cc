#include "worker/layer/layer_inflate.h"

#include <map>

#include "worker/layer/layer_test_support.h"

namespace holdfast::layer {
namespace {

using toc::testing::GzipMember;

absl::Status InflateInto(std::string_view compressed, const std::vector<WantedRange>& wanted,
                         std::map<size_t, std::string>* out) {
  return InflateRanges(compressed, wanted,
                       [out](size_t i, std::string bytes) { (*out)[i] = std::move(bytes); });
}

TEST(InflateRanges, CutsTheWantedRangesOutOfOneMember) {
  std::string text = RandomText(300'000, 1);
  std::map<size_t, std::string> out;
  ASSERT_TRUE(
      InflateInto(GzipMember(text), {{0, 10}, {5, 100'000}, {99'999, 1}, {200'000, 100'000}}, &out).ok());
  EXPECT_EQ(out[0], text.substr(0, 10));
  EXPECT_EQ(out[1], text.substr(5, 100'000));
  EXPECT_EQ(out[2], text.substr(99'999, 1));
  EXPECT_EQ(out[3], text.substr(200'000));
}

TEST(InflateRanges, StopsWhenItHasWhatItWants) {
  std::string member = GzipMember(RandomText(300'000, 1));
  std::map<size_t, std::string> out;
  // The rest is broken, and is never looked at.
  EXPECT_TRUE(InflateInto(member.substr(0, member.size() / 2), {{0, 1000}}, &out).ok());
  EXPECT_EQ(out.size(), 1u);
}

TEST(InflateRanges, ARangeMayGoOnInTheNextMember) {
  std::map<size_t, std::string> out;
  ASSERT_TRUE(InflateInto(GzipMember("first") + GzipMember("second"), {{3, 6}}, &out).ok());
  EXPECT_EQ(out[0], "stseco");
}

TEST(InflateRanges, BrokenOrShortStreamsAreDataLossAndKeepWhatWasWhole) {
  std::string text = RandomText(300'000, 1);
  std::string member = GzipMember(text);
  std::map<size_t, std::string> out;
  EXPECT_EQ(InflateInto(member.substr(0, member.size() / 2), {{0, 1000}, {299'000, 1000}}, &out).code(),
            absl::StatusCode::kDataLoss);
  EXPECT_EQ(out.size(), 1u);
  out.clear();
  EXPECT_EQ(InflateInto(member, {{299'999, 2}}, &out).code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(InflateInto("", {{0, 1}}, &out).code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(InflateInto("not gzip at all", {{0, 1}}, &out).code(), absl::StatusCode::kDataLoss);
  EXPECT_TRUE(out.empty());
}

TEST(InflateRanges, EveryCutAndEveryFlippedByteEndsWithoutWrongLength) {
  std::string text = RandomText(2000, 2);
  std::string member = GzipMember(text);
  for (size_t i = 0; i < member.size(); i++) {
    std::map<size_t, std::string> out;
    absl::Status cut = InflateInto(member.substr(0, i), {{0, 2000}}, &out);
    EXPECT_EQ(cut.ok(), out.size() == 1) << i;
    std::string flipped = member;
    flipped[i] = static_cast<char>(flipped[i] ^ 0x10);
    out.clear();
    absl::Status status = InflateInto(flipped, {{0, 2000}}, &out);
    EXPECT_EQ(status.ok(), out.size() == 1) << i;
    if (!out.empty()) {
      EXPECT_EQ(out[0].size(), 2000u);
    }
  }
}

}  // namespace
}  // namespace holdfast::layer
