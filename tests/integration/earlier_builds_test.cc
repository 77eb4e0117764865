// Builds of earlier commits, kept in tests/golden/builds, with today's in every pairing of supervisor and
// worker: an upgrade from one worker to the other and back, and deaths, under readers, with fetches
// outstanding.
#include <stdlib.h>

#include <algorithm>
#include <cctype>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/integration/lazy_image.h"
#include "tests/integration/node.h"
#include "tests/support/registry_server.h"
#include "worker/layer/digest.h"

namespace holdfast::test {
namespace {

namespace fs = std::filesystem;

std::string Variable(const char* name) {
  const char* value = getenv(name);
  return value == nullptr ? "" : value;
}

struct Build {
  std::string name, supervisor, worker;
};

Build Today() {
  const std::string bin = Variable("HOLDFAST_BIN");
  return {"today", bin + "/holdfast-supervisor", bin + "/holdfast-worker"};
}

std::vector<std::string> EarlierNames() {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(Variable("HOLDFAST_SOURCE") + "/tests/golden/builds")) {
    if (entry.is_directory()) names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

std::string DigestOf(const std::string& program) {
  auto bytes = ReadFile(program);
  EXPECT_TRUE(bytes.ok()) << bytes.status();
  return bytes.ok() ? layer::Sha256Name(*bytes).substr(strlen("sha256:")) : "";
}

// Into `folder`; checked against its SHA256SUMS.
Build Unpack(const std::string& name, const std::string& folder) {
  const std::string from = Variable("HOLDFAST_SOURCE") + "/tests/golden/builds/" + name;
  const std::string command =
      "cd '" + folder + "' && for p in holdfast-supervisor holdfast-worker; do xz -dc '" + from +
      "'/$p.xz > $p && chmod 755 $p || exit 1; done && sha256sum --quiet -c '" + from + "/SHA256SUMS'";
  EXPECT_EQ(system(command.c_str()), 0) << command;
  return {name, folder + "/holdfast-supervisor", folder + "/holdfast-worker"};
}

// What runs as the owner: SHA-256 of its executable.
std::string OwnerExecutable(const Node& node) {
  auto control = node.Control();
  if (control == nullptr) return "no supervisor";
  auto status = control->Status();
  if (!status.ok()) return status.status().ToString();
  for (const ctl::WorkerStatus& worker : status->workers) {
    if (worker.role == "owner") return worker.executable;
  }
  return "no owner";
}

std::string Mounted(Node* node, const std::string& parent, const std::string& key) {
  auto mounts = node->snapshots()->Prepare(key, parent, {});
  EXPECT_TRUE(mounts.ok()) << mounts.status();
  return mounts.ok() ? node->MountAll(*mounts) : "";
}

// From `first` to `second` and back, each with reads that wait for a silent registry, each followed by a
// death.
void SwapThereAndBack(const std::string& supervisor, const std::string& first, const std::string& second) {
  RegistryServer registry;
  registry.SetDelay(3'000'000);
  Node node("[cache]\nfree_floor = 0\n[fetch]\nmiss_timeout = \"50s\"\n", {supervisor, first});
  const std::string first_digest = DigestOf(first), second_digest = DigestOf(second);
  ASSERT_NE(first_digest, second_digest);
  ASSERT_EQ(OwnerExecutable(node), first_digest);

  const Image warm = MakeImage(1, {.small_files = 40, .large_bytes = 1u << 20});
  auto warm_parent = PullLazily(node.snapshots(), &registry, warm, "warm");
  ASSERT_TRUE(warm_parent.ok()) << warm_parent.status();
  const std::string warm_root = Mounted(&node, *warm_parent, "default/9/warm");
  {
    Readers once(warm, warm_root, 4, Readers::Until::kAllRead);
    once.Wait();
    ASSERT_EQ(once.wrong(), 0u) << once.first_error();
  }
  Readers warm_readers(warm, warm_root, 2, Readers::Until::kStopped);

  struct Leg {
    int image;
    std::string name, worker, digest;
  };
  for (const Leg& leg : {Leg{2, "there", second, second_digest}, Leg{3, "back", first, first_digest}}) {
    SCOPED_TRACE(leg.name);
    const Image cold = MakeImage(leg.image);
    auto cold_parent = PullLazily(node.snapshots(), &registry, cold, "cold-" + leg.name);
    ASSERT_TRUE(cold_parent.ok()) << cold_parent.status();
    const std::string cold_root = Mounted(&node, *cold_parent, "default/9/cold-" + leg.name);
    registry.SetBlackHole(true);  // these reads outlast the upgrade and the death
    Readers cold_readers(cold, cold_root, 4, Readers::Until::kAllRead);
    ASSERT_TRUE(registry.WaitFor([&] { return registry.in_flight() > 0; }));
    auto swap = node.Control()->Upgrade(leg.worker, /*force=*/false);
    ASSERT_TRUE(swap.ok()) << swap.status();
    EXPECT_TRUE(swap->changed);
    EXPECT_GT(swap->swap.requests_carried_over, 0u) << "no read waited during the swap";
    EXPECT_EQ(OwnerExecutable(node), leg.digest);
    Mounted(&node, *cold_parent, "default/10/after-" + leg.name);

    const pid_t killed = node.KillWorker();
    ASSERT_GT(killed, 0);
    ASSERT_TRUE(node.WaitRunning(20, killed));
    node.Reconnect();
    EXPECT_EQ(OwnerExecutable(node), leg.digest) << "one death must not change the build";
    Mounted(&node, *warm_parent, "default/11/killed-" + leg.name);
    EXPECT_FALSE(cold_readers.finished()) << "the reads were over before they could be disturbed";
    registry.SetBlackHole(false);
    cold_readers.Wait();
    EXPECT_EQ(cold_readers.wrong(), 0u) << cold_readers.first_error();
  }
  warm_readers.Stop();
  EXPECT_EQ(warm_readers.wrong(), 0u) << warm_readers.first_error();
  EXPECT_GT(warm_readers.read(), 100u);
  node.UnmountAll();
  EXPECT_EQ(node.Stop(), 0);
  EXPECT_TRUE(node.MountsLeft().empty());
}

class EarlierBuildsTest : public ::testing::TestWithParam<std::string> {
 protected:
  TempDir folder_;
  const Build earlier_ = Unpack(GetParam(), folder_.path());
  const Build today_ = Today();
};

TEST_P(EarlierBuildsTest, TodaysSupervisorUpgradesTheEarlierWorkerToTodaysAndBack) {
  SwapThereAndBack(today_.supervisor, earlier_.worker, today_.worker);
}

TEST_P(EarlierBuildsTest, TodaysSupervisorStartedWithTodaysWorkerGoesBackToTheEarlierOne) {
  SwapThereAndBack(today_.supervisor, today_.worker, earlier_.worker);
}

TEST_P(EarlierBuildsTest, TheEarlierSupervisorUpgradesItsWorkerToTodaysAndBack) {
  SwapThereAndBack(earlier_.supervisor, earlier_.worker, today_.worker);
}

TEST_P(EarlierBuildsTest, TheEarlierSupervisorStartedWithTodaysWorkerGoesBackToTheEarlierOne) {
  SwapThereAndBack(earlier_.supervisor, today_.worker, earlier_.worker);
}

INSTANTIATE_TEST_SUITE_P(Golden, EarlierBuildsTest, ::testing::ValuesIn(EarlierNames()),
                         [](const ::testing::TestParamInfo<std::string>& build) {
                           std::string name = build.param;
                           for (char& c : name) c = isalnum(static_cast<unsigned char>(c)) ? c : '_';
                           return name;
                         });

}  // namespace
}  // namespace holdfast::test
