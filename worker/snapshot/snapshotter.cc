#include "worker/snapshot/snapshotter.h"

#include <unistd.h>

#include <atomic>
#include <set>

#include "common/log.h"
#include "glog/logging.h"
#include "worker/snapshot/claims.h"
#include "worker/snapshot/creating_ids.h"
#include "worker/snapshot/filter.h"
#include "worker/snapshot/folders.h"
#include "worker/snapshot/labels.h"
#include "worker/snapshot/mounts.h"
#include "worker/snapshot/parents.h"
#include "worker/snapshot/reaper.h"
#include "worker/snapshot/remote_prepare.h"

namespace holdfast::snapshot {
namespace {

using metadata::Kind;
using metadata::SnapshotRow;

// Commit runs inside containerd's database lock; a folder too large to measure in this time is measured when
// asked for.
constexpr uint64_t kCommitScanNanos = 50'000'000;
constexpr std::chrono::seconds kCleanupWait{10};
constexpr char kLabelsPath[] = "labels";
constexpr std::string_view kLabelPathPrefix = "labels.";

absl::Status Missing(const std::string& key) { return NotFound("snapshot " + key); }

Info InfoOf(const SnapshotRow& row) {
  return {row.key, row.parent, row.kind, row.created_wall_nanos, row.updated_wall_nanos, row.labels};
}

class SnapshotterImpl final : public Snapshotter {
 public:
  SnapshotterImpl(const Options& options, metadata::MetadataStore* store, LayerMounter* mounter)
      : options_(options),
        store_(store),
        mounter_(mounter),
        folders_(options.root),
        index_off_(access("/sys/module/overlay/parameters/index", F_OK) == 0),
        parents_(store, mounter, &folders_),
        reaper_(
            &folders_, mounter, [this](uint64_t id) { return UseOf(id); }, options.trace, options.faults),
        remote_({&options_, store, mounter, &folders_, &claims_, &creating_, &parents_, &reaper_}) {}

  absl::Status Init() const { return folders_.Init(); }

  absl::StatusOr<std::vector<Mount>> Prepare(const std::string& key, const std::string& parent,
                                             const Labels& labels) override {
    TraceSpan span(options_.trace, "snapshot.prepare",
                   "key=" + LogValue(key) + " parent=" + LogValue(parent));
    HF_RETURN_IF_ERROR(CheckNew(key, parent));
    if (!LabelOr(labels, kTargetLabel).empty()) {
      HF_RETURN_IF_ERROR(remote_.Prepare(key, parent, labels));
      span.AddDetail("lazy=false");
    }
    return CreateSnapshot(Kind::kActive, key, parent, labels);
  }

  absl::StatusOr<std::vector<Mount>> View(const std::string& key, const std::string& parent,
                                          const Labels& labels) override {
    TraceSpan span(options_.trace, "snapshot.view", "key=" + LogValue(key) + " parent=" + LogValue(parent));
    HF_RETURN_IF_ERROR(CheckNew(key, parent));
    return CreateSnapshot(Kind::kView, key, parent, labels);
  }

  absl::StatusOr<std::vector<Mount>> Mounts(const std::string& key) override {
    std::optional<SnapshotRow> row = store_->Get(key);
    if (!row.has_value()) return Missing(key);
    if (row->kind == Kind::kCommitted)
      return FailedPrecondition("snapshot " + key + " is committed, it has no mounts");
    HF_ASSIGN_OR_RETURN(std::vector<Row> chain, parents_.Chain(row->parent));
    HF_RETURN_IF_ERROR(parents_.EnsureMounted(chain));
    return MountsOf(*row, chain);
  }

  absl::Status Commit(const std::string& name, const std::string& key, const Labels& labels,
                      const std::string& parent) override {
    TraceSpan span(options_.trace, "snapshot.commit", "key=" + LogValue(key) + " name=" + LogValue(name));
    if (name.empty()) return InvalidArgument("the name of a committed snapshot must not be empty");
    std::optional<SnapshotRow> active = store_->Get(key);
    TreeUsage usage;
    if (active.has_value() && active->kind == Kind::kActive) {
      usage = Folders::Scan(folders_.Fs(active->id), Clock::Real()->BootNanos() + kCommitScanNanos, never_);
    }
    Claims::Hold hold = claims_.Take({key, name}, {parent});
    HF_ASSIGN_OR_RETURN(SnapshotRow row, CheckCommit(name, key, parent));
    row.key = name;
    row.kind = Kind::kCommitted;
    row.labels = WithoutEmpty(labels);
    row.created_wall_nanos = row.updated_wall_nanos = options_.clock->WallNanos();
    row.usage_bytes = usage.complete ? usage.bytes : 0;
    row.usage_inodes = usage.complete ? usage.inodes : 0;  // 0: not measured, see GetUsage
    HF_RETURN_IF_ERROR(folders_.Describe(row));
    HF_RETURN_IF_ERROR(PassFault(options_.faults, "snapshot.commit.before_row"));
    HF_RETURN_IF_ERROR(store_->Apply({{row}, {key}}));
    return PassFault(options_.faults, "snapshot.commit.after_row");
  }

  absl::Status Remove(const std::string& key) override {
    TraceSpan span(options_.trace, "snapshot.remove", "key=" + LogValue(key));
    Claims::Hold hold = claims_.Take({key});
    std::optional<SnapshotRow> row = store_->Get(key);
    if (!row.has_value()) {
      LOG(INFO) << "snapshot.remove key=" << LogValue(key) << " found=false";
      return absl::OkStatus();
    }
    if (!store_->ChildrenOf(key).empty()) return FailedPrecondition("cannot remove snapshot with child");
    HF_RETURN_IF_ERROR(PassFault(options_.faults, "snapshot.remove.before_row"));
    HF_RETURN_IF_ERROR(store_->Apply({{}, {key}}));
    HF_RETURN_IF_ERROR(PassFault(options_.faults, "snapshot.remove.after_row"));
    VLOG(1) << "snapshot.remove key=" << LogValue(key) << " id=" << row->id;
    reaper_.Schedule(row->id);
    return absl::OkStatus();
  }

  absl::StatusOr<Info> Stat(const std::string& key) override {
    std::optional<SnapshotRow> row = store_->Get(key);
    if (!row.has_value()) return Missing(key);
    return InfoOf(*row);
  }

  absl::StatusOr<Info> Update(const Info& info, const std::vector<std::string>& paths) override {
    Claims::Hold hold = claims_.Take({info.name});
    std::optional<SnapshotRow> row = store_->Get(info.name);
    if (!row.has_value()) return Missing(info.name);
    HF_ASSIGN_OR_RETURN(row->labels, UpdatedLabels(row->labels, info.labels, paths));
    row->updated_wall_nanos = options_.clock->WallNanos();
    HF_RETURN_IF_ERROR(folders_.Describe(*row));
    HF_RETURN_IF_ERROR(PassFault(options_.faults, "snapshot.update.before_row"));
    HF_RETURN_IF_ERROR(store_->Apply({{*row}, {}}));
    return InfoOf(*row);
  }

  absl::StatusOr<std::vector<Info>> List(const std::vector<std::string>& filters) override {
    HF_ASSIGN_OR_RETURN(std::unique_ptr<Filter> filter, Filter::ParseAny(filters));
    std::vector<Info> result;
    for (const Row& row : store_->Rows()) {
      if (filter->Matches(*row)) result.push_back(InfoOf(*row));
    }
    return result;
  }

  absl::StatusOr<Usage> GetUsage(const std::string& key) override {
    std::optional<SnapshotRow> row = store_->Get(key);
    if (!row.has_value()) return Missing(key);
    uint64_t bytes = row->usage_bytes, inodes = row->usage_inodes;
    if (!row->lazy_digest.empty()) {
      mounter_->Usage(row->lazy_digest, row->lazy_index, &bytes, &inodes);
    } else if (row->kind == Kind::kActive || (row->kind == Kind::kCommitted && inodes == 0)) {
      TreeUsage usage = Folders::Scan(folders_.Fs(row->id), 0, aborted_);
      if (!usage.complete) return absl::AbortedError("the worker is being replaced");
      bytes = usage.bytes;
      inodes = usage.inodes;
      if (row->kind == Kind::kCommitted) RememberUsage(*row, usage);
    }
    return Usage{static_cast<int64_t>(bytes), static_cast<int64_t>(inodes)};
  }

  absl::Status Cleanup() override {
    absl::Status status = reaper_.Sweep(kCleanupWait);
    LOG_IF(ERROR, !status.ok()) << "snapshot.cleanup error=" << LogValue(FromAbsl(status.message()));
    return absl::OkStatus();
  }

  void Restore() override {
    std::vector<Row> lazy;
    for (const Row& row : store_->Rows()) {
      if (!row->lazy_digest.empty()) lazy.push_back(row);
    }
    parents_.MountAll(lazy);
    absl::Status status = reaper_.Sweep(std::chrono::milliseconds(0));
    LOG_IF(ERROR, !status.ok()) << "snapshot.restore error=" << LogValue(FromAbsl(status.message()));
  }

  void Abort() override {
    aborted_ = true;
    remote_.Abort();
    parents_.Abort();
    reaper_.Stop();
  }

 private:
  // The checks of a new snapshot; made before the work and again, under claims, before the row is written.
  absl::Status CheckNew(const std::string& key, const std::string& parent) const {
    if (key.empty()) return InvalidArgument("the key of a snapshot must not be empty");
    if (!parent.empty()) {
      std::optional<SnapshotRow> row = store_->Get(parent);
      if (!row.has_value()) return NotFound("parent snapshot " + parent);
      if (row->kind != Kind::kCommitted)
        return InvalidArgument("parent snapshot " + parent + " is not committed");
    }
    if (store_->Get(key).has_value()) return AlreadyExists("snapshot " + key);
    return absl::OkStatus();
  }

  absl::StatusOr<std::vector<Mount>> CreateSnapshot(Kind kind, const std::string& key,
                                                    const std::string& parent, const Labels& labels) {
    HF_ASSIGN_OR_RETURN(std::vector<Row> chain, parents_.Chain(parent));
    HF_RETURN_IF_ERROR(parents_.EnsureMounted(chain));
    SnapshotRow row;
    row.key = key;
    row.parent = parent;
    row.kind = kind;
    row.labels = WithoutEmpty(labels);
    row.created_wall_nanos = row.updated_wall_nanos = options_.clock->WallNanos();
    // Through our own mount when the parent is lazy: it is live, and its requests are answered by other
    // threads.
    std::string owner_from = chain.empty() ? "" : folders_.Fs(chain[0]->id);
    std::unique_ptr<CreatingIds::Mark> mark;
    absl::Status status;
    do {  // an id whose folder was left behind by a lost store is skipped
      HF_ASSIGN_OR_RETURN(row.id, store_->NextId());
      mark = std::make_unique<CreatingIds::Mark>(&creating_, row.id);
      status = folders_.Create(row, owner_from);
    } while (absl::IsAlreadyExists(status));
    if (status.ok()) status = WriteNewRow(row);
    mark.reset();
    if (!status.ok()) {
      reaper_.Schedule(row.id);
      return status;
    }
    return MountsOf(row, chain);
  }

  absl::Status WriteNewRow(const SnapshotRow& row) {
    HF_RETURN_IF_ERROR(PassFault(options_.faults, "snapshot.prepare.before_row"));
    {
      Claims::Hold hold = claims_.Take({row.key}, {row.parent});
      HF_RETURN_IF_ERROR(CheckNew(row.key, row.parent));
      HF_RETURN_IF_ERROR(store_->Apply({{row}, {}}));
    }
    return PassFault(options_.faults, "snapshot.prepare.after_row");
  }

  std::vector<Mount> MountsOf(const SnapshotRow& row, const std::vector<Row>& chain) const {
    std::vector<std::string> lower;
    for (const Row& parent : chain) lower.push_back(folders_.Fs(parent->id));
    return BuildMounts(row.kind, folders_.Fs(row.id), folders_.Work(row.id), lower, index_off_);
  }

  // The active row, with its parent replaced where Commit gives one.
  absl::StatusOr<SnapshotRow> CheckCommit(const std::string& name, const std::string& key,
                                          const std::string& parent) const {
    if (store_->Get(name).has_value()) return AlreadyExists("snapshot " + name);
    std::optional<SnapshotRow> row = store_->Get(key);
    if (!row.has_value()) return Missing(key);
    if (row->kind != Kind::kActive) return FailedPrecondition("snapshot " + key + " is not active");
    if (parent.empty()) return *row;
    if (!row->parent.empty() && row->parent != parent) {
      return InvalidArgument("snapshot " + key + " has the parent " + row->parent + ", not " + parent);
    }
    std::optional<SnapshotRow> base = store_->Get(parent);
    if (!base.has_value()) return NotFound("parent snapshot " + parent);
    if (base->kind != Kind::kCommitted)
      return FailedPrecondition("parent snapshot " + parent + " is not committed");
    row->parent = parent;
    return *row;
  }

  static absl::StatusOr<Labels> UpdatedLabels(const Labels& old, const Labels& wanted,
                                              const std::vector<std::string>& paths) {
    if (paths.empty()) return WithoutEmpty(wanted);
    Labels result = old;
    for (const std::string& path : paths) {
      if (path == kLabelsPath) {
        result = wanted;
      } else if (path.compare(0, kLabelPathPrefix.size(), kLabelPathPrefix) == 0) {
        std::string name = path.substr(kLabelPathPrefix.size());
        result[name] = LabelOr(wanted, name);  // empty: dropped below
      } else {
        return InvalidArgument("cannot update " + path + " of a snapshot");
      }
    }
    return WithoutEmpty(result);
  }

  void RememberUsage(const SnapshotRow& seen, const TreeUsage& usage) {
    Claims::Hold hold = claims_.Take({seen.key});
    std::optional<SnapshotRow> row = store_->Get(seen.key);
    if (!row.has_value() || row->id != seen.id) return;
    row->usage_bytes = usage.bytes;
    row->usage_inodes = usage.inodes;
    absl::Status status = store_->Apply({{*row}, {}});
    LOG_IF(WARNING, !status.ok()) << "snapshot.usage_not_stored key=" << LogValue(seen.key)
                                  << " error=" << LogValue(FromAbsl(status.message()));
  }

  // Being created is asked first: its row is written before the mark is taken off.
  FolderUse UseOf(uint64_t id) const {
    if (creating_.Contains(id)) return FolderUse::kBeingCreated;
    return store_->HasId(id) ? FolderUse::kHasRow : FolderUse::kGarbage;
  }

  const Options options_;
  metadata::MetadataStore* const store_;
  LayerMounter* const mounter_;
  const Folders folders_;
  const bool index_off_;
  const std::atomic<bool> never_{false};
  std::atomic<bool> aborted_{false};
  Claims claims_;
  CreatingIds creating_;
  Parents parents_;
  Reaper reaper_;
  RemotePreparer remote_;  // last: its leftovers use the others
};

}  // namespace

absl::StatusOr<std::unique_ptr<Snapshotter>> Snapshotter::Create(const Options& options,
                                                                 metadata::MetadataStore* store,
                                                                 LayerMounter* mounter) {
  auto snapshotter = std::make_unique<SnapshotterImpl>(options, store, mounter);
  HF_RETURN_IF_ERROR(snapshotter->Init());
  return std::unique_ptr<Snapshotter>(std::move(snapshotter));
}

}  // namespace holdfast::snapshot
