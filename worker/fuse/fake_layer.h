// For tests: a LayerIndex made by hand and a Layer whose fetches the test holds back, releases or fails. The
// bytes of a file are a function of its nodeid and the offset, so every process can check them.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "common/mutex.h"
#include "worker/layer/layer.h"

namespace holdfast::fuse {

char ContentByte(uint64_t nodeid, uint64_t offset);
std::string ContentBytes(uint64_t nodeid, uint64_t offset, uint64_t size);

class FakeIndex final : public layer::LayerIndex {
 public:
  FakeIndex();
  // The node's record may be changed afterwards through `mutable_node`. Names must come in ascending order
  // for a given folder only if readdir order matters to the test.
  uint64_t Add(uint64_t folder, const std::string& name, uint32_t mode, uint64_t size = 0);
  uint64_t AddSymlink(uint64_t folder, const std::string& name, const std::string& target);
  void AddHardLink(uint64_t folder, const std::string& name, uint64_t nodeid);
  void SetXattr(uint64_t nodeid, const std::string& name, const std::string& value);
  layer::NodeRecord& mutable_node(uint64_t nodeid) { return nodes_[nodeid - 1]; }

  const layer::IndexInfo& info() const override { return info_; }
  uint32_t numbering_version() const override { return 1; }
  uint64_t node_count() const override { return nodes_.size(); }
  uint64_t regular_files() const override { return 0; }
  uint64_t content_bytes() const override { return 1 << 20; }
  uint64_t chunk_count() const override { return 0; }
  bool has_xattrs() const override { return !xattrs_.empty(); }
  bool has_implied_folders() const override { return false; }
  const layer::NodeRecord* node(uint64_t nodeid) const override;
  uint64_t Lookup(uint64_t folder, std::string_view name) const override;
  uint64_t LookupPath(std::string_view) const override { return 0; }
  std::span<const layer::ChildRecord> children(uint64_t folder) const override;
  std::string_view name(const layer::ChildRecord& child) const override;
  std::string_view link_target(const layer::NodeRecord& node) const override;
  std::vector<std::pair<std::string_view, std::string_view>> xattrs(
      const layer::NodeRecord& node) const override;
  std::span<const layer::ChunkRecord> chunks() const override { return {}; }
  uint64_t ChunkAt(const layer::NodeRecord&, uint64_t) const override { return 0; }

 private:
  uint64_t NewNode(uint64_t folder, uint32_t mode, uint64_t size);
  void AddChild(uint64_t folder, const std::string& name, uint64_t nodeid);
  uint64_t Keep(const std::string& text);

  layer::IndexInfo info_;
  std::vector<layer::NodeRecord> nodes_;
  std::deque<std::string> strings_;
  std::map<uint64_t, std::vector<layer::ChildRecord>> children_;
  std::map<uint64_t, std::map<std::string, uint64_t>> names_;
  std::map<uint64_t, std::map<std::string, std::string>> xattrs_;
};

// What ReadNow has of a file.
enum class Stored {
  kMissing,  // must be fetched
  kMemory,
  kZeros,
  kFile,       // in a real file, at an odd offset
  kTruncated,  // the real file ends too early; fetching helps
};

class FakeLayer final : public layer::Layer {
 public:
  explicit FakeLayer(std::shared_ptr<FakeIndex> index);
  ~FakeLayer() override;

  void Store(uint64_t nodeid, Stored how);
  // Fetches wait for Release from now on / are answered at once by the layer's own thread.
  void Hold(bool hold);
  // Answers what waits (with an error, if not OK), on the layer's own thread.
  void Release(const absl::Status& status = absl::OkStatus());
  size_t waiting() const;
  uint64_t fetches() const;

  const layer::LayerIndex& index() const override { return *index_; }
  std::shared_ptr<cache::LayerContent> content() const override { return nullptr; }
  std::optional<layer::ReadResult> ReadNow(uint64_t nodeid, uint64_t offset, uint64_t size) override;
  void ReadAsync(uint64_t nodeid, uint64_t offset, uint64_t size, uint64_t deadline_boot_nanos,
                 std::function<void(absl::StatusOr<layer::ReadResult>)> done) override;
  void StartPrefetch() override {}
  layer::LayerStats stats() const override { return {}; }

 private:
  using Done = std::function<void(absl::StatusOr<layer::ReadResult>)>;
  struct Fetch {
    uint64_t nodeid = 0, offset = 0, size = 0;
    Done done;
    absl::Status status;
  };
  void Run();
  bool Next(Fetch* fetch);
  std::shared_ptr<const cache::LayerContent::Files> FileFor(uint64_t nodeid)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::shared_ptr<FakeIndex> index_;
  mutable Mutex mutex_;
  CondVar changed_;
  bool hold_ ABSL_GUARDED_BY(mutex_) = false;
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  uint64_t fetches_ ABSL_GUARDED_BY(mutex_) = 0;
  std::map<uint64_t, Stored> stored_ ABSL_GUARDED_BY(mutex_);
  std::map<uint64_t, std::shared_ptr<const cache::LayerContent::Files>> files_ ABSL_GUARDED_BY(mutex_);
  std::vector<Fetch> waiting_ ABSL_GUARDED_BY(mutex_);
  std::deque<Fetch> ready_ ABSL_GUARDED_BY(mutex_);
  std::thread thread_;
};

}  // namespace holdfast::fuse
