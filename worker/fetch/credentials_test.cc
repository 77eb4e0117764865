#include "worker/fetch/credentials.h"

#include <sys/stat.h>

#include <cstdlib>
#include <thread>

#include "common/clock.h"
#include "common/io.h"
#include "common/urgency.h"
#include "gtest/gtest.h"
#include "worker/fetch/authenticator.h"

namespace holdfast::fetch {
namespace {

CredentialStore::Source FindIn(const std::string& json, const std::string& host) {
  const TempDir folder;
  const std::string path = folder.path() + "/config.json";
  EXPECT_TRUE(WriteFileAtomic(path, json).ok());
  CredentialStore store(path);
  return store.Find(host);
}

TEST(DockerConfigTest, ReadsEveryWayToStoreCredentials) {
  const DockerConfig config = ParseDockerConfig(R"({"auths":{
      "a":{"auth":"dXNlcjpwYTpzcw=="}, "b":{"username":"u","password":"p"}, "c":{"identitytoken":"t"},
      "d":{}, "e":{"auth":"%%%"}, "f":{"auth":"bm9jb2xvbg=="}, "g":7},
      "credHelpers":{"h":"vault","i":5},"credsStore":"desktop","HttpHeaders":{}})")
                                  .value();
  EXPECT_EQ(config.auths.at("a").username, "user");
  EXPECT_EQ(config.auths.at("a").password, "pa:ss");
  EXPECT_EQ(config.auths.at("b").password, "p");
  EXPECT_EQ(config.auths.at("c").identity_token, "t");
  EXPECT_EQ(config.auths.size(), 3u);
  EXPECT_EQ(config.helpers.size(), 1u);
  EXPECT_EQ(config.default_helper, "desktop");
}

TEST(DockerConfigTest, RefusesWhatIsNoObjectWithoutQuotingIt) {
  for (const std::string& text :
       {std::string("secret"), std::string("[]"), std::string("{\"auths\":{\"secret"), std::string(),
        std::string(100'000, '[')}) {
    const absl::StatusOr<DockerConfig> config = ParseDockerConfig(text);
    EXPECT_FALSE(config.ok());
    EXPECT_EQ(config.status().ToString().find("secret"), std::string::npos);
  }
  EXPECT_FALSE(ParseDockerConfig("{\"a\":" + std::string(50, '[') + std::string(50, ']') + "}").ok());
}

TEST(CredentialStoreTest, FindsAHostUnderAllItsNames) {
  EXPECT_EQ(
      FindIn(R"({"auths":{"https://r.example:5000/v2/":{"username":"u","password":"p"}}})", "r.example:5000")
          .stored.username,
      "u");
  EXPECT_EQ(FindIn(R"({"auths":{"https://index.docker.io/v1/":{"username":"u","password":"p"}}})",
                   "registry-1.docker.io")
                .stored.username,
            "u");
  EXPECT_EQ(FindIn(R"({"auths":{"docker.io":{"username":"u","password":"p"}}})", "registry-1.docker.io")
                .stored.username,
            "u");
  EXPECT_TRUE(
      FindIn(R"({"auths":{"r.example":{"username":"u","password":"p"}}})", "r.example.evil").stored.empty());
  EXPECT_TRUE(
      FindIn(R"({"auths":{"r.example":{"username":"u","password":"p"}}})", "r.example:5000").stored.empty());
}

TEST(CredentialStoreTest, AHelperOfTheHostComesBeforeTheDefaultOne) {
  const char* json = R"({"credHelpers":{"r.example":"own"},"credsStore":"all"})";
  EXPECT_EQ(FindIn(json, "r.example").helper, "own");
  EXPECT_EQ(FindIn(json, "other.example").helper, "all");
  EXPECT_EQ(FindIn(json, "registry-1.docker.io").server, "https://index.docker.io/v1/");
}

TEST(CredentialStoreTest, ReadsTheFileAnewWhenItChangesAppearsOrGoes) {
  const TempDir folder;
  const std::string path = folder.path() + "/config.json";
  CredentialStore store(path);
  EXPECT_TRUE(store.Find("h").stored.empty());
  EXPECT_EQ(store.Find("h").problem, "");
  for (const char* name : {"one", "two"}) {
    ASSERT_TRUE(
        WriteFileAtomic(path, std::string(R"({"auths":{"h":{"password":"p","username":")") + name + "\"}}}")
            .ok());
    EXPECT_EQ(store.Find("h").stored.username, name);
  }
  ASSERT_TRUE(WriteFileAtomic(path, "broken").ok());
  EXPECT_NE(store.Find("h").problem.find("not valid JSON"), std::string::npos);
  ASSERT_EQ(unlink(path.c_str()), 0);
  EXPECT_EQ(store.Find("h").problem, "");
}

TEST(HelperAnswerTest, TellsPasswordsFromIdentityTokens) {
  EXPECT_EQ(ParseHelperAnswer(R"({"Username":"u","Secret":"s"})").value().password, "s");
  EXPECT_EQ(ParseHelperAnswer(R"({"Username":"<token>","Secret":"s"})").value().identity_token, "s");
  EXPECT_FALSE(ParseHelperAnswer("{}").ok());
  EXPECT_FALSE(ParseHelperAnswer("credentials not found").ok());
}

TEST(CredentialHelperTest, IsKilledWhenItTakesTooLong) {
  const TempDir folder;
  const std::string script = folder.path() + "/docker-credential-slow";
  ASSERT_TRUE(WriteFileAtomic(script, "#!/bin/sh\nexec sleep 1000\n").ok());
  ASSERT_EQ(chmod(script.c_str(), 0755), 0);
  const std::string old_path = std::getenv("PATH");
  setenv("PATH", (folder.path() + ":" + old_path).c_str(), 1);
  const absl::StatusOr<Credentials> slow = RunCredentialHelper("slow", "h", 100'000'000, nullptr);
  const absl::StatusOr<Credentials> missing = RunCredentialHelper("not-there", "h", 5'000'000'000, nullptr);
  setenv("PATH", old_path.c_str(), 1);
  EXPECT_TRUE(absl::IsDeadlineExceeded(slow.status())) << slow.status();
  EXPECT_TRUE(absl::IsNotFound(missing.status())) << missing.status();
}

TEST(CredentialHelperTest, IsOrdinaryAlsoWhenTheWorkerIsUrgent) {
  const TempDir folder;
  const std::string script = folder.path() + "/docker-credential-policy", seen = folder.path() + "/policy";
  // The 41st field of its stat: the scheduling policy.
  ASSERT_TRUE(WriteFileAtomic(
                  script, "#!/bin/sh\nread -r line < /proc/self/stat\nset -- $line\nshift 40\necho $1 > " +
                              seen + "\n")
                  .ok());
  ASSERT_EQ(chmod(script.c_str(), 0755), 0);
  const std::string old_path = std::getenv("PATH");
  setenv("PATH", (folder.path() + ":" + old_path).c_str(), 1);
  std::thread([] {
    const UrgentChildren urgent;
    (void)RunCredentialHelper("policy", "h", 5'000'000'000, nullptr);
  }).join();
  setenv("PATH", old_path.c_str(), 1);
  EXPECT_EQ(ReadFile(seen).value_or("it did not run"), "0\n");
}

TEST(TokenAnswerTest, ReadsBothNamesAndBoundsTheLifetime) {
  EXPECT_EQ(ParseTokenAnswer(R"({"token":"a"})").value().lifetime_nanos, 60'000'000'000u);
  EXPECT_EQ(ParseTokenAnswer(R"({"access_token":"b","expires_in":300})").value().token, "b");
  EXPECT_EQ(ParseTokenAnswer(R"({"token":"a","expires_in":-5})").value().lifetime_nanos, 1'000'000'000u);
  EXPECT_EQ(ParseTokenAnswer(R"({"token":"a","expires_in":1e300})").value().lifetime_nanos,
            86'400'000'000'000u);
  for (const char* text :
       {"", "{}", "[]", R"({"token":7})", R"({"token":""})", R"({"token":"a\r\nX-Evil: 1"})"}) {
    EXPECT_FALSE(ParseTokenAnswer(text).ok()) << text;
  }
}

}  // namespace
}  // namespace holdfast::fetch
