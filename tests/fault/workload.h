// What an application has open when a fault strikes, and readers that run while it does. Everything goes
// through the overlay mount of an image (tests/integration/lazy_image.h), every byte is compared.
#pragma once

#include <dirent.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "common/io.h"
#include "common/mutex.h"
#include "tests/integration/lazy_image.h"
#include "tests/support/registry_server.h"

namespace holdfast::test {

// Names of files that nobody has read yet, far from each other in the blob. When all are used up it begins
// anew: then they are read past the page cache.
class ColdFiles {
 public:
  explicit ColdFiles(const Image& image);
  struct File {
    std::string name;
    int flags = 0;  // for open(2)
  };
  File Next();
  // A part of data/large that nobody has read yet.
  uint64_t NextOffset(uint64_t size);
  // There are parts left for one more case.
  bool LastsForOneMore() const;

 private:
  std::vector<std::string> names_;
  std::atomic<size_t> next_{0};
  std::atomic<uint64_t> next_offset_{0};
  const uint64_t large_bytes_;
};

// Counts what was read and collects what was wrong. Thread-safe.
class Findings {
 public:
  void Compared(const std::string& what, bool right, const std::string& seen = "");
  uint64_t checked() const { return checked_; }
  std::vector<std::string> wrong() const;

 private:
  std::atomic<uint64_t> checked_{0};
  mutable Mutex mutex_;
  std::vector<std::string> wrong_ ABSL_GUARDED_BY(mutex_);
};

// Made before the fault: files and a folder held open in the middle, a mapping, cached content, a name known
// not to exist. Check, after it, looks at all of that and at what nobody has looked at yet.
class Witness {
 public:
  Witness(const Image& image, std::string root, ColdFiles* cold, Findings* findings);
  ~Witness();
  Witness(const Witness&) = delete;
  Witness& operator=(const Witness&) = delete;
  void Check();

 private:
  void ReadRest(DIR* folder, std::set<std::string> seen, const std::string& what);
  void Absent(const std::string& name);
  void File(const ColdFiles::File& file, const std::string& what);

  const Image& image_;
  const std::string root_;
  ColdFiles& cold_;
  Findings& findings_;
  std::vector<std::string> warm_;
  std::set<std::string> listing_;  // of data/
  UniqueFd open_;
  std::string open_name_;
  DIR* folder_ = nullptr;
  std::set<std::string> folder_seen_;
  char* mapping_ = nullptr;
  size_t mapping_size_ = 0;
  uint64_t mapping_offset_ = 0;
  std::string absent_;
};

// A READ that waits for the registry, which has stopped answering it, until Finish.
class WaitingRead {
 public:
  WaitingRead(const Image& image, const std::string& root, RegistryServer* registry, ColdFiles* cold,
              Findings* findings);
  ~WaitingRead() { Finish(); }
  // The registry has got the request.
  bool waiting() const { return waiting_; }
  void Finish();

 private:
  RegistryServer* const registry_;
  bool waiting_ = false;
  std::thread thread_;
};

// Two threads that read until they are stopped: what is on disk, past the page cache, and what nobody has
// read.
class RunningReaders {
 public:
  RunningReaders(const Image& image, const std::string& root, ColdFiles* cold, Findings* findings);
  ~RunningReaders() { Stop(); }
  void Stop();
  double longest_ms() const { return static_cast<double>(longest_nanos_) / 1e6; }

 private:
  void Run(const std::function<void(int)>& turn);
  std::atomic<bool> stopping_{false};
  std::atomic<uint64_t> longest_nanos_{0};
  std::vector<std::thread> threads_;
};

}  // namespace holdfast::test
