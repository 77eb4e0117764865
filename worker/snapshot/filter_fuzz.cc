// The filter language is parsed from whatever a client of the socket sends.
#include <cstdint>
#include <string_view>

#include "worker/snapshot/filter.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  auto filter = holdfast::snapshot::Filter::Parse({reinterpret_cast<const char*>(data), size});
  if (!filter.ok()) return 0;
  holdfast::metadata::SnapshotRow row;
  row.key = "default/1/key";
  row.labels = {{"containerd.io/snapshot.ref", "sha256:aa"}, {"a.b", "c"}};
  static_cast<void>((*filter)->Matches(row));
  return 0;
}
