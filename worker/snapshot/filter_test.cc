#include "worker/snapshot/filter.h"

#include "gtest/gtest.h"

namespace holdfast::snapshot {
namespace {

metadata::SnapshotRow Sample() {
  metadata::SnapshotRow row;
  row.key = "default/7/sha256:aa";
  row.parent = "remote/2";
  row.kind = metadata::Kind::kCommitted;
  row.labels = {
      {"containerd.io/snapshot.ref", "sha256:bbb"}, {"l", "2"}, {"a.b", "x,y z"}, {"umlaut", "\xc3\xbc"}};
  return row;
}

bool Matches(const std::string& text) {
  auto filter = Filter::Parse(text);
  EXPECT_TRUE(filter.ok()) << text << ": " << filter.status();
  return filter.ok() && (*filter)->Matches(Sample());
}

TEST(Filter, MatchesWhatContainerdSends) {
  EXPECT_TRUE(Matches(R"(labels."containerd.io/snapshot.ref"==sha256:bbb,parent=="remote/2")"));
  EXPECT_FALSE(Matches(R"(labels."containerd.io/snapshot.ref"==sha256:bbb,parent=="")"));
}

TEST(Filter, KnowsEveryOperator) {
  for (const char* yes : {"",
                          "  ",
                          "kind==committed",
                          "kind!=active",
                          "name==default/7/sha256:aa",
                          "labels.l",
                          "labels.l==2",
                          "parent!=\"\"",
                          "labels.\"a.b\"==\"x,y z\"",
                          "labels.a.b",
                          "name~=^default/",
                          "name~=/^default\\/7/",
                          "labels.l~=|^[0-9]$|",
                          "labels.nothing!=x",
                          "labels.umlaut==\"\\u00fc\"",
                          "labels.umlaut==\"\\xc3\\xbc\"",
                          " kind == committed , labels.l == 2 ",
                          "name",
                          "parent",
                          "nonsense!=x"}) {
    EXPECT_TRUE(Matches(yes)) << yes;
  }
  for (const char* no :
       {"kind==active", "labels.l==3", "labels.nothing", "labels.nothing==\"\"", "labels.nothing!=\"\"",
        "labels", "nonsense", "nonsense==x", "name~=^x", "kind==committed,labels.l==3"}) {
    EXPECT_FALSE(Matches(no)) << no;
  }
}

TEST(Filter, RefusesWhatIsNotAFilter) {
  for (const char* bad : {"==", "name=", "name=x", "name==", "name==a b", "name==\"a", "name==\"a\"b", "a..b",
                          "a.", ",", "name,", "name~=(", "name==\"\\q\"", "name==\"\\ud800\"",
                          "name==\"\\x4\"", "a b", "name==\"a\nb\"", "\x01"}) {
    EXPECT_EQ(Filter::Parse(bad).status().code(), absl::StatusCode::kInvalidArgument) << bad;
  }
  EXPECT_EQ(Filter::Parse(std::string(70'000, 'a')).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(Filter, AlternativesMatchIfOneDoes) {
  EXPECT_TRUE((*Filter::ParseAny({"kind==active", "labels.l==2"}))->Matches(Sample()));
  EXPECT_FALSE((*Filter::ParseAny({"kind==active", "kind==view"}))->Matches(Sample()));
  EXPECT_TRUE((*Filter::ParseAny({}))->Matches(Sample()));
  EXPECT_FALSE(Filter::ParseAny({"kind==active", "=="}).ok());
}

}  // namespace
}  // namespace holdfast::snapshot
