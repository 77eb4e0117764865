// What an earlier supervisor left, and what to make of it: pure decisions and checks. The taking over itself
// is Supervisor::Recover (recovery.cc); the table is in README.md.
#pragma once

#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "common/fd_store.h"
#include "supervisor/state_journal.h"

namespace holdfast::supervisor {

// How long the owner may take to come back before it is replaced.
inline constexpr uint64_t kReattachMillis = 5'000;

// A worker that has outlived its supervisor, from <state>/supervisor/workers.
struct LivingWorker {
  uint64_t generation = 0, start_ticks = 0;
  pid_t pid = 0;
};

std::string WorkersPath(const std::string& state_dir);
// The file is rewritten when a worker comes or goes, not synced: it is about this boot only.
absl::Status WriteLivingWorkers(const std::string& path, const std::vector<LivingWorker>& workers);
// Those that still run; none when the file is missing, of an earlier boot, or cannot be read.
std::vector<LivingWorker> ReadLivingWorkers(const std::string& path);

// Its pidfd, or invalid when that very process has ended.
UniqueFd OpenIfAlive(pid_t pid, uint64_t start_ticks);

// Which of the workers that still run is to go on: the holder of the metadata, else the owner; 0: none. Only
// one that can come back. The others are ended.
uint64_t ChooseOwner(const SavedState& state, const std::set<uint64_t>& alive);

// True when the descriptors of everything in `state` are in `fds`.
bool HasAllDescriptors(const SavedState& state, const StoredFds& fds);

// What becomes of the saved mounts. Descriptors are taken out of `fds`. `owner`: the worker that goes on,
// `held`, if known, what it was given. A mount that it asked for and was not given was made, but nobody was
// told of it.
struct RestoredMounts {
  std::vector<Mount> served;    // live or detached, with devices
  std::vector<uint64_t> lost;   // half-made, gone, or without a device
  std::set<std::string> paths;  // where a mount is to stay; all others are unmounted
};
RestoredMounts RestoreMounts(const SavedState& state, uint64_t owner,
                             const std::optional<std::set<uint64_t>>& held, StoredFds* fds);

}  // namespace holdfast::supervisor
