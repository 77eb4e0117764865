#include "worker/app/samples.h"

#include <sys/stat.h>

#include <algorithm>
#include <optional>
#include <random>
#include <string>
#include <string_view>

#include "common/io.h"
#include "common/unhurried.h"
#include "worker/layer/digest.h"
#include "worker/layer/layer_index.h"

namespace holdfast::app {
namespace {

using handover::SampleFile;
using handover::SampleKind;
using layer::LayerIndex;
using layer::NodeRecord;

constexpr uint64_t kNodesLookedAt = 20'000;  // of one layer, before it is said to have nothing to show
constexpr uint64_t kNamesListed = 5'000;     // a larger folder is not listed
constexpr int kDeepest = 200;
constexpr uint64_t kVerifiedHere = 4 * 1024 * 1024;  // no larger chunk is hashed: a few milliseconds

std::string Raw(const toc::Digest& digest) { return std::string(digest.begin(), digest.end()); }

// Chooses from one layer.
class LayerSampler {
 public:
  LayerSampler(const SampledMount& mount, const std::function<bool()>& full, std::mt19937_64* random)
      : mount_(mount),
        full_(full),
        index_(mount.layer->index()),
        content_(mount.layer->content()),
        files_(content_->files()),
        random_(*random),
        next_node_(index_.node_count() == 0 ? 0 : random_() % index_.node_count()) {}

  // The next file of which a piece is on this disk, behind the one before it.
  std::optional<SampleFile> File() {
    for (; looked_at_ < std::min(index_.node_count(), kNodesLookedAt) && !full_(); ++looked_at_) {
      const uint64_t nodeid = 1 + next_node_++ % index_.node_count();
      const NodeRecord* node = index_.node(nodeid);
      if (node == nullptr || !S_ISREG(node->mode) || node->size == 0 || node->count == 0) continue;
      std::optional<SampleFile> sample = Piece(nodeid, *node);
      if (!sample.has_value()) continue;
      ++looked_at_;
      return sample;
    }
    return std::nullopt;
  }

  // The folder of a file that was chosen, or the root.
  std::optional<SampleFile> Folder(uint64_t nodeid) const {
    std::span<const layer::ChildRecord> children = index_.children(nodeid);
    if (children.size() > kNamesListed) return std::nullopt;
    std::vector<std::string> names;
    for (const layer::ChildRecord& child : children) {
      if (index_.node(child.nodeid) != nullptr) names.emplace_back(index_.name(child));
    }
    std::sort(names.begin(), names.end());
    layer::DigestStream digest;
    for (const std::string& name : names) digest.Update(name.c_str(), name.size() + 1);
    SampleFile sample = Start(SampleKind::kFolder);
    if (!PathOf(nodeid, &sample.path)) return std::nullopt;
    sample.digest = Raw(digest.Finish());
    return sample;
  }

  SampleFile Absent() const {
    SampleFile sample = Start(SampleKind::kAbsent);
    do {  // a name that was never asked for, so no kernel remembers its absence
      sample.path = "holdfast-absent-" + std::to_string(random_());
    } while (index_.Lookup(layer::kRootNode, sample.path) != 0);
    return sample;
  }

  uint64_t FolderOfLast() const { return folder_of_last_; }

 private:
  SampleFile Start(SampleKind kind) const {
    SampleFile sample;
    sample.mount_id = mount_.mount_id;
    sample.kind = kind;
    return sample;
  }

  std::optional<SampleFile> Piece(uint64_t nodeid, const NodeRecord& node) {
    const uint64_t id = node.first + random_() % node.count;
    if (id >= index_.chunk_count()) return std::nullopt;
    const layer::ChunkRecord& chunk = index_.chunks()[id];
    const cache::ChunkState state = content_->StateOf(*files_, id);
    if (state == cache::ChunkState::kAbsent) return std::nullopt;
    if (state == cache::ChunkState::kUnverified &&
        (chunk.size > kVerifiedHere || !mount_.layer->VerifyOnDisk(files_, id))) {
      return std::nullopt;
    }
    SampleFile sample = Start(SampleKind::kFile);
    sample.offset = chunk.file_offset;
    sample.length = std::min(chunk.size, kSampleBytes);
    if (sample.length == 0 || !PathOf(nodeid, &sample.path)) return std::nullopt;
    if (sample.length == chunk.size) {
      sample.digest.assign(std::begin(chunk.digest), std::end(chunk.digest));
    } else {
      std::string bytes(sample.length, '\0');
      if (!PreadFull(files_->data.get(), bytes.data(), bytes.size(), chunk.store_offset).ok())
        return std::nullopt;
      sample.digest = Raw(layer::Sha256Raw(bytes));
    }
    folder_of_last_ = node.parent;
    return sample;
  }

  // A node knows its folder, but not its name in it.
  bool PathOf(uint64_t nodeid, std::string* path) const {
    path->clear();
    for (int depth = 0; nodeid != layer::kRootNode; ++depth) {
      const NodeRecord* node = index_.node(nodeid);
      if (node == nullptr || depth > kDeepest) return false;
      std::span<const layer::ChildRecord> siblings = index_.children(node->parent);
      auto self = std::find_if(siblings.begin(), siblings.end(),
                               [&](const layer::ChildRecord& child) { return child.nodeid == nodeid; });
      if (self == siblings.end()) return false;
      std::string name(index_.name(*self));
      *path = path->empty() ? std::move(name) : std::move(name) + "/" + *path;
      nodeid = node->parent;
    }
    return true;
  }

  const SampledMount mount_;
  const std::function<bool()> full_;  // there are samples enough, or the time is over
  const LayerIndex& index_;
  const std::shared_ptr<cache::LayerContent> content_;
  const std::shared_ptr<const cache::LayerContent::Files> files_;
  std::mt19937_64& random_;
  uint64_t next_node_;
  uint64_t looked_at_ = 0;
  uint64_t folder_of_last_ = layer::kRootNode;
};

}  // namespace

std::vector<SampleFile> SampleMounts(size_t mounts, const std::function<SampledMount(size_t)>& open,
                                     uint32_t limit, uint64_t deadline_boot_nanos, const Clock& clock) {
  std::vector<SampleFile> samples;
  std::mt19937_64 random(std::random_device{}());
  auto full = [&] { return samples.size() >= limit || clock.BootNanos() >= deadline_boot_nanos; };
  Unhurried unhurried;
  auto add = [&](std::optional<SampleFile> sample) {
    unhurried.Rest();
    if (sample.has_value() && !full()) samples.push_back(*std::move(sample));
  };
  std::vector<size_t> order(mounts);
  for (size_t i = 0; i < mounts; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  // First a file, a folder and an absent name of each mount, then more files of all in turn.
  std::vector<std::unique_ptr<LayerSampler>> layers;
  for (size_t i : order) {
    if (full()) return samples;
    SampledMount mount = open(i);
    if (mount.layer == nullptr) continue;
    layers.push_back(std::make_unique<LayerSampler>(mount, full, &random));
    add(layers.back()->File());
    add(layers.back()->Folder(layers.back()->FolderOfLast()));
    add(layers.back()->Absent());
  }
  while (!layers.empty() && !full()) {
    std::erase_if(layers, [&](const std::unique_ptr<LayerSampler>& layer) {
      std::optional<SampleFile> sample = full() ? std::nullopt : layer->File();
      const bool exhausted = !sample.has_value();
      add(std::move(sample));
      return exhausted;
    });
  }
  return samples;
}

}  // namespace holdfast::app
