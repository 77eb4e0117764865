// Snapshot lifecycle: prepare, view, commit, remove, mounts, usage, list, cleanup, as containerd's snapshots
// package demands (shared/reference facts are condensed in README.md). Knows rows, folders and the
// LayerMounter; no gRPC, no FUSE.
//
// Folders: <root>/snapshots/<id>/{fs,work} and snapshot.json, which describes the snapshot (written before
// its row). Thread safety: all methods. Claims on names order calls on one snapshot (claims.h); nothing is
// claimed or locked while the network is waited for, and Stat and List wait for nothing. Errors: the codes of
// containerd's contract (AlreadyExists, NotFound, FailedPrecondition, InvalidArgument).
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "common/clock.h"
#include "common/fault.h"
#include "common/status.h"
#include "common/trace.h"
#include "worker/metadata/metadata.h"
#include "worker/snapshot/layer_mounter.h"

namespace holdfast::snapshot {

using Labels = std::map<std::string, std::string>;

struct Mount {
  std::string type, source;
  std::vector<std::string> options;
};

struct Info {
  std::string name, parent;
  metadata::Kind kind = metadata::Kind::kActive;
  int64_t created_wall_nanos = 0, updated_wall_nanos = 0;
  Labels labels;
};

struct Usage {
  int64_t bytes = 0, inodes = 0;
};

struct Options {
  std::string root;                               // state folder; snapshots/ lies in it
  uint64_t lazy_deadline_nanos = 20'000'000'000;  // then a Prepare falls back to an ordinary snapshot
  const Clock* clock = Clock::Real();
  TraceRing* trace = nullptr;
  FaultPoints* faults = nullptr;  // snapshot.* points
};

class Snapshotter {
 public:
  // Ends background work, and waits for calls of the mounter that overran their deadline. `mounter` must
  // outlive it; `store` must too, unless Abort was called.
  virtual ~Snapshotter() = default;
  static absl::StatusOr<std::unique_ptr<Snapshotter>> Create(const Options& options,
                                                             metadata::MetadataStore* store,
                                                             LayerMounter* mounter);

  // With the label containerd.io/snapshot.ref: tries to make the target a committed, lazily served snapshot
  // and then returns AlreadyExists; whatever prevents it is logged and an ordinary snapshot is prepared
  // instead.
  virtual absl::StatusOr<std::vector<Mount>> Prepare(const std::string& key, const std::string& parent,
                                                     const Labels& labels) = 0;
  virtual absl::StatusOr<std::vector<Mount>> View(const std::string& key, const std::string& parent,
                                                  const Labels& labels) = 0;
  virtual absl::StatusOr<std::vector<Mount>> Mounts(const std::string& key) = 0;
  // `parent` non-empty: CommitSnapshotRequest.parent of containerd 2.2.
  virtual absl::Status Commit(const std::string& name, const std::string& key, const Labels& labels,
                              const std::string& parent) = 0;
  // A metadata change only; the folder goes later. OK when there is no such snapshot: containerd's garbage
  // collection gives up a whole pass on any error.
  virtual absl::Status Remove(const std::string& key) = 0;
  virtual absl::StatusOr<Info> Stat(const std::string& key) = 0;
  // `paths` empty: replace all labels.
  virtual absl::StatusOr<Info> Update(const Info& info, const std::vector<std::string>& paths) = 0;
  // Filters as containerd writes them (OR between list entries). One consistent view.
  virtual absl::StatusOr<std::vector<Info>> List(const std::vector<std::string>& filters) = 0;
  virtual absl::StatusOr<Usage> GetUsage(const std::string& key) = 0;
  // Runs deferred work now, for at most some seconds: unmounts and deletes folders without a row. Never takes
  // a mount from a running container. What fails is retried in the background and is no error here.
  virtual absl::Status Cleanup() = 0;

  // After a start: mounts again every lazy snapshot that the vault does not hold. Blocking; a failure is
  // logged and retried when the snapshot is used. Also starts to delete what a predecessor left.
  virtual void Restore() = 0;

  // For the hand-over: ends background work, Restore included; calls that wait for the network, scan a large
  // folder or mount layers return Aborted soon with nothing changed, also later ones. When this has returned
  // and no call is inside, the store may be closed.
  virtual void Abort() = 0;
};

}  // namespace holdfast::snapshot
