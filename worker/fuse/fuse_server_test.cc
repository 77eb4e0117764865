// One server on real mounts: what a layer holds reads right, and a miss stops nobody but its reader.
#include <dirent.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <future>
#include <set>

#include "common/urgency.h"
#include "gtest/gtest.h"
#include "worker/fuse/fuse_bench.h"

namespace holdfast::fuse {
namespace {

constexpr uint64_t kRoot = layer::kRootNode;
constexpr uint64_t kMiB = 1 << 20;
constexpr uint32_t kManyFiles = 5000;

// In a reader: ends it with the line number of what is not so.
#define EXIT_UNLESS(condition) \
  if (!(condition)) return __LINE__ % 250 + 1

// Node ids are given in order of adding.
enum Node : uint64_t {
  kFolder = 2,
  kBig,
  kMemory,
  kMissing,
  kEmpty,
  kSparse,
  kSetuid,
  kWhiteout,
  kBlock,
  kFifo,
  kLink,
  kLong,
  kOpaque,
  kMany,
  kTruncated
};
const std::string kLongName(255, 'n');

std::shared_ptr<FakeIndex> MakeIndex(uint64_t) {
  auto index = std::make_shared<FakeIndex>();
  index->Add(kRoot, "folder", S_IFDIR | S_ISVTX | 0751);
  index->Add(kRoot, "big", S_IFREG | 0644, 8 * kMiB + 777);
  index->Add(kRoot, "memory", S_IFREG | 0644, 100'000);
  index->Add(kRoot, "missing", S_IFREG | 0644, 16 * kMiB);
  index->Add(kRoot, "empty", S_IFREG | 0600, 0);
  index->Add(kRoot, "sparse", S_IFREG | 0644, 1ull << 40);
  index->Add(kRoot, "setuid", S_IFREG | S_ISUID | S_ISGID | 0755, 10);
  index->Add(kRoot, "whiteout", S_IFCHR);
  index->Add(kRoot, "block", S_IFBLK | 0660);
  index->Add(kRoot, "fifo", S_IFIFO | 0600);
  index->AddSymlink(kRoot, "link", "folder/../some where");
  index->Add(kFolder, kLongName, S_IFREG | 0644, 5);
  index->Add(kRoot, "opaque", S_IFDIR | 0755);
  index->Add(kRoot, "many", S_IFDIR | 0755);
  index->Add(kRoot, "truncated", S_IFREG | 0644, 4 * kMiB);
  index->mutable_node(kBlock).rdev = static_cast<uint32_t>(makedev(8, 17));
  index->mutable_node(kSetuid).uid = 1000;
  index->mutable_node(kSetuid).gid = 1001;
  index->mutable_node(kOpaque).flags = layer::kNodeOpaque;
  index->mutable_node(kFolder).nlink = 2;
  index->AddHardLink(kFolder, "hard", kBig);
  index->SetXattr(kSetuid, "user.one", "value");
  index->SetXattr(kSetuid, "security.capability", std::string("\0\0\0\2", 4) + std::string(16, '\0'));
  for (uint32_t i = 0; i < kManyFiles; i++) index->Add(kMany, "file-" + std::to_string(i), S_IFREG | 0644, i);
  return index;
}

void Prepare(uint64_t, FakeLayer& layer) {
  layer.Store(kBig, Stored::kFile);
  layer.Store(kMemory, Stored::kMemory);
  layer.Store(kSparse, Stored::kZeros);
  layer.Store(kLong, Stored::kMemory);
  layer.Store(kTruncated, Stored::kTruncated);
}

class FuseServerTest : public testing::Test {
 protected:
  ServerSetup NewSetup() {
    ServerSetup setup;
    setup.index = MakeIndex;
    setup.prepare = Prepare;
    return setup;
  }
  // Runs a reader in its own process; 0 = all was as expected.
  std::unique_ptr<ChildProcess> Reader(const std::function<int()>& body) {
    return std::make_unique<ChildProcess>([&] {
      bench_.CloseDevices();
      return body();
    });
  }
  int Read(const std::function<int()>& body, double seconds = 20) { return Reader(body)->Wait(seconds); }

  Bench bench_;
};

TEST_F(FuseServerTest, EveryKindOfObjectLooksAsTheIndexSays) {
  std::string root = bench_.Mount().path;
  ServerProcess server(bench_, NewSetup());
  ASSERT_EQ(server.Call("start"), "ok");
  EXPECT_EQ(
      Read([&] {
        struct stat st;
        EXIT_UNLESS(lstat((root + "/folder").c_str(), &st) == 0);
        EXIT_UNLESS(st.st_mode == (S_IFDIR | S_ISVTX | 0751) && st.st_nlink == 2 && st.st_ino == kFolder);
        EXIT_UNLESS(lstat((root + "/big").c_str(), &st) == 0);
        EXIT_UNLESS(st.st_size == 8 * kMiB + 777 && st.st_nlink == 2 && st.st_blksize == 4096);
        EXIT_UNLESS(st.st_mtim.tv_sec == 1'600'000'000 && st.st_mtim.tv_nsec == 123 && st.st_blocks > 0);
        ino_t inode = st.st_ino;
        EXIT_UNLESS(lstat((root + "/folder/hard").c_str(), &st) == 0 && st.st_ino == inode);
        EXIT_UNLESS(lstat((root + "/setuid").c_str(), &st) == 0);
        EXIT_UNLESS(st.st_mode == (S_IFREG | S_ISUID | S_ISGID | 0755) && st.st_uid == 1000 &&
                    st.st_gid == 1001);
        EXIT_UNLESS(lstat((root + "/whiteout").c_str(), &st) == 0 && S_ISCHR(st.st_mode) && st.st_rdev == 0);
        EXIT_UNLESS(lstat((root + "/block").c_str(), &st) == 0 && S_ISBLK(st.st_mode) &&
                    st.st_rdev == makedev(8, 17));
        EXIT_UNLESS(lstat((root + "/fifo").c_str(), &st) == 0 && S_ISFIFO(st.st_mode));
        EXIT_UNLESS(lstat((root + "/empty").c_str(), &st) == 0 && st.st_size == 0);
        EXIT_UNLESS(lstat((root + "/folder/" + kLongName).c_str(), &st) == 0 && st.st_size == 5);
        EXIT_UNLESS(lstat((root + "/link").c_str(), &st) == 0 && S_ISLNK(st.st_mode) && st.st_size == 20);
        char target[100];
        ssize_t n = readlink((root + "/link").c_str(), target, sizeof target);
        EXIT_UNLESS(n == 20 && std::string(target, 20) == "folder/../some where");
        EXIT_UNLESS(lstat((root + "/no such name").c_str(), &st) != 0 && errno == ENOENT);
        EXIT_UNLESS(lstat((root + "/big/x").c_str(), &st) != 0 && errno == ENOTDIR);
        EXIT_UNLESS(open((root + "/big").c_str(), O_RDWR) < 0 && errno == EROFS);
        EXIT_UNLESS(mkdir((root + "/new").c_str(), 0700) != 0 && errno == EROFS);
        struct statvfs fs;
        EXIT_UNLESS(statvfs(root.c_str(), &fs) == 0 && fs.f_bsize == 4096 && fs.f_namemax == 255);
        EXIT_UNLESS(fs.f_blocks == 256 && fs.f_bfree == 0 && fs.f_files > 5000);
        int fd = open(root.c_str(), O_RDONLY | O_DIRECTORY);
        EXIT_UNLESS(ioctl(fd, _IO('h', 99)) != 0 && errno == ENOTTY);
        return 0;
      }),
      0);
}

TEST_F(FuseServerTest, XattrsAreThoseOfTheIndexAndTheOpaqueMarkIsAsTheMountAsks) {
  MountFlags user;
  user.opaque_user = true;
  std::string root = bench_.Mount().path, root_user = bench_.Mount(user).path;
  ServerProcess server(bench_, NewSetup());
  ASSERT_EQ(server.Call("start"), "ok");
  EXPECT_EQ(
      Read([&] {
        char value[100];
        std::string path = root + "/setuid";
        EXIT_UNLESS(getxattr(path.c_str(), "user.one", value, sizeof value) == 5 &&
                    std::string(value, 5) == "value");
        EXIT_UNLESS(getxattr(path.c_str(), "user.one", nullptr, 0) == 5);
        EXIT_UNLESS(getxattr(path.c_str(), "user.one", value, 2) < 0 && errno == ERANGE);
        EXIT_UNLESS(getxattr(path.c_str(), "security.capability", value, sizeof value) == 20 &&
                    value[3] == 2);
        EXIT_UNLESS(getxattr(path.c_str(), "user.two", value, sizeof value) < 0 && errno == ENODATA);
        ssize_t n = listxattr(path.c_str(), value, sizeof value);
        EXIT_UNLESS(n == 29 && std::string(value, 29) == std::string("security.capability\0user.one\0", 29));
        EXIT_UNLESS(listxattr(path.c_str(), nullptr, 0) == 29);
        EXIT_UNLESS(listxattr(path.c_str(), value, 5) < 0 && errno == ERANGE);
        path = root + "/opaque";
        EXIT_UNLESS(getxattr(path.c_str(), "trusted.overlay.opaque", value, sizeof value) == 1 &&
                    value[0] == 'y');
        EXIT_UNLESS(getxattr(path.c_str(), "user.overlay.opaque", value, sizeof value) < 0 &&
                    errno == ENODATA);
        path = root_user + "/opaque";
        EXIT_UNLESS(getxattr(path.c_str(), "user.overlay.opaque", value, sizeof value) == 1 &&
                    value[0] == 'y');
        EXIT_UNLESS(listxattr(path.c_str(), value, sizeof value) == 20);
        EXIT_UNLESS(getxattr((root + "/folder").c_str(), "trusted.overlay.opaque", value, 9) < 0 &&
                    errno == ENODATA);
        return 0;
      }),
      0);
}

TEST_F(FuseServerTest, AFolderOfFiveThousandNamesIsListedWhole) {
  std::string root = bench_.Mount().path;
  ServerProcess server(bench_, NewSetup());
  ASSERT_EQ(server.Call("start"), "ok");
  EXPECT_EQ(Read([&] {
              DIR* dir = opendir((root + "/many").c_str());
              EXIT_UNLESS(dir != nullptr);
              std::set<std::string> names;
              while (dirent* entry = readdir(dir)) {
                std::string name = entry->d_name;
                EXIT_UNLESS(names.insert(name).second);
                if (name == ".") EXIT_UNLESS(entry->d_ino == kMany && entry->d_type == DT_DIR);
                if (name == "..") EXIT_UNLESS(entry->d_type == DT_DIR);
                if (name[0] == 'f') EXIT_UNLESS(entry->d_type == DT_REG);
              }
              EXIT_UNLESS(names.size() == kManyFiles + 2 && names.contains(".") && names.contains(".."));
              struct stat st;
              EXIT_UNLESS(stat((root + "/many/file-4321").c_str(), &st) == 0 && st.st_size == 4321);
              // From a cookie in the middle on, as a program that seeks does.
              rewinddir(dir);
              for (int i = 0; i < 1000; i++) readdir(dir);
              long position = telldir(dir);
              std::string next = readdir(dir)->d_name;
              seekdir(dir, position);
              EXIT_UNLESS(next == readdir(dir)->d_name);
              return 0;
            }),
            0);
}

TEST_F(FuseServerTest, FilesReadRightFromFilesMemoryZerosAndFetches) {
  std::string root = bench_.Mount().path;
  ServerProcess server(bench_, NewSetup());
  ASSERT_EQ(server.Call("start"), "ok");
  EXPECT_EQ(Read([&] { return CheckFile(root + "/big", kBig, 0, 8 * kMiB + 777); }), 0);
  // The largest request there is, from an odd place in the content file.
  EXPECT_EQ(Read([&] { return CheckFile(root + "/big", kBig, kMiB, 4 * kMiB, true); }), 0);
  EXPECT_EQ(Read([&] { return CheckFile(root + "/folder/hard", kBig, 12345, 100); }), 0);
  EXPECT_EQ(Read([&] { return CheckFile(root + "/memory", kMemory, 0, 100'000); }), 0);
  EXPECT_EQ(Read([&] { return CheckFile(root + "/folder/" + kLongName, kLong, 0, 5); }), 0);
  EXPECT_EQ(server.Number("fetches 100"), 0u);
  EXPECT_EQ(Read([&] { return CheckFile(root + "/missing", kMissing, 0, 3 * kMiB); }), 0);
  EXPECT_GT(server.Number("fetches 100"), 0u);
  EXPECT_EQ(Read([&] {
              char buffer[8192];
              int fd = open((root + "/empty").c_str(), O_RDONLY);
              EXIT_UNLESS(read(fd, buffer, 100) == 0);
              fd = open((root + "/memory").c_str(), O_RDONLY | O_DIRECT);
              EXIT_UNLESS(pread(fd, buffer, 8192, 98304) == 100'000 - 98304);
              EXIT_UNLESS(pread(fd, buffer, 8192, 1 << 20) == 0);
              fd = open((root + "/sparse").c_str(), O_RDONLY);
              for (uint64_t at : {uint64_t{0}, uint64_t{1} << 35, (uint64_t{1} << 40) - 4096}) {
                buffer[17] = 'x';
                EXIT_UNLESS(pread(fd, buffer, 4096, static_cast<off_t>(at)) == 4096 && buffer[17] == 0);
              }
              return 0;
            }),
            0);
  EXPECT_EQ(server.Stats()["errors"], 0u);
  EXPECT_TRUE(Eventually([&] { return server.Stats()["pending"] == 0; }));
}

TEST_F(FuseServerTest, AContentFileThatIsTooShortIsFetchedAgainAndNoBrokenReplyIsSent) {
  std::string root = bench_.Mount().path;
  ServerProcess server(bench_, NewSetup());
  ASSERT_EQ(server.Call("start"), "ok");
  EXPECT_EQ(Read([&] { return CheckFile(root + "/truncated", kTruncated, 0, 4 * kMiB, true); }), 0);
  EXPECT_GT(server.Number("fetches 100"), 0u);
  EXPECT_EQ(Read([&] { return CheckFile(root + "/big", kBig, 0, kMiB); }), 0);
}

TEST_F(FuseServerTest, EnosysAnswersMakeTheKernelStopAsking) {
  MountFlags flags;
  flags.zero_open = flags.no_xattrs = true;
  std::string root = bench_.Mount(flags).path;
  ServerProcess server(bench_, NewSetup());
  ASSERT_EQ(server.Call("start"), "ok");
  auto read_all = [&] {
    char value[10];
    EXIT_UNLESS(getxattr((root + "/setuid").c_str(), "user.one", value, sizeof value) < 0 &&
                errno == EOPNOTSUPP);
    EXIT_UNLESS(listxattr((root + "/setuid").c_str(), nullptr, 0) == 0);
    return CheckFile(root + "/memory", kMemory, 0, 100'000);
  };
  EXPECT_EQ(Read(read_all), 0);
  uint64_t before = server.Stats()["requests"];
  EXPECT_EQ(Read(read_all), 0);
  EXPECT_EQ(server.Stats()["requests"], before + 1);  // of the second run only LISTXATTR reached the server
}

TEST_F(FuseServerTest, AFailedFetchIsEioForItsReader) {
  std::string root = bench_.Mount().path;
  ServerProcess server(bench_, NewSetup());
  ASSERT_EQ(server.Call("hold 100 1"), "ok");
  ASSERT_EQ(server.Call("start"), "ok");
  auto reader = Reader([&] { return CheckFile(root + "/missing", kMissing, 0, 4096, true); });
  ASSERT_TRUE(Eventually([&] { return server.Number("waiting 100") == 1; }));
  ASSERT_EQ(server.Call("fail 100"), "ok");
  EXPECT_EQ(reader->Wait(10), EIO);
  EXPECT_TRUE(Eventually([&] { return server.Stats()["errors"] == 1; }));
}

TEST_F(FuseServerTest, ALayerThatCannotBeOpenedIsEioAndTriedAgain) {
  std::string root = bench_.Mount().path;
  ServerSetup setup = NewSetup();
  setup.fail_opens = 1;
  ServerProcess server(bench_, setup);
  ASSERT_EQ(server.Call("start"), "ok");
  EXPECT_EQ(Read([&] { return CheckFile(root + "/memory", kMemory, 0, 10); }), EIO);
  EXPECT_TRUE(
      Eventually([&] { return Read([&] { return CheckFile(root + "/memory", kMemory, 0, 10); }) == 0; }, 5));
}

TEST_F(FuseServerTest, WaitingReadersOnOneMountLeaveTheOthersAlone) {
  std::string a = bench_.Mount().path, b = bench_.Mount().path;
  ServerSetup setup = NewSetup();
  setup.options.max_pending_per_mount = 8;
  ServerProcess server(bench_, setup);
  ASSERT_EQ(server.Call("hold 100 1"), "ok");
  ASSERT_EQ(server.Call("start"), "ok");
  std::vector<std::unique_ptr<ChildProcess>> readers;
  for (uint64_t i = 0; i < 80; i++) {
    readers.push_back(Reader([&] { return CheckFile(a + "/missing", kMissing, i * 4096, 4096, true); }));
  }
  ASSERT_TRUE(Eventually([&] { return server.Stats()["pending"] >= 8; }));
  auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(Read([&] { return CheckFile(b + "/big", kBig, 0, 8 * kMiB); }, 5), 0);
  EXPECT_EQ(Read([&] { return CheckFile(b + "/missing", kMissing, 0, kMiB); }, 5), 0);
  auto took =
      std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() - start).count();
  // At the cap: 8, one a thread that was under way, and what comes in while looking for INTERRUPTs (5 a
  // second).
  EXPECT_LE(server.Stats()["pending"], 8u + 2 + 10 + static_cast<uint64_t>(took) / 100);
  ASSERT_EQ(server.Call("hold 100 0"), "ok");
  ASSERT_EQ(server.Call("release 100"), "ok");
  for (auto& reader : readers) EXPECT_EQ(reader->Wait(20), 0);
  EXPECT_TRUE(Eventually([&] { return server.Stats()["pending"] == 0; }));
}

TEST_F(FuseServerTest, AKilledReaderWhoseReadWaitsIsGoneWithinASecond) {
  std::string root = bench_.Mount().path;
  ServerSetup setup = NewSetup();
  setup.options.max_pending_per_mount = 4;
  ServerProcess server(bench_, setup);
  ASSERT_EQ(server.Call("hold 100 1"), "ok");
  ASSERT_EQ(server.Call("start"), "ok");
  auto reader = Reader([&] { return CheckFile(root + "/missing", kMissing, 0, 4096, true); });
  ASSERT_TRUE(Eventually([&] { return server.Number("waiting 100") == 1; }));
  reader->Signal(SIGKILL);
  EXPECT_EQ(reader->Wait(1), 1000 + SIGKILL);
  EXPECT_TRUE(Eventually([&] { return server.Stats()["interrupted"] == 1; }));
  EXPECT_TRUE(Eventually([&] { return server.Stats()["pending"] == 0; }));
  // Also when the mount is at its cap and no longer read.
  std::vector<std::unique_ptr<ChildProcess>> readers;
  for (uint64_t i = 1; i <= 12; i++) {
    readers.push_back(Reader([&] { return CheckFile(root + "/missing", kMissing, i * 4096, 4096, true); }));
  }
  ASSERT_TRUE(Eventually([&] { return server.Stats()["pending"] >= 4; }));
  for (auto& r : readers) r->Signal(SIGKILL);
  for (auto& r : readers) EXPECT_EQ(r->Wait(1), 1000 + SIGKILL);
  // The late answers of the fetches disturb nobody.
  ASSERT_EQ(server.Call("release 100"), "ok");
  EXPECT_EQ(Read([&] { return CheckFile(root + "/memory", kMemory, 0, 100); }), 0);
}

TEST_F(FuseServerTest, AnInterruptThatComesWhileTheReadExecutesCountsOnceItWaits) {
  std::string root = bench_.Mount().path;
  ServerSetup setup = NewSetup();
  setup.faults = "fuse.record_filled=block";
  ServerProcess server(bench_, setup);
  ASSERT_EQ(server.Call("hold 100 1"), "ok");
  ASSERT_EQ(server.Call("start"), "ok");
  auto reader = Reader([&] { return CheckFile(root + "/missing", kMissing, 0, 4096, true); });
  ASSERT_EQ(server.Call("fired fuse.record_filled 1"), "ok");
  uint64_t before = server.Stats()["requests"];
  reader->Signal(SIGKILL);
  ASSERT_TRUE(Eventually([&] { return server.Stats()["requests"] > before; }));
  ASSERT_EQ(server.Call("unblock fuse.record_filled"), "ok");
  EXPECT_EQ(reader->Wait(1), 1000 + SIGKILL);
  EXPECT_TRUE(Eventually([&] { return server.Stats()["interrupted"] == 1; }));
  EXPECT_EQ(bench_.ledgers[1]->record(0)->state, uint32_t{HF_RECORD_FREE});
}

TEST_F(FuseServerTest, AnUnmountedFileSystemIsReportedAndOthersGoOn) {
  std::string root = bench_.Mount().path;
  std::string other = bench_.Mount().path;
  ServerProcess server(bench_, NewSetup());
  ASSERT_EQ(server.Call("start"), "ok");
  EXPECT_EQ(Read([&] { return CheckFile(root + "/memory", kMemory, 0, 100); }), 0);
  bench_.Unmount(bench_.mounts[100]);
  EXPECT_TRUE(Eventually([&] { return server.Call("ended") == "ok 100"; }));
  EXPECT_EQ(server.Call("remove 100"), "ok");
  EXPECT_EQ(Read([&] { return CheckFile(other + "/memory", kMemory, 0, 100); }), 0);
  EXPECT_EQ(server.Call("ended"), "ok 100");
}

TEST_F(FuseServerTest, InAHurryThePoolIsUrgentUntilItIsOverOrParked) {
  const int all = std::async(std::launch::async, [] { return BecomeUrgent().ok(); }).get() ? 2 : 0;
  std::string root = bench_.Mount().path;
  ServerProcess server(bench_, NewSetup());
  ASSERT_EQ(server.Call("start"), "ok");
  ASSERT_TRUE(
      Eventually([&] { return server.ThreadNamed("fuse-0") > 0 && server.ThreadNamed("fuse-1") > 0; }));
  auto urgent_threads = [&] {
    return IsUrgent(server.ThreadNamed("fuse-0")) + IsUrgent(server.ThreadNamed("fuse-1"));
  };
  EXPECT_EQ(urgent_threads(), 0);
  ASSERT_EQ(server.Call("hurry 60000"), "ok");
  EXPECT_TRUE(Eventually([&] { return urgent_threads() == all; })) << "also those that sleep, or just begin";
  EXPECT_EQ(Read([&] { return CheckFile(root + "/memory", kMemory, 0, 100); }), 0);
  EXPECT_EQ(urgent_threads(), all);
  ASSERT_EQ(server.Call("hurry 1"), "ok");
  EXPECT_TRUE(Eventually([&] { return urgent_threads() == 0; }));
  ASSERT_EQ(server.Call("hurry 60000"), "ok");
  ASSERT_EQ(server.Call("park"), "ok");
  EXPECT_EQ(urgent_threads(), 0);
  ASSERT_EQ(server.Call("hurry 60000"), "ok");
  EXPECT_EQ(urgent_threads(), 0) << "it reads nothing";
  ASSERT_EQ(server.Call("resume"), "ok");
  EXPECT_EQ(Read([&] { return CheckFile(root + "/memory", kMemory, 0, 100); }), 0);
  EXPECT_EQ(urgent_threads(), 0);
}

TEST_F(FuseServerTest, AHurryEndsAlsoWhereAThreadOfThePoolIsStuck) {
  const bool permitted = std::async(std::launch::async, [] { return BecomeUrgent().ok(); }).get();
  std::string root = bench_.Mount().path;
  ServerSetup setup = NewSetup();
  setup.faults = "fuse.stuck=block@1";
  ServerProcess server(bench_, setup);
  ASSERT_EQ(server.Call("start"), "ok");
  auto reader = Reader([&] { return CheckFile(root + "/memory", kMemory, 0, 100); });
  ASSERT_EQ(server.Call("fired fuse.stuck 1"), "ok");
  auto urgent = [&](const char* name) { return IsUrgent(server.ThreadNamed(name)); };
  ASSERT_EQ(server.Call("hurry 60000"), "ok");
  EXPECT_TRUE(Eventually([&] { return urgent("fuse-0") == permitted && urgent("fuse-1") == permitted; }));
  ASSERT_EQ(server.Call("hurry 1"), "ok");
  EXPECT_TRUE(Eventually([&] { return !urgent("fuse-0") && !urgent("fuse-1"); }))
      << "the other one sees to it";
  ASSERT_EQ(server.Call("unblock fuse.stuck"), "ok");
  EXPECT_EQ(reader->Wait(20), 0);
}

TEST_F(FuseServerTest, RemovingAMountDropsItsRecords) {
  std::string root = bench_.Mount().path;
  ServerProcess server(bench_, NewSetup());
  ASSERT_EQ(server.Call("hold 100 1"), "ok");
  ASSERT_EQ(server.Call("start"), "ok");
  auto reader = Reader([&] { return CheckFile(root + "/missing", kMissing, 0, 4096, true); });
  ASSERT_TRUE(Eventually([&] { return server.Number("waiting 100") == 1; }));
  ASSERT_EQ(server.Call("remove 100"), "ok");
  EXPECT_TRUE(Eventually([&] { return server.Stats()["pending"] == 0; }));
  EXPECT_EQ(bench_.ledgers[1]->record(0)->state, uint32_t{HF_RECORD_FREE});
  ASSERT_EQ(server.Call("release 100"), "ok");
  ASSERT_EQ(server.Call("destroy"), "ok");
  server.Kill();
  bench_.CloseDevices();  // the connection ends, and the reader with it
  EXPECT_EQ(reader->Wait(5), ECONNABORTED);
}

TEST_F(FuseServerTest, TheLedgerHeaderShowsProgress) {
  std::string root = bench_.Mount().path;
  ServerProcess server(bench_, NewSetup());
  ASSERT_EQ(server.Call("start"), "ok");
  EXPECT_EQ(Read([&] { return CheckFile(root + "/missing", kMissing, 0, kMiB); }), 0);
  hf_ledger_header* header = bench_.ledgers[1]->header;
  EXPECT_GT(header->requests_received, 0u);
  EXPECT_TRUE(Eventually([&] { return header->requests_received == header->requests_answered; }));
  EXPECT_GT(header->record_high_water, 0u);
  uint64_t beat = header->loop_heartbeat_ns;
  EXPECT_TRUE(Eventually([&] { return header->loop_heartbeat_ns > beat; }, 5));
}

}  // namespace
}  // namespace holdfast::fuse
