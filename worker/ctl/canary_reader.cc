#include "worker/ctl/canary_reader.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <memory>

#include "common/io.h"

namespace holdfast::ctl {
namespace {

using std::chrono::steady_clock;

constexpr uint64_t kMostBytes = 256 * 1024;  // of one file
constexpr size_t kBlock = 4096;              // what O_DIRECT is aligned to
constexpr size_t kMostTried = 20'000;
constexpr int kFinders = 16;
constexpr auto kPace = std::chrono::milliseconds(1);  // between reads: a drill shall not load the node

std::vector<std::string> RegularFiles(const std::string& root, steady_clock::time_point deadline) {
  std::vector<std::string> paths;
  std::error_code error;
  auto it = std::filesystem::recursive_directory_iterator(
      root, std::filesystem::directory_options::skip_permission_denied, error);
  for (; !error && it != std::filesystem::recursive_directory_iterator(); it.increment(error)) {
    if (paths.size() == kMostTried || steady_clock::now() > deadline) break;
    std::error_code ignored;
    if (it->symlink_status(ignored).type() == std::filesystem::file_type::regular)
      paths.push_back(it->path());
  }
  return paths;
}

}  // namespace

absl::StatusOr<std::string> ReadBeginning(const std::string& path, uint64_t length) {
  const size_t room = std::max(kBlock, (length + kBlock - 1) / kBlock * kBlock);
  std::unique_ptr<char, decltype(&free)> buffer(static_cast<char*>(aligned_alloc(kBlock, room)), &free);
  HF_ASSIGN_OR_RETURN(UniqueFd fd, OpenFile(path, O_RDONLY | O_DIRECT | O_NOFOLLOW));
  std::string bytes;
  while (bytes.size() < length) {
    const ssize_t size = pread(fd.get(), buffer.get(), room, static_cast<off_t>(bytes.size()));
    if (size < 0 && errno == EINTR) continue;
    if (size < 0) return ErrnoStatus(errno, path);
    if (size == 0) return DataLoss(path + " has become shorter");
    bytes.append(buffer.get(), static_cast<size_t>(size));
  }
  bytes.resize(length);
  return bytes;
}

std::vector<CanaryFile> FindCachedFiles(const std::vector<std::string>& roots, size_t limit, int seconds) {
  const auto deadline = steady_clock::now() + std::chrono::seconds(seconds);
  std::vector<std::string> paths;
  for (const std::string& root : roots) {
    std::vector<std::string> some = RegularFiles(root, deadline);
    paths.insert(paths.end(), some.begin(), some.end());
  }
  Mutex mutex;
  std::vector<CanaryFile> found;
  std::atomic<size_t> next{0};
  auto look = [&] {
    for (size_t i = next++; i < paths.size() && steady_clock::now() < deadline; i = next++) {
      struct stat info;
      if (stat(paths[i].c_str(), &info) != 0 || info.st_size == 0) continue;
      auto bytes = ReadBeginning(paths[i], std::min(static_cast<uint64_t>(info.st_size), kMostBytes));
      if (!bytes.ok()) continue;
      MutexLock lock(&mutex);
      if (found.size() == limit) return;
      found.push_back({paths[i], *std::move(bytes)});
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < kFinders; ++i) threads.emplace_back(look);
  for (std::thread& thread : threads) thread.join();
  return found;
}

CanaryReader::CanaryReader(std::vector<CanaryFile> files, int threads)
    : files_(std::move(files)), progress_(static_cast<size_t>(threads)) {
  for (Progress& progress : progress_) {
    threads_.emplace_back([this, &progress, first = threads_.size()] { Run(first, &progress); });
  }
}

CanaryReader::~CanaryReader() {
  Stop();
  for (std::thread& thread : threads_) thread.join();
}

void CanaryReader::Run(size_t first, Progress* progress) {
  for (size_t i = first; !stopping_; ++i) {
    const CanaryFile& file = files_[i % files_.size()];
    ++progress->begun;
    const auto start = steady_clock::now();
    absl::StatusOr<std::string> bytes = ReadBeginning(file.path, file.beginning.size());
    absl::Status status = bytes.status();
    if (status.ok() && *bytes != file.beginning) status = DataLoss(file.path + ": other bytes than at first");
    const auto took = static_cast<uint64_t>((steady_clock::now() - start).count());
    {
      MutexLock lock(&mutex_);
      ++figures_.reads;
      figures_.longest_nanos = std::max(figures_.longest_nanos, took);
      if (!status.ok() && !stopping_) {
        if (figures_.failed++ == 0) figures_.first_failure = std::string(FromAbsl(status.message()));
      }
      progress->ended = progress->begun.load();
      changed_.SignalAll();
    }
    std::this_thread::sleep_for(kPace);
  }
}

CanaryReader::Figures CanaryReader::Take(int seconds) {
  const auto deadline = steady_clock::now() + std::chrono::seconds(seconds);
  MutexLock lock(&mutex_);
  std::vector<uint64_t> begun;
  for (const Progress& progress : progress_) begun.push_back(progress.begun);
  uint64_t missing = 0;
  for (size_t i = 0; i < progress_.size(); ++i) {
    bool in_time = true;
    // One that began later has ended: its number is higher.
    while (in_time && progress_[i].ended <= begun[i]) in_time = changed_.WaitUntil(&mutex_, deadline);
    if (progress_[i].ended <= begun[i]) ++missing;
  }
  Figures figures = figures_;
  figures_ = Figures();
  if (missing != 0) {
    figures.failed += missing;
    if (figures.first_failure.empty()) figures.first_failure = "a read has not returned";
  }
  return figures;
}

}  // namespace holdfast::ctl
