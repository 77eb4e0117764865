#include "worker/snapshot/folders.h"

#include <fcntl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>

#include "common/io.h"
#include "gtest/gtest.h"
#include "worker/metadata/row_codec.h"

namespace holdfast::snapshot {
namespace {

const std::atomic<bool> kGo{false};

void Touch(const std::string& path, size_t size = 0) {
  UniqueFd fd = OpenFile(path, O_WRONLY | O_CREAT, 0644).value();
  std::string content(size, 'x');
  ASSERT_TRUE(PwriteFull(fd.get(), content.data(), content.size(), 0).ok());
}

TEST(Folders, AFolderDescribesItself) {
  TempDir dir;
  Folders folders(dir.path());
  ASSERT_TRUE(folders.Init().ok());
  metadata::SnapshotRow row;
  row.key = "default/1/a key";
  row.id = 7;
  ASSERT_TRUE(folders.Create(row, "").ok());
  EXPECT_TRUE(absl::IsAlreadyExists(folders.Create(row, "")));
  auto copy = metadata::DecodeRow(ReadFile(folders.Folder(7) + "/snapshot.json").value());
  ASSERT_TRUE(copy.ok()) << copy.status();
  EXPECT_EQ(copy->key, row.key);
  EXPECT_EQ(folders.Ids().value(), std::vector<uint64_t>{7});
}

TEST(Folders, ModesDoNotDependOnTheUmask) {
  TempDir dir;
  Folders folders(dir.path());
  ASSERT_TRUE(folders.Init().ok());
  metadata::SnapshotRow row;
  row.key = "k";
  row.id = 1;
  mode_t old = umask(0077);
  absl::Status status = folders.Create(row, "");
  umask(old);
  ASSERT_TRUE(status.ok()) << status;
  struct stat st;
  ASSERT_EQ(lstat(folders.Fs(1).c_str(), &st), 0);
  EXPECT_EQ(st.st_mode & 07777, 0755u);
  ASSERT_EQ(lstat(folders.Work(1).c_str(), &st), 0);
  EXPECT_EQ(st.st_mode & 07777, 0711u);
}

TEST(Folders, UsageCountsHardLinksOnceAndStaysOnTheFileSystem) {
  TempDir dir;
  Touch(dir.path() + "/a", 8192);
  ASSERT_EQ(link((dir.path() + "/a").c_str(), (dir.path() + "/b").c_str()), 0);
  ASSERT_TRUE(MakeDirs(dir.path() + "/m").ok());
  TreeUsage before = Folders::Scan(dir.path(), 0, kGo);
  EXPECT_TRUE(before.complete);
  EXPECT_EQ(before.inodes, 3u);
  EXPECT_GE(before.bytes, 8192u);
  EXPECT_LT(before.bytes, 2 * 8192u + 4096u);
  ASSERT_EQ(mount("tmpfs", (dir.path() + "/m").c_str(), "tmpfs", 0, "size=64k"), 0);
  Touch(dir.path() + "/m/more");
  TreeUsage with_mount = Folders::Scan(dir.path(), 0, kGo);
  umount2((dir.path() + "/m").c_str(), MNT_DETACH);
  EXPECT_EQ(with_mount.inodes, 2u);
}

TEST(Folders, UsageStopsWhenCancelledOrOutOfTime) {
  TempDir dir;
  for (int i = 0; i < 10; i++) Touch(dir.path() + "/" + std::to_string(i));
  const std::atomic<bool> stop{true};
  EXPECT_FALSE(Folders::Scan(dir.path(), 0, stop).complete);
  EXPECT_FALSE(Folders::Scan(dir.path(), 1, kGo).complete);
}

TEST(RemoveFolder, RemovesATreeDeeperThanAPathMayBe) {
  TempDir dir;
  std::string top = dir.path() + "/top";
  ASSERT_TRUE(MakeDirs(top).ok());
  UniqueFd at = OpenFile(top, O_RDONLY | O_DIRECTORY).value();
  for (int i = 0; i < 3000; i++) {
    ASSERT_EQ(mkdirat(at.get(), "nested-folder", 0700), 0);
    at.Reset(openat(at.get(), "nested-folder", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    ASSERT_TRUE(at.valid());
  }
  at.Reset();
  EXPECT_TRUE(RemoveFolder(top, kGo).ok());
  EXPECT_FALSE(PathExists(top));
  EXPECT_TRUE(RemoveFolder(top, kGo).ok()) << "missing is fine";
}

TEST(RemoveFolder, NeverEntersAMountNotEvenABindOfTheSameDisk) {
  TempDir dir;
  std::string precious = dir.path() + "/precious", top = dir.path() + "/top";
  ASSERT_TRUE(MakeDirs(precious).ok());
  ASSERT_TRUE(MakeDirs(top + "/fs").ok());
  Touch(precious + "/file");
  ASSERT_EQ(mount(precious.c_str(), (top + "/fs").c_str(), nullptr, MS_BIND, nullptr), 0);
  absl::Status status = RemoveFolder(top, kGo);
  umount2((top + "/fs").c_str(), MNT_DETACH);
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_TRUE(PathExists(precious + "/file"));
  EXPECT_TRUE(RemoveFolder(top, kGo).ok());
}

TEST(RemoveFolder, DoesNotFollowLinksAndCanBeStopped) {
  TempDir dir;
  std::string precious = dir.path() + "/precious", top = dir.path() + "/top";
  ASSERT_TRUE(MakeDirs(precious).ok());
  ASSERT_TRUE(MakeDirs(top).ok());
  Touch(precious + "/file");
  ASSERT_EQ(symlink(precious.c_str(), (top + "/link").c_str()), 0);
  const std::atomic<bool> stop{true};
  EXPECT_TRUE(absl::IsCancelled(RemoveFolder(top, stop)));
  EXPECT_TRUE(RemoveFolder(top, kGo).ok());
  EXPECT_TRUE(PathExists(precious + "/file"));
}

}  // namespace
}  // namespace holdfast::snapshot
