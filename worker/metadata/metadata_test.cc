#include "worker/metadata/metadata.h"

#include <fcntl.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <thread>

#include "common/clock.h"
#include "common/fake_clock.h"
#include "common/io.h"
#include "gtest/gtest.h"
#include "leveldb/db.h"

namespace holdfast::metadata {
namespace {

constexpr uint64_t kSecond = 1'000'000'000;

SnapshotRow Row(const std::string& key, uint64_t id, const std::string& parent = "") {
  SnapshotRow row;
  row.key = key;
  row.id = id;
  row.parent = parent;
  return row;
}

std::unique_ptr<MetadataStore> MustOpen(const std::string& folder, FaultPoints* faults = nullptr) {
  auto store = MetadataStore::Open(folder, 5 * kSecond, faults);
  EXPECT_TRUE(store.ok()) << store.status();
  return store.ok() ? std::move(*store) : nullptr;
}

class MetadataTest : public testing::Test {
 protected:
  TempDir dir_;
  const std::string folder_ = dir_.path() + "/metadata";
};

TEST_F(MetadataTest, RowsSurviveClosing) {
  {
    auto store = MustOpen(folder_);
    ASSERT_TRUE(store->Apply({{Row("a", 1), Row("b", 2, "a")}, {}}).ok());
    ASSERT_TRUE(store->Apply({{Row("c", 3, "a")}, {"b"}}).ok());
  }
  auto store = MustOpen(folder_);
  EXPECT_TRUE(store->Get("a").has_value());
  EXPECT_FALSE(store->Get("b").has_value());
  EXPECT_EQ(store->Get("c")->parent, "a");
  EXPECT_EQ(store->All().size(), 2u);
}

TEST_F(MetadataTest, ChildrenFollowTheRows) {
  auto store = MustOpen(folder_);
  ASSERT_TRUE(store->Apply({{Row("a", 1), Row("b", 2, "a"), Row("ab", 3)}, {}}).ok());
  ASSERT_EQ(store->ChildrenOf("a").size(), 1u);
  EXPECT_EQ(store->ChildrenOf("").size(), 2u);
  ASSERT_TRUE(store->Apply({{Row("b", 2, "ab")}, {}}).ok());
  EXPECT_TRUE(store->ChildrenOf("a").empty());
  EXPECT_EQ(store->ChildrenOf("ab").size(), 1u);
  ASSERT_TRUE(store->Apply({{}, {"b"}}).ok());
  EXPECT_TRUE(store->ChildrenOf("ab").empty());
}

TEST_F(MetadataTest, IdsAreNeverUsedTwice) {
  uint64_t last = 0;
  for (int round = 0; round < 3; round++) {
    auto store = MustOpen(folder_);
    for (int i = 0; i < 70; i++) {
      uint64_t id = store->NextId().value();
      EXPECT_GT(id, last);
      last = id;
    }
  }
}

TEST_F(MetadataTest, ThreadsThatWriteAtOnceShareASyncedBatch) {
  FaultPoints faults;
  auto store = MustOpen(folder_, &faults);
  faults.BlockAt("metadata.write.before");
  std::thread first([&] { EXPECT_TRUE(store->Apply({{Row("first", 1)}, {}}).ok()); });
  ASSERT_TRUE(faults.WaitFired("metadata.write.before", 1, 10));
  std::vector<std::thread> threads;
  for (uint64_t i = 0; i < 16; i++) {
    threads.emplace_back([&, i] {
      EXPECT_TRUE(store->Apply({{Row("k" + std::to_string(i), i + 2)}, {}}).ok());
    });
  }
  uint64_t give_up = Clock::Real()->BootNanos() + 10 * kSecond;
  while (faults.passes("metadata.write.queued") < 17 && Clock::Real()->BootNanos() < give_up)
    std::this_thread::yield();
  faults.Release("metadata.write.before");
  first.join();
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(store->All().size(), 17u);
  EXPECT_EQ(faults.passes("metadata.write.before"), 2);
  store.reset();
  EXPECT_EQ(MustOpen(folder_)->All().size(), 17u);
}

TEST_F(MetadataTest, AKillLeavesTheOldOrTheNewStateNeverAMixture) {
  for (const char* point : {"metadata.write.before", "metadata.write.after"}) {
    std::string folder = dir_.path() + "/" + point;
    { ASSERT_TRUE(MustOpen(folder)->Apply({{Row("old", 1)}, {}}).ok()); }
    pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      FaultPoints faults;
      auto store = MetadataStore::Open(folder, 5 * kSecond, &faults);
      if (!store.ok()) _exit(3);
      faults.KillAt(point);
      static_cast<void>((*store)->Apply({{Row("new1", 2), Row("new2", 3, "new1")}, {"old"}}));
      _exit(4);
    }
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) << status;
    auto store = MustOpen(folder);
    bool written = std::string(point) == "metadata.write.after";
    EXPECT_EQ(store->Get("old").has_value(), !written);
    EXPECT_EQ(store->Get("new1").has_value(), written);
    EXPECT_EQ(store->Get("new2").has_value(), written);
  }
}

TEST_F(MetadataTest, AFailedWriteChangesNothingEvenIfItReachedTheLog) {
  FaultPoints faults;
  {
    auto store = MustOpen(folder_, &faults);
    ASSERT_TRUE(store->Apply({{Row("kept", 1)}, {}}).ok());
    faults.FailAt("metadata.write.after", ErrnoStatus(EIO, "injected"));
    EXPECT_FALSE(store->Apply({{Row("ghost", 2)}, {"kept"}}).ok());
    EXPECT_EQ(faults.fired("metadata.write.after"), 1);
    EXPECT_TRUE(store->Get("kept").has_value());
    EXPECT_FALSE(store->Get("ghost").has_value());
    ASSERT_TRUE(store->Apply({{Row("later", 3)}, {}}).ok());
  }
  auto store = MustOpen(folder_);
  EXPECT_TRUE(store->Get("kept").has_value());
  EXPECT_FALSE(store->Get("ghost").has_value());
  EXPECT_TRUE(store->Get("later").has_value());
}

// A file system of 1 MiB, unmounted by the destructor.
class TinyDisk {
 public:
  TinyDisk() { ok_ = mount("tmpfs", dir_.path().c_str(), "tmpfs", 0, "size=1m,mode=0700") == 0; }
  ~TinyDisk() {
    if (ok_) umount2(dir_.path().c_str(), MNT_DETACH);
  }
  bool ok() const { return ok_; }
  std::string path(const std::string& name) const { return dir_.path() + "/" + name; }

 private:
  TempDir dir_;
  bool ok_;
};

TEST_F(MetadataTest, AFullDiskIsResourceExhaustedAndNothingChanged) {
  TinyDisk disk;
  ASSERT_TRUE(disk.ok()) << "tmpfs needs root";
  auto store = MustOpen(disk.path("metadata"));
  ASSERT_TRUE(store->Apply({{Row("before", 1)}, {}}).ok());
  {
    UniqueFd ballast = OpenFile(disk.path("ballast"), O_WRONLY | O_CREAT).value();
    std::string block(4096, 'x');
    while (write(ballast.get(), block.data(), block.size()) > 0) continue;
  }
  SnapshotRow big = Row("big", 2);
  big.labels["containerd.io/snapshot/x"] = std::string(60'000, 'y');
  for (int i = 0; i < 3; i++) {
    EXPECT_EQ(store->Apply({{big}, {"before"}}).code(), absl::StatusCode::kResourceExhausted);
    EXPECT_TRUE(store->Get("before").has_value());
    EXPECT_FALSE(store->Get("big").has_value());
  }
  std::filesystem::remove(disk.path("ballast"));
  ASSERT_TRUE(store->Apply({{Row("after", 3)}, {}}).ok());
  store.reset();
  store = MustOpen(disk.path("metadata"));
  ASSERT_NE(store, nullptr);
  EXPECT_TRUE(store->Get("before").has_value());
  EXPECT_TRUE(store->Get("after").has_value());
  EXPECT_FALSE(store->Get("big").has_value());
}

TEST_F(MetadataTest, ADamagedStoreIsDataLossThatNamesTheFolder) {
  {
    auto store = MustOpen(folder_);
    for (uint64_t i = 0; i < 50; i++)
      ASSERT_TRUE(store->Apply({{Row("k" + std::to_string(i), i + 1)}, {}}).ok());
  }
  int damaged = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder_)) {
    if (entry.path().extension() != ".log") continue;
    UniqueFd fd = OpenFile(entry.path(), O_RDWR).value();
    ASSERT_TRUE(PwriteFull(fd.get(), "damage", 6, 300).ok());
    damaged++;
  }
  ASSERT_EQ(damaged, 1);
  auto store = MetadataStore::Open(folder_, 0);
  EXPECT_EQ(store.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_NE(FromAbsl(store.status().message()).find(folder_), std::string_view::npos) << store.status();
}

TEST_F(MetadataTest, WaitsForTheLockOfAnotherProcessAndThenGivesUp) {
  int ready[2], release[2];
  ASSERT_EQ(pipe2(ready, O_CLOEXEC), 0);
  ASSERT_EQ(pipe2(release, O_CLOEXEC), 0);
  pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    close(release[1]);
    auto store = MetadataStore::Open(folder_, 0);
    if (!store.ok() || write(ready[1], "x", 1) != 1) _exit(3);
    char byte;
    static_cast<void>(!read(release[0], &byte, 1));
    store->reset();
    _exit(0);
  }
  char byte;
  ASSERT_EQ(read(ready[0], &byte, 1), 1);
  uint64_t start = Clock::Real()->BootNanos();
  EXPECT_EQ(MetadataStore::Open(folder_, kSecond / 10).status().code(), absl::StatusCode::kUnavailable);
  EXPECT_GE(Clock::Real()->BootNanos() - start, kSecond / 10);
  std::thread releaser([&] { ASSERT_EQ(write(release[1], "x", 1), 1); });
  EXPECT_TRUE(MetadataStore::Open(folder_, 10 * kSecond).ok());
  releaser.join();
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  for (int fd : {ready[0], ready[1], release[0], release[1]}) close(fd);
}

TEST_F(MetadataTest, TwoStoresOfOneProcessExcludeEachOther) {
  auto store = MustOpen(folder_);
  EXPECT_EQ(MetadataStore::Open(folder_, 0).status().code(), absl::StatusCode::kUnavailable);
}

TEST_F(MetadataTest, OpensTenThousandRowsInWellUnderASecond) {
  {
    auto store = MustOpen(folder_);
    Batch batch;
    for (uint64_t i = 1; i <= 10'000; i++) batch.put.push_back(Row("key" + std::to_string(i), i));
    ASSERT_TRUE(store->Apply(batch).ok());
  }
  uint64_t start = Clock::Real()->BootNanos();
  auto store = MustOpen(folder_);
  uint64_t opened = Clock::Real()->BootNanos() - start;
  EXPECT_EQ(store->Rows().size(), 10'000u);
#ifndef HOLDFAST_SANITIZED
  EXPECT_LT(opened, 2 * kSecond);
#endif
  RecordProperty("open_millis", static_cast<int>(opened / 1'000'000));
}

TEST_F(MetadataTest, AWriteThatDoesNotReturnIsSeenAndAStoreAtRestIsNot) {
  FakeClock clock;
  LoopWatch watch(&clock);
  FaultPoints faults;
  auto opened = MetadataStore::Open(folder_, 5 * kSecond, &faults, &watch);
  ASSERT_TRUE(opened.ok()) << opened.status();
  clock.Advance(600 * kSecond);
  EXPECT_EQ(watch.Oldest().nanos, 0u);
  faults.BlockAt("metadata.write.before");
  std::thread writer([&] { EXPECT_TRUE((*opened)->Apply({{Row("a", 1)}, {}}).ok()); });
  ASSERT_TRUE(faults.WaitFired("metadata.write.before", 1, 10));
  clock.Advance(7 * kSecond);
  EXPECT_EQ(watch.Oldest().nanos, 7 * kSecond);
  EXPECT_EQ(watch.Oldest().name, "metadata");
  faults.Release("metadata.write.before");
  writer.join();
  EXPECT_EQ(watch.Oldest().nanos, 0u);
}

// Keys and values as the first release wrote them.
TEST_F(MetadataTest, ADatabaseOfTheFirstReleaseIsReadAndContinued) {
  const std::string row =
      R"({"created":5,"id":7,"key":"remote/7","kind":"committed","labels":{},"lazy_blob_size":99,)"
      R"("lazy_digest":"sha256:bb","lazy_image":"localhost/x:1","lazy_index":"cc","lazy_tenant":"default",)"
      R"("parent":"","updated":6,"usage_bytes":0,"usage_inodes":0,"v":1})";
  {
    leveldb::Options options;
    options.create_if_missing = true;
    leveldb::DB* raw = nullptr;
    ASSERT_TRUE(leveldb::DB::Open(options, folder_, &raw).ok());
    std::unique_ptr<leveldb::DB> db(raw);
    ASSERT_TRUE(db->Put({}, "meta/schema", "1").ok());
    ASSERT_TRUE(db->Put({}, "id/next", "65").ok());
    ASSERT_TRUE(db->Put({}, "snap/remote/7", row).ok());
    ASSERT_TRUE(db->Put({}, "future/key", "kept").ok());
  }
  {
    auto store = MustOpen(folder_);
    ASSERT_TRUE(store->Get("remote/7").has_value());
    EXPECT_EQ(store->Get("remote/7")->lazy_index, "cc");
    EXPECT_EQ(store->NextId().value(), 65u);
    ASSERT_TRUE(store->Apply({{*store->Get("remote/7")}, {}}).ok());
  }
  leveldb::DB* raw = nullptr;
  ASSERT_TRUE(leveldb::DB::Open({}, folder_, &raw).ok());
  std::unique_ptr<leveldb::DB> db(raw);
  std::string value;
  ASSERT_TRUE(db->Get({}, "snap/remote/7", &value).ok());
  EXPECT_EQ(value, row);
  ASSERT_TRUE(db->Get({}, "id/next", &value).ok());
  EXPECT_EQ(value, "129") << "ids are reserved in blocks of 64";
  ASSERT_TRUE(db->Get({}, "meta/schema", &value).ok());
  EXPECT_EQ(value, "1");
  EXPECT_TRUE(db->Get({}, "future/key", &value).ok()) << "what another build wrote stays";
}

}  // namespace
}  // namespace holdfast::metadata
