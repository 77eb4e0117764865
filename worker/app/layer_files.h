// What this node knows of each layer, in files: <root>/<hex of the layer digest>/layer.json and <sha256>.idx
// (LayerIndex). Everything needed to mount a layer again without the network. Written atomically; any worker
// may read at any time. Thread safety: all methods. Errors: NotFound when nothing is known of the layer,
// DataLoss for a damaged layer.json.
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "common/mutex.h"
#include "common/status.h"

namespace holdfast::app {

struct LayerRecord {
  std::string layer_digest;  // sha256:...
  std::string toc_digest;    // sha256:... of the TOC the index was built from
  uint64_t blob_size = 0;
  std::string index_sha256;  // of the index not bound to any parents
  uint32_t numbering_version = 0;
  std::set<std::string> images;  // references it was seen by
};

class LayerFiles {
 public:
  explicit LayerFiles(std::string root) : root_(std::move(root)) {}

  absl::StatusOr<LayerRecord> Load(const std::string& layer_digest) const;
  absl::Status Store(const LayerRecord& record);
  // Adds an image to the record of a known layer; nothing happens when it is there already.
  absl::Status AddImage(const std::string& layer_digest, const std::string& image);

  std::string IndexPath(const std::string& layer_digest, const std::string& index_sha256) const;
  // Writes the index unless exactly these bytes are there already.
  absl::Status StoreIndex(const std::string& layer_digest, const std::string& index_sha256,
                          std::string_view bytes);
  // The path of an index whose layer is not known; NotFound when there is none.
  absl::StatusOr<std::string> FindIndex(const std::string& index_sha256) const;
  std::vector<std::string> ListLayers() const;  // digests

 private:
  std::string Folder(const std::string& layer_digest) const;

  const std::string root_;
  Mutex mutex_;  // read-modify-write of layer.json
};

std::string EncodeLayerRecord(const LayerRecord& record);
absl::StatusOr<LayerRecord> DecodeLayerRecord(const std::string& text);

}  // namespace holdfast::app
