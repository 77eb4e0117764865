// Tokens, passwords, credential helpers, redirects and TLS against the test registry.
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>

#include <atomic>
#include <cstdlib>
#include <vector>

#include "worker/fetch/client_test_support.h"
#include "worker/fetch/url.h"

namespace holdfast::fetch {
namespace {

using absl::StatusCode;

RegistryOptions With(RegistryAuth auth) {
  RegistryOptions options;
  options.auth = auth;
  options.username = "robot";
  options.password = "secret-password";
  options.identity_token = "secret-identity";
  return options;
}

std::string ConfigWith(const std::string& host, const std::string& username, const std::string& password) {
  return R"({"auths":{")" + host + R"(":{"auth":")" + Base64Encode(username + ":" + password) + R"("}}})";
}

class BearerTest : public ClientTest {
 protected:
  BearerTest() : ClientTest(With(RegistryAuth::kBearer)) {}
};

TEST_F(BearerTest, GetsOneTokenForManyConcurrentRequests) {
  WriteDockerConfig(ConfigWith(registry_.host(), "robot", "secret-password"));
  const BlobRef blob = Blob("content");
  std::vector<Waiter<std::string>> waiters(50);
  for (auto& waiter : waiters) client().FetchRange(blob, 0, 7, Priority::kDemand, 0, waiter.Callback());
  for (auto& waiter : waiters) EXPECT_EQ(waiter.Get().value(), "content");
  EXPECT_EQ(registry_.token_requests(), 1u);
  EXPECT_EQ(registry_.blob_requests(), 51u);  // the first found out that a token is needed
  EXPECT_TRUE(Fetch(Blob("other", "demo/other"), 0, 5).ok());
  EXPECT_EQ(registry_.token_requests(), 2u);  // another repository, another token
}

// The first request to a repository finds out what authorization is wanted, for all others as well.
TEST_F(BearerTest, AFirstRequestThatIsNeverAnsweredHoldsUpNobodyElse) {
  registry_.SetPassword("", "");
  options_.stall_timeout_nanos = 60 * kSecond;
  options_.probe_patience_nanos = 50 * kMilli;
  const BlobRef blob = Blob("content");
  RegistryFault silent;
  silent.stall = true;
  registry_.FailNext(silent, 2);  // the second who asks is unlucky as well
  std::vector<Waiter<std::string>> unlucky(2), others(5);
  client().FetchRange(blob, 0, 7, Priority::kDemand, In(60 * kSecond), unlucky[0].Callback());
  ASSERT_TRUE(registry_.WaitFor([this] { return registry_.faults_served() == 1; }));
  client().FetchRange(blob, 0, 7, Priority::kDemand, In(60 * kSecond), unlucky[1].Callback());
  for (auto& other : others)
    client().FetchRange(blob, 0, 7, Priority::kDemand, In(60 * kSecond), other.Callback());
  for (auto& other : others) EXPECT_EQ(other.Get().value(), "content");
  EXPECT_EQ(Fetch(blob, 0, 7).value(), "content");
  EXPECT_EQ(registry_.faults_served(), 2u);
  EXPECT_EQ(registry_.in_flight(), 2);
  EXPECT_EQ(registry_.token_requests(), 1u);
  registry_.ReleaseStalls();  // cut, so asked again
  for (auto& one : unlucky) EXPECT_EQ(one.Get().value(), "content");
}

TEST_F(BearerTest, AnonymousTokensNeedNoCredentials) {
  registry_.SetPassword("", "");
  EXPECT_EQ(Fetch(Blob("content"), 0, 7).value(), "content");
}

TEST_F(BearerTest, ARevokedTokenIsRenewedOnce) {
  WriteDockerConfig(ConfigWith(registry_.host(), "robot", "secret-password"));
  const BlobRef blob = Blob("content");
  ASSERT_TRUE(Fetch(blob, 0, 7).ok());
  registry_.RevokeTokens();
  EXPECT_TRUE(Fetch(blob, 0, 7).ok());
  EXPECT_EQ(registry_.token_requests(), 2u);
  registry_.ResetCounters();
  registry_.FailNext(Status(401), 10);
  EXPECT_THAT(Fetch(blob, 0, 7), FailsWith(StatusCode::kPermissionDenied, "HTTP 401"));
  EXPECT_EQ(registry_.blob_requests(), 2u);
}

TEST_F(BearerTest, WrongCredentialsAreRefusedInWordsAndNeverShown) {
  WriteDockerConfig(ConfigWith(registry_.host(), "robot", "wrong-password"));
  const absl::StatusOr<std::string> result = Fetch(Blob("content"), 0, 7);
  EXPECT_THAT(result, FailsWith(StatusCode::kPermissionDenied, "credentials were not accepted"));
  EXPECT_EQ(result.status().ToString().find("wrong-password"), std::string::npos);
  // A later login needs no restart.
  WriteDockerConfig(ConfigWith(registry_.host(), "robot", "secret-password"));
  EXPECT_TRUE(Fetch(Blob("content"), 0, 7).ok());
}

TEST_F(BearerTest, MissingCredentialsAreNamed) {
  EXPECT_THAT(Fetch(Blob("content"), 0, 7),
              FailsWith(StatusCode::kPermissionDenied, "no credentials are configured"));
}

TEST_F(BearerTest, ABrokenDockerConfigIsNamedWhenItMatters) {
  WriteDockerConfig("{ not json");
  EXPECT_THAT(Fetch(Blob("content"), 0, 7), FailsWith(StatusCode::kPermissionDenied, "not valid JSON"));
}

TEST_F(BearerTest, AnIdentityTokenIsExchanged) {
  WriteDockerConfig(R"({"auths":{")" + registry_.host() + R"(":{"identitytoken":"secret-identity"}}})");
  EXPECT_EQ(Fetch(Blob("content"), 0, 7).value(), "content");
  bool posted = false;
  for (const RegistryLogEntry& entry : registry_.log()) posted = posted || entry.method == "POST";
  EXPECT_TRUE(posted);
}

TEST_F(BearerTest, StaticCredentialsOfTheConfigurationComeFirst) {
  WriteDockerConfig(ConfigWith(registry_.host(), "robot", "wrong-password"));
  options_.hosts[registry_.host()].username = "robot";
  options_.hosts[registry_.host()].password = "secret-password";
  EXPECT_TRUE(Fetch(Blob("content"), 0, 7).ok());
}

class ShortTokenTest : public ClientTest {
 protected:
  static RegistryOptions Options() {
    RegistryOptions options = With(RegistryAuth::kBearer);
    options.username.clear();
    options.token_lifetime_seconds = 1;
    return options;
  }
  ShortTokenTest() : ClientTest(Options()) {}
};

TEST_F(ShortTokenTest, AnExpiredTokenIsRenewedBeforeItIsRefused) {
  const BlobRef blob = Blob("content");
  ASSERT_TRUE(Fetch(blob, 0, 7).ok());
  const uint64_t expired = In(800 * kMilli);  // a quarter of the lifetime is margin
  ASSERT_TRUE(registry_.WaitFor([&] { return Clock::Real()->BootNanos() >= expired; }));
  registry_.ResetCounters();
  ASSERT_TRUE(Fetch(blob, 0, 7).ok());
  EXPECT_EQ(registry_.token_requests(), 1u);
  EXPECT_EQ(registry_.blob_requests(), 1u);
}

class BasicTest : public ClientTest {
 protected:
  BasicTest() : ClientTest(With(RegistryAuth::kBasic)) {}
};

TEST_F(BasicTest, SendsThePasswordOfTheDockerConfig) {
  WriteDockerConfig(ConfigWith("http://" + registry_.host() + "/v1/", "robot", "secret-password"));
  const BlobRef blob = Blob("content");
  EXPECT_EQ(Fetch(blob, 0, 7).value(), "content");
  EXPECT_EQ(Fetch(blob, 0, 7).value(), "content");
  EXPECT_EQ(registry_.blob_requests(), 3u);
}

TEST_F(BasicTest, AWrongPasswordIsRefusedAfterOneTry) {
  WriteDockerConfig(ConfigWith(registry_.host(), "robot", "wrong-password"));
  EXPECT_THAT(Fetch(Blob("content"), 0, 7), FailsWith(StatusCode::kPermissionDenied, "HTTP 401"));
  EXPECT_EQ(registry_.blob_requests(), 2u);
}

// A refusal that passes (a proxy before the registry that restarts, say) must not outlive itself.
TEST_F(ClientTest, AfterAChallengeThatCouldNotBeAnsweredTheRegistryIsAskedAnew) {
  RegistryFault challenge = Status(401);
  challenge.headers = {{"WWW-Authenticate", "Basic realm=\"elsewhere\""}};
  const BlobRef blob = Blob("content");
  registry_.FailNext(challenge, 1);
  EXPECT_THAT(Fetch(blob, 0, 7), FailsWith(StatusCode::kPermissionDenied, "none is configured"));
  EXPECT_EQ(Fetch(blob, 0, 7).value(), "content");
}

// docker-credential-<name> scripts in a folder of their own on PATH.
class HelperTest : public BasicTest {
 protected:
  HelperTest() : old_path_(std::getenv("PATH")) {
    setenv("PATH", (folder_.path() + ":" + old_path_).c_str(), 1);
  }
  ~HelperTest() override { setenv("PATH", old_path_.c_str(), 1); }
  void WriteHelper(const std::string& name, const std::string& script) {
    const std::string path = folder_.path() + "/docker-credential-" + name;
    ASSERT_TRUE(WriteFileAtomic(path, "#!/bin/sh\n" + script, 0755).ok());
    ASSERT_EQ(chmod(path.c_str(), 0755), 0);
  }
  const std::string old_path_;
};

TEST_F(HelperTest, TheHelperOfAHostIsAskedForIt) {
  WriteHelper("vault", "[ \"$1\" = get ] || exit 1\nread server\n[ \"$server\" = " + registry_.host() +
                           " ] || exit 1\necho '{\"Username\":\"robot\",\"Secret\":\"secret-password\"}'\n");
  WriteDockerConfig(R"({"credHelpers":{")" + registry_.host() + R"(":"vault"}})");
  EXPECT_EQ(Fetch(Blob("content"), 0, 7).value(), "content");
}

TEST_F(HelperTest, TheDefaultHelperIsAskedAndTheFileServesWhereItKnowsNothing) {
  WriteHelper("vault", "echo 'credentials not found'; exit 1\n");
  std::string config = ConfigWith(registry_.host(), "robot", "secret-password");
  config.insert(1, R"("credsStore":"vault",)");
  WriteDockerConfig(config);
  EXPECT_EQ(Fetch(Blob("content"), 0, 7).value(), "content");
}

TEST_F(HelperTest, AHangingHelperDelaysNobodyElseAndDiesWithTheClient) {
  WriteHelper("vault", "echo $$ > " + folder_.path() + "/pid\nexec sleep 1000\n");
  WriteDockerConfig(R"({"credHelpers":{")" + registry_.host() + R"(":"vault"}})");
  RegistryServer open;
  BlobRef other = Blob("content");
  Waiter<std::string> stuck;
  client().FetchRange(other, 0, 7, Priority::kDemand, In(60 * kSecond), stuck.Callback());
  std::string pid;
  ASSERT_TRUE(registry_.WaitFor([&] {
    pid = ReadFile(folder_.path() + "/pid").value_or("");
    return !pid.empty();
  }));
  other.image.host = open.host();
  open.AddBlob("content");
  EXPECT_EQ(Fetch(other, 0, 7, 2 * kSecond).value(), "content");
  client_.reset();
  EXPECT_THAT(stuck.Get(), FailsWith(StatusCode::kCancelled, ""));
  EXPECT_EQ(kill(std::stoi(pid), 0), -1);
}

TEST_F(HelperTest, AHelpersNameMustNotBeAPath) {
  WriteDockerConfig(R"({"credsStore":"../../bin/sh"})");
  EXPECT_THAT(Fetch(Blob("content"), 0, 7), FailsWith(StatusCode::kPermissionDenied, "malformed name"));
}

class RedirectTest : public BearerTest {
 protected:
  RedirectTest() {
    WriteDockerConfig(ConfigWith(registry_.host(), "robot", "secret-password"));
    registry_.SetRedirect(storage_.url());
  }
  BlobRef StoredBlob(const std::string& bytes) {
    storage_.AddBlob(bytes);
    return Blob(bytes);
  }
  RegistryServer storage_;
};

TEST_F(RedirectTest, CredentialsNeverFollowToAnotherHost) {
  EXPECT_EQ(Fetch(StoredBlob("content"), 0, 7).value(), "content");
  ASSERT_EQ(storage_.log().size(), 1u);
  EXPECT_FALSE(storage_.log()[0].had_authorization);
  EXPECT_TRUE(registry_.log().back().had_authorization);
}

TEST_F(RedirectTest, LaterRangesGoToTheTargetDirectly) {
  const BlobRef blob = StoredBlob("content");
  for (int i = 0; i < 5; i++) ASSERT_TRUE(Fetch(blob, 0, 7).ok());
  EXPECT_EQ(storage_.blob_requests(), 5u);
  EXPECT_EQ(registry_.blob_requests(), 2u);
}

TEST_F(RedirectTest, AStaleTargetIsResolvedAnew) {
  const BlobRef blob = StoredBlob("content");
  for (const int status : {400, 401, 403, 404, 410}) {
    ASSERT_TRUE(Fetch(blob, 0, 7).ok());
    registry_.ResetCounters();
    storage_.FailNext(Status(status));
    EXPECT_EQ(Fetch(blob, 0, 7).value(), "content") << status;
    EXPECT_EQ(registry_.blob_requests(), 1u) << status;
  }
}

TEST_F(RedirectTest, ATargetThatStaysForbiddenIsFinalAndItsSignatureIsNotShown) {
  storage_.FailNext(Status(403), 100);
  const absl::StatusOr<std::string> result = Fetch(StoredBlob("content"), 0, 7);
  EXPECT_THAT(result, FailsWith(StatusCode::kPermissionDenied, "HTTP 403 from " + storage_.host()));
  EXPECT_EQ(result.status().ToString().find("signature"), std::string::npos);
  EXPECT_EQ(storage_.blob_requests(), 2u);
}

TEST_F(RedirectTest, ATargetThatNeverHadTheBlobIsNotFound) {
  EXPECT_THAT(Fetch(Blob("only the registry knows it"), 0, 7), FailsWith(StatusCode::kNotFound, "HTTP 404"));
}

TEST_F(RedirectTest, ALoopIsRefused) {
  storage_.SetRedirect(registry_.url());
  EXPECT_THAT(Fetch(StoredBlob("content"), 0, 7), FailsWith(StatusCode::kFailedPrecondition, "redirect"));
}

TEST_F(RedirectTest, AnEndlessChainIsRefused) {
  std::atomic<int> hops{0};
  storage_.SetHook([&](const test::RegistryRequest&) {
    RegistryFault fault = Status(302);
    fault.headers.emplace_back("Location", "/next/" + std::to_string(++hops));
    return fault;
  });
  EXPECT_THAT(Fetch(StoredBlob("content"), 0, 7),
              FailsWith(StatusCode::kFailedPrecondition, "more than 5 redirects"));
  EXPECT_LE(hops, 5);
}

TEST_F(RedirectTest, BadLocationsAreRefused) {
  const BlobRef blob = StoredBlob("content");
  for (const char* location : {"http://registry.example/x", "file:///etc/passwd", "gopher://127.0.0.1/",
                               "http://u:p@127.0.0.1/", "http://127.0.0.1.evil.example/"}) {
    RegistryFault fault = Status(307);
    fault.headers.emplace_back("Location", location);
    storage_.FailNext(fault);
    EXPECT_THAT(Fetch(blob, 0, 7), FailsWith(StatusCode::kFailedPrecondition, "")) << location;
  }
}

TEST_F(RedirectTest, ARelativeLocationOnTheRegistryItselfKeepsTheAuthorization) {
  registry_.SetRedirect("");
  const BlobRef blob = Blob("content");
  RegistryFault fault = Status(307);
  fault.headers.emplace_back("Location", "/v2/demo/app/blobs/" + blob.digest + "?moved=1");
  ASSERT_TRUE(Fetch(blob, 0, 7).ok());
  registry_.FailNext(fault);
  EXPECT_EQ(Fetch(blob, 0, 7).value(), "content");
  EXPECT_EQ(registry_.log().back().query, "moved=1");
}

class TlsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(test::MakeTestCertificates(folder_.path()).ok());
    RegistryOptions options;
    options.tls_certificate_file = folder_.path() + "/server.pem";
    options.tls_key_file = folder_.path() + "/server.key";
    registry_ = std::make_unique<RegistryServer>(options);
    blob_ = {{registry_->host(), "demo/app", "latest"}, registry_->AddBlob("content"), "default"};
    options_.docker_config = folder_.path() + "/none";
  }
  absl::StatusOr<std::string> Fetch(const std::string& ca_file, uint64_t limit) {
    options_.hosts[registry_->host()].ca_file = ca_file;
    const std::unique_ptr<RegistryClient> client = RegistryClient::Create(options_);
    Waiter<std::string> waiter;
    client->FetchRange(blob_, 0, 7, Priority::kDemand, In(limit), waiter.Callback());
    return waiter.Get();
  }
  const TempDir folder_;
  std::unique_ptr<RegistryServer> registry_;
  BlobRef blob_;
  ClientOptions options_;
};

TEST_F(TlsTest, AHostsOwnAuthorityIsTrusted) {
  EXPECT_EQ(Fetch(folder_.path() + "/ca.pem", 20 * kSecond).value(), "content");
}

TEST_F(TlsTest, AnyOtherAuthorityIsRefusedAtOnceInWords) {
  const TempDir other;
  ASSERT_TRUE(test::MakeTestCertificates(other.path()).ok());
  EXPECT_THAT(Fetch(other.path() + "/ca.pem", 60 * kSecond),
              FailsWith(StatusCode::kFailedPrecondition, "not trusted"));
  EXPECT_THAT(Fetch(other.path() + "/missing.pem", 60 * kSecond),
              FailsWith(StatusCode::kFailedPrecondition, "CA file"));
  EXPECT_EQ(registry_->requests(), 0u);
}

TEST_F(TlsTest, ARedirectToPlainHttpIsRefused) {
  RegistryServer plain;
  plain.AddBlob("content");
  registry_->SetRedirect(plain.url());
  EXPECT_THAT(Fetch(folder_.path() + "/ca.pem", 20 * kSecond),
              FailsWith(StatusCode::kFailedPrecondition, "https to plain http"));
  EXPECT_EQ(plain.requests(), 0u);
}

}  // namespace
}  // namespace holdfast::fetch
