#include "common/mountinfo.h"

#include <algorithm>

#include "gtest/gtest.h"

namespace holdfast {
namespace {

TEST(MountInfoTest, EscapesAndOptionalFieldsAreUnderstood) {
  auto mounts = ParseMountInfo(
      "31 1 0:27 / /state/mnt/a\\040b ro,nodev shared:5 master:2 - fuse.holdfast holdfast ro,user_id=0\n"
      "nonsense\n"
      "32 1 0:28 / /merged rw - overlay overlay rw,lowerdir=/s/snapshots/2/fs:/s/snapshots/1/fs,upperdir=/u\n"
      "33 1 0:29 / /merged2 rw - overlay overlay rw,lowerdir=9/fs:8/fs,upperdir=10/fs\n");
  ASSERT_EQ(mounts.size(), 3u);
  EXPECT_EQ(mounts[0].path, "/state/mnt/a b");
  EXPECT_EQ(mounts[0].device, "0:27");
  EXPECT_EQ(mounts[0].type, "fuse.holdfast");
}

TEST(MountInfoTest, AFolderIsNotUnderOneThatOnlySharesItsBeginning) {
  EXPECT_TRUE(IsUnder("/a/b", "/a"));
  EXPECT_TRUE(IsUnder("/a", "/a"));
  EXPECT_TRUE(IsUnder("/a", "/"));
  EXPECT_FALSE(IsUnder("/ab", "/a"));
}

TEST(MountInfoTest, TheRootOfThisProcessIsListed) {
  auto mounts = ReadMountInfo();
  ASSERT_TRUE(mounts.ok()) << mounts.status();
  EXPECT_TRUE(
      std::any_of(mounts->begin(), mounts->end(), [](const MountInfo& mount) { return mount.path == "/"; }));
}

}  // namespace
}  // namespace holdfast
