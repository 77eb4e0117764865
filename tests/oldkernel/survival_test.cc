// Runs inside the virtual machine (run.py), as the only program of its /init: ten deaths and three upgrades
// of the worker, each while reads wait for a silent registry, on a kernel that cannot send requests again (no
// FUSE_NOTIFY_RESEND).
#include <stdlib.h>
#include <sys/utsname.h>

#include <cstdio>
#include <memory>
#include <string>
#include <thread>

#include "common/clock.h"
#include "gtest/gtest.h"
#include "tests/integration/lazy_image.h"
#include "tests/integration/node.h"
#include "tests/support/registry_server.h"
#include "worker/ctl/inflight.h"

namespace holdfast::test {
namespace {

constexpr int kDeaths = 10;
constexpr int kUpgrades = 3;
constexpr int kPatience = 60;  // seconds: an emulated processor is slow

class SurvivalTest : public ::testing::Test {
 protected:
  SurvivalTest() : node_("[cache]\nfree_floor = 0\n[fetch]\nmiss_timeout = \"110s\"\n") {}

  std::string Mounted(const Image& image, const std::string& name) {
    auto parent = PullLazily(node_.snapshots(), &registry_, image, name);
    EXPECT_TRUE(parent.ok()) << parent.status();
    if (!parent.ok()) return "";
    auto mounts = node_.snapshots()->Prepare("default/9/" + name, *parent, {});
    EXPECT_TRUE(mounts.ok()) << mounts.status();
    return mounts.ok() ? node_.MountAll(*mounts) : "";
  }

  // Requests that wait for content, as `holdfastctl inflight` sees them.
  size_t Waiting() {
    auto control = node_.Control();
    if (control == nullptr) return 0;
    auto ledgers = control->Ledgers();
    if (!ledgers.ok()) return 0;
    size_t waiting = 0;
    for (const ctl::LedgerFd& ledger : *ledgers) {
      auto requests = ctl::ReadLedgerFd(ledger.memory.get(), Clock::Real()->BootNanos());
      if (!requests.ok()) continue;
      for (const ctl::InflightRequest& request : *requests) waiting += request.executing ? 0 : 1;
    }
    return waiting;
  }

  bool WaitForWaiting(size_t count) {
    for (int i = 0; i < kPatience * 100 && Waiting() < count; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return Waiting() >= count;
  }

  uint64_t CarriedOver() {
    auto control = node_.Control();
    if (control == nullptr) return 0;
    auto status = control->Status();
    return status.ok() ? status->carried_over_total : 0;
  }

  // Reads an image that was never read, while the registry is silent; `disturb` runs when its reads wait.
  template <typename Disturb>
  void Round(int number, Disturb disturb) {
    SCOPED_TRACE("round " + std::to_string(number));
    const Image image =
        MakeImage(100 + static_cast<uint64_t>(number), {.small_files = 12, .large_bytes = 300'000});
    const std::string root = Mounted(image, "cold" + std::to_string(number));
    ASSERT_FALSE(root.empty());
    registry_.SetBlackHole(true);
    Readers readers(image, root, 3, Readers::Until::kAllRead);
    EXPECT_TRUE(WaitForWaiting(1)) << "no read waits for the registry";
    EXPECT_FALSE(readers.finished());
    const uint64_t before = CarriedOver();
    disturb();
    const uint64_t carried = CarriedOver() - before;
    EXPECT_GT(carried, 0u) << "no request was in flight";
    registry_.SetBlackHole(false);
    readers.Wait();
    EXPECT_EQ(readers.wrong(), 0u) << readers.first_error();
    EXPECT_EQ(readers.read(), image.files.size());
    printf("round %d: %llu requests carried over, %llu files right\n", number,
           static_cast<unsigned long long>(carried),
           static_cast<unsigned long long>(readers.read() - readers.wrong()));
    fflush(stdout);
  }

  RegistryServer registry_;
  Node node_;
};

TEST_F(SurvivalTest, TenDeathsAndThreeUpgradesWithRequestsInFlightFailNoRead) {
  utsname kernel{};
  ASSERT_EQ(uname(&kernel), 0);
  const char* expected = getenv("HOLDFAST_EXPECT_KERNEL");
  ASSERT_NE(expected, nullptr) << "HOLDFAST_EXPECT_KERNEL is not set: run through run.py";
  ASSERT_EQ(std::string(kernel.release).rfind(expected, 0), 0u) << "this is kernel " << kernel.release;

  const Image warm = MakeImage(1, {.small_files = 12, .large_bytes = 300'000});
  const std::string root = Mounted(warm, "warm");
  ASSERT_FALSE(root.empty());
  Readers always(warm, root, 1, Readers::Until::kStopped);
  int round = 0;
  for (int i = 0; i < kDeaths; ++i) {
    Round(++round, [&] {
      const pid_t killed = node_.KillWorker();
      ASSERT_GT(killed, 0);
      ASSERT_TRUE(node_.WaitRunning(kPatience, killed));
      node_.Reconnect();
    });
    if (HasFatalFailure()) return;
  }
  for (int i = 0; i < kUpgrades; ++i) {
    Round(++round, [&] {
      auto swap = node_.Control()->Upgrade("", /*force=*/true);
      ASSERT_TRUE(swap.ok()) << swap.status();
      EXPECT_TRUE(swap->changed);
    });
    if (HasFatalFailure()) return;
  }
  always.Stop();
  EXPECT_EQ(always.wrong(), 0u) << always.first_error();
  EXPECT_GT(always.read(), 0u);
  printf("beside them %llu reads past the page cache, %llu wrong\n",
         static_cast<unsigned long long>(always.read()), static_cast<unsigned long long>(always.wrong()));
}

}  // namespace
}  // namespace holdfast::test
