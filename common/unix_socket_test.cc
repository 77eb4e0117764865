#include "common/unix_socket.h"

#include <sys/stat.h>

#include "gtest/gtest.h"

namespace holdfast {
namespace {

TEST(ListenUnixTest, AStaleSocketIsReplacedALivingOneAndAFileAreNot) {
  TempDir dir;
  std::string path = dir.path() + "/s";
  {
    auto first = ListenUnix(path);
    ASSERT_TRUE(first.ok()) << first.status();
    struct stat info;
    ASSERT_EQ(stat(path.c_str(), &info), 0);
    EXPECT_EQ(info.st_mode & 0777, 0600u);
    EXPECT_EQ(ListenUnix(path).status().code(), absl::StatusCode::kAlreadyExists);
  }
  EXPECT_TRUE(ListenUnix(path).ok());
  ASSERT_TRUE(WriteFileAtomic(dir.path() + "/file", "x").ok());
  EXPECT_EQ(ListenUnix(dir.path() + "/file").status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_FALSE(ListenUnix(dir.path() + "/" + std::string(200, 'x')).ok());
}

}  // namespace
}  // namespace holdfast
