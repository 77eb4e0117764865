// Index bytes with a right checksum: what the validator lets through must be safe to use, and must bind.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "tests/fuzz/index_walk.h"
#include "worker/layer/layer_index_format.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace holdfast;
  std::string bytes(reinterpret_cast<const char*>(data), size);
  if (bytes.size() >= sizeof(layer::IndexHeader)) {
    uint64_t file_size = bytes.size();
    std::memcpy(bytes.data() + offsetof(layer::IndexHeader, file_size), &file_size, sizeof(file_size));
    layer::SealIndex(&bytes);
  }
  auto index = layer::LayerIndex::FromBytes(bytes);
  if (!index.ok()) return 0;
  fuzz::WalkIndex(**index);
  auto bound = layer::BindImpliedFolders(**index, [](const std::string& path) {
    layer::Attributes found;
    found.xattrs = {{"user.path", path.substr(0, 100)}};
    return std::optional<layer::Attributes>(found);
  });
  if (!bound.ok()) std::abort();
  return 0;
}
