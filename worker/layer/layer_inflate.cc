#include "worker/layer/layer_inflate.h"

#include <zlib.h>

#include <algorithm>
#include <array>
#include <vector>

namespace holdfast::layer {
namespace {

constexpr int kGzipWindow = 15 + 16;  // zlib: gzip header and trailer, 32 KiB window

// Cuts a stream of bytes into the wanted ranges.
class Cutter {
 public:
  Cutter(std::span<const WantedRange> wanted, const std::function<void(size_t, std::string)>& deliver)
      : wanted_(wanted), deliver_(deliver), parts_(wanted.size()) {}

  bool done() const { return first_ == wanted_.size(); }

  void Feed(std::string_view bytes) {
    uint64_t end = position_ + bytes.size();
    for (size_t i = first_; i < wanted_.size() && wanted_[i].inner_offset < end; i++) Take(i, bytes);
    position_ = end;
    while (first_ < wanted_.size() && delivered(first_)) first_++;
  }

 private:
  bool delivered(size_t i) const { return parts_[i].taken == wanted_[i].size; }

  void Take(size_t i, std::string_view bytes) {
    Part& part = parts_[i];
    const WantedRange& want = wanted_[i];
    if (delivered(i)) return;
    if (part.bytes.empty()) part.bytes.reserve(want.size);
    uint64_t from = want.inner_offset + part.taken - position_;
    uint64_t count = std::min<uint64_t>(bytes.size() - from, want.size - part.taken);
    part.bytes.append(bytes.substr(from, count));
    part.taken += count;
    if (delivered(i)) deliver_(i, std::move(part.bytes));
  }

  struct Part {
    std::string bytes;
    uint64_t taken = 0;
  };
  std::span<const WantedRange> wanted_;
  const std::function<void(size_t, std::string)>& deliver_;
  std::vector<Part> parts_;
  size_t first_ = 0;       // all before it are delivered
  uint64_t position_ = 0;  // of the next byte in the stream
};

class Inflater {
 public:
  Inflater() { ready_ = inflateInit2(&stream_, kGzipWindow) == Z_OK; }
  ~Inflater() {
    if (ready_) inflateEnd(&stream_);
  }
  Inflater(const Inflater&) = delete;
  Inflater& operator=(const Inflater&) = delete;

  absl::Status Run(std::string_view compressed, Cutter* cutter) {
    if (!ready_) return ResourceExhausted("zlib: no memory");
    std::array<char, 32 * 1024> out;
    size_t given = 0;
    while (!cutter->done()) {
      if (stream_.avail_in == 0 && given < compressed.size()) {
        // zlib counts in unsigned int, and never writes through next_in.
        size_t count = std::min<size_t>(compressed.size() - given, 1u << 30);
        stream_.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(compressed.data() + given));
        stream_.avail_in = static_cast<uInt>(count);
        given += count;
      }
      stream_.next_out = reinterpret_cast<Bytef*>(out.data());
      stream_.avail_out = static_cast<uInt>(out.size());
      int result = inflate(&stream_, Z_NO_FLUSH);
      cutter->Feed({out.data(), out.size() - stream_.avail_out});
      if (cutter->done()) break;
      bool at_end = stream_.avail_in == 0 && given == compressed.size();
      if (result == Z_STREAM_END && !at_end) {
        if (inflateReset(&stream_) != Z_OK) return DataLoss("gzip: cannot reset");
      } else if (result != Z_OK || (at_end && stream_.avail_out != 0)) {
        return DataLoss("gzip: the compressed bytes are broken or end early");
      }
    }
    return absl::OkStatus();
  }

 private:
  z_stream stream_{};
  bool ready_ = false;
};

}  // namespace

absl::Status InflateRanges(std::string_view compressed, std::span<const WantedRange> wanted,
                           const std::function<void(size_t, std::string)>& deliver) {
  Cutter cutter(wanted, deliver);
  return Inflater().Run(compressed, &cutter);
}

}  // namespace holdfast::layer
