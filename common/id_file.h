// Numbers that are never given out twice, also across crashes. Not thread-safe.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "common/status.h"

namespace holdfast {

// A block of numbers is reserved in the file before one of it is given out.
class IdFile {
 public:
  // `path` need not exist. DataLoss when it holds anything but a number.
  static absl::StatusOr<IdFile> Open(const std::string& path, uint64_t block);
  absl::StatusOr<uint64_t> Next(uint64_t above = 0);  // the next one that is higher
  // Writes the file now if less than half a block is left, so that Next() need not when time is short.
  absl::Status Reserve();

 private:
  absl::Status WriteBlock();
  IdFile(std::string path, uint64_t next, uint64_t block)
      : path_(std::move(path)), next_(next), end_(next), block_(block) {}
  std::string path_;
  uint64_t next_, end_;  // numbers below end_ are reserved
  uint64_t block_;
};

}  // namespace holdfast
