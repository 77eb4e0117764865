// A TOC's JSON, all the way to an open index: whatever the parser lets through must make an index or a clean
// error.
#include <cstdint>
#include <cstdlib>

#include "tests/fuzz/index_walk.h"
#include "worker/toc/toc.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace holdfast;
  const uint64_t toc_offset = 1 << 20, blob_size = toc_offset + 1000;
  auto parsed =
      toc::ParseEstargzToc({reinterpret_cast<const char*>(data), size}, toc_offset, blob_size, toc::Limits{});
  if (!parsed.ok()) return 0;
  auto built =
      layer::BuildLayerIndex(*parsed, {"sha256:layer", blob_size, "sha256:toc", parsed->prefetch_end}, {});
  if (!built.ok()) {
    // Internal: the builder made an index that its own validator refuses.
    if (built.status().code() == absl::StatusCode::kInternal) std::abort();
    return 0;
  }
  auto index = layer::LayerIndex::FromBytes(built->bytes);
  if (!index.ok()) std::abort();
  fuzz::WalkIndex(**index);
  return 0;
}
