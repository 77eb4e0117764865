#include "worker/app/layer_files.h"

#include <dirent.h>

#include <nlohmann/json.hpp>

#include "common/io.h"
#include "worker/layer/digest.h"

namespace holdfast::app {
namespace {

constexpr int kRecordVersion = 1;
constexpr size_t kMaxImages = 64;  // enough to tell where a layer came from; bounds the file
constexpr char kPrefix[] = "sha256:";

std::vector<std::string> ListFolder(const std::string& path) {
  std::vector<std::string> names;
  DIR* dir = opendir(path.c_str());
  if (dir == nullptr) return names;
  while (dirent* entry = readdir(dir)) names.emplace_back(entry->d_name);
  closedir(dir);
  return names;
}

}  // namespace

std::string EncodeLayerRecord(const LayerRecord& record) {
  nlohmann::ordered_json json;
  json["v"] = kRecordVersion;
  json["layer_digest"] = record.layer_digest;
  json["toc_digest"] = record.toc_digest;
  json["blob_size"] = record.blob_size;
  json["index_sha256"] = record.index_sha256;
  json["numbering_version"] = record.numbering_version;
  json["images"] = record.images;
  return json.dump(1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

absl::StatusOr<LayerRecord> DecodeLayerRecord(const std::string& text) {
  try {
    const auto json = nlohmann::json::parse(text);
    if (json.at("v").get<int>() > kRecordVersion) return FailedPrecondition("written by a newer version");
    LayerRecord record;
    record.layer_digest = json.at("layer_digest").get<std::string>();
    record.toc_digest = json.at("toc_digest").get<std::string>();
    record.blob_size = json.at("blob_size").get<uint64_t>();
    record.index_sha256 = json.at("index_sha256").get<std::string>();
    record.numbering_version = json.at("numbering_version").get<uint32_t>();
    record.images = json.at("images").get<std::set<std::string>>();
    return record;
  } catch (const nlohmann::json::exception& error) {
    return DataLoss(error.what());
  }
}

std::string LayerFiles::Folder(const std::string& layer_digest) const {
  return root_ + "/" + layer_digest.substr(sizeof kPrefix - 1);
}

std::string LayerFiles::IndexPath(const std::string& layer_digest, const std::string& index_sha256) const {
  return Folder(layer_digest) + "/" + index_sha256 + ".idx";
}

absl::StatusOr<LayerRecord> LayerFiles::Load(const std::string& layer_digest) const {
  if (!layer::IsSha256Digest(layer_digest)) return InvalidArgument("not a layer digest: " + layer_digest);
  const std::string path = Folder(layer_digest) + "/layer.json";
  HF_ASSIGN_OR_RETURN(std::string text, ReadFile(path));
  absl::StatusOr<LayerRecord> record = DecodeLayerRecord(text);
  if (!record.ok()) return Annotate(record.status(), path);
  if (record->layer_digest != layer_digest) return DataLoss(path + ": describes " + record->layer_digest);
  return record;
}

absl::Status LayerFiles::Store(const LayerRecord& record) {
  if (!layer::IsSha256Digest(record.layer_digest))
    return InvalidArgument("not a layer digest: " + record.layer_digest);
  MutexLock lock(&mutex_);
  HF_RETURN_IF_ERROR(MakeDirs(Folder(record.layer_digest)));
  return WriteFileAtomic(Folder(record.layer_digest) + "/layer.json", EncodeLayerRecord(record));
}

absl::Status LayerFiles::AddImage(const std::string& layer_digest, const std::string& image) {
  MutexLock lock(&mutex_);
  HF_ASSIGN_OR_RETURN(LayerRecord record, Load(layer_digest));
  if (image.empty() || record.images.size() >= kMaxImages || !record.images.insert(image).second) {
    return absl::OkStatus();
  }
  return WriteFileAtomic(Folder(layer_digest) + "/layer.json", EncodeLayerRecord(record));
}

absl::Status LayerFiles::StoreIndex(const std::string& layer_digest, const std::string& index_sha256,
                                    std::string_view bytes) {
  const std::string path = IndexPath(layer_digest, index_sha256);
  if (absl::StatusOr<std::string> there = ReadFile(path); there.ok() && *there == bytes)
    return absl::OkStatus();
  HF_RETURN_IF_ERROR(MakeDirs(Folder(layer_digest)));
  return WriteFileAtomic(path, bytes, 0400);
}

absl::StatusOr<std::string> LayerFiles::FindIndex(const std::string& index_sha256) const {
  for (const std::string& digest : ListLayers()) {
    std::string path = IndexPath(digest, index_sha256);
    if (PathExists(path)) return path;
  }
  return NotFound("no index " + index_sha256 + " under " + root_);
}

std::vector<std::string> LayerFiles::ListLayers() const {
  std::vector<std::string> digests;
  for (const std::string& name : ListFolder(root_)) {
    std::string digest = kPrefix + name;
    if (layer::IsSha256Digest(digest)) digests.push_back(std::move(digest));
  }
  return digests;
}

}  // namespace holdfast::app
