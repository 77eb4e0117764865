// The folder of one layer under the store's root, locked (flock) against every other process and thread that
// would open, convert, evict or remove it. Reading and adding chunks needs no lock.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "common/io.h"
#include "common/status.h"
#include "worker/cache/content_store.h"
#include "worker/cache/presence_file.h"

namespace holdfast::cache {

// What the files of a layer folder occupy on disk (blocks), and when the layer was last read as far as its
// presence file tells (hours since 1970; 0 = unknown). Takes no lock.
struct FolderUsage {
  uint64_t bytes = 0;
  uint32_t access_hour = 0;
};
FolderUsage UsageOf(const std::string& folder);

class LayerFolder {
 public:
  // Locks the folder, making it when `create`; NotFound otherwise. Blocks while another holds it
  // (milliseconds).
  static absl::StatusOr<LayerFolder> Lock(const std::string& path, bool create);

  struct Opened {
    std::shared_ptr<LayerContent::Files> files;
    bool damaged = false;  // something unsound was renamed to *.damaged
    FolderUsage usage;
  };
  // The current generation: what is on disk, or a new, empty one. What an interrupted eviction left behind is
  // removed.
  absl::StatusOr<Opened> OpenCurrent(const PresenceIdentity& identity, uint32_t access_hour);
  // The current generation if it is there, sound and of this vault and boot, else NotFound. Changes nothing.
  absl::StatusOr<Opened> FindCurrent(const PresenceIdentity& identity);
  // Unlinks all content (presence first) and makes the next, empty generation.
  absl::StatusOr<std::shared_ptr<LayerContent::Files>> Replace(const PresenceIdentity& identity,
                                                               uint32_t access_hour);
  // Unlinks everything and the folder itself. Returns the bytes on disk that were named here.
  absl::StatusOr<uint64_t> Remove();

 private:
  LayerFolder(std::string path, UniqueFd lock) : path_(std::move(path)), lock_(std::move(lock)) {}
  absl::Status UnlinkContent(uint64_t* last_generation);

  std::string path_;
  UniqueFd lock_;
};

}  // namespace holdfast::cache
