#include "worker/snapshot/parents.h"

#include <algorithm>
#include <atomic>
#include <thread>

#include "common/log.h"
#include "glog/logging.h"

namespace holdfast::snapshot {
namespace {

constexpr size_t kMountThreads = 8;

}  // namespace

absl::StatusOr<std::vector<Row>> Parents::Chain(const std::string& parent) const {
  std::vector<Row> chain;
  for (std::string key = parent; !key.empty(); key = chain.back()->parent) {
    std::optional<metadata::SnapshotRow> row = store_->Get(key);
    if (!row.has_value()) return NotFound("parent snapshot " + key);
    chain.push_back(std::make_shared<const metadata::SnapshotRow>(std::move(*row)));
  }
  return chain;
}

absl::Status Parents::MountOne(const metadata::SnapshotRow& row) {
  Claims::Hold hold = mounting_.Take({std::to_string(row.id)});
  if (mounter_->IsMounted(row.id)) return absl::OkStatus();
  absl::Status status = mounter_->Remount(row.lazy_digest, row.lazy_index, row.lazy_image, row.lazy_blob_size,
                                          row.id, folders_->Fs(row.id));
  LOG(INFO) << "snapshot.remount ok=" << status.ok() << " key=" << LogValue(row.key)
            << " layer=" << row.lazy_digest << " id=" << row.id
            << (status.ok() ? "" : " error=" + LogValue(FromAbsl(status.message())));
  if (status.ok()) return status;
  return Unavailable("layer " + row.lazy_digest + " unavailable: " + std::string(FromAbsl(status.message())));
}

std::vector<absl::Status> Parents::MountMany(const std::vector<Row>& rows) {
  std::vector<Row> missing;
  for (const Row& row : rows) {
    if (!row->lazy_digest.empty() && !mounter_->IsMounted(row->id)) missing.push_back(row);
  }
  std::vector<absl::Status> results(missing.size());
  std::atomic<size_t> next{0};
  auto work = [&] {
    for (size_t i = next++; i < missing.size(); i = next++) {
      results[i] = aborted_ ? absl::AbortedError("the worker is being replaced") : MountOne(*missing[i]);
    }
  };
  std::vector<std::thread> helpers;
  for (size_t i = 1; i < std::min(kMountThreads, missing.size()); i++) helpers.emplace_back(work);
  work();
  for (std::thread& helper : helpers) helper.join();
  return results;
}

absl::Status Parents::EnsureMounted(const std::vector<Row>& rows) {
  for (const absl::Status& status : MountMany(rows)) HF_RETURN_IF_ERROR(status);
  return absl::OkStatus();
}

void Parents::MountAll(const std::vector<Row>& rows) {
  size_t failed = 0;
  std::vector<absl::Status> results = MountMany(rows);
  for (const absl::Status& status : results) failed += status.ok() ? 0 : 1;
  LOG(INFO) << "snapshot.restored snapshots=" << rows.size() << " remounted=" << results.size() - failed
            << " failed=" << failed;
}

std::vector<ParentLayer> Parents::Describe(const std::vector<Row>& chain) const {
  std::vector<ParentLayer> result;
  for (const Row& row : chain) result.push_back({row->id, folders_->Fs(row->id), row->lazy_index});
  return result;
}

}  // namespace holdfast::snapshot
