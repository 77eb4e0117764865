// Reads files of a drill's mounts over and over past the kernel's caches (O_DIRECT), so that every read needs
// a living worker, and compares each with what it was at first. Measures the longest wait.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "common/mutex.h"
#include "common/status.h"

namespace holdfast::ctl {

struct CanaryFile {
  std::string path;
  std::string beginning;  // its first bytes
};

// Files below `roots` whose beginning is on this disk: those that answer. A file that is not fails after the
// node's miss_timeout, so many are tried at once. At most `limit` files, `seconds` long; joins its threads.
std::vector<CanaryFile> FindCachedFiles(const std::vector<std::string>& roots, size_t limit, int seconds);

// Exactly the first `length` bytes, read with O_DIRECT.
absl::StatusOr<std::string> ReadBeginning(const std::string& path, uint64_t length);

class CanaryReader {
 public:
  struct Figures {
    uint64_t reads = 0, failed = 0, longest_nanos = 0;
    std::string first_failure;
  };

  CanaryReader(std::vector<CanaryFile> files, int threads);
  ~CanaryReader();  // waits for the reads under way
  CanaryReader(const CanaryReader&) = delete;
  CanaryReader& operator=(const CanaryReader&) = delete;

  // Of the reads that ended since the last call. Waits until each thread has ended a read that began after
  // this call, at most `seconds`; a thread that has not counts as failed.
  Figures Take(int seconds);
  // Tells the threads to end after the read under way.
  void Stop() { stopping_ = true; }

 private:
  struct Progress {
    std::atomic<uint64_t> begun{0}, ended{0};  // numbers of reads of one thread
  };
  void Run(size_t first, Progress* progress);

  const std::vector<CanaryFile> files_;
  std::atomic<bool> stopping_{false};
  std::vector<Progress> progress_;  // one a thread
  Mutex mutex_;
  CondVar changed_;
  Figures figures_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::thread> threads_;
};

}  // namespace holdfast::ctl
