// Shared by this folder's tests: a store in a folder of its own, chunks with known bytes.
#pragma once

#include <sys/stat.h>

#include <filesystem>
#include <memory>
#include <string>

#include "common/fake_clock.h"
#include "common/io.h"
#include "gtest/gtest.h"
#include "worker/cache/content_store.h"

namespace holdfast::cache {

inline constexpr uint64_t kChunkBytes = 64 * 1024;

// Digest number `n`: "sha256:" and 64 digits.
inline std::string LayerName(int n) {
  std::string digits = std::to_string(n);
  return "sha256:" + std::string(64 - digits.size(), 'a') + digits;
}

// Bytes that differ in every chunk and are never all zero.
inline std::string ChunkContent(uint64_t chunk, uint64_t size = kChunkBytes) {
  std::string bytes(size, '\0');
  for (size_t i = 0; i < bytes.size(); i++)
    bytes[i] = static_cast<char>(1 + (chunk * 31 + i * 7 + i / 251) % 255);
  return bytes;
}

inline std::unique_ptr<ContentStore> OpenStore(const StoreOptions& options) {
  auto store = ContentStore::Open(options);
  EXPECT_TRUE(store.ok()) << store.status();
  return store.ok() ? std::move(*store) : nullptr;
}

inline std::shared_ptr<LayerContent> OpenLayer(ContentStore* store, int layer, uint64_t chunks,
                                               uint64_t chunk_bytes = kChunkBytes) {
  auto content = store->OpenLayer(LayerName(layer), chunks, chunks * chunk_bytes);
  EXPECT_TRUE(content.ok()) << content.status();
  return content.ok() ? std::move(*content) : nullptr;
}

inline absl::Status PutChunk(LayerContent* content, uint64_t chunk) {
  return content->Put(chunk, chunk * kChunkBytes, ChunkContent(chunk));
}

inline std::string ReadChunk(const LayerContent::Files& files, uint64_t chunk) {
  std::string bytes(kChunkBytes, '\0');
  absl::Status status = PreadFull(files.data.get(), bytes.data(), bytes.size(), chunk * kChunkBytes);
  return status.ok() ? bytes : "unreadable: " + status.ToString();
}

// Of all files in a folder, in blocks.
inline uint64_t DiskUsage(const std::string& folder) {
  uint64_t bytes = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    struct stat st {};
    EXPECT_EQ(lstat(entry.path().c_str(), &st), 0);
    bytes += static_cast<uint64_t>(st.st_blocks) * 512;
  }
  return bytes;
}

class StoreTest : public testing::Test {
 protected:
  StoreTest() {
    options_.root = dir_.path() + "/content";
    options_.vault_id = std::string(32, '1');
    options_.boot_id = "boot-1";
    options_.clock = &clock_;
  }
  std::string FolderOf(int layer) const { return options_.root + "/" + LayerName(layer).substr(7); }

  TempDir dir_;
  FakeClock clock_;
  FaultPoints faults_;
  StoreOptions options_;
};

}  // namespace holdfast::cache
