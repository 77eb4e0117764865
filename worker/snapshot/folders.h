// The folders of snapshots: <root>/snapshots/<id>/{fs,work} and snapshot.json, a copy of the row in the same
// bytes (worker/metadata/row_codec.h). The row in the metadata store is synced and decides; the copy is for
// people and for rebuilding a lost store, and is not synced. Thread safety: all methods, for different ids.
// Errors: those of the file system, never codes that mean something in containerd's contract (NotFound,
// AlreadyExists, ... become Internal); InvalidArgument for a row that is not UTF-8.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/status.h"
#include "worker/metadata/metadata.h"

namespace holdfast::snapshot {

struct TreeUsage {
  uint64_t bytes = 0, inodes = 0;
  bool complete = false;  // false: cancelled or out of time
};

class Folders {
 public:
  explicit Folders(const std::string& root) : root_(root + "/snapshots") {}

  absl::Status Init() const;  // creates <root>/snapshots
  std::string Folder(uint64_t id) const { return root_ + "/" + std::to_string(id); }
  std::string Fs(uint64_t id) const { return Folder(id) + "/fs"; }
  std::string Work(uint64_t id) const { return Folder(id) + "/work"; }

  // Creates the folder and its description. `owner_from`: the folder whose owner the new fs gets ("": ours).
  // AlreadyExists when the id has a folder (left by a lost store): take another id.
  absl::Status Create(const metadata::SnapshotRow& row, const std::string& owner_from) const;
  absl::Status Describe(const metadata::SnapshotRow& row) const;
  absl::StatusOr<std::vector<uint64_t>> Ids() const;

  // Disk usage below `path`, hard links counted once, other file systems left out. Stops at
  // `deadline_boot_nanos` (0: none) and when `cancelled` becomes true.
  static TreeUsage Scan(const std::string& path, uint64_t deadline_boot_nanos,
                        const std::atomic<bool>& cancelled);

 private:
  const std::string root_;
};

// rm -rf that never enters a mount (not even a bind mount of the same file system), copes with any depth, and
// stops when `cancelled`. A missing path is OK; Cancelled, FailedPrecondition (a mount is in the way) or the
// file system's error.
absl::Status RemoveFolder(const std::string& path, const std::atomic<bool>& cancelled);

// `status` with a code that containerd gives no meaning to.
absl::Status AsPlainFailure(const absl::Status& status);

}  // namespace holdfast::snapshot
