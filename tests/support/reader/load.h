// A steady mixed load on many trees, through what is held open on them, every operation with the moments at
// which it began and ended: so a driver can cause a disturbance and say what it cost those operations that
// met it.
//
// One thread a tree does one operation after another at a given rate; `Cold` threads read, while they are
// wanted, files that nobody has read before, each once. Everything that is read is verified.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "tests/support/reader/manifest.h"

namespace holdfast::reader {

enum class LoadKind : uint16_t {
  kDirect,    // O_DIRECT read of a held file: always reaches the file system
  kAbsent,    // lookup, from a held folder, of a name that does not exist and was never asked for
  kList,      // the next piece of a held folder's listing; each round through it must have the same names
  kCached,    // read of a held file, from the page cache if it is there
  kMapped,    // copy from a mapping that is kept all the time
  kOpen,      // open by path, read, close
  kUnlinked,  // O_DIRECT read of a held file that was removed from its tree (which must be writable)
  kExec,      // a program of the tree runs and ends with 0
  kCold,      // read of a file that nobody has read
};
inline constexpr int kLoadKinds = 9;
const char* LoadKindName(LoadKind kind);

enum class LoadResult : uint16_t { kRight, kFailed, kCorrupt };

// As written to the log: native byte order, no padding.
struct LoadRecord {
  int64_t begin_ns, end_ns;  // CLOCK_MONOTONIC
  uint32_t target;           // position in LoadOptions.targets
  uint16_t kind, result;     // LoadKind, LoadResult
};
static_assert(sizeof(LoadRecord) == 24);

struct LoadTarget {
  std::string root;
  std::vector<File> warm;  // read once before the load begins, then at random
  std::vector<File> cold;  // for kCold
  std::vector<std::string>
      programs;  // relative to root, for kExec; in this order, again from the first when all have run
  bool ancestors =
      true;  // hold also the folders above those of warm files: in overlays, lookups there ask every layer
};

struct LoadOptions {
  std::vector<LoadTarget> targets;
  std::vector<LoadKind> kinds = {LoadKind::kDirect, LoadKind::kAbsent, LoadKind::kList};  // any but kCold
  double ops_per_second = 100;                                                            // of each target
  int unlinked = 4;  // files a target that kUnlinked removes
  uint64_t seed = 1;
  int error_lines = 20;
};

struct LoadReport {
  std::vector<LoadRecord> records;
  std::vector<std::string> errors;  // the first ones
  bool cold_used_up = false;        // cold reads were wanted when there was nothing cold left
};

class MixedLoad {
 public:
  // Opens and reads everything warm once. Throws std::runtime_error when that fails.
  static std::unique_ptr<MixedLoad> Start(LoadOptions options);
  virtual ~MixedLoad() = default;
  // So many threads read what is cold, each beginning a read `gap_ms` after the last began, or as soon as
  // that has ended.
  virtual void Cold(int threads, double gap_ms) = 0;
  virtual uint64_t cold_reads() const = 0;  // ended
  // Waits for the operations under way.
  virtual LoadReport Stop() = 0;
};

}  // namespace holdfast::reader
