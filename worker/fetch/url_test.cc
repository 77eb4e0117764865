#include "worker/fetch/url.h"

#include "gtest/gtest.h"
#include "worker/fetch/image_reference.h"
#include "worker/fetch/registry_client.h"

namespace holdfast::fetch {
namespace {

TEST(UrlTest, TakesAUrlApartAndDropsDefaultPorts) {
  const Url url = ParseUrl("HTTPS://Registry.Example:443/v2/a?x=1#part").value();
  EXPECT_EQ(url.scheme, "https");
  EXPECT_EQ(url.authority, "registry.example");
  EXPECT_EQ(url.full.find("#part"), std::string::npos);
  EXPECT_EQ(ParseUrl("http://h:443/").value().authority, "h:443");
  EXPECT_EQ(ParseUrl("http://[::1]:5000/").value().authority, "[::1]:5000");
}

TEST(UrlTest, RefusesOtherSchemesUserNamesAndControlCharacters) {
  for (const char* text : {"ftp://h/", "file:///x", "https://user@h/", "https://u:p@h/", "https://h/a b",
                           "https://h/\r\nX: y", "", "nonsense", "https://"}) {
    EXPECT_FALSE(ParseUrl(text).ok()) << text;
  }
}

TEST(UrlTest, ResolvesRelativeLocations) {
  const Url base = ParseUrl("https://h:8443/v2/a/blobs/x").value();
  EXPECT_EQ(ResolveUrl(base, "/y?z=1").value().full, "https://h:8443/y?z=1");
  EXPECT_EQ(ResolveUrl(base, "//other/y").value().authority, "other");
  EXPECT_FALSE(ResolveUrl(base, "/y").value().SameOrigin(ParseUrl("https://h/").value()));
  EXPECT_FALSE(ResolveUrl(base, "/y").value().SameOrigin(ParseUrl("http://h:8443/").value()));
  EXPECT_TRUE(ResolveUrl(base, "/y").value().SameOrigin(base));
}

TEST(UrlTest, OnlyRealLoopbackIsLoopback) {
  for (const char* host :
       {"127.0.0.1", "127.0.0.1:5000", "127.255.0.3", "localhost", "localhost:1", "[::1]", "[::1]:5000"}) {
    EXPECT_TRUE(IsLoopback(host)) << host;
  }
  for (const char* host : {"127.0.0.1.evil.example", "128.0.0.1", "localhost.evil.example", "10.0.0.1",
                           "[::2]:1", "", "[", "0.0.0.0"}) {
    EXPECT_FALSE(IsLoopback(host)) << host;
  }
}

TEST(UrlTest, EncodesWhatAQueryMustNotHold) {
  EXPECT_EQ(PercentEncode("repository:a/b:pull &x=\xff"), "repository%3Aa%2Fb%3Apull%20%26x%3D%FF");
}

struct ReferenceCase {
  const char *text, *host, *repository, *object;
};

TEST(ImageReferenceTest, FollowsDockersRules) {
  const std::string digest = "sha256:" + std::string(64, 'a');
  const std::string with_digest = "ghcr.example/a/b:v1@" + digest;
  for (const ReferenceCase& c : {
           ReferenceCase{"ubuntu", "registry-1.docker.io", "library/ubuntu", "latest"},
           {"docker.io/library/ubuntu:22.04", "registry-1.docker.io", "library/ubuntu", "22.04"},
           {"docker.io/ubuntu", "registry-1.docker.io", "library/ubuntu", "latest"},
           {"index.docker.io/team/app:1", "registry-1.docker.io", "team/app", "1"},
           {"team/app", "registry-1.docker.io", "team/app", "latest"},
           {"localhost/app", "localhost", "app", "latest"},
           {"127.0.0.1:5000/demo/app:v1", "127.0.0.1:5000", "demo/app", "v1"},
           {"registry.example/app", "registry.example", "app", "latest"},
           {"[::1]:5000/app:x", "[::1]:5000", "app", "x"},
           {with_digest.c_str(), "ghcr.example", "a/b", digest.c_str()},
       }) {
    const absl::StatusOr<ImageReference> image = ParseImageReference(c.text);
    ASSERT_TRUE(image.ok()) << c.text << ": " << image.status();
    EXPECT_EQ(image->host, c.host) << c.text;
    EXPECT_EQ(image->repository, c.repository) << c.text;
    EXPECT_EQ(image->tag_or_digest, c.object) << c.text;
  }
}

TEST(ImageReferenceTest, RefusesWhatCouldEscapeFromAUrl) {
  for (const char* text : {"",
                           "/",
                           "a/",
                           "/a",
                           "h.example//a",
                           "h.example/a/../b",
                           "h.example/a?b",
                           "h.example/a#b",
                           "UPPER",
                           "h.example/a b",
                           "h.example/a:",
                           "h.example/a:t/x",
                           "a@sha256:123",
                           "a@md5:0",
                           "u@h.example/a",
                           "h.example:0/a",
                           "h.example:99999/a",
                           "h.example/%2e%2e/a",
                           "h.example/a\r\nb",
                           "-.example/a",
                           "h.example/a..b",
                           "h.example/a___b",
                           "h.example/-a"}) {
    EXPECT_FALSE(ParseImageReference(text).ok()) << text;
  }
  EXPECT_FALSE(ParseImageReference("h.example/" + std::string(300, 'a')).ok());
  EXPECT_TRUE(IsValidRepository("a/b-c/d__e.f--g"));
}

}  // namespace
}  // namespace holdfast::fetch
