#include "common/executable_store.h"

#include <sys/stat.h>
#include <unistd.h>

#include <chrono>

#include "gtest/gtest.h"

namespace holdfast {
namespace {

TEST(ExecutableStoreTest, ADamagedPrivateCopyIsReplaced) {
  TempDir dir;
  ExecutableStore store(dir.path() + "/bin", "worker");
  std::string program = dir.path() + "/program";
  ASSERT_TRUE(WriteFileAtomic(program, "#!/bin/true\n", 0755).ok());
  ASSERT_EQ(chmod(program.c_str(), 0755), 0);
  auto first = store.Add(program);
  ASSERT_TRUE(first.ok()) << first.status();
  std::string copy = dir.path() + "/bin/" + (*first)->sha256 + "/worker";
  struct stat info;
  ASSERT_EQ(stat(copy.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777, 0555u);
  ASSERT_TRUE(WriteFileAtomic(copy, "damaged").ok());
  auto second = store.Add(program);
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ(ReadFile(copy).value(), "#!/bin/true\n");
  store.Keep({});
  EXPECT_FALSE(PathExists(copy));
}

TEST(ExecutableStoreTest, WhatIsNoProgramIsRefusedWithTheReason) {
  TempDir dir;
  ExecutableStore store(dir.path() + "/bin", "worker");
  EXPECT_FALSE(store.Add(dir.path() + "/missing").ok());
  EXPECT_FALSE(store.Add(dir.path()).ok());
  ASSERT_EQ(mkfifo((dir.path() + "/fifo").c_str(), 0755), 0);
  EXPECT_FALSE(store.Add(dir.path() + "/fifo").ok());
  ASSERT_TRUE(WriteFileAtomic(dir.path() + "/plain", "x", 0644).ok());
  EXPECT_EQ(store.Add(dir.path() + "/plain").status().code(), absl::StatusCode::kPermissionDenied);
}

TEST(ExecutableStoreTest, WhatIsTooLargeForAProgramIsRefusedBeforeItIsRead) {
  TempDir dir;
  ExecutableStore store(dir.path() + "/bin", "worker");
  const std::string large = dir.path() + "/large";
  ASSERT_TRUE(WriteFileAtomic(large, "", 0755).ok());
  ASSERT_EQ(truncate(large.c_str(), 20ll << 30), 0);
  const auto before = std::chrono::steady_clock::now();
  const absl::Status status = store.Add(large).status();
  EXPECT_LT(std::chrono::steady_clock::now() - before, std::chrono::seconds(3));
  EXPECT_EQ(status.message(), large + " has 21474836480 bytes; a program may have at most 1 GiB");
  EXPECT_FALSE(PathExists(dir.path() + "/bin"));
  ASSERT_EQ(truncate(large.c_str(), static_cast<off_t>(kMostExecutableBytes) + 1), 0);
  EXPECT_EQ(store.Add(large).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace holdfast
