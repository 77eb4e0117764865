// Two processes on one store, and processes that die in the middle.
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "worker/cache/content_store.h"
#include "worker/cache/store_test_util.h"

namespace holdfast::cache {
namespace {

class ProcessTest : public StoreTest {
 protected:
  // Runs `body` in a child that exits 0 when it returns true.
  static pid_t Spawn(const std::function<bool()>& body) {
    pid_t child = fork();
    if (child != 0) return child;
    alarm(60);
    _exit(body() ? 0 : 1);
  }
  static int WaitFor(pid_t child) {
    int status = -1;
    EXPECT_EQ(waitpid(child, &status, 0), child);
    return status;
  }
};

TEST_F(ProcessTest, AWorkerKilledBetweenDataAndMarkLeavesTheChunkAbsentNotZeros) {
  pid_t child = Spawn([&] {
    faults_.KillAt("cache.before_mark", 2);
    options_.faults = &faults_;
    auto store = OpenStore(options_);
    auto content = OpenLayer(store.get(), 1, 4);
    return PutChunk(content.get(), 0).ok() && PutChunk(content.get(), 1).ok();
  });
  int status = WaitFor(child);
  ASSERT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) << "the fault did not happen: " << status;

  auto store = OpenStore(options_);
  auto content = OpenLayer(store.get(), 1, 4);
  EXPECT_EQ(content->StateOf(*content->files(), 0), ChunkState::kPresent);
  EXPECT_EQ(ReadChunk(*content->files(), 0), ChunkContent(0));
  EXPECT_EQ(content->StateOf(*content->files(), 1), ChunkState::kAbsent);
  EXPECT_EQ(store->stats().damaged_layers, 0u);
}

TEST_F(ProcessTest, TwoWorkersThatStoreTheSameChunksNeverShowAWrongByte) {
  constexpr uint64_t kChunks = 256;
  auto load = [&](unsigned seed) {
    auto store = OpenStore(options_);
    auto content = OpenLayer(store.get(), 1, kChunks);
    if (content == nullptr) return false;
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < 3; t++) {
      threads.emplace_back([&, t] {
        std::mt19937 random(seed * 17 + t);
        for (int i = 0; i < 600; i++) {
          uint64_t chunk = random() % kChunks;
          auto files = content->files();
          if (content->StateOf(*files, chunk) == ChunkState::kPresent) {
            if (ReadChunk(*files, chunk) != ChunkContent(chunk)) wrong++;
          } else if (!PutChunk(content.get(), chunk).ok()) {
            wrong++;
          }
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    store->Flush();
    return wrong == 0;
  };
  pid_t one = Spawn([&] { return load(1); });
  pid_t two = Spawn([&] { return load(2); });
  EXPECT_EQ(WaitFor(one), 0);
  EXPECT_EQ(WaitFor(two), 0);
  auto store = OpenStore(options_);
  auto content = OpenLayer(store.get(), 1, kChunks);
  uint64_t present = 0;
  for (uint64_t chunk = 0; chunk < kChunks; chunk++) {
    if (content->StateOf(*content->files(), chunk) != ChunkState::kPresent) continue;
    present++;
    EXPECT_EQ(ReadChunk(*content->files(), chunk), ChunkContent(chunk));
  }
  EXPECT_GT(present, kChunks * 9 / 10);
}

TEST_F(ProcessTest, ALayerOpenedByManyWorkersWhileItsFolderIsRemovedAndMadeAgainIsNeverDamaged) {
  constexpr uint64_t kChunks = 4;
  auto work = [&](uint64_t seed) {
    bool good = true;
    for (uint64_t i = 0; i < 400 && good; i++) {
      auto store = OpenStore(options_);
      auto found = i % 2 == 0 ? store->FindLayer(LayerName(1), kChunks, kChunks * kChunkBytes)
                              : store->OpenLayer(LayerName(1), kChunks, kChunks * kChunkBytes);
      if (!found.ok()) {
        good = i % 2 == 0 && found.status().code() == absl::StatusCode::kNotFound;
        continue;
      }
      uint64_t chunk = (seed + i) % kChunks;
      good = PutChunk(found->get(), chunk).ok() && store->stats().damaged_layers == 0;
      auto files = (*found)->files();
      if ((*found)->StateOf(*files, chunk) == ChunkState::kPresent) {
        good = good && ReadChunk(*files, chunk) == ChunkContent(chunk);
      }
    }
    return good;
  };
  std::vector<pid_t> workers;
  for (uint64_t seed = 0; seed < 3; seed++) workers.push_back(Spawn([&, seed] { return work(seed); }));
  // Room for one of the others: each that is stored evicts the rest, with its folder.
  StoreOptions options = options_;
  options.limit_bytes = kChunks * kChunkBytes + 16384;
  pid_t evicts = Spawn([&] {
    uint64_t evicted = 0;
    for (int i = 0; i < 300; i++) {
      auto owner = OpenStore(options);
      owner->AllowEviction(true);
      auto other = OpenLayer(owner.get(), 2 + i % 2, kChunks);
      for (uint64_t chunk = 0; chunk < kChunks; chunk++) (void)PutChunk(other.get(), chunk);
      evicted += owner->stats().evicted_bytes;
    }
    return evicted > 0;
  });
  for (pid_t worker : workers) EXPECT_EQ(WaitFor(worker), 0);
  EXPECT_EQ(WaitFor(evicts), 0);
}

TEST_F(ProcessTest, OpeningUnderANewVaultWhileAnotherWorkerStoresLosesNothing) {
  constexpr uint64_t kChunks = 128;
  pid_t writer = Spawn([&] {
    auto store = OpenStore(options_);
    auto content = OpenLayer(store.get(), 1, kChunks);
    bool good = true;
    for (uint64_t chunk = 0; chunk < kChunks; chunk++) good = PutChunk(content.get(), chunk).ok() && good;
    return good;
  });
  for (char vault : {'2', '3', '4', '5'}) {
    options_.vault_id = std::string(32, vault);
    auto store = OpenStore(options_);
    EXPECT_NE(OpenLayer(store.get(), 1, kChunks), nullptr);
    EXPECT_EQ(store->stats().damaged_layers, 0u);
  }
  EXPECT_EQ(WaitFor(writer), 0);
  auto store = OpenStore(options_);
  auto content = OpenLayer(store.get(), 1, kChunks);
  for (uint64_t chunk = 0; chunk < kChunks; chunk++) {
    EXPECT_NE(content->StateOf(*content->files(), chunk), ChunkState::kAbsent);
    EXPECT_EQ(ReadChunk(*content->files(), chunk), ChunkContent(chunk));
  }
}

}  // namespace
}  // namespace holdfast::cache
