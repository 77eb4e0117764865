#include "worker/app/self_test.h"

#include <string>

#include "common/io.h"
#include "worker/fetch/registry_client.h"
#include "worker/layer/digest.h"
#include "worker/layer/layer_index.h"
#include "worker/toc/toc.h"

namespace holdfast::app {
namespace {

constexpr uint64_t kTocOffset = 1000;
constexpr uint64_t kBlobSize = 2000;

std::string SampleToc(const std::string& content_digest) {
  return R"({"version":1,"entries":[{"name":"etc/","type":"dir","mode":493},)"
         R"({"name":"etc/a","type":"reg","mode":420,"size":5,"offset":10,"digest":")" +
         content_digest + R"(","chunkDigest":")" + content_digest + R"("}]})";
}

absl::Status CheckIndex() {
  const std::string json = SampleToc(layer::Sha256Name("hello"));
  HF_ASSIGN_OR_RETURN(toc::Toc toc, toc::ParseEstargzToc(json, kTocOffset, kBlobSize, toc::Limits()));
  layer::IndexInfo info;
  info.layer_digest = layer::Sha256Name("layer");
  info.toc_digest = layer::Sha256Name(json);
  info.blob_size = kBlobSize;
  HF_ASSIGN_OR_RETURN(layer::BuiltIndex built,
                      layer::BuildLayerIndex(toc, info, [](const std::string&) { return std::nullopt; }));
  TempDir folder;
  const std::string path = folder.path() + "/" + built.sha256 + ".idx";
  HF_RETURN_IF_ERROR(WriteFileAtomic(path, built.bytes));
  HF_ASSIGN_OR_RETURN(auto index, layer::LayerIndex::Open(path, built.sha256));
  const layer::NodeRecord* node = index->node(index->LookupPath("etc/a"));
  if (node == nullptr || node->size != 5 || node->count != 1)
    return Internal("the index does not answer as built");
  return absl::OkStatus();
}

}  // namespace

absl::Status SelfTest() {
  if (layer::Sha256Hex("") != "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855") {
    return Internal("OpenSSL computes a wrong SHA-256");
  }
  HF_RETURN_IF_ERROR(fetch::RegistryClient::Check());
  return Annotate(CheckIndex(), "index");
}

}  // namespace holdfast::app
