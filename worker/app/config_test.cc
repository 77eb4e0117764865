#include "worker/app/config.h"

#include <cstdlib>

#include "common/io.h"
#include "gtest/gtest.h"

namespace holdfast::app {
namespace {

std::string ErrorOf(std::string_view text) {
  absl::StatusOr<Config> config = ParseConfig(text, "test.toml");
  if (config.ok()) return "(no error)";
  return std::string(FromAbsl(config.status().message()));
}

TEST(ConfigTest, AnEmptyFileMeansTheDefaults) {
  absl::StatusOr<Config> config = ParseConfig("", "test.toml");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->cache.limit_bytes, 0u);
  EXPECT_EQ(config->fetch.miss_timeout_nanos, 60'000'000'000u);
  EXPECT_EQ(config->snapshotter.lazy_deadline_nanos, 20'000'000'000u);
  EXPECT_TRUE(config->registry.empty());
}

TEST(ConfigTest, EveryKeyIsRead) {
  absl::StatusOr<Config> config = ParseConfig(R"(
[cache]
limit = "10GiB"
free_floor = 4096
[fetch]
miss_timeout = "500ms"
docker_config = "/etc/docker.json"
max_connections_per_host = 3
[registry."localhost:5000"]
plain_http = true
ca_file = "/ca.pem"
username = "u"
password = "p"
[snapshotter]
lazy_deadline = "2m"
[fuse]
threads = 4
)",
                                              "test.toml");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->cache.limit_bytes, 10ull << 30);
  EXPECT_EQ(config->cache.free_floor_bytes, 4096u);
  EXPECT_EQ(config->fetch.miss_timeout_nanos, 500'000'000u);
  EXPECT_EQ(config->fetch.docker_config, "/etc/docker.json");
  EXPECT_EQ(config->fetch.max_connections_per_host, 3u);
  ASSERT_EQ(config->registry.count("localhost:5000"), 1u);
  EXPECT_TRUE(config->registry["localhost:5000"].plain_http);
  EXPECT_EQ(config->registry["localhost:5000"].ca_file, "/ca.pem");
  EXPECT_EQ(config->registry["localhost:5000"].username, "u");
  EXPECT_EQ(config->registry["localhost:5000"].password, "p");
  EXPECT_EQ(config->snapshotter.lazy_deadline_nanos, 120'000'000'000u);
  EXPECT_EQ(config->fuse.threads, 4u);
}

TEST(ConfigTest, AnUnknownKeyIsNamedWithFileAndLineAndTheKnownOnes) {
  EXPECT_EQ(ErrorOf("[cache]\nlimit = 1\nlimitt = 2\n"),
            "test.toml:3: unknown key 'limitt'; [cache] may hold: free_floor, limit");
  EXPECT_EQ(ErrorOf("\n[cach]\nlimit = 1\n"),
            "test.toml:2: unknown key 'cach'; the file may hold: cache, fetch, fuse, registry, snapshotter");
  EXPECT_EQ(ErrorOf("[registry.\"a:1\"]\nplain = true\n"),
            "test.toml:2: unknown key 'plain'; [registry.\"a:1\"] may hold: ca_file, password, plain_http, "
            "username");
}

TEST(ConfigTest, AMistypedKeyIsNamedWithItsLineAndWhatItMustBe) {
  EXPECT_EQ(ErrorOf("[registry.\"a:1\"]\nplain_http = \"yes\"\n"),
            "test.toml:2: 'registry.\"a:1\".plain_http' must be true or false");
  EXPECT_EQ(ErrorOf("[fetch]\ndocker_config = 1\n"), "test.toml:2: 'fetch.docker_config' must be a string");
  EXPECT_EQ(ErrorOf("[fuse]\nthreads = \"2\"\n"), "test.toml:2: 'fuse.threads' must be an integer");
  EXPECT_EQ(ErrorOf("[cache]\n\nlimit = true\n"),
            "test.toml:3: 'cache.limit' must be a size: bytes, or a string like \"10GiB\"");
  EXPECT_EQ(ErrorOf("[fetch]\nmiss_timeout = 60\n"),
            "test.toml:2: 'fetch.miss_timeout' must be a duration: a string like \"60s\" or \"500ms\"");
  EXPECT_EQ(ErrorOf("cache = 1\n"), "test.toml:1: 'cache' must be a table, [cache]");
  EXPECT_EQ(ErrorOf("[registry]\nfoo = 1\n"),
            "test.toml:2: 'registry.\"foo\"' must be a table, [registry.\"foo\"]");
}

TEST(ConfigTest, AValueOutOfRangeIsNamedWithTheRange) {
  EXPECT_EQ(ErrorOf("[fuse]\nthreads = 17\n"), "test.toml:2: 'fuse.threads' must be 1 to 16");
  EXPECT_EQ(ErrorOf("[fuse]\nthreads = 0\n"), "test.toml:2: 'fuse.threads' must be 1 to 16");
  EXPECT_EQ(ErrorOf("[cache]\nlimit = -1\n"), "test.toml:2: 'cache.limit' must not be negative");
  EXPECT_EQ(ErrorOf("[fetch]\nmiss_timeout = \"0s\"\n"),
            "test.toml:2: 'fetch.miss_timeout' must be more than 0");
}

TEST(ConfigTest, ASizeOrDurationWithoutSenseIsShownWithAnExample) {
  EXPECT_EQ(ErrorOf("[cache]\nlimit = \"10GB\"\n"),
            "test.toml:2: 'cache.limit' '10GB' is not a value like \"500MiB\" or \"10GiB\"");
  EXPECT_EQ(ErrorOf("[fetch]\nmiss_timeout = \"60\"\n"),
            "test.toml:2: 'fetch.miss_timeout' '60' is not a value like \"60s\", \"500ms\" or \"2m\"");
  EXPECT_FALSE(ParseSize("99999999999999TiB").ok()) << "overflow";
  EXPECT_FALSE(ParseSize("").ok());
  EXPECT_FALSE(ParseSize("-1").ok());
}

TEST(ConfigTest, ARegistryWithOnlyHalfACredentialIsRefused) {
  EXPECT_EQ(ErrorOf("[registry.\"a:1\"]\nusername = \"u\"\n"),
            "test.toml:1: [registry.\"a:1\"] needs username and password together");
}

TEST(ConfigTest, ARegistryNameWithAPathIsRefused) {
  EXPECT_EQ(ErrorOf("[registry.\"a/b\"]\n"), "test.toml:1: 'a/b' is not a host or host:port");
}

TEST(ConfigTest, BrokenTomlIsAnErrorWithItsLine) {
  EXPECT_EQ(ErrorOf("[cache]\nlimit = \n").rfind("test.toml:2: ", 0), 0u) << ErrorOf("[cache]\nlimit = \n");
}

TEST(ConfigTest, ANamedFileThatIsMissingIsAnErrorThatNamesIt) {
  absl::StatusOr<Config> config = LoadConfig("/nonexistent/holdfast.toml");
  ASSERT_FALSE(config.ok());
  EXPECT_NE(std::string(FromAbsl(config.status().message())).find("/nonexistent/holdfast.toml"),
            std::string::npos);
}

TEST(ConfigTest, TheShippedFileIsValidAndSaysTheDefaults) {
  const char* source = getenv("HOLDFAST_SOURCE");
  ASSERT_NE(source, nullptr);
  absl::StatusOr<Config> config = LoadConfig(std::string(source) + "/packaging/config.toml");
  ASSERT_TRUE(config.ok()) << config.status();
  const Config defaults;
  EXPECT_EQ(config->cache.limit_bytes, defaults.cache.limit_bytes);
  EXPECT_EQ(config->cache.free_floor_bytes, defaults.cache.free_floor_bytes);
  EXPECT_EQ(config->fetch.miss_timeout_nanos, defaults.fetch.miss_timeout_nanos);
  EXPECT_EQ(config->fetch.max_connections_per_host, defaults.fetch.max_connections_per_host);
  EXPECT_EQ(config->snapshotter.lazy_deadline_nanos, defaults.snapshotter.lazy_deadline_nanos);
}

}  // namespace
}  // namespace holdfast::app
