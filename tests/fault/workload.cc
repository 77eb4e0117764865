#include "tests/fault/workload.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <utility>

#include "common/clock.h"
#include "glog/logging.h"

namespace holdfast::test {
namespace {

constexpr char kLarge[] = "data/large";
constexpr uint64_t kStride = 512 * 1024;  // two chunks: the kernel reads around what is mapped
constexpr uint64_t kOffsetsOfACase = 2;
constexpr size_t kMapped = 64 * 1024;
constexpr size_t kFilesApart = 10;  // in the blob, so that one is not fetched with the other
const char* const kWarm[] = {"data/f1", "data/f2", "etc/kept", "etc/replaced", "private/file"};

std::atomic<uint64_t> next_name{0};
std::string FreshName() { return "data/no-such-name-" + std::to_string(next_name++); }

}  // namespace

ColdFiles::ColdFiles(const Image& image) : large_bytes_(image.files.at(kLarge).size()) {
  std::vector<std::string> all;
  for (const auto& [name, content] : image.files) {
    const bool warm =
        std::any_of(std::begin(kWarm), std::end(kWarm), [&](const char* w) { return name == w; });
    if (name.rfind("data/f", 0) == 0 && !warm) all.push_back(name);
  }
  // In the order of the blob.
  std::sort(all.begin(), all.end(), [](const std::string& a, const std::string& b) {
    return std::make_pair(a.size(), a) < std::make_pair(b.size(), b);
  });
  for (size_t first = 0; first < kFilesApart; ++first) {
    for (size_t i = first; i < all.size(); i += kFilesApart) names_.push_back(all[i]);
  }
}

ColdFiles::File ColdFiles::Next() {
  const size_t at = next_++;
  return {names_[at % names_.size()], at < names_.size() ? 0 : O_DIRECT};
}

uint64_t ColdFiles::NextOffset(uint64_t size) {
  const uint64_t offset = kStride * next_offset_++;
  CHECK_LE(offset + size, large_bytes_) << "all is read";
  return offset;
}

bool ColdFiles::LastsForOneMore() const { return kStride * (next_offset_ + kOffsetsOfACase) <= large_bytes_; }

void Findings::Compared(const std::string& what, bool right, const std::string& seen) {
  checked_++;
  if (right) return;
  MutexLock lock(&mutex_);
  wrong_.push_back(what + (seen.empty() ? "" : ": " + seen.substr(0, 80)));
}

std::vector<std::string> Findings::wrong() const {
  MutexLock lock(&mutex_);
  return wrong_;
}

Witness::Witness(const Image& image, std::string root, ColdFiles* cold, Findings* findings)
    : image_(image), root_(std::move(root) + "/"), cold_(*cold), findings_(*findings) {
  for (const auto& [name, content] : image_.files) {
    if (name.rfind("data/", 0) == 0) listing_.insert(name.substr(5));
  }
  for (const char* name : kWarm) {
    warm_.emplace_back(name);
    File({name, 0}, "before");
  }
  const ColdFiles::File half = cold_.Next();
  open_name_ = half.name;
  auto opened = OpenFile(root_ + open_name_, O_RDONLY);
  findings_.Compared("open " + open_name_, opened.ok());
  if (opened.ok()) open_ = std::move(*opened);
  char first[16] = {};
  findings_.Compared("begin of " + open_name_,
                     read(open_.get(), first, sizeof first) == sizeof first &&
                         image_.files.at(open_name_).compare(0, sizeof first, first, sizeof first) == 0);
  folder_ = opendir((root_ + "data").c_str());
  findings_.Compared("opendir", folder_ != nullptr);
  for (int i = 0; folder_ != nullptr && i < 20; ++i) {
    if (dirent* entry = readdir(folder_)) folder_seen_.insert(entry->d_name);
  }
  auto large = OpenFile(root_ + kLarge, O_RDONLY);
  findings_.Compared("open large", large.ok());
  if (large.ok()) {
    mapping_offset_ = cold_.NextOffset(kMapped);
    mapping_size_ = kMapped;
    void* at =
        mmap(nullptr, kMapped, PROT_READ, MAP_PRIVATE, large->get(), static_cast<off_t>(mapping_offset_));
    findings_.Compared("mmap", at != MAP_FAILED);
    mapping_ = at == MAP_FAILED ? nullptr : static_cast<char*>(at);
  }
  absent_ = FreshName();
  Absent(absent_);
}

Witness::~Witness() {
  if (folder_ != nullptr) closedir(folder_);
  if (mapping_ != nullptr) munmap(mapping_, mapping_size_);
}

void Witness::File(const ColdFiles::File& file, const std::string& what) {
  const std::string content = ReadWhole(root_ + file.name, 65536, file.flags);
  const bool failed = content.rfind("error: ", 0) == 0;
  findings_.Compared(what + " " + file.name, content == image_.files.at(file.name),
                     failed ? content : "other bytes");
}

void Witness::Absent(const std::string& name) {
  struct stat st;
  const bool absent = lstat((root_ + name).c_str(), &st) != 0 && errno == ENOENT;
  findings_.Compared("absent " + name, absent, strerror(errno));
}

void Witness::ReadRest(DIR* folder, std::set<std::string> seen, const std::string& what) {
  errno = 0;
  while (dirent* entry = readdir(folder)) seen.insert(entry->d_name);
  const int error = errno;
  seen.erase(".");
  seen.erase("..");
  findings_.Compared(what, error == 0 && seen == listing_,
                     error != 0 ? strerror(error) : std::to_string(seen.size()) + " names");
}

void Witness::Check() {
  for (int i = 0; i < 4; ++i) File(cold_.Next(), "never read");
  for (const std::string& name : warm_) File({name, 0}, "cached");
  for (const std::string& name : warm_) File({name, O_DIRECT}, "again");
  std::string rest(32768, '\0');
  const ssize_t n = pread(open_.get(), rest.data(), rest.size(), 0);
  rest.resize(n < 0 ? 0 : static_cast<size_t>(n));
  findings_.Compared("held open " + open_name_, rest == image_.files.at(open_name_), strerror(errno));
  if (mapping_ != nullptr) {
    // Copied out by the kernel: where a load would be SIGBUS, and the end of the test, this is an error.
    UniqueFd memory(memfd_create("mapped", MFD_CLOEXEC));
    std::string seen(mapping_size_, '\0');
    const bool copied = PwriteFull(memory.get(), mapping_, mapping_size_, 0).ok() &&
                        PreadFull(memory.get(), seen.data(), mapping_size_, 0).ok();
    findings_.Compared("mapping at " + std::to_string(mapping_offset_),
                       copied && image_.files.at(kLarge).compare(mapping_offset_, mapping_size_, seen) == 0,
                       copied ? "other bytes" : "not readable");
  }
  if (folder_ != nullptr) ReadRest(folder_, folder_seen_, "listing from the middle on");
  if (DIR* again = opendir((root_ + "data").c_str()); again != nullptr) {
    ReadRest(again, {}, "listing");
    closedir(again);
  } else {
    findings_.Compared("opendir again", false, strerror(errno));
  }
  Absent(absent_);
  Absent(FreshName());
  Absent("etc/deleted");
  struct stat st;
  findings_.Compared("stat", stat((root_ + "private").c_str(), &st) == 0 && (st.st_mode & 07777) == 0700);
  char target[64] = {};
  findings_.Compared("readlink", readlink((root_ + "etc/link").c_str(), target, sizeof target - 1) == 4 &&
                                     strcmp(target, "kept") == 0);
}

WaitingRead::WaitingRead(const Image& image, const std::string& root, RegistryServer* registry,
                         ColdFiles* cold, Findings* findings)
    : registry_(registry) {
  constexpr size_t kBytes = 4096;
  const uint64_t offset = cold->NextOffset(kBytes);
  const uint64_t before = registry->faults_served();
  RegistryFault silent;
  silent.stall = true;
  registry->FailNext(silent);
  thread_ = std::thread([&image, path = root + "/" + kLarge, offset, findings] {
    std::string bytes(kBytes, '\0');
    auto file = OpenFile(path, O_RDONLY);
    const bool read = file.ok() && PreadFull(file->get(), bytes.data(), kBytes, offset).ok();
    findings->Compared("read that waited",
                       read && image.files.at(kLarge).compare(offset, kBytes, bytes) == 0);
  });
  waiting_ = registry->WaitFor([&] { return registry->faults_served() > before; }, 10);
}

void WaitingRead::Finish() {
  if (!thread_.joinable()) return;
  registry_->ClearFaults();
  registry_->ReleaseStalls();
  thread_.join();
}

RunningReaders::RunningReaders(const Image& image, const std::string& root, ColdFiles* cold,
                               Findings* findings) {
  auto compare = [&image, root, findings](const ColdFiles::File& file) {
    const std::string content = ReadWhole(root + "/" + file.name, 65536, file.flags);
    findings->Compared("running reader, " + file.name, content == image.files.at(file.name),
                       content.rfind("error: ", 0) == 0 ? content : "other bytes");
  };
  threads_.emplace_back([this, compare] {
    Run([&](int turn) { compare({kWarm[static_cast<size_t>(turn) % std::size(kWarm)], O_DIRECT}); });
  });
  threads_.emplace_back([this, compare, root, cold, findings] {
    Run([&](int turn) {
      if (turn % 10 == 0) compare(cold->Next());
      struct stat st;
      const std::string name = FreshName();
      findings->Compared("running reader, " + name,
                         lstat((root + "/" + name).c_str(), &st) != 0 && errno == ENOENT, strerror(errno));
    });
  });
}

void RunningReaders::Run(const std::function<void(int)>& turn) {
  for (int i = 0; !stopping_; ++i) {
    const uint64_t begin = Clock::Real()->BootNanos();
    turn(i);
    const uint64_t took = Clock::Real()->BootNanos() - begin;
    uint64_t longest = longest_nanos_;
    while (took > longest && !longest_nanos_.compare_exchange_weak(longest, took)) {
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(5));  // the machine is needed for the swap, too
  }
}

void RunningReaders::Stop() {
  stopping_ = true;
  for (std::thread& thread : threads_) {
    if (thread.joinable()) thread.join();
  }
}

}  // namespace holdfast::test
