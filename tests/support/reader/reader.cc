#include "tests/support/reader/reader.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <thread>

#include "tests/support/reader/mapped_copy.h"

extern char** environ;

namespace holdfast::reader {
namespace {

using Time = std::chrono::steady_clock;

const char* Name(Mode mode) {
  switch (mode) {
    case Mode::kRead:
      return "read";
    case Mode::kPread:
      return "pread";
    case Mode::kMmap:
      return "mmap";
    case Mode::kDirect:
      return "direct";
    case Mode::kExec:
      return "exec";
  }
  return "?";
}

struct Work {
  size_t file = 0;
  uint64_t block = 0;
};

// Descriptors of all files, in their order; empty when files are opened anew for each read.
struct Held {
  std::vector<int> plain;
  std::vector<int> direct;  // O_DIRECT
  ~Held() {
    for (int fd : plain) close(fd);
    for (int fd : direct) close(fd);
  }
  int For(Mode mode, size_t file) const {
    const std::vector<int>& fds = mode == Mode::kDirect ? direct : plain;
    return fds.empty() ? -1 : fds[file];
  }
};

// One thread's share. Everything it counts is its own; the caller merges.
class Reader {
 public:
  Reader(const Options& options, const std::vector<File>& files, const Held& held, uint64_t seed)
      : options_(options), files_(files), held_(held), random_(seed) {
    if (posix_memalign(&buffer_, 4096, kBlock) != 0) throw std::runtime_error("no memory");
  }
  ~Reader() { free(buffer_); }
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  void RunRandom(Time::time_point end, const std::atomic<bool>& stop) {
    auto next = Time::now();
    while (!stop && Time::now() < end) {
      if (options_.ops_per_second > 0) {
        std::this_thread::sleep_until(next);
        next = std::max(next, Time::now()) +
               std::chrono::nanoseconds(static_cast<int64_t>(1e9 / options_.ops_per_second));
      }
      Work work;
      work.file = random_() % files_.size();
      const File& file = files_[work.file];
      work.block = file.blocks.empty() ? 0 : random_() % file.blocks.size();
      One(options_.modes[random_() % options_.modes.size()], work);
    }
  }

  void RunShare(const std::vector<Work>& all, std::atomic<size_t>* next, const std::atomic<bool>& stop) {
    while (!stop) {
      size_t i = (*next)++;
      if (i >= all.size()) return;
      One(options_.modes[i % options_.modes.size()], all[i]);
    }
  }

  Report report;

 private:
  void One(Mode mode, const Work& work) {
    auto start = Time::now();
    if (mode == Mode::kExec) {
      Exec(options_.exec_paths[random_() % options_.exec_paths.size()]);
    } else {
      Block(mode, files_[work.file], held_.For(mode, work.file), work.block);
    }
    auto nanos = std::chrono::duration_cast<std::chrono::nanoseconds>(Time::now() - start).count();
    report.latency[Name(mode)].Add(static_cast<uint64_t>(nanos));
    report.operations++;
  }

  void Fail(const std::string& what) {
    report.failed++;
    if (report.errors.size() < static_cast<size_t>(options_.error_lines)) report.errors.push_back(what);
  }

  void Block(Mode mode, const File& file, int held, uint64_t block) {
    std::string path = options_.root + "/" + file.path;
    int fd = held;
    if (fd < 0) fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | (mode == Mode::kDirect ? O_DIRECT : 0));
    if (fd < 0) return Fail("open " + path + ": " + std::strerror(errno));
    if (!file.blocks.empty()) {
      if (mode == Mode::kMmap) {
        Mapped(file, path, fd, block);
      } else {
        Copied(mode, file, path, fd, block);
      }
    }
    if (fd != held) close(fd);
  }

  void Copied(Mode mode, const File& file, const std::string& path, int fd, uint64_t block) {
    uint64_t offset = block * kBlock, want = file.block_bytes(block), got = 0;
    if (mode == Mode::kRead && lseek(fd, static_cast<off_t>(offset), SEEK_SET) < 0) {
      return Fail("lseek " + path + ": " + std::strerror(errno));
    }
    // A descriptor that all threads hold has one file position, so read(2) is used on own descriptors only.
    bool positioned = mode != Mode::kRead || options_.hold_open;
    while (got < want) {
      char* at = static_cast<char*>(buffer_) + got;
      ssize_t n = positioned ? pread(fd, at, kBlock - got, static_cast<off_t>(offset + got))
                             : read(fd, at, kBlock - got);
      if (n < 0) return Fail(std::string(Name(mode)) + " " + path + ": " + std::strerror(errno));
      if (n == 0) return Fail(std::string(Name(mode)) + " " + path + ": ends early");
      got += static_cast<uint64_t>(n);
    }
    Check(file, path, block, buffer_, want);
  }

  void Mapped(const File& file, const std::string& path, int fd, uint64_t block) {
    uint64_t want = file.block_bytes(block);
    void* map = mmap(nullptr, want, PROT_READ, MAP_SHARED, fd, static_cast<off_t>(block * kBlock));
    if (map == MAP_FAILED) return Fail("mmap " + path + ": " + std::strerror(errno));
    if (CopyMapped(buffer_, map, want)) {
      Check(file, path, block, buffer_, want);
    } else {
      Fail("mmap " + path + ": SIGBUS");
    }
    munmap(map, want);
  }

  void Check(const File& file, const std::string& path, uint64_t block, const void* data, uint64_t size) {
    report.bytes += size;
    if (BlockDigest(data, size) == file.blocks[block]) return;
    report.corrupt_bytes += size;
    if (report.errors.size() < static_cast<size_t>(options_.error_lines)) {
      report.errors.push_back("corrupt " + path + " at " + std::to_string(block * kBlock));
    }
  }

  void Exec(const std::string& relative) {
    std::string path = options_.root + "/" + relative;
    char* argv[] = {path.data(), nullptr};
    pid_t pid = 0;
    int error = posix_spawn(&pid, path.c_str(), nullptr, nullptr, argv, environ);
    if (error != 0) return Fail("exec " + path + ": " + std::strerror(error));
    int status = 0;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
    }
    if (status != 0) Fail("exec " + path + ": wait status " + std::to_string(status));
  }

  const Options& options_;
  const std::vector<File>& files_;
  const Held& held_;
  std::mt19937_64 random_;
  void* buffer_ = nullptr;
};

void OpenAll(const Options& options, const std::vector<File>& files, int flags, std::vector<int>* held) {
  for (const File& file : files) {
    int fd = open((options.root + "/" + file.path).c_str(), O_RDONLY | O_CLOEXEC | flags);
    if (fd < 0) throw std::runtime_error("open " + file.path + ": " + std::strerror(errno));
    held->push_back(fd);
  }
}

std::vector<Work> AllBlocks(const std::vector<File>& files, uint64_t seed) {
  std::vector<Work> all;
  for (size_t f = 0; f < files.size(); f++) {
    for (uint64_t b = 0; b < files[f].blocks.size(); b++) all.push_back({f, b});
  }
  std::mt19937_64 random(seed);
  std::shuffle(all.begin(), all.end(), random);
  return all;
}

}  // namespace

Report Run(const Options& options, const std::vector<File>& files, const std::atomic<bool>& stop) {
  if (files.empty()) throw std::runtime_error("the manifest is empty");
  InstallSigbus();
  Held held;
  if (options.hold_open) {
    bool direct = std::find(options.modes.begin(), options.modes.end(), Mode::kDirect) != options.modes.end();
    OpenAll(options, files, 0, &held.plain);
    if (direct) OpenAll(options, files, O_DIRECT, &held.direct);
  }
  if (!options.ready_file.empty()) {
    int fd = open(options.ready_file.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
    if (fd >= 0) close(fd);
  }
  std::vector<Work> all;
  if (options.once) all = AllBlocks(files, options.seed);
  std::atomic<size_t> next{0};
  auto end = Time::now() +
             std::chrono::duration_cast<Time::duration>(std::chrono::duration<double>(options.seconds));
  std::vector<std::unique_ptr<Reader>> readers;
  std::vector<std::thread> threads;
  for (int i = 0; i < options.threads; i++) {
    readers.push_back(
        std::make_unique<Reader>(options, files, held, options.seed * 1000 + static_cast<uint64_t>(i)));
    threads.emplace_back([&, reader = readers.back().get()] {
      if (options.once) reader->RunShare(all, &next, stop);
      if (options.seconds > 0) reader->RunRandom(end, stop);
    });
  }
  for (std::thread& thread : threads) thread.join();
  Report total;
  for (const auto& reader : readers) {
    total.operations += reader->report.operations;
    total.bytes += reader->report.bytes;
    total.failed += reader->report.failed;
    total.corrupt_bytes += reader->report.corrupt_bytes;
    for (const auto& [mode, histogram] : reader->report.latency) total.latency[mode].Merge(histogram);
    for (const std::string& error : reader->report.errors) {
      if (total.errors.size() < static_cast<size_t>(options.error_lines)) total.errors.push_back(error);
    }
  }
  return total;
}

}  // namespace holdfast::reader
