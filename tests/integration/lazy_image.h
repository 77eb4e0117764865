// An image of two layers for one test: what it holds, how containerd would pull it lazily, and threads that
// read it and compare every byte.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "common/mutex.h"
#include "common/status.h"
#include "tests/integration/node.h"
#include "tests/support/registry_server.h"
#include "worker/toc/testing/estargz_writer.h"

namespace holdfast::test {

struct ImageShape {
  int small_files = 200;
  size_t large_bytes = 6u << 20;
};

struct Image {
  toc::testing::EstargzLayer lower, upper;
  std::map<std::string, std::string> files;  // path -> content, of the merged tree
};

// The upper layer holds a file in a folder that only the lower one describes, a whiteout, and a replaced
// file. The bytes do not compress, so the blobs are as large as their content.
Image MakeImage(uint64_t seed, const ImageShape& shape = {});

// As containerd's unpacker asks for layer after layer. The name of the committed snapshot of the upper one;
// an error also when a layer would have been downloaded.
absl::StatusOr<std::string> PullLazily(SnapshotsClient* snapshots, RegistryServer* registry,
                                       const Image& image, const std::string& name);

// The content, or "error: why".
std::string ReadWhole(const std::string& path, size_t step = 65536, int flags = 0);

// Threads that read every file of an image from `root` and compare it.
class Readers {
 public:
  enum class Until {
    kAllRead,  // each file once, through the kernel's caches
    kStopped,  // over and over, past the page cache (O_DIRECT): every read reaches the worker
  };
  Readers(const Image& image, std::string root, int threads, Until until);
  ~Readers();  // as Stop
  Readers(const Readers&) = delete;
  Readers& operator=(const Readers&) = delete;

  void Stop();  // and waits for the reads under way
  void Wait();  // until all is read
  bool finished() const { return running_ == 0; }
  uint64_t read() const { return read_; }    // files
  uint64_t wrong() const { return wrong_; }  // of them: an error or other bytes
  std::string first_error() const;

 private:
  void Run();

  const Image& image_;
  const std::string root_;
  const Until until_;
  std::vector<std::string> names_;
  std::atomic<bool> stopping_{false};
  std::atomic<int> running_;
  std::atomic<size_t> next_{0};
  std::atomic<uint64_t> read_{0}, wrong_{0};
  mutable Mutex mutex_;
  std::string first_error_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::thread> threads_;
};

}  // namespace holdfast::test
