#include "common/io.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "gtest/gtest.h"

namespace holdfast {
namespace {

TEST(IoTest, AnAtomicWriteReplacesTheFileAndLeavesNoTemporary) {
  TempDir dir;
  std::string path = dir.path() + "/a";
  ASSERT_TRUE(WriteFileAtomic(path, "one").ok());
  ASSERT_TRUE(WriteFileAtomic(path, "two").ok());
  EXPECT_EQ(*ReadFile(path), "two");
  ASSERT_EQ(unlink(path.c_str()), 0);
  EXPECT_EQ(rmdir(dir.path().c_str()), 0) << "something else is left in the folder";
  ASSERT_EQ(mkdir(dir.path().c_str(), 0700), 0);
}

TEST(IoTest, AFailedAtomicWriteNamesThePathAndKeepsTheErrno) {
  absl::Status status = WriteFileAtomic("/nonexistent-folder/a", "x");
  EXPECT_EQ(StatusErrno(status), ENOENT);
  EXPECT_NE(std::string(FromAbsl(status.message())).find("/nonexistent-folder/a"), std::string::npos);
}

TEST(IoTest, AReadPastTheEndIsAnErrorNotZeros) {
  TempDir dir;
  ASSERT_TRUE(WriteFileAtomic(dir.path() + "/a", "12345").ok());
  auto fd = OpenFile(dir.path() + "/a", O_RDONLY);
  ASSERT_TRUE(fd.ok());
  char buffer[8];
  EXPECT_EQ(PreadFull(fd->get(), buffer, 8, 0).code(), absl::StatusCode::kOutOfRange);
  EXPECT_TRUE(PreadFull(fd->get(), buffer, 5, 0).ok());
}

TEST(IoTest, RemovingATreeDoesNotFollowSymlinks) {
  TempDir outside, dir;
  ASSERT_TRUE(WriteFileAtomic(outside.path() + "/precious", "x").ok());
  ASSERT_TRUE(MakeDirs(dir.path() + "/t/a/b").ok());
  ASSERT_EQ(symlink(outside.path().c_str(), (dir.path() + "/t/a/link").c_str()), 0);
  ASSERT_TRUE(RemoveTree(dir.path() + "/t").ok());
  EXPECT_FALSE(PathExists(dir.path() + "/t"));
  EXPECT_TRUE(PathExists(outside.path() + "/precious"));
}

}  // namespace
}  // namespace holdfast
