// The log of nodes that a worker on trial has answered for (schema/touched.h): its writer, and what an older
// worker reads from it after a rollback.
//
// Thread safety: none; the server guards it. A node is noted once, so a busy one does not fill the log.
// Errors: DataLoss for memory that is not laid out as the header says.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "common/io.h"
#include "common/status.h"
#include "schema/touched.h"

namespace holdfast::fuse {

class TouchedLog {
 public:
  static absl::StatusOr<std::unique_ptr<TouchedLog>> Map(const UniqueFd& memory);
  ~TouchedLog();
  TouchedLog(const TouchedLog&) = delete;
  TouchedLog& operator=(const TouchedLog&) = delete;

  void Note(uint64_t mount_id, uint64_t nodeid);
  // Whole entries, by mount; nullopt when it overflowed: then everything was touched.
  std::optional<std::map<uint64_t, std::set<uint64_t>>> Nodes() const;

 private:
  TouchedLog() = default;
  hf_touched_header* header() const { return reinterpret_cast<hf_touched_header*>(base_); }
  hf_touched_entry* entry(uint64_t index) const {
    return reinterpret_cast<hf_touched_entry*>(base_ + header_size_ + index * stride_);
  }

  uint8_t* base_ = nullptr;
  uint64_t size_ = 0;
  uint32_t header_size_ = 0, stride_ = 0,
           capacity_ = 0;  // checked once; the other side can still write there
  bool overflowed_ = false;
  std::unordered_map<uint64_t, std::unordered_set<uint64_t>> noted_;
};

}  // namespace holdfast::fuse
