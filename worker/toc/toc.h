// Parsers for the table of contents of lazily pullable layers: pure functions over bytes that come from
// outside. This first one reads eStargz (format: containerd/stargz-snapshotter docs/estargz.md), current and
// legacy footer.
//
// Everything returned is checked: names are clean relative paths without "..", offsets lie inside the blob,
// sizes and counts are within Limits. What a TOC says that cannot be represented is an error, never a guess.
// Thread safety: pure functions. Errors: InvalidArgument (malformed, with the entry's position and name),
// ResourceExhausted (a limit, named).
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "common/status.h"

namespace holdfast::toc {

using Digest = std::array<uint8_t, 32>;  // SHA-256

struct Limits {
  uint64_t max_toc_bytes = 512u << 20;   // compressed and uncompressed TOC
  uint64_t max_entries = 4'000'000;      // TOC entries, chunks included
  uint64_t max_file_bytes = 1ull << 46;  // one file
  uint64_t max_chunk_bytes = 64u << 20;  // one chunk, uncompressed: it is held in memory to be verified
  uint64_t max_path_bytes = 4095;
  uint64_t max_name_bytes = 255;
  uint64_t max_depth = 1024;
  uint64_t max_xattrs_per_entry = 1024;
  uint64_t max_xattr_bytes = 65536;  // one value (the kernel's own limit)
};

struct Footer {
  uint64_t toc_offset = 0;   // of the TOC's gzip member in the blob
  uint64_t footer_size = 0;  // 51 (eStargz) or 47 (legacy)
  bool legacy = false;
};

// How many bytes of the blob's end ParseFooter wants to see (fewer only when the blob is smaller).
inline constexpr uint64_t kFooterTailBytes = 51;

// `tail` is the end of a blob of `blob_size` bytes.
absl::StatusOr<Footer> ParseFooter(std::string_view tail, uint64_t blob_size);

// Decompresses the TOC's gzip member (bytes [toc_offset, blob_size - footer_size) of the blob) and returns
// the JSON held by its tar entry "stargz.index.json". The caller compares its SHA-256 with the TOC digest
// label.
absl::StatusOr<std::string> ExtractTocJson(std::string_view member, const Limits& limits);

enum class Type : uint8_t { kDirectory, kRegular, kSymlink, kHardlink, kCharDevice, kBlockDevice, kFifo };

struct Chunk {
  uint64_t file_offset = 0;  // where it belongs in the file
  uint64_t size = 0;         // uncompressed
  uint64_t blob_offset = 0;  // of the gzip member
  uint64_t blob_end =
      0;  // where the next member (or the TOC) begins: [blob_offset, blob_end) suffices to inflate
  uint64_t inner_offset = 0;  // of the payload in the member's uncompressed bytes
  Digest digest{};
};

struct Entry {
  std::string name;  // clean, relative, no leading or trailing slash; "" is the root
  Type type = Type::kRegular;
  uint32_t mode = 0;  // permission bits and set-uid, set-gid, sticky only
  uint32_t uid = 0, gid = 0;
  uint64_t size = 0;
  int64_t mtime_seconds = 0;  // before 1970 and after 2262: 0, as in an ordinary unpack
  uint32_t mtime_nanos = 0;
  uint32_t dev_major = 0, dev_minor = 0;
  std::string link_target;                    // symlink: as is; hardlink: a clean relative path
  std::map<std::string, std::string> xattrs;  // trusted.* dropped, as in an ordinary unpack
  std::vector<Chunk> chunks;                  // in file order, without gaps or overlaps, summing to size
};

struct Toc {
  std::vector<Entry> entries;  // in TOC order, duplicates as they came (the later one wins when an index is
                               // built); the TOC itself and the prefetch landmarks are left out
  bool has_no_prefetch_landmark = false;
  uint64_t prefetch_end = 0;  // blob bytes [0, prefetch_end) are worth prefetching; 0 = no landmark
};

// `blob_size` and `toc_offset` bound the chunks. Chunks without digest are an error.
absl::StatusOr<Toc> ParseEstargzToc(std::string_view json, uint64_t toc_offset, uint64_t blob_size,
                                    const Limits& limits);

}  // namespace holdfast::toc
