#include "supervisor/vault.h"

#include <fcntl.h>

#include "gtest/gtest.h"

namespace holdfast::supervisor {
namespace {

SharedFd DevNull() { return std::make_shared<UniqueFd>(open("/dev/null", O_RDWR | O_CLOEXEC)); }

class VaultTest : public ::testing::Test {
 protected:
  uint64_t Live(const std::string& path, const std::string& blob = "") {
    uint64_t id = vault_.Allocate(path, blob, 1).value();
    SetLive(id, DevNull());
    return id;
  }
  void SetLive(uint64_t id, SharedFd device) {
    vault_.Find(id)->state = MountState::kLive;
    vault_.Find(id)->device = std::move(device);
  }
  TempDir dir_;
  Vault vault_{IdFile::Open(dir_.path() + "/ids", 100).value()};
};

TEST_F(VaultTest, PagesHoldLiveAndDetachedMountsInOrder) {
  uint64_t a = Live("/a");
  ASSERT_TRUE(vault_.Allocate("/mounting", "", 1).ok());
  uint64_t b = Live("/b");
  uint64_t c = Live("/c");
  vault_.Find(b)->state = MountState::kDetached;
  bool more = false;
  auto page = vault_.Page(0, 2, &more);
  ASSERT_EQ(page.size(), 2u);
  EXPECT_TRUE(more);
  EXPECT_EQ(page[0]->id, a);
  EXPECT_EQ(page[1]->id, b);
  EXPECT_EQ(page[1]->state, MountState::kDetached);
  page = vault_.Page(b, 2, &more);
  ASSERT_EQ(page.size(), 1u);
  EXPECT_FALSE(more);
  EXPECT_EQ(page[0]->id, c);
}

TEST_F(VaultTest, APathIsMountedOnceUntilItIsDetached) {
  uint64_t a = Live("/a");
  EXPECT_FALSE(vault_.Allocate("/a", "", 1).ok());
  vault_.Find(a)->state = MountState::kDetached;
  EXPECT_TRUE(vault_.Allocate("/a", "", 1).ok());
  EXPECT_FALSE(vault_.Allocate("/a", "", 1).ok()) << "being mounted";
}

TEST_F(VaultTest, CountsMountsByState) {
  Live("/a");
  EXPECT_EQ(vault_.Count(MountState::kMounting), 0u);
  uint64_t b = vault_.Allocate("/b", "", 1).value();
  EXPECT_EQ(vault_.Count(MountState::kMounting), 1u);
  SetLive(b, DevNull());
  EXPECT_EQ(vault_.Count(MountState::kMounting), 0u);
}

TEST_F(VaultTest, AMountIsGoneWhenItsDescriptorPollsAnError) {
  uint64_t live = Live("/live");
  uint64_t gone = vault_.Allocate("/gone", "", 1).value();
  // A /dev/fuse that is not mounted polls POLLERR, like one whose superblock is gone.
  auto fuse = std::make_shared<UniqueFd>(open("/dev/fuse", O_RDWR | O_CLOEXEC));
  ASSERT_TRUE(fuse->valid());
  SetLive(gone, fuse);
  EXPECT_EQ(vault_.TakeGone(), std::vector<uint64_t>{gone});
  EXPECT_EQ(vault_.Find(gone), nullptr);
  EXPECT_NE(vault_.Find(live), nullptr);
  EXPECT_TRUE(vault_.TakeGone().empty());
}

}  // namespace
}  // namespace holdfast::supervisor
