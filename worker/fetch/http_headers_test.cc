#include "worker/fetch/http_headers.h"

#include "gtest/gtest.h"
#include "worker/fetch/auth_challenge.h"

namespace holdfast::fetch {
namespace {

TEST(ContentRangeTest, ReadsTheThreeForms) {
  const ContentRange full = ParseContentRange("bytes 10-19/100").value();
  EXPECT_TRUE(full.satisfied);
  EXPECT_EQ(full.first, 10u);
  EXPECT_EQ(full.last, 19u);
  EXPECT_EQ(full.total, 100u);
  EXPECT_FALSE(ParseContentRange("bytes 10-19/*").value().total.has_value());
  EXPECT_FALSE(ParseContentRange("bytes */100").value().satisfied);
}

TEST(ContentRangeTest, RefusesWhatContradictsItself) {
  for (const char* text : {"", "bytes", "bytes ", "bytes 1-0/10", "bytes 0-10/10", "bytes */*", "bytes -1/10",
                           "items 0-1/10", "bytes 0-18446744073709551615/*", "bytes 0-99999999999999999999/*",
                           "bytes 0x1-2/10", "bytes 0-1", "bytes +0-1/10", "bytes 0-1/10/10"}) {
    EXPECT_FALSE(ParseContentRange(text).has_value()) << text;
  }
}

TEST(RetryAfterTest, ReadsSecondsAndDates) {
  EXPECT_EQ(ParseRetryAfter("120", 0), 120'000'000'000u);
  EXPECT_EQ(ParseRetryAfter("Thu, 01 Jan 1970 00:01:00 GMT", 50'000'000'000), 10'000'000'000u);
  EXPECT_EQ(ParseRetryAfter("Thu, 01 Jan 1970 00:00:01 GMT", 50'000'000'000), 0u);
  EXPECT_EQ(ParseRetryAfter("99999999999999999999999999", 0), 365ull * 86400 * 1'000'000'000);
  for (const char* text : {"", "-5", "soon", "1.5.5.5 never"})
    EXPECT_FALSE(ParseRetryAfter(text, 0).has_value()) << text;
}

TEST(AddHeaderLineTest, KeepsWhatMattersWhateverTheCase) {
  HttpHeaders headers;
  AddHeaderLine("CONTENT-length:  12 \r\n", &headers);
  AddHeaderLine("content-range: bytes 0-1/2\r\n", &headers);
  AddHeaderLine("X-Other: y\r\n", &headers);
  AddHeaderLine("no colon\r\n", &headers);
  for (int i = 0; i < 100; i++) AddHeaderLine("WWW-Authenticate: Basic\r\n", &headers);
  EXPECT_EQ(headers.content_length, 12u);
  EXPECT_EQ(headers.content_range, "bytes 0-1/2");
  EXPECT_EQ(headers.www_authenticate.size(), 16u);
}

TEST(AuthChallengeTest, ReadsWhatRegistriesSend) {
  const auto challenges = ParseAuthChallenges(
      R"(Bearer realm="https://auth.example/token",service="registry.example",scope="repository:a/b:pull,push", Basic realm="x\"y")");
  ASSERT_EQ(challenges.size(), 2u);
  EXPECT_EQ(challenges[0].scheme, "bearer");
  EXPECT_EQ(challenges[0].params.at("realm"), "https://auth.example/token");
  EXPECT_EQ(challenges[0].params.at("scope"), "repository:a/b:pull,push");
  EXPECT_EQ(challenges[1].scheme, "basic");
  EXPECT_EQ(challenges[1].params.at("realm"), "x\"y");
}

TEST(AuthChallengeTest, AcceptsBareValuesAndOddSpacing) {
  const auto challenges = ParseAuthChallenges("  bEaReR  Realm = https://a/t , service=s,,scope=\"\"");
  ASSERT_EQ(challenges.size(), 1u);
  EXPECT_EQ(challenges[0].params.at("realm"), "https://a/t");
  EXPECT_EQ(challenges[0].params.at("service"), "s");
}

TEST(AuthChallengeTest, HostileInputGivesAtMostAFewChallenges) {
  EXPECT_TRUE(ParseAuthChallenges("").empty());
  EXPECT_TRUE(ParseAuthChallenges("Bearer realm=\"never closed").empty());
  EXPECT_TRUE(ParseAuthChallenges("\x01\x02").empty());
  std::string many;
  for (int i = 0; i < 5000; i++) many += "Basic a=b, ";
  EXPECT_LE(ParseAuthChallenges(many).size(), 8u);
  std::string params = "Bearer a0=b";
  for (int i = 1; i < 1000; i++) params += ",a" + std::to_string(i) + "=b";
  EXPECT_LE(ParseAuthChallenges(params)[0].params.size(), 16u);
}

TEST(AuthChallengeTest, PrefersBearerWithARealm) {
  EXPECT_EQ(ChooseChallenge({"Basic realm=x", "Bearer realm=\"https://a\""})->scheme, "bearer");
  EXPECT_EQ(ChooseChallenge({"Bearer service=x", "Basic realm=x"})->scheme, "basic");
  EXPECT_FALSE(ChooseChallenge({"Negotiate", "Digest realm=x"}).has_value());
}

}  // namespace
}  // namespace holdfast::fetch
