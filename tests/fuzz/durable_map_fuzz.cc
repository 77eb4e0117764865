// The saved state may come back from a worker: whatever the bytes are, opening them is an error or a map that
// can be used and opened again.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>

#include "common/durable_map.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using holdfast::DurableMap;
  holdfast::UniqueFd file(memfd_create("fuzz", MFD_CLOEXEC));
  if (!holdfast::PwriteFull(file.get(), data, size, 0).ok()) return 0;
  auto map = DurableMap::Open(file.get());
  if (!map.ok()) return 0;
  if (!map->Put("key", "value").ok()) return 0;
  auto again = DurableMap::Open(file.get());
  if (!again.ok() || again->all() != map->all()) abort();
  return 0;
}
