#include "common/id_file.h"

#include <algorithm>
#include <charconv>

#include "common/io.h"

namespace holdfast {

absl::StatusOr<IdFile> IdFile::Open(const std::string& path, uint64_t block) {
  uint64_t next = 1;
  if (PathExists(path)) {
    HF_ASSIGN_OR_RETURN(std::string text, ReadFile(path));
    if (!text.empty() && text.back() == '\n') text.pop_back();
    auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), next);
    if (error != std::errc() || end != text.data() + text.size() || next == 0) {
      return DataLoss(path +
                      " does not hold a number; restore it, or write one that is higher than any ever used");
    }
  }
  return IdFile(path, next, block);
}

absl::StatusOr<uint64_t> IdFile::Next(uint64_t above) {
  next_ = std::max(next_, above + 1);
  if (next_ >= end_) HF_RETURN_IF_ERROR(WriteBlock());
  return next_++;
}

absl::Status IdFile::Reserve() { return end_ < next_ + block_ / 2 ? WriteBlock() : absl::OkStatus(); }

absl::Status IdFile::WriteBlock() {
  HF_RETURN_IF_ERROR(WriteFileAtomic(path_, std::to_string(next_ + block_) + "\n"));
  end_ = next_ + block_;
  return absl::OkStatus();
}

}  // namespace holdfast
