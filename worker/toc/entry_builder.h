// From the JSON members of TOC entries to checked Entries. Internal to worker/toc: the JSON reader calls Add
// once an entry, in TOC order, then Finish. Thread safety: none. Errors: as toc.h; after an error the builder
// is spent.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "worker/toc/toc.h"

namespace holdfast::toc {

enum class TextField : uint8_t { kName, kType, kLinkName, kModTime, kDigest, kChunkDigest };
enum class NumberField : uint8_t {
  kSize,
  kMode,
  kUid,
  kGid,
  kOffset,
  kInnerOffset,
  kDevMajor,
  kDevMinor,
  kChunkOffset,
  kChunkSize
};

// One entry as the JSON says it; absent members are empty or 0.
struct RawEntry {
  std::array<std::string, 6> texts;
  std::array<uint64_t, 10> numbers{};
  std::vector<std::pair<std::string, std::string>> xattrs;  // values still in base64
  bool has_name = false;

  const std::string& text(TextField field) const { return texts[static_cast<size_t>(field)]; }
  uint64_t number(NumberField field) const { return numbers[static_cast<size_t>(field)]; }
  void Clear();
};

class EntryBuilder {
 public:
  EntryBuilder(uint64_t toc_offset, const Limits& limits) : toc_offset_(toc_offset), limits_(limits) {}
  void Reserve(size_t entries) { toc_.entries.reserve(entries); }
  absl::Status Add(const RawEntry& raw);
  absl::StatusOr<Toc> Finish();

 private:
  absl::Status AddChunkEntry(const RawEntry& raw);
  absl::Status AddChunk(const RawEntry& raw);
  absl::Status ClosePending();
  absl::Status Classify(const RawEntry& raw, Entry* entry) const;
  absl::Status FillAttributes(const RawEntry& raw, Entry* entry) const;
  absl::Status FillXattrs(const RawEntry& raw, Entry* entry) const;
  absl::Status FillBlobEnds();
  absl::Status Error(std::string_view message) const;
  absl::Status Limit(std::string_view message) const;
  std::string Where() const;

  const uint64_t toc_offset_;
  const Limits limits_;
  Toc toc_;
  std::vector<uint64_t> member_starts_;
  uint64_t index_ = 0;   // of the entry that is being added
  std::string current_;  // its name, for messages
  Entry pending_;        // the last entry that is not a chunk; its chunks may still come
  uint64_t pending_index_ = 0;
  bool has_pending_ = false;
  bool pending_landmark_ = false;  // landmarks are checked like other files, then dropped
  uint64_t pending_covered_ = 0;   // bytes of the pending file that its chunks cover so far
  uint64_t landmark_offset_ = 0;
};

// Clean("/" + name) without the leading slash; refuses "..", NUL, and what is too long or too deep.
absl::StatusOr<std::string> CleanName(std::string_view name, const Limits& limits);

// RFC 3339, as Go's time.Parse takes it. Before 1970 and after 2262: 0.
absl::Status ParseTime(std::string_view text, int64_t* seconds, uint32_t* nanos);

}  // namespace holdfast::toc
