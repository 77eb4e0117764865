#include "supervisor/vault.h"

#include <fcntl.h>
#include <stdio.h>

#include "gtest/gtest.h"

namespace holdfast::supervisor {
namespace {

SharedFd DevNull() { return std::make_shared<UniqueFd>(open("/dev/null", O_RDWR | O_CLOEXEC)); }

TEST(IdFileTest, NumbersAreNeverReusedAcrossRestarts) {
  TempDir dir;
  uint64_t last = 0;
  for (int restart = 0; restart < 3; ++restart) {
    auto ids = IdFile::Open(dir.path() + "/ids", 4);
    ASSERT_TRUE(ids.ok()) << ids.status();
    for (int i = 0; i < 6; ++i) {
      auto next = ids->Next();
      ASSERT_TRUE(next.ok());
      EXPECT_GT(*next, last);
      last = *next;
    }
  }
}

TEST(IdFileTest, NumbersUsedWhileTheFileCouldNotBeWrittenAreNotGivenOutLater) {
  TempDir dir;
  std::string folder = dir.path() + "/full";
  ASSERT_TRUE(MakeDirs(folder).ok());
  auto ids = IdFile::Open(folder + "/ids", 2);
  ASSERT_TRUE(ids.ok());
  EXPECT_EQ(ids->Next(0).value(), 1u);
  EXPECT_EQ(ids->Next(1).value(), 2u);
  ASSERT_EQ(rename(folder.c_str(), (folder + "-away").c_str()), 0);
  EXPECT_FALSE(ids->Next(2).ok());  // the caller helps itself: 3, 4, 5
  EXPECT_FALSE(ids->Next(5).ok());
  ASSERT_EQ(rename((folder + "-away").c_str(), folder.c_str()), 0);
  EXPECT_EQ(ids->Next(5).value(), 6u);
  EXPECT_EQ(ids->Next(0).value(), 7u);
  EXPECT_EQ(ids->Next(0).value(), 8u);
  EXPECT_GT(IdFile::Open(folder + "/ids", 2)->Next().value(), 8u);
}

TEST(IdFileTest, ADamagedFileIsAnErrorNotAFreshStart) {
  TempDir dir;
  ASSERT_TRUE(WriteFileAtomic(dir.path() + "/ids", "12x\n").ok());
  EXPECT_FALSE(IdFile::Open(dir.path() + "/ids", 4).ok());
  ASSERT_TRUE(WriteFileAtomic(dir.path() + "/ids", "").ok());
  EXPECT_FALSE(IdFile::Open(dir.path() + "/ids", 4).ok());
}

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
