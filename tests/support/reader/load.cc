#include "tests/support/reader/load.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <random>
#include <set>
#include <stdexcept>
#include <thread>
#include <utility>

#include "tests/support/reader/mapped_copy.h"

extern char** environ;

namespace holdfast::reader {
namespace {

using Clock = std::chrono::steady_clock;  // CLOCK_MONOTONIC

int64_t NanosOf(Clock::time_point when) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(when.time_since_epoch()).count();
}

[[noreturn]] void ThrowErrno(const std::string& what) {
  throw std::runtime_error(what + ": " + std::strerror(errno));
}

class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  ~Fd() {
    if (fd_ >= 0) close(fd_);
  }
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&&) = delete;
  int get() const { return fd_; }

 private:
  int fd_ = -1;
};

Fd Open(const std::string& path, int flags) {
  int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | flags);
  if (fd < 0) ThrowErrno("open " + path);
  return Fd(fd);
}

class Mapping {
 public:
  Mapping(int fd, uint64_t size) : size_(size) {
    at_ = mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0);
    if (at_ == MAP_FAILED) ThrowErrno("mmap");
  }
  ~Mapping() {
    if (at_ != nullptr) munmap(at_, size_);
  }
  Mapping(Mapping&& other) noexcept : at_(std::exchange(other.at_, nullptr)), size_(other.size_) {}
  Mapping& operator=(Mapping&&) = delete;
  const char* at(uint64_t offset) const { return static_cast<const char*>(at_) + offset; }

 private:
  void* at_ = nullptr;
  uint64_t size_;
};

struct HeldFile {
  const File* file;
  Fd plain, direct;
  Mapping map;
};

struct HeldFolder {
  std::string path;
  Fd fd;
  std::set<std::string> expected, seen;
};

// getdents64's entries.
struct Entry {
  uint64_t ino;
  int64_t off;
  uint16_t length;
  uint8_t type;
  char name[1];
};

enum class Listed { kMore, kEnd, kError };

// One small piece, so that a folder is nearly always in the middle of its listing.
Listed ListPiece(int fd, std::set<std::string>* names) {
  alignas(8) std::array<char, 512> buffer;
  long n = syscall(SYS_getdents64, fd, buffer.data(), buffer.size());
  if (n < 0) return Listed::kError;
  for (long at = 0; at < n;) {
    const auto* entry = reinterpret_cast<const Entry*>(buffer.data() + at);
    names->insert(entry->name);
    at += entry->length;
  }
  return n == 0 ? Listed::kEnd : Listed::kMore;
}

std::string FolderOf(const std::string& path) {
  size_t slash = path.rfind('/');
  return slash == std::string::npos ? "" : path.substr(0, slash);
}

// What a thread does and notes. Not shared.
class Operations {
 public:
  explicit Operations(uint64_t seed) : random_(seed) {
    if (posix_memalign(&buffer_, 4096, kBlock) != 0) throw std::runtime_error("no memory");
  }
  ~Operations() { free(buffer_); }
  Operations(const Operations&) = delete;
  Operations& operator=(const Operations&) = delete;

  std::vector<LoadRecord> records;
  std::vector<std::string> errors;

 protected:
  template <typename Function>
  void Timed(uint32_t target, LoadKind kind, Function&& operation) {
    Clock::time_point begin = Clock::now();
    LoadResult result = operation();
    records.push_back({NanosOf(begin), NanosOf(Clock::now()), target, static_cast<uint16_t>(kind),
                       static_cast<uint16_t>(result)});
  }

  LoadResult Failed(const std::string& what) {
    errors.push_back(what);
    return LoadResult::kFailed;
  }
  LoadResult FailedErrno(const std::string& what) { return Failed(what + ": " + std::strerror(errno)); }

  LoadResult Check(const File& file, uint64_t block, const char* how) {
    if (BlockDigest(buffer_, file.block_bytes(block)) == file.blocks[block]) return LoadResult::kRight;
    errors.push_back(std::string("corrupt ") + file.path + " at " + std::to_string(block * kBlock) + " by " +
                     how);
    return LoadResult::kCorrupt;
  }

  LoadResult ReadBlock(int fd, const File& file, uint64_t block, const char* how) {
    uint64_t want = file.block_bytes(block), got = 0;
    while (got < want) {
      // The whole rest of the buffer: O_DIRECT wants a multiple of its own alignment, and the file ends where
      // it ends.
      ssize_t n = pread(fd, static_cast<char*>(buffer_) + got, kBlock - got,
                        static_cast<off_t>(block * kBlock + got));
      if (n < 0) return FailedErrno(std::string(how) + " " + file.path);
      if (n == 0) return Failed(std::string(how) + " " + file.path + ": ends early");
      got += static_cast<uint64_t>(n);
    }
    return Check(file, block, how);
  }

  std::mt19937_64 random_;
  void* buffer_ = nullptr;
};

class Steady : public Operations {
 public:
  Steady(const LoadOptions& options, uint32_t number)
      : Operations(options.seed * 1000 + number),
        options_(options),
        target_(options.targets[number]),
        number_(number) {
    Hold();
    if (Wanted(LoadKind::kUnlinked)) Unlink();
    ReadAllOnce();
    if (!errors.empty()) throw std::runtime_error(target_.root + ": " + errors.front());
  }

  void Run(const std::atomic<bool>& stop) {
    auto next = Clock::now();
    const auto gap = std::chrono::nanoseconds(static_cast<int64_t>(1e9 / options_.ops_per_second));
    // Not all trees in step.
    next += std::chrono::nanoseconds(static_cast<int64_t>(random_() % static_cast<uint64_t>(gap.count())));
    while (!stop) {
      std::this_thread::sleep_until(next);
      if (stop) return;
      next = std::max(next, Clock::now()) + gap;
      One(options_.kinds[random_() % options_.kinds.size()]);
    }
  }

 private:
  bool Wanted(LoadKind kind) const {
    return std::find(options_.kinds.begin(), options_.kinds.end(), kind) != options_.kinds.end();
  }

  void Hold() {
    std::set<std::string> folders;
    for (const File& file : target_.warm) {
      std::string folder = FolderOf(file.path);
      folders.insert(folder);
      while (target_.ancestors && !folder.empty()) folders.insert(folder = FolderOf(folder));
      if (file.size == 0) continue;
      std::string path = target_.root + "/" + file.path;
      Fd plain = Open(path, 0);
      Mapping map(plain.get(), file.size);
      held_.push_back({&file, std::move(plain), Open(path, O_DIRECT), std::move(map)});
    }
    if (held_.empty()) throw std::runtime_error(target_.root + ": no file to read");
    for (const std::string& folder : folders) {
      folders_.push_back({folder, Open(target_.root + "/" + folder, O_DIRECTORY), {}, {}});
    }
  }

  void Unlink() {
    for (size_t i = 0; i < held_.size() && i < static_cast<size_t>(options_.unlinked); i++) {
      std::string path = target_.root + "/" + held_[i].file->path;
      if (unlink(path.c_str()) != 0) ThrowErrno("unlink " + path);
      unlinked_++;
    }
  }

  void ReadAllOnce() {
    for (const HeldFile& one : held_) {
      for (uint64_t block = 0; block < one.file->blocks.size(); block++)
        (void)ReadBlock(one.plain.get(), *one.file, block, "first read");
    }
    for (HeldFolder& folder : folders_) {
      Listed listed = Listed::kMore;
      while (listed == Listed::kMore) listed = ListPiece(folder.fd.get(), &folder.expected);
      if (listed == Listed::kError || lseek(folder.fd.get(), 0, SEEK_SET) != 0)
        ThrowErrno("list " + folder.path);
    }
  }

  void One(LoadKind kind) {
    const HeldFile& any = held_[random_() % held_.size()];
    const HeldFile& kept =
        held_.size() == unlinked_ ? any : held_[unlinked_ + random_() % (held_.size() - unlinked_)];
    uint64_t block = random_() % any.file->blocks.size(), kept_block = random_() % kept.file->blocks.size();
    Timed(number_, kind, [&]() -> LoadResult {
      switch (kind) {
        case LoadKind::kDirect:
          return ReadBlock(any.direct.get(), *any.file, block, "direct");
        case LoadKind::kCached:
          return ReadBlock(any.plain.get(), *any.file, block, "cached");
        case LoadKind::kMapped:
          return Mapped(any, block);
        case LoadKind::kAbsent:
          return Absent();
        case LoadKind::kList:
          return List();
        case LoadKind::kOpen:
          return OpenAndRead(*kept.file, kept_block);
        case LoadKind::kUnlinked: {
          const HeldFile& gone = held_[random_() % unlinked_];
          return ReadBlock(gone.direct.get(), *gone.file, random_() % gone.file->blocks.size(), "unlinked");
        }
        case LoadKind::kExec:
          return Exec();
        case LoadKind::kCold:
          break;
      }
      return Failed("no such kind");
    });
  }

  LoadResult Mapped(const HeldFile& held, uint64_t block) {
    if (!CopyMapped(buffer_, held.map.at(block * kBlock), held.file->block_bytes(block)))
      return Failed("mapped " + held.file->path + ": SIGBUS");
    return Check(*held.file, block, "mapped");
  }

  LoadResult Absent() {
    const HeldFolder& folder = folders_[random_() % folders_.size()];
    std::string name = "absent-" + std::to_string(options_.seed) + "-" + std::to_string(names_asked_++);
    struct stat info;
    if (fstatat(folder.fd.get(), name.c_str(), &info, AT_SYMLINK_NOFOLLOW) == 0)
      return Failed("absent " + folder.path + "/" + name + ": it is there");
    if (errno != ENOENT) return FailedErrno("absent " + folder.path + "/" + name);
    return LoadResult::kRight;
  }

  LoadResult List() {
    HeldFolder& folder = folders_[random_() % folders_.size()];
    Listed listed = ListPiece(folder.fd.get(), &folder.seen);
    if (listed == Listed::kError) return FailedErrno("list " + folder.path);
    if (listed == Listed::kMore) return LoadResult::kRight;
    bool same = folder.seen == folder.expected;
    if (!same) {
      errors.push_back("corrupt listing of " + folder.path + ": " + std::to_string(folder.seen.size()) +
                       " names, must be " + std::to_string(folder.expected.size()));
    }
    folder.seen.clear();
    if (lseek(folder.fd.get(), 0, SEEK_SET) != 0) return FailedErrno("rewind " + folder.path);
    return same ? LoadResult::kRight : LoadResult::kCorrupt;
  }

  LoadResult OpenAndRead(const File& file, uint64_t block) {
    int fd = open((target_.root + "/" + file.path).c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) return FailedErrno("open " + file.path);
    Fd own(fd);
    return ReadBlock(fd, file, block, "opened");
  }

  LoadResult Exec() {
    std::string path = target_.root + "/" + target_.programs[programs_run_++ % target_.programs.size()];
    char* argv[] = {path.data(), nullptr};
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0);
    pid_t pid = 0;
    int error = posix_spawn(&pid, path.c_str(), &actions, nullptr, argv, environ);
    posix_spawn_file_actions_destroy(&actions);
    if (error != 0) return Failed("exec " + path + ": " + std::strerror(error));
    int status = 0;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
    }
    return status == 0 ? LoadResult::kRight
                       : Failed("exec " + path + ": wait status " + std::to_string(status));
  }

  const LoadOptions& options_;
  const LoadTarget& target_;
  uint32_t number_;
  std::vector<HeldFile> held_;  // the first `unlinked_` have no name any more
  std::vector<HeldFolder> folders_;
  uint64_t unlinked_ = 0, names_asked_ = 0, programs_run_ = 0;
};

// The files of all targets in turn, those of one target in random order.
class ColdPool {
 public:
  struct Piece {
    uint32_t target;
    const File* file;
  };

  ColdPool(const std::vector<LoadTarget>& targets, uint64_t seed) {
    std::mt19937_64 random(seed);
    std::vector<std::vector<const File*>> left;
    for (const LoadTarget& target : targets) {
      left.emplace_back();
      for (const File& file : target.cold) {
        if (file.size > 0) left.back().push_back(&file);
      }
      std::shuffle(left.back().begin(), left.back().end(), random);
    }
    for (size_t row = 0, added = 1; added > 0; row++) {
      added = 0;
      for (uint32_t target = 0; target < left.size(); target++) {
        if (row >= left[target].size()) continue;
        pieces_.push_back({target, left[target][row]});
        added++;
      }
    }
  }
  // nullptr: nothing is left.
  const Piece* Next() {
    size_t i = next_++;
    return i < pieces_.size() ? &pieces_[i] : nullptr;
  }

 private:
  std::vector<Piece> pieces_;
  std::atomic<size_t> next_{0};
};

class ColdReader : public Operations {
 public:
  ColdReader(const LoadOptions& options, uint32_t number, ColdPool* pool)
      : Operations(options.seed * 1000 + 500 + number), options_(options), pool_(pool) {}

  // False: nothing is left.
  bool One() {
    const ColdPool::Piece* piece = pool_->Next();
    if (piece == nullptr) return false;
    Timed(piece->target, LoadKind::kCold, [&]() -> LoadResult {
      std::string path = options_.targets[piece->target].root + "/" + piece->file->path;
      int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
      if (fd < 0) return FailedErrno("open " + path);
      Fd own(fd);
      return ReadBlock(fd, *piece->file, 0, "cold");
    });
    return true;
  }

 private:
  const LoadOptions& options_;
  ColdPool* pool_;
};

constexpr uint32_t kMostColdThreads = 64;

class LoadImpl final : public MixedLoad {
 public:
  explicit LoadImpl(LoadOptions options)
      : options_(std::move(options)), pool_(options_.targets, options_.seed) {
    InstallSigbus();
    for (LoadKind kind : options_.kinds) {
      for (const LoadTarget& target : options_.targets) {
        if (kind == LoadKind::kExec && target.programs.empty())
          throw std::runtime_error("no program to run on " + target.root);
      }
      if (kind == LoadKind::kUnlinked && options_.unlinked <= 0)
        throw std::runtime_error("nothing to unlink");
    }
    std::vector<std::unique_ptr<Steady>> steady(options_.targets.size());
    for (uint32_t i = 0; i < options_.targets.size(); i++) steady[i] = std::make_unique<Steady>(options_, i);
    steady_ = std::move(steady);
    for (const auto& one : steady_) threads_.emplace_back([this, one = one.get()] { one->Run(stop_); });
  }
  ~LoadImpl() override { (void)Stop(); }

  void Cold(int threads, double gap_ms) override {
    std::lock_guard lock(mutex_);
    cold_wanted_ = std::min<uint32_t>(static_cast<uint32_t>(threads), kMostColdThreads);
    cold_gap_ = std::chrono::nanoseconds(static_cast<int64_t>(gap_ms * 1e6));
    while (cold_.size() < cold_wanted_) {
      auto number = static_cast<uint32_t>(cold_.size());
      cold_.push_back(std::make_unique<ColdReader>(options_, number, &pool_));
      threads_.emplace_back([this, number, reader = cold_.back().get()] { RunCold(number, reader); });
    }
    changed_.notify_all();
  }

  uint64_t cold_reads() const override { return cold_reads_; }

  LoadReport Stop() override {
    stop_ = true;
    {
      std::lock_guard lock(mutex_);
      changed_.notify_all();
    }
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
    LoadReport report;
    for (const auto& one : steady_) Merge(*one, &report);
    for (const auto& one : cold_) Merge(*one, &report);
    report.cold_used_up = cold_used_up_;
    return report;
  }

 private:
  void RunCold(uint32_t number, ColdReader* reader) {
    while (true) {
      auto began = Clock::now();
      std::chrono::nanoseconds gap{};
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return stop_ || number < cold_wanted_; });
        if (stop_) return;
        gap = cold_gap_;
      }
      if (!reader->One()) {
        cold_used_up_ = true;
        return;
      }
      cold_reads_++;
      std::this_thread::sleep_until(began + gap);
    }
  }

  void Merge(const Operations& from, LoadReport* to) const {
    to->records.insert(to->records.end(), from.records.begin(), from.records.end());
    for (const std::string& error : from.errors) {
      if (to->errors.size() < static_cast<size_t>(options_.error_lines)) to->errors.push_back(error);
    }
  }

  const LoadOptions options_;
  ColdPool pool_;
  std::vector<std::unique_ptr<Steady>> steady_;
  std::vector<std::unique_ptr<ColdReader>> cold_;
  std::vector<std::thread> threads_;
  std::atomic<bool> stop_{false}, cold_used_up_{false};
  std::atomic<uint64_t> cold_reads_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
  uint32_t cold_wanted_ = 0;             // by mutex_
  std::chrono::nanoseconds cold_gap_{};  // by mutex_
};

}  // namespace

const char* LoadKindName(LoadKind kind) {
  static constexpr std::array<const char*, kLoadKinds> kNames = {
      "direct", "absent", "list", "cached", "mapped", "open", "unlinked", "exec", "cold"};
  return kNames[static_cast<size_t>(kind)];
}

std::unique_ptr<MixedLoad> MixedLoad::Start(LoadOptions options) {
  return std::make_unique<LoadImpl>(std::move(options));
}

}  // namespace holdfast::reader
