// The end of a blob: footer, and the gzip member before it.
#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "worker/toc/toc.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  namespace toc = holdfast::toc;
  std::string_view blob(reinterpret_cast<const char*>(data), size);
  toc::Limits limits;
  limits.max_toc_bytes = 1 << 20;
  auto footer = toc::ParseFooter(blob.substr(size - std::min<size_t>(size, toc::kFooterTailBytes)), size);
  if (footer.ok() && footer->toc_offset + footer->footer_size > size) std::abort();
  uint64_t offset = footer.ok() ? footer->toc_offset : 0;
  uint64_t end = footer.ok() ? size - footer->footer_size : size;
  auto json = toc::ExtractTocJson(blob.substr(offset, end - offset), limits);
  if (json.ok() && json->size() > limits.max_toc_bytes) std::abort();
  return 0;
}
