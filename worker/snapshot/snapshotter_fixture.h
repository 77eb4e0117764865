// For tests: a snapshotter over a real metadata store in a temporary folder, with a fake LayerMounter.
#pragma once

#include <fcntl.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "common/io.h"
#include "gtest/gtest.h"
#include "worker/snapshot/fake_mounter.h"
#include "worker/snapshot/folders.h"
#include "worker/snapshot/snapshotter.h"

namespace holdfast::snapshot {

struct Backend {
  Backend(const std::string& root, LayerMounter* mounter, FaultPoints* faults,
          uint64_t lazy_deadline_nanos = 20'000'000'000) {
    auto opened = metadata::MetadataStore::Open(root + "/metadata", 5'000'000'000, faults);
    EXPECT_TRUE(opened.ok()) << opened.status();
    store = std::move(*opened);
    Options options;
    options.root = root;
    options.faults = faults;
    options.lazy_deadline_nanos = lazy_deadline_nanos;
    auto created = Snapshotter::Create(options, store.get(), mounter);
    EXPECT_TRUE(created.ok()) << created.status();
    snapshotter = std::move(*created);
  }
  std::unique_ptr<metadata::MetadataStore> store;
  std::unique_ptr<Snapshotter> snapshotter;
};

class SnapshotterFixture : public testing::Test {
 protected:
  SnapshotterFixture() { Start(); }
  ~SnapshotterFixture() override { Stop(); }

  void Start(uint64_t lazy_deadline_nanos = 20'000'000'000) {
    backend_ = std::make_unique<Backend>(dir_.path(), &mounter_, &faults_, lazy_deadline_nanos);
    snapshotter_ = backend_->snapshotter.get();
  }
  void Stop() { backend_.reset(); }
  void Restart() {
    Stop();
    Start();
  }

  const std::string& root() const { return dir_.path(); }
  void Active(const std::string& key, const std::string& parent = "", const Labels& labels = {}) {
    auto mounts = snapshotter_->Prepare(key, parent, labels);
    ASSERT_TRUE(mounts.ok()) << mounts.status();
  }
  void Commit(const std::string& key, const std::string& name) {
    absl::Status status = snapshotter_->Commit(name, key, {}, "");
    ASSERT_TRUE(status.ok()) << status;
  }
  uint64_t IdOf(const std::string& key) const {
    auto row = backend_->store->Get(key);
    return row.has_value() ? row->id : 0;
  }
  std::vector<uint64_t> FolderIds() const {
    std::vector<uint64_t> ids = Folders(root()).Ids().value();
    std::sort(ids.begin(), ids.end());
    return ids;
  }
  static void WriteText(const std::string& path, const std::string& text) {
    UniqueFd fd = OpenFile(path, O_WRONLY | O_CREAT, 0644).value();
    ASSERT_TRUE(PwriteFull(fd.get(), text.data(), text.size(), 0).ok());
  }

  TempDir dir_;
  FaultPoints faults_;
  FakeMounter mounter_;
  std::unique_ptr<Backend> backend_;
  Snapshotter* snapshotter_ = nullptr;
};

}  // namespace holdfast::snapshot
