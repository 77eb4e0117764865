// The whole path on real parts: a lazily pulled image of two layers is prepared through the gRPC API, its
// overlay is mounted, and every byte is compared, while the worker is killed or upgraded.
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <functional>
#include <thread>

#include "common/clock.h"
#include "common/mutex.h"
#include "gtest/gtest.h"
#include "tests/integration/lazy_image.h"
#include "tests/integration/node.h"
#include "tests/support/registry_server.h"
#include "worker/ctl/inflight.h"

namespace holdfast::test {
namespace {

bool WaitUntil(const std::function<bool()>& condition) {
  for (int i = 0; i < 2000; ++i) {
    if (condition()) return true;  // it may be so for a moment only
    usleep(5000);
  }
  return false;
}

class WholePathTest : public ::testing::Test {
 protected:
  WholePathTest() : node_("[cache]\nfree_floor = 0\n[fetch]\nmiss_timeout = \"50s\"\n") {}

  // Returns the merged tree's folder.
  std::string PullAndMount(const Image& image, const std::string& name) {
    auto parent = PullLazily(node_.snapshots(), &registry_, image, name);
    EXPECT_TRUE(parent.ok()) << parent.status();
    if (!parent.ok()) return "";
    committed_.push_back(*parent);
    auto mounts = node_.snapshots()->Prepare("default/9/" + name, *parent, {});
    EXPECT_TRUE(mounts.ok()) << mounts.status();
    if (!mounts.ok()) return "";
    return node_.MountAll(*mounts);
  }

  // Reads every file of the image from several threads and counts what is wrong.
  void ReadEverything(const Image& image, const std::string& root) {
    std::vector<std::string> names;
    for (const auto& [name, content] : image.files) names.push_back(name);
    std::atomic<size_t> next{0};
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i) {
      threads.emplace_back([&] {
        for (size_t at = next++; at < names.size(); at = next++) {
          const std::string content = ReadWhole(root + "/" + names[at]);
          if (content == image.files.at(names[at])) continue;
          wrong_++;
          MutexLock lock(&mutex_);
          if (first_error_.empty()) first_error_ = names[at] + ": " + content.substr(0, 60);
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    finished_ = true;
  }

  uint64_t CarriedOver() {
    auto control = node_.Control();
    if (control == nullptr) return 0;
    auto status = control->Status();
    return status.ok() ? status->carried_over_total : 0;
  }

  // Requests that wait for content, as `holdfastctl inflight` sees them.
  size_t Waiting() {
    auto control = node_.Control();
    if (control == nullptr) return 0;
    auto ledgers = control->Ledgers();
    EXPECT_TRUE(ledgers.ok()) << ledgers.status();
    if (!ledgers.ok()) return 0;
    size_t waiting = 0;
    for (const ctl::LedgerFd& ledger : *ledgers) {
      auto requests = ctl::ReadLedgerFd(ledger.memory.get(), Clock::Real()->BootNanos());
      EXPECT_TRUE(requests.ok()) << requests.status();
      if (!requests.ok()) continue;
      for (const ctl::InflightRequest& request : *requests) waiting += request.executing ? 0 : 1;
    }
    return waiting;
  }

  RegistryServer registry_;
  Node node_;
  std::vector<std::string> committed_;
  std::atomic<int> wrong_{0};
  std::atomic<bool> finished_{false};
  Mutex mutex_;
  std::string first_error_ ABSL_GUARDED_BY(mutex_);
};

TEST_F(WholePathTest, AnImageIsReadBeforeItIsDownloadedAndEveryByteIsRight) {
  const Image image = MakeImage(1);
  const std::string root = PullAndMount(image, "plain");
  ASSERT_FALSE(root.empty());
  EXPECT_LT(registry_.body_bytes(), image.lower.blob.size() / 2) << "the layers were downloaded, not mounted";
  EXPECT_EQ(ReadWhole(root + "/etc/kept"), "kept");
  EXPECT_LT(registry_.body_bytes(), image.lower.blob.size() / 2) << "one small file brought the whole layer";

  struct stat st;
  ASSERT_EQ(stat((root + "/private").c_str(), &st), 0);
  EXPECT_EQ(st.st_mode & 07777, 0700u) << "an implied folder must not become public";
  EXPECT_EQ(st.st_uid, 1u);
  EXPECT_EQ(st.st_gid, 2u);
  EXPECT_EQ(access((root + "/etc/deleted").c_str(), F_OK), -1);
  char target[64] = {};
  EXPECT_EQ(readlink((root + "/etc/link").c_str(), target, sizeof target - 1), 4);
  EXPECT_STREQ(target, "kept");

  ReadEverything(image, root);
  EXPECT_EQ(wrong_, 0) << first_error_;
}

TEST_F(WholePathTest, KillingTheWorkerInTheMiddleOfReadsFailsNone) {
  registry_.SetDelay(10'000'000);
  const Image image = MakeImage(2);
  const std::string root = PullAndMount(image, "killed");
  ASSERT_FALSE(root.empty());
  std::thread reader([&] { ReadEverything(image, root); });
  int kills = 0;
  while (!finished_ && kills < 4) {
    const uint64_t before = registry_.blob_requests();
    registry_.WaitFor(
        [&] { return finished_ || (registry_.in_flight() > 0 && registry_.blob_requests() > before + 2); });
    if (finished_) break;
    if (node_.KillWorker() > 0) kills++;
    EXPECT_TRUE(node_.WaitRunning()) << "no successor after kill " << kills;
  }
  reader.join();
  EXPECT_EQ(wrong_, 0) << first_error_;
  EXPECT_GT(kills, 1) << "the reads were over before they could be disturbed";
  EXPECT_GT(CarriedOver(), 0u) << "no kill hit a request in flight";
}

TEST_F(WholePathTest, AnUpgradeInTheMiddleOfReadsFailsNeitherReadsNorCalls) {
  registry_.SetDelay(5'000'000);
  const Image image = MakeImage(3);
  const std::string root = PullAndMount(image, "upgraded");
  ASSERT_FALSE(root.empty());
  std::atomic<int> calls{0}, failed_calls{0};
  std::thread caller([&] {
    auto client = SnapshotsClient::Connect(node_.root() + "/run/snapshotter.sock");
    while (!finished_) {
      calls++;
      if (!client->Stat(committed_.front()).ok()) failed_calls++;
    }
  });
  std::thread reader([&] { ReadEverything(image, root); });
  uint64_t longest_pause = 0;
  for (int upgrade = 1; upgrade <= 3; ++upgrade) {
    // The registry falls silent, so that there are reads which wait while the worker is swapped.
    registry_.SetBlackHole(true);
    EXPECT_TRUE(registry_.WaitFor([&] { return registry_.in_flight() > 0; })) << "upgrade " << upgrade;
    EXPECT_TRUE(WaitUntil([&] { return Waiting() > 0; })) << "upgrade " << upgrade;
    auto result = node_.Control()->Upgrade("", /*force=*/true);
    EXPECT_TRUE(result.ok()) << result.status();
    registry_.SetBlackHole(false);
    if (!result.ok()) break;
    EXPECT_TRUE(result->changed);
    EXPECT_GT(result->swap.requests_carried_over, 0u) << "upgrade " << upgrade;
    EXPECT_FALSE(finished_) << "upgrade " << upgrade;
    longest_pause = std::max(longest_pause, result->swap.pause_nanos);
    const uint64_t before = registry_.blob_requests();
    registry_.WaitFor([&] { return finished_ || registry_.blob_requests() > before + 3; });
  }
  reader.join();
  caller.join();
  EXPECT_EQ(wrong_, 0) << first_error_;
  EXPECT_GT(calls, 0);
  EXPECT_EQ(failed_calls, 0);
  EXPECT_LT(longest_pause, 1'000'000'000u);
}

TEST_F(WholePathTest, AKilledWorkersSuccessorServesWithoutTheRegistryWhatWasRead) {
  const Image image = MakeImage(4);
  const std::string root = PullAndMount(image, "offline");
  ASSERT_FALSE(root.empty());
  ReadEverything(image, root);
  ASSERT_EQ(wrong_, 0) << first_error_;
  registry_.Stop();
  const uint64_t fetched = registry_.body_bytes();
  ASSERT_GT(node_.KillWorker(), 0);
  ASSERT_TRUE(node_.WaitRunning());
  // The kernel's caches would answer for a dead worker.
  ASSERT_TRUE(WriteFileAtomic(node_.root() + "/unused", "").ok());
  auto drop = OpenFile("/proc/sys/vm/drop_caches", O_WRONLY);
  ASSERT_TRUE(drop.ok());
  ASSERT_TRUE(PwriteFull(drop->get(), "3", 1, 0).ok());
  ReadEverything(image, root);
  EXPECT_EQ(wrong_, 0) << first_error_;
  EXPECT_EQ(registry_.body_bytes(), fetched);
}

TEST_F(WholePathTest, AReaderOutlivesTheSupervisorAndTheNextOneGoesOnWithItsWorker) {
  registry_.SetDelay(5'000'000);
  const Image image = MakeImage(6);
  const std::string root = PullAndMount(image, "orphaned");
  ASSERT_FALSE(root.empty());
  const std::string committed = committed_.front();
  std::thread reader([&] { ReadEverything(image, root); });
  EXPECT_TRUE(registry_.WaitFor([&] { return registry_.in_flight() > 0; }));
  const pid_t worker = node_.KillSupervisor();
  EXPECT_GT(worker, 0);
  EXPECT_FALSE(finished_) << "the reads were over before the supervisor died";
  EXPECT_TRUE(node_.StartAgain()) << "the living worker keeps the new supervisor from starting";
  reader.join();
  EXPECT_EQ(wrong_, 0) << first_error_;

  // The connection of old and a new one must work.
  auto old = node_.snapshots()->Prepare("default/9/after", committed, {});
  EXPECT_TRUE(old.ok()) << old.status();
  auto client = SnapshotsClient::Connect(node_.root() + "/run/snapshotter.sock");
  auto fresh = client->Prepare("default/10/after", committed, {});
  ASSERT_TRUE(fresh.ok()) << fresh.status();
  ReadEverything(image, node_.MountAll(*fresh));
  EXPECT_EQ(wrong_, 0) << first_error_;

  EXPECT_EQ(node_.WorkerPid(), worker) << "which is the owner again";
}

TEST_F(WholePathTest, RemovingEverythingLeavesNoMountAndStoppingLeavesNoProcess) {
  const Image image = MakeImage(5);
  ASSERT_FALSE(PullAndMount(image, "removed").empty());
  node_.UnmountAll();
  ASSERT_TRUE(node_.snapshots()->Remove("default/9/removed").ok());
  ASSERT_TRUE(node_.snapshots()->Remove(committed_.front()).ok());
  auto left = node_.snapshots()->List("");
  ASSERT_TRUE(left.ok());
  for (const std::string& name : *left) ASSERT_TRUE(node_.snapshots()->Remove(name).ok());
  ASSERT_TRUE(node_.snapshots()->Cleanup().ok());
  auto mounts = node_.Control()->Mounts();
  ASSERT_TRUE(mounts.ok()) << mounts.status();
  EXPECT_TRUE(mounts->empty());
  EXPECT_TRUE(node_.MountsLeft().empty());
  const pid_t worker = node_.WorkerPid();
  EXPECT_EQ(node_.Stop(), 0);
  EXPECT_NE(kill(worker, 0), 0) << "the worker outlived an orderly stop";
}

}  // namespace
}  // namespace holdfast::test
