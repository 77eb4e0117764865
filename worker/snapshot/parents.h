// The layers below a snapshot: finds them, and makes sure that lazily served ones are mounted before a path
// to them is handed out. Thread-safe; mounting one layer is done once however many calls need it.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "common/status.h"
#include "worker/metadata/metadata.h"
#include "worker/snapshot/claims.h"
#include "worker/snapshot/folders.h"
#include "worker/snapshot/layer_mounter.h"

namespace holdfast::snapshot {

using Row = std::shared_ptr<const metadata::SnapshotRow>;

class Parents {
 public:
  Parents(const metadata::MetadataStore* store, LayerMounter* mounter, const Folders* folders)
      : store_(store), mounter_(mounter), folders_(folders) {}

  // `parent` and what is below it, nearest first; empty for "". NotFound when one is missing.
  absl::StatusOr<std::vector<Row>> Chain(const std::string& parent) const;
  // Unavailable "layer <digest> unavailable: why" when one cannot be mounted, Aborted after Abort. No
  // network; in parallel.
  absl::Status EnsureMounted(const std::vector<Row>& rows);
  // Mounts what is not mounted; failures are logged and left for EnsureMounted.
  void MountAll(const std::vector<Row>& rows);
  // Begins no further mount: those that wait, and all later ones, are Aborted.
  void Abort() { aborted_ = true; }
  std::vector<ParentLayer> Describe(const std::vector<Row>& chain) const;

 private:
  absl::Status MountOne(const metadata::SnapshotRow& row);
  std::vector<absl::Status> MountMany(const std::vector<Row>& rows);

  const metadata::MetadataStore* const store_;
  LayerMounter* const mounter_;
  const Folders* const folders_;
  std::atomic<bool> aborted_{false};
  Claims mounting_;
};

}  // namespace holdfast::snapshot
