// A map of strings in a memfd that survives its process: whoever gets the descriptor next finds every Put()
// and Erase() that returned, and of one that was under way the old or the new value. Knows nothing of what it
// holds.
//
// Layout: a page with two head slots, then two areas, one of which is in use: a log of records, each with a
// CRC. A change appends its record beyond the end of the log, then writes the new end into the older head
// slot; the valid slot with the higher number counts. So nothing that counts is ever overwritten. A log that
// is mostly dead records is copied to the other area, and the next head names that one.
//
// The file is read and written with pread and pwrite, never mapped: whoever else holds it could truncate it.
// Not thread-safe; one writer. Fails only by lack of memory: the map then holds the old value.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>

#include "common/io.h"
#include "common/status.h"

namespace holdfast {

class DurableMap {
 public:
  static absl::StatusOr<DurableMap> Create(const std::string& name);
  // What `file`, of any access mode, holds; it is reopened for writing, so every holder of the file sees what
  // is put from now on. DataLoss when it is not such a map or is damaged.
  static absl::StatusOr<DurableMap> Open(int file);

  // At most 256 KiB, both together.
  absl::Status Put(std::string_view key, std::string_view value);
  absl::Status Erase(std::string_view key);  // OK when it is not there
  const std::map<std::string, std::string, std::less<>>& all() const { return entries_; }

  int file() const { return file_.get(); }
  // For holders that shall not write by mistake.
  absl::StatusOr<UniqueFd> OpenReadOnly() const;
  uint64_t log_bytes() const { return end_; }  // for tests: of the area in use

 private:
  explicit DurableMap(UniqueFd file) : file_(std::move(file)) {}
  absl::Status ReadHead();
  absl::Status ReadLog();
  void Note(std::string_view key, std::string_view value, bool erase);
  absl::Status Append(std::string_view key, std::string_view value, bool erase);
  absl::Status WriteHead(uint32_t area, uint64_t end);
  absl::Status Compact();
  void Discard(uint32_t area);
  uint64_t AreaOffset(uint32_t area) const;

  UniqueFd file_;
  std::map<std::string, std::string, std::less<>> entries_;
  uint64_t live_bytes_ = 0;  // of the records that count
  uint64_t number_ = 0;      // of the head in force
  uint64_t end_ = 0;
  uint32_t area_ = 0;
};

}  // namespace holdfast
