#include "worker/cache/content_store.h"

#include <sys/mount.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <thread>

#include "common/status.h"
#include "worker/cache/store_test_util.h"

namespace holdfast::cache {
namespace {

using ContentStoreTest = StoreTest;

TEST_F(ContentStoreTest, ARestartKeepsEverythingWithoutVerifying) {
  {
    auto store = OpenStore(options_);
    auto content = OpenLayer(store.get(), 1, 8);
    for (uint64_t chunk : {0, 3, 7}) ASSERT_TRUE(PutChunk(content.get(), chunk).ok());
  }
  auto store = OpenStore(options_);
  auto content = OpenLayer(store.get(), 1, 8);
  auto files = content->files();
  for (uint64_t chunk = 0; chunk < 8; chunk++) {
    bool stored = chunk == 0 || chunk == 3 || chunk == 7;
    EXPECT_EQ(content->StateOf(*files, chunk), stored ? ChunkState::kPresent : ChunkState::kAbsent) << chunk;
    if (stored) {
      EXPECT_EQ(ReadChunk(*files, chunk), ChunkContent(chunk));
    }
  }
  EXPECT_EQ(content->StateOf(*files, 8), ChunkState::kAbsent);
  EXPECT_GE(store->stats().bytes, 3 * kChunkBytes);
  EXPECT_TRUE(PathExists(FolderOf(1)));
}

TEST_F(ContentStoreTest, ANewVaultIdMakesEveryMarkUnverifiedUntilTheBytesWereVerified) {
  {
    auto store = OpenStore(options_);
    auto content = OpenLayer(store.get(), 1, 4);
    for (uint64_t chunk = 0; chunk < 3; chunk++) ASSERT_TRUE(PutChunk(content.get(), chunk).ok());
  }
  options_.vault_id = std::string(32, '2');
  {
    auto store = OpenStore(options_);
    auto content = OpenLayer(store.get(), 1, 4);
    auto files = content->files();
    for (uint64_t chunk = 0; chunk < 3; chunk++)
      EXPECT_EQ(content->StateOf(*files, chunk), ChunkState::kUnverified);
    content->MarkVerified(*files, 0);
    EXPECT_EQ(content->StateOf(*files, 0), ChunkState::kPresent);
    content->Drop(*files, 1, kChunkBytes);
    EXPECT_EQ(content->StateOf(*files, 1), ChunkState::kAbsent);
    content->MarkVerified(*files, 1);  // what is absent cannot be verified
    EXPECT_EQ(content->StateOf(*files, 1), ChunkState::kAbsent);
    EXPECT_EQ(store->stats().damaged_chunks, 1u);
  }
  // The same vault again: verified stays verified, unverified stays unverified.
  auto store = OpenStore(options_);
  auto content = OpenLayer(store.get(), 1, 4);
  EXPECT_EQ(content->StateOf(*content->files(), 0), ChunkState::kPresent);
  EXPECT_EQ(content->StateOf(*content->files(), 2), ChunkState::kUnverified);
}

TEST_F(ContentStoreTest, AVaultIdThatChangesUnderOpenLayersDistrustsWhatWasStoredBefore) {
  const std::string second(32, '2');
  auto store = OpenStore(options_);
  auto content = OpenLayer(store.get(), 1, 4);
  for (uint64_t chunk = 0; chunk < 2; chunk++) ASSERT_TRUE(PutChunk(content.get(), chunk).ok());
  { ASSERT_TRUE(PutChunk(OpenLayer(store.get(), 2, 4).get(), 0).ok()); }  // a layer that nobody holds
  auto opened_before = content->files();
  ASSERT_TRUE(store->SetVaultId(second).ok());
  EXPECT_EQ(content->StateOf(*opened_before, 0), ChunkState::kUnverified);
  EXPECT_EQ(content->StateOf(*content->files(), 1), ChunkState::kUnverified);
  EXPECT_EQ(content->StateOf(*content->files(), 2), ChunkState::kAbsent);
  EXPECT_EQ(ReadChunk(*opened_before, 0), ChunkContent(0)) << "the bytes stay";
  auto other = OpenLayer(store.get(), 2, 4);
  EXPECT_EQ(other->StateOf(*other->files(), 0), ChunkState::kUnverified);
  // Once is enough, and what is stored from now on counts.
  content->MarkVerified(*content->files(), 0);
  ASSERT_TRUE(PutChunk(content.get(), 3).ok());
  EXPECT_EQ(content->StateOf(*content->files(), 0), ChunkState::kPresent);
  ASSERT_TRUE(store->SetVaultId(second).ok()) << "again: distrusted again";
  EXPECT_EQ(content->StateOf(*content->files(), 0), ChunkState::kUnverified);
  content->MarkVerified(*content->files(), 0);
  content->MarkVerified(*content->files(), 3);
  // A successor that is given the new id believes those marks; one with the old id does not.
  content.reset();
  other.reset();
  store.reset();
  options_.vault_id = second;
  {
    auto successor = OpenStore(options_);
    auto again = OpenLayer(successor.get(), 1, 4);
    EXPECT_EQ(again->StateOf(*again->files(), 0), ChunkState::kPresent);
    EXPECT_EQ(again->StateOf(*again->files(), 1), ChunkState::kUnverified);
    EXPECT_EQ(again->StateOf(*again->files(), 3), ChunkState::kPresent);
  }
  options_.vault_id = std::string(32, '1');
  auto old = OpenStore(options_);
  auto again = OpenLayer(old.get(), 1, 4);
  EXPECT_EQ(again->StateOf(*again->files(), 0), ChunkState::kUnverified);
}

TEST_F(ContentStoreTest, AnEvictedLayerIsNamedByTheNewVaultId) {
  options_.limit_bytes = 6 * kChunkBytes;
  auto store = OpenStore(options_);
  store->AllowEviction(true);
  auto content = OpenLayer(store.get(), 1, 8);
  ASSERT_TRUE(PutChunk(content.get(), 0).ok());
  ASSERT_TRUE(store->SetVaultId(std::string(32, '2')).ok());
  clock_.Advance(120'000'000'000);  // idle
  auto other = OpenLayer(store.get(), 2, 8);
  for (uint64_t chunk = 0; chunk < 5; chunk++) ASSERT_TRUE(PutChunk(other.get(), chunk).ok());
  EXPECT_GT(store->stats().evicted_bytes, 0u);
  EXPECT_EQ(content->StateOf(*content->files(), 0), ChunkState::kAbsent);
  clock_.Advance(120'000'000'000);  // now the other one gives way
  ASSERT_TRUE(PutChunk(content.get(), 1).ok());
  content.reset();
  other.reset();
  store.reset();
  options_.vault_id = std::string(32, '2');
  store = OpenStore(options_);
  content = OpenLayer(store.get(), 1, 8);
  EXPECT_EQ(content->StateOf(*content->files(), 1), ChunkState::kPresent);
}

TEST_F(ContentStoreTest, AWorkerOnTrialLeavesNothingThatIsBelievedAndAParkedOneNothingAtAll) {
  auto store = OpenStore(options_);
  auto content = OpenLayer(store.get(), 1, 4);
  ASSERT_TRUE(PutChunk(content.get(), 0).ok());
  store->SetWriting(ContentStore::Writing::kOnTrial);
  ASSERT_TRUE(PutChunk(content.get(), 1).ok());
  EXPECT_EQ(content->StateOf(*content->files(), 0), ChunkState::kPresent);
  EXPECT_EQ(content->StateOf(*content->files(), 1), ChunkState::kUnverified);
  content->MarkVerified(*content->files(), 1);
  EXPECT_EQ(content->StateOf(*content->files(), 1), ChunkState::kUnverified);
  store->SetWriting(ContentStore::Writing::kNone);
  ASSERT_TRUE(PutChunk(content.get(), 2).ok());
  EXPECT_EQ(content->StateOf(*content->files(), 2), ChunkState::kAbsent);
  content->MarkVerified(*content->files(), 1);
  EXPECT_EQ(content->StateOf(*content->files(), 1), ChunkState::kUnverified);
  store->SetWriting(ContentStore::Writing::kTrusted);
  content->MarkVerified(*content->files(), 1);
  ASSERT_TRUE(PutChunk(content.get(), 2).ok());
  EXPECT_EQ(content->StateOf(*content->files(), 1), ChunkState::kPresent);
  EXPECT_EQ(content->StateOf(*content->files(), 2), ChunkState::kPresent);
}

TEST_F(ContentStoreTest, WhoParksWaitsForTheChunkThatIsBeingStored) {
  options_.faults = &faults_;
  auto store = OpenStore(options_);
  auto content = OpenLayer(store.get(), 1, 4);
  faults_.BlockAt("cache.before_mark");
  std::thread storing([&] { EXPECT_TRUE(PutChunk(content.get(), 0).ok()); });
  ASSERT_TRUE(faults_.WaitFired("cache.before_mark", 1, 10));
  std::atomic<bool> parked{false};
  std::thread parking([&] {
    store->SetWriting(ContentStore::Writing::kNone);
    parked = true;
  });
  EXPECT_FALSE(parked);
  faults_.Release("cache.before_mark");
  parking.join();
  EXPECT_EQ(content->StateOf(*content->files(), 0), ChunkState::kPresent);
  storing.join();
}

TEST_F(ContentStoreTest, AfterAnotherBootNoMarkIsTrustedSyncedOrNot) {
  {
    auto store = OpenStore(options_);
    auto content = OpenLayer(store.get(), 1, 4);
    ASSERT_TRUE(PutChunk(content.get(), 0).ok());
    store->Flush();
    ASSERT_TRUE(PutChunk(content.get(), 1).ok());  // a power failure may have lost these bytes
  }
  options_.boot_id = "boot-2";
  auto store = OpenStore(options_);
  auto content = OpenLayer(store.get(), 1, 4);
  EXPECT_EQ(content->StateOf(*content->files(), 0), ChunkState::kUnverified);
  EXPECT_EQ(content->StateOf(*content->files(), 1), ChunkState::kUnverified);
  EXPECT_EQ(content->StateOf(*content->files(), 2), ChunkState::kAbsent);
}

TEST_F(ContentStoreTest, TheSameDigestIsTheSameObjectWhileItIsHeld) {
  auto store = OpenStore(options_);
  auto one = OpenLayer(store.get(), 1, 4);
  EXPECT_EQ(OpenLayer(store.get(), 1, 4), one);
  EXPECT_NE(OpenLayer(store.get(), 2, 4), one);
  EXPECT_EQ(store->OpenLayer(LayerName(1), 5, 5 * kChunkBytes).status().code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(store->OpenLayer("sha256:../../etc", 1, 1).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(ContentStoreTest, WhoOnlyLooksForALayerMakesRemovesAndRepairsNothing) {
  auto store = OpenStore(options_);
  auto find = [&] { return store->FindLayer(LayerName(1), 4, 4 * kChunkBytes); };
  EXPECT_EQ(find().status().code(), absl::StatusCode::kNotFound);
  EXPECT_FALSE(PathExists(FolderOf(1)));
  ASSERT_TRUE(MakeDirs(FolderOf(1)).ok());
  EXPECT_EQ(find().status().code(), absl::StatusCode::kNotFound);
  ASSERT_EQ(rmdir(FolderOf(1).c_str()), 0) << "still empty";
  {
    auto other = OpenStore(options_);
    ASSERT_TRUE(PutChunk(OpenLayer(other.get(), 1, 4).get(), 2).ok());
  }
  {
    auto found = find();
    ASSERT_TRUE(found.ok()) << found.status();
    EXPECT_EQ((*found)->StateOf(*(*found)->files(), 2), ChunkState::kPresent);
    EXPECT_FALSE((*found)->unlinked());
    EXPECT_EQ(OpenLayer(store.get(), 1, 4), *found);
    EXPECT_EQ(store->stats().bytes, DiskUsage(FolderOf(1)));
  }
  {
    StoreOptions options = options_;
    options.vault_id = std::string(32, '2');
    auto other = OpenStore(options);
    EXPECT_EQ(other->FindLayer(LayerName(1), 4, 4 * kChunkBytes).status().code(),
              absl::StatusCode::kNotFound);
    auto still = find();
    ASSERT_TRUE(still.ok()) << still.status();
    EXPECT_EQ((*still)->StateOf(*(*still)->files(), 2), ChunkState::kPresent)
        << "not renamed, not distrusted";
  }
  const std::string content = FolderOf(1) + "/content.1", presence = FolderOf(1) + "/presence.1";
  ASSERT_EQ(truncate(content.c_str(), 10), 0);
  EXPECT_EQ(find().status().code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(PathExists(content) && PathExists(presence)) << "not set aside";
  ASSERT_EQ(unlink(content.c_str()), 0);
  EXPECT_EQ(find().status().code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(PathExists(presence));
  EXPECT_EQ(store->stats().bytes, DiskUsage(FolderOf(1)));
}

TEST_F(ContentStoreTest, WhatALayerOccupiesIsCountedWhenItIsOpenedWhateverElseLiesInItsFolder) {
  uint64_t put = 0;
  for (const char* extra : {"", "/content.damaged", "/presence.3", "/content.7"}) {
    if (*extra != 0) {
      ASSERT_TRUE(WriteFileAtomic(FolderOf(1) + extra, std::string(50'000, 'x')).ok());
    }
    auto store = OpenStore(options_);
    auto content = OpenLayer(store.get(), 1, 4);
    EXPECT_EQ(content->bytes(), DiskUsage(FolderOf(1))) << extra;
    EXPECT_EQ(content->StateOf(*content->files(), 0), put > 0 ? ChunkState::kPresent : ChunkState::kAbsent);
    ASSERT_TRUE(PutChunk(content.get(), put++).ok());
    EXPECT_EQ(content->bytes(), DiskUsage(FolderOf(1))) << extra;
    EXPECT_EQ(store->stats().bytes, DiskUsage(FolderOf(1))) << extra;
  }
}

TEST_F(ContentStoreTest, ContentOfAnotherShapeIsDropped) {
  {
    auto store = OpenStore(options_);
    ASSERT_TRUE(PutChunk(OpenLayer(store.get(), 1, 4).get(), 1).ok());
  }
  auto store = OpenStore(options_);
  auto content = OpenLayer(store.get(), 1, 5);
  EXPECT_EQ(content->StateOf(*content->files(), 1), ChunkState::kAbsent);
  EXPECT_EQ(content->files()->generation, 2u);
}

TEST_F(ContentStoreTest, AChunkOutsideTheContentIsRefused) {
  auto store = OpenStore(options_);
  auto content = OpenLayer(store.get(), 1, 2);
  EXPECT_EQ(content->Put(2, 0, "x").code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(content->Put(1, 2 * kChunkBytes - 1, "xy").code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(content->Put(1, ~0ull, "xy").code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(ContentStoreTest, AWriteThatFailsLeavesTheChunkAbsent) {
  options_.faults = &faults_;
  auto store = OpenStore(options_);
  auto content = OpenLayer(store.get(), 1, 2);
  faults_.FailAt("cache.before_data", ErrnoStatus(ENOSPC, "injected"));
  EXPECT_EQ(PutChunk(content.get(), 0).code(), absl::StatusCode::kResourceExhausted);
  faults_.FailAt("cache.before_mark", ErrnoStatus(EIO, "injected"));
  EXPECT_FALSE(PutChunk(content.get(), 0).ok());
  EXPECT_EQ(faults_.fired("cache.before_data") + faults_.fired("cache.before_mark"), 2);
  EXPECT_EQ(content->StateOf(*content->files(), 0), ChunkState::kAbsent);
  EXPECT_EQ(store->stats().unstored_bytes, 2 * kChunkBytes);
  EXPECT_TRUE(PutChunk(content.get(), 0).ok());
}

TEST_F(ContentStoreTest, AContentFileFoundShortIsSetAside) {
  {
    auto store = OpenStore(options_);
    auto content = OpenLayer(store.get(), 1, 4);
    for (uint64_t chunk = 0; chunk < 4; chunk++) ASSERT_TRUE(PutChunk(content.get(), chunk).ok());
  }
  ASSERT_EQ(truncate((FolderOf(1) + "/content.1").c_str(), kChunkBytes), 0);
  for (int round = 1; round <= 2; round++) {
    auto store = OpenStore(options_);
    auto content = OpenLayer(store.get(), 1, 4);
    EXPECT_EQ(content->StateOf(*content->files(), 0), ChunkState::kAbsent);
    EXPECT_EQ(content->files()->generation, 2u);
    EXPECT_EQ(store->stats().damaged_layers, round == 1 ? 1u : 0u);
  }
  EXPECT_TRUE(PathExists(FolderOf(1) + "/content.damaged"));
}

TEST_F(ContentStoreTest, AContentFileCutShortWhileOpenIsFoundAndNeverReadAsZeros) {
  for (const char* finder : {"put", "drop", "flush"}) {
    auto store = OpenStore(options_);
    auto content = OpenLayer(store.get(), 1, 4);
    auto files = content->files();
    for (uint64_t chunk = 0; chunk < 3; chunk++) ASSERT_TRUE(PutChunk(content.get(), chunk).ok());
    ASSERT_EQ(ftruncate(files->data.get(), kChunkBytes), 0);
    if (std::string(finder) == "put") {
      ASSERT_TRUE(PutChunk(content.get(), 3).ok());
    }
    if (std::string(finder) == "drop") content->Drop(*files, 2, kChunkBytes);
    if (std::string(finder) == "flush") store->Flush();
    EXPECT_EQ(content->StateOf(*files, 1), ChunkState::kUnverified) << finder;
    EXPECT_EQ(store->stats().damaged_layers, 1u) << finder;
    std::filesystem::remove_all(FolderOf(1));
  }
}

TEST_F(ContentStoreTest, WhatAnInterruptedEvictionLeftIsRemoved) {
  {
    auto store = OpenStore(options_);
    ASSERT_TRUE(PutChunk(OpenLayer(store.get(), 1, 4).get(), 1).ok());
  }
  ASSERT_EQ(unlink((FolderOf(1) + "/presence.1").c_str()), 0);
  auto store = OpenStore(options_);
  auto content = OpenLayer(store.get(), 1, 4);
  EXPECT_EQ(content->StateOf(*content->files(), 1), ChunkState::kAbsent);
  EXPECT_FALSE(PathExists(FolderOf(1) + "/content.1"));
  EXPECT_EQ(store->stats().damaged_layers, 0u);
}

TEST_F(ContentStoreTest, LastAccessSurvivesARestartAtHourGranularity) {
  constexpr uint64_t kHour = 3'600'000'000'000;
  int64_t touched = 0;
  {
    auto store = OpenStore(options_);
    auto content = OpenLayer(store.get(), 1, 4);
    clock_.Advance(10 * kHour);
    content->Touch();
    store->Flush();
    touched = clock_.WallNanos();
  }
  clock_.Advance(5 * kHour);
  auto store = OpenStore(options_);
  auto content = OpenLayer(store.get(), 1, 4);
  EXPECT_LE(content->last_access_wall_nanos(), touched);
  EXPECT_GT(content->last_access_wall_nanos(), touched - static_cast<int64_t>(kHour));
}

TEST_F(ContentStoreTest, ALayerOfAMillionChunksOpensFastAlsoUnderANewVault) {
  {
    auto store = OpenStore(options_);
    auto content = OpenLayer(store.get(), 1, 1'000'000, 4096);
    for (uint64_t chunk = 0; chunk < 1'000'000; chunk += 1000) {
      ASSERT_TRUE(content->Put(chunk, chunk * 4096, "small").ok());
    }
  }
  options_.vault_id = std::string(32, '2');
  auto store = OpenStore(options_);
  auto before = std::chrono::steady_clock::now();
  auto content = OpenLayer(store.get(), 1, 1'000'000, 4096);
  EXPECT_LT(std::chrono::steady_clock::now() - before, std::chrono::milliseconds(500));
  EXPECT_EQ(content->StateOf(*content->files(), 999'000), ChunkState::kUnverified);
}

// A small tmpfs of its own.
class FullDiskTest : public StoreTest {
 protected:
  void SetUp() override {
    mount_point_ = dir_.path() + "/disk";
    ASSERT_TRUE(MakeDirs(mount_point_).ok());
    ASSERT_EQ(mount("holdfast-test", mount_point_.c_str(), "tmpfs", 0, "size=1m"), 0);
    mounted_ = true;
    options_.root = mount_point_ + "/content";
  }
  ~FullDiskTest() override {
    if (mounted_) umount2(mount_point_.c_str(), MNT_DETACH);
  }
  // Takes all space but `leave` bytes.
  void Fill(uint64_t leave) {
    auto space = std::filesystem::space(mount_point_);
    ASSERT_TRUE(WriteFileAtomic(mount_point_ + "/filler", std::string(space.available - leave, 'x')).ok());
  }
  void Unfill() { unlink((mount_point_ + "/filler").c_str()); }

  std::string mount_point_;
  bool mounted_ = false;
};

TEST_F(FullDiskTest, PutReportsExhaustionAndNeverMarksWhatWasWrittenInPart) {
  auto store = OpenStore(options_);
  auto content = OpenLayer(store.get(), 1, 32);
  absl::Status status;
  uint64_t chunk = 0;
  for (; chunk < 32 && status.ok(); chunk++) status = PutChunk(content.get(), chunk);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  ASSERT_GT(chunk, 4u);
  auto files = content->files();
  EXPECT_EQ(content->StateOf(*files, chunk - 1), ChunkState::kAbsent);
  for (uint64_t i = 0; i + 1 < chunk; i++) EXPECT_EQ(ReadChunk(*files, i), ChunkContent(i));
  EXPECT_EQ(store->stats().unstored_bytes, kChunkBytes);
}

TEST_F(FullDiskTest, ALayerOpensOnAFullDiskAndStoresOnceThereIsRoom) {
  auto store = OpenStore(options_);
  Fill(0);
  auto content = OpenLayer(store.get(), 1, 8);
  ASSERT_NE(content, nullptr);
  EXPECT_EQ(content->StateOf(*content->files(), 0), ChunkState::kAbsent);
  EXPECT_EQ(PutChunk(content.get(), 0).code(), absl::StatusCode::kResourceExhausted);
  store->Flush();
  Unfill();
  clock_.Advance(2'000'000'000);
  EXPECT_TRUE(PutChunk(content.get(), 0).ok());
  EXPECT_EQ(content->StateOf(*content->files(), 0), ChunkState::kPresent);
  EXPECT_EQ(ReadChunk(*content->files(), 0), ChunkContent(0));
}

TEST_F(FullDiskTest, TheFreeSpaceFloorIsKept) {
  options_.free_floor_bytes = 512 * 1024;
  auto store = OpenStore(options_);
  auto content = OpenLayer(store.get(), 1, 32);
  absl::Status status;
  for (uint64_t chunk = 0; chunk < 32 && status.ok(); chunk++) status = PutChunk(content.get(), chunk);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_GE(std::filesystem::space(mount_point_).available, options_.free_floor_bytes);
}

}  // namespace
}  // namespace holdfast::cache
