// Makes whole, valid eStargz blobs for tests, from a list of entries: gzip members, TOC, footer, digests.
// Deterministic. Format: containerd/stargz-snapshotter docs/estargz.md. Not for production: it holds
// everything in memory and aborts on what it cannot write.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "worker/toc/toc.h"

namespace holdfast::toc::testing {

struct WriterEntry {
  std::string name;  // as it should stand in tar and TOC; folders get a trailing slash if they have none
  Type type = Type::kRegular;
  uint32_t mode = 0644;
  uint32_t uid = 0, gid = 0;
  int64_t mtime = 0;        // seconds
  std::string content;      // regular files
  std::string link_target;  // symlinks and hard links
  uint32_t dev_major = 0, dev_minor = 0;
  std::map<std::string, std::string> xattrs;
};

// Shorthands for the common kinds.
WriterEntry Dir(std::string name, uint32_t mode = 0755);
WriterEntry File(std::string name, std::string content, uint32_t mode = 0644);
WriterEntry Symlink(std::string name, std::string target);
WriterEntry Hardlink(std::string name, std::string target);
// Files named as the format wants them; all entries before kPrefetchLandmark are worth prefetching.
inline constexpr char kPrefetchLandmarkName[] = ".prefetch.landmark";
inline constexpr char kNoPrefetchLandmarkName[] = ".no.prefetch.landmark";
WriterEntry Landmark(std::string name = kPrefetchLandmarkName);

struct WriterOptions {
  uint64_t chunk_size = 4u << 20;  // uncompressed bytes of a chunk
  uint64_t min_chunk_size =
      0;  // > 0: payloads share a gzip member (innerOffset) until it holds that many bytes
  bool legacy_footer = false;  // 47 bytes
  int gzip_level = 6;
};

struct EstargzLayer {
  std::string blob;
  std::string toc_json;
  uint64_t toc_offset = 0;
  std::string layer_digest;  // sha256:... of the blob
  std::string
      toc_digest;  // sha256:... of toc_json: the value of the label containerd.io/snapshot/stargz/toc.digest
  std::string diff_id;  // sha256:... of the uncompressed tar
};

EstargzLayer WriteEstargz(const std::vector<WriterEntry>& entries, const WriterOptions& options = {});

// Pieces, for tests of broken blobs.
std::string GzipMember(const std::string& bytes, int level = 6);
std::string TarHeader(const WriterEntry& entry);     // with a PAX header before it where needed
std::string EstargzFooter(uint64_t toc_offset);      // 51 bytes
std::string LegacyFooter(uint64_t toc_offset);       // 47 bytes
std::string ExternalTocFooter();                     // 46 bytes
std::string TocMember(const std::string& toc_json);  // the gzip member that holds the TOC's tar entry

}  // namespace holdfast::toc::testing
