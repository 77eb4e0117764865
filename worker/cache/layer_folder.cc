#include "worker/cache/layer_folder.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <map>
#include <string_view>
#include <vector>

#include "absl/strings/numbers.h"
#include "glog/logging.h"

namespace holdfast::cache {
namespace {

std::vector<std::string> NamesIn(const std::string& folder) {
  std::vector<std::string> names;
  std::unique_ptr<DIR, int (*)(DIR*)> dir(opendir(folder.c_str()), closedir);
  if (dir == nullptr) return names;
  while (const dirent* entry = readdir(dir.get())) {
    std::string_view name = entry->d_name;
    if (name != "." && name != "..") names.emplace_back(name);
  }
  return names;
}

// The generation in "content.7" or "presence.7"; 0 for any other name.
uint64_t GenerationIn(std::string_view name, std::string_view prefix) {
  uint64_t generation = 0;
  if (name.substr(0, prefix.size()) != prefix) return 0;
  if (!absl::SimpleAtoi(ToAbsl(name.substr(prefix.size())), &generation)) return 0;
  return prefix.size() + std::to_string(generation).size() == name.size() ? generation : 0;
}

struct Pair {
  bool content = false;
  bool presence = false;
};

struct Contents {
  std::map<uint64_t, Pair> pairs;  // by generation
  bool others = false;             // something of another name
};

Contents ContentsOf(const std::string& folder) {
  Contents contents;
  for (const std::string& name : NamesIn(folder)) {
    if (uint64_t g = GenerationIn(name, "content."); g != 0) {
      contents.pairs[g].content = true;
    } else if (uint64_t p = GenerationIn(name, "presence."); p != 0) {
      contents.pairs[p].presence = true;
    } else {
      contents.others = true;
    }
  }
  return contents;
}

// What UsageOf says of a folder with nothing in it but these files.
absl::StatusOr<FolderUsage> UsageOfPair(const LayerContent::Files& files) {
  FolderUsage usage;
  for (int fd : {files.data.get(), files.presence.get()}) {
    struct stat st {};
    if (fstat(fd, &st) != 0) return ErrnoStatus(errno, "fstat in the cache");
    usage.bytes += static_cast<uint64_t>(st.st_blocks) * 512;
  }
  std::atomic_ref<uint64_t> packed(HeaderOf(files)->last_access);
  usage.access_hour = UnpackAccessHour(packed.load());
  return usage;
}

absl::Status Unlink(const std::string& path) {
  if (unlink(path.c_str()) != 0 && errno != ENOENT) return ErrnoStatus(errno, "unlink " + path);
  return absl::OkStatus();
}

absl::Status SetAside(const std::string& folder, uint64_t generation) {
  for (const char* kind : {"presence", "content"}) {
    std::string from = folder + "/" + kind + "." + std::to_string(generation);
    std::string to = folder + "/" + kind + ".damaged";
    if (rename(from.c_str(), to.c_str()) != 0 && errno != ENOENT) return ErrnoStatus(errno, "rename " + from);
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<LayerFolder> LayerFolder::Lock(const std::string& path, bool create) {
  for (;;) {
    auto fd = OpenFile(path, O_RDONLY | O_DIRECTORY);
    if (!fd.ok()) {
      if (!create || fd.status().code() != absl::StatusCode::kNotFound) return fd.status();
      HF_RETURN_IF_ERROR(MakeDirs(path));
      continue;  // it may be removed in between
    }
    int result = 0;
    do {
      result = flock(fd->get(), LOCK_EX);
    } while (result != 0 && errno == EINTR);
    if (result != 0) return ErrnoStatus(errno, "flock " + path);
    struct stat held {
    }, named{};
    if (fstat(fd->get(), &held) != 0) return ErrnoStatus(errno, "fstat " + path);
    if (stat(path.c_str(), &named) == 0 && named.st_ino == held.st_ino && named.st_dev == held.st_dev) {
      return LayerFolder(path, std::move(*fd));
    }
    // Another process removed the folder while this one waited for the lock.
  }
}

absl::StatusOr<LayerFolder::Opened> LayerFolder::OpenCurrent(const PresenceIdentity& identity,
                                                             uint32_t access_hour) {
  Opened opened;
  const Contents contents = ContentsOf(path_);
  const std::map<uint64_t, Pair>& pairs = contents.pairs;
  uint64_t last = pairs.empty() ? 0 : pairs.rbegin()->first;
  // The usual case: one sound pair, or nothing yet.
  bool only_pair = !contents.others && pairs.size() <= 1;
  for (auto it = pairs.rbegin(); it != pairs.rend(); ++it) {
    const auto& [generation, pair] = *it;
    if (opened.files == nullptr && pair.content && pair.presence) {
      auto files = OpenGeneration(path_, generation, identity, /*may_renew=*/true);
      if (files.ok()) {
        opened.files = std::move(*files);
        continue;
      }
      if (files.status().code() == absl::StatusCode::kResourceExhausted) return files.status();
      LOG(WARNING) << "cache.damaged content=" << identity.layer_hex << " generation=" << generation
                   << " reason=\"" << files.status().message() << "\"";
      opened.damaged = true;
      only_pair = false;
      HF_RETURN_IF_ERROR(SetAside(path_, generation));
    } else if (pair.presence && !pair.content) {
      opened.damaged = true;
      only_pair = false;
      HF_RETURN_IF_ERROR(SetAside(path_, generation));
    } else {  // left by an interrupted eviction or creation
      HF_RETURN_IF_ERROR(Unlink(path_ + "/presence." + std::to_string(generation)));
      HF_RETURN_IF_ERROR(Unlink(path_ + "/content." + std::to_string(generation)));
    }
  }
  if (opened.files == nullptr) {
    HF_ASSIGN_OR_RETURN(opened.files, CreateGeneration(path_, last + 1, identity, access_hour));
  }
  if (!only_pair) {
    opened.usage = UsageOf(path_);
    return opened;
  }
  HF_ASSIGN_OR_RETURN(opened.usage, UsageOfPair(*opened.files));
  return opened;
}

absl::StatusOr<LayerFolder::Opened> LayerFolder::FindCurrent(const PresenceIdentity& identity) {
  const Contents contents = ContentsOf(path_);
  auto last = contents.pairs.rbegin();
  if (last == contents.pairs.rend() || !last->second.content || !last->second.presence) {
    return NotFound("no content in " + path_);
  }
  Opened opened;
  auto files = OpenGeneration(path_, last->first, identity, /*may_renew=*/false);
  if (!files.ok()) return NotFound("no sound content in " + path_);
  opened.files = std::move(*files);
  opened.usage = UsageOf(path_);
  return opened;
}

absl::Status LayerFolder::UnlinkContent(uint64_t* last_generation) {
  const std::map<uint64_t, Pair> pairs = ContentsOf(path_).pairs;
  for (const auto& [generation, pair] : pairs) {
    HF_RETURN_IF_ERROR(Unlink(path_ + "/presence." + std::to_string(generation)));
  }
  for (const auto& [generation, pair] : pairs) {
    HF_RETURN_IF_ERROR(Unlink(path_ + "/content." + std::to_string(generation)));
    *last_generation = generation;
  }
  for (const char* name : {"/presence.damaged", "/content.damaged", "/presence.tmp"}) {
    HF_RETURN_IF_ERROR(Unlink(path_ + name));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<LayerContent::Files>> LayerFolder::Replace(const PresenceIdentity& identity,
                                                                          uint32_t access_hour) {
  uint64_t last = 0;
  HF_RETURN_IF_ERROR(UnlinkContent(&last));
  return CreateGeneration(path_, last + 1, identity, access_hour);
}

absl::StatusOr<uint64_t> LayerFolder::Remove() {
  uint64_t bytes = UsageOf(path_).bytes;
  uint64_t last = 0;
  HF_RETURN_IF_ERROR(UnlinkContent(&last));
  if (rmdir(path_.c_str()) != 0 && errno != ENOENT) return ErrnoStatus(errno, "rmdir " + path_);
  return bytes;
}

FolderUsage UsageOf(const std::string& folder) {
  FolderUsage usage;
  for (const std::string& name : NamesIn(folder)) {
    std::string path = folder + "/" + name;
    struct stat st {};
    if (lstat(path.c_str(), &st) != 0) continue;
    usage.bytes += static_cast<uint64_t>(st.st_blocks) * 512;
    if (GenerationIn(name, "presence.") == 0) continue;
    auto fd = OpenFile(path, O_RDONLY | O_NOFOLLOW);
    uint64_t packed = 0;
    if (fd.ok() && PreadFull(fd->get(), &packed, sizeof packed, offsetof(PresenceHeader, last_access)).ok()) {
      usage.access_hour = std::max(usage.access_hour, UnpackAccessHour(packed));
    }
  }
  return usage;
}

}  // namespace holdfast::cache
