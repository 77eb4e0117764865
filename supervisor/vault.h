// The vault: every mount the supervisor made, with what a worker needs to serve it. Pure bookkeeping, no system calls but
// the id file's; interprets neither INIT bytes nor blobs.
//
// Used on the main thread only. A device descriptor is shared by everything that may still send it; it is closed when the
// mount is gone and nobody sends it any more.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "common/io.h"
#include "common/status.h"

namespace holdfast::supervisor {

using SharedFd = std::shared_ptr<UniqueFd>;

// Numbers that are never reused within one state folder, across restarts: reserved in blocks, the reservation synced to the
// file before a number of it is given out.
class IdFile {
 public:
  // `path` need not exist. DataLoss when it holds anything but a number.
  static absl::StatusOr<IdFile> Open(const std::string& path, uint64_t block);
  absl::StatusOr<uint64_t> Next();

 private:
  IdFile(std::string path, uint64_t next, uint64_t block) : path_(std::move(path)), next_(next), end_(next), block_(block) {}
  std::string path_;
  uint64_t next_;
  uint64_t end_;  // numbers below it are reserved
  uint64_t block_;
};

enum class MountState { kMounting, kLive, kDetached, kGone };

struct Mount {
  uint64_t id = 0;
  MountState state = MountState::kMounting;
  std::string path;
  std::string blob;
  uint64_t caller = 0;     // generation that asked for it
  bool abandoned = false;  // nobody waits for it any more: undone when mounting ends
  SharedFd device;
  std::string init_request;
  std::string init_reply;
};

class Vault {
 public:
  explicit Vault(IdFile ids) : ids_(std::move(ids)) {}

  // A new entry in state mounting. AlreadyExists while another mounting or live entry has the path.
  absl::StatusOr<uint64_t> Allocate(const std::string& path, std::string blob, uint64_t caller);
  void SetLive(uint64_t id, SharedFd device, std::string init_request, std::string init_reply);
  absl::Status SetBlob(uint64_t id, std::string blob);
  void SetDetached(uint64_t id);
  void Forget(uint64_t id);  // gone

  // Null when unknown (never existed, or gone). Valid until the next change.
  const Mount* Find(uint64_t id) const;
  // Live and detached entries with id > after, in order; *more says whether there are others.
  std::vector<const Mount*> Page(uint64_t after, size_t limit, bool* more) const;
  std::vector<const Mount*> All() const;

  // Entries that another worker than `generation` is still mounting.
  bool MountingForOthers(uint64_t generation) const;
  void AbandonMountingOfOthers(uint64_t generation);

  // Live or detached entries whose descriptor polls POLLERR: their superblock exists no more. Forgets and returns them.
  std::vector<uint64_t> TakeGone();

 private:
  IdFile ids_;
  std::map<uint64_t, Mount> mounts_;
};

}  // namespace holdfast::supervisor
