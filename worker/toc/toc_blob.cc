// The end of an eStargz blob: footer, and the gzip member that holds the TOC.
#include <zlib.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "worker/toc/toc.h"

namespace holdfast::toc {
namespace {

constexpr uint64_t kLegacyFooterBytes = 47;
constexpr uint64_t kExternalTocFooterBytes = 46;
constexpr std::string_view kTocName = "stargz.index.json";
constexpr size_t kTarBlock = 512;

// A footer is an empty gzip member: this header, the length of the extra field (LE16), the extra field, this
// trailer.
constexpr std::string_view kGzipHeader("\x1f\x8b\x08\x04\x00\x00\x00\x00\x00\xff", 10);
constexpr std::string_view kEmptyDeflate("\x01\x00\x00\xff\xff\x00\x00\x00\x00\x00\x00\x00\x00", 13);
constexpr std::string_view kMagic = "STARGZ";
constexpr std::string_view kSubfield("SG\x16\x00", 4);
constexpr std::string_view kExternalExtra("SG\x11\x00STARGZEXTERNALTOC", 21);

// The extra field of a footer of exactly `size` bytes at the end of `tail`.
std::optional<std::string_view> FooterExtra(std::string_view tail, uint64_t size) {
  if (tail.size() < size) return std::nullopt;
  std::string_view footer = tail.substr(tail.size() - size);
  const size_t extra_size = size - kGzipHeader.size() - 2 - kEmptyDeflate.size();
  const char length[2] = {static_cast<char>(extra_size), 0};
  if (!footer.starts_with(kGzipHeader) || !footer.ends_with(kEmptyDeflate)) return std::nullopt;
  if (footer.substr(kGzipHeader.size(), 2) != std::string_view(length, 2)) return std::nullopt;
  return footer.substr(kGzipHeader.size() + 2, extra_size);
}

// 16 hexadecimal digits and the magic.
std::optional<uint64_t> OffsetBeforeMagic(std::string_view text) {
  if (text.size() != 16 + kMagic.size() || !text.ends_with(kMagic)) return std::nullopt;
  uint64_t value = 0;
  for (char c : text.substr(0, 16)) {
    int digit = -1;
    if (c >= '0' && c <= '9') digit = c - '0';
    if (c >= 'a' && c <= 'f') digit = c - 'a' + 10;
    if (c >= 'A' && c <= 'F') digit = c - 'A' + 10;
    if (digit < 0) return std::nullopt;
    value = value << 4 | static_cast<uint64_t>(digit);
  }
  return value;
}

// Inflates one gzip member piece by piece.
class Inflater {
 public:
  explicit Inflater(std::string_view input) {
    stream_.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(input.data()));
    stream_.avail_in = static_cast<uInt>(input.size());
    ready_ = inflateInit2(&stream_, 15 + 16) == Z_OK;
  }
  ~Inflater() {
    if (ready_) inflateEnd(&stream_);
  }
  Inflater(const Inflater&) = delete;
  Inflater& operator=(const Inflater&) = delete;

  // Exactly `size` bytes, or an error.
  absl::Status Read(char* out, size_t size) {
    if (!ready_) return ResourceExhausted("TOC: no memory for zlib");
    stream_.next_out = reinterpret_cast<Bytef*>(out);
    stream_.avail_out = static_cast<uInt>(size);
    while (stream_.avail_out > 0) {
      int result = inflate(&stream_, Z_NO_FLUSH);
      if (stream_.avail_out == 0) return absl::OkStatus();
      if (result == Z_STREAM_END)
        return InvalidArgument("TOC: its gzip member ends before its tar entry does");
      if (result == Z_BUF_ERROR) return InvalidArgument("TOC: its gzip member is truncated");
      if (result != Z_OK) {
        return InvalidArgument(std::string("TOC: not valid gzip: ") +
                               (stream_.msg != nullptr ? stream_.msg : "?"));
      }
    }
    return absl::OkStatus();
  }

 private:
  z_stream stream_{};
  bool ready_ = false;
};

// An octal tar number; spaces and NULs end it.
std::optional<uint64_t> Octal(std::string_view field) {
  uint64_t value = 0;
  size_t i = 0;
  while (i < field.size() && field[i] == ' ') i++;
  size_t digits = 0;
  for (; i < field.size() && field[i] >= '0' && field[i] <= '7'; i++, digits++) {
    value = value << 3 | static_cast<uint64_t>(field[i] - '0');
  }
  for (; i < field.size(); i++) {
    if (field[i] != ' ' && field[i] != '\0') return std::nullopt;
  }
  return digits > 0 ? std::optional<uint64_t>(value) : std::nullopt;
}

absl::StatusOr<uint64_t> TocSize(std::string_view header) {
  std::optional<uint64_t> want = Octal(header.substr(148, 8));
  uint64_t sum = 0;
  for (size_t i = 0; i < header.size(); i++)
    sum += i >= 148 && i < 156 ? ' ' : static_cast<uint8_t>(header[i]);
  if (!want.has_value() || *want != sum) return InvalidArgument("TOC: its tar header has a wrong checksum");
  std::string_view name = header.substr(0, 100);
  name = name.substr(0, name.find('\0'));
  if (name != kTocName) return InvalidArgument("TOC: its tar entry is not named stargz.index.json");
  if (header[156] != '0' && header[156] != '\0')
    return InvalidArgument("TOC: its tar entry is not a regular file");
  std::optional<uint64_t> size = Octal(header.substr(124, 12));
  if (!size.has_value()) return InvalidArgument("TOC: its tar header has no valid size");
  return *size;
}

}  // namespace

absl::StatusOr<Footer> ParseFooter(std::string_view tail, uint64_t blob_size) {
  if (tail.size() > blob_size || (tail.size() < kFooterTailBytes && tail.size() != blob_size)) {
    return InvalidArgument("footer: its caller passed " + std::to_string(tail.size()) +
                           " bytes of a blob of " + std::to_string(blob_size));
  }
  if (blob_size < kExternalTocFooterBytes) {
    return InvalidArgument("footer: the blob has only " + std::to_string(blob_size) +
                           " bytes: not an eStargz layer");
  }
  Footer footer;
  std::optional<uint64_t> offset;
  if (auto extra = FooterExtra(tail, kFooterTailBytes); extra.has_value() && extra->starts_with(kSubfield)) {
    offset = OffsetBeforeMagic(extra->substr(kSubfield.size()));
    footer.footer_size = kFooterTailBytes;
  } else if (extra = FooterExtra(tail, kLegacyFooterBytes); extra.has_value()) {
    offset = OffsetBeforeMagic(*extra);
    footer.footer_size = kLegacyFooterBytes;
    footer.legacy = true;
  } else if (FooterExtra(tail, kExternalTocFooterBytes) == kExternalExtra) {
    return InvalidArgument(
        "footer: this layer keeps its TOC in another image (external TOC), which is not supported");
  }
  if (!offset.has_value()) return InvalidArgument("footer: not an eStargz layer");
  if (*offset >= blob_size - footer.footer_size) {
    return InvalidArgument("footer: the TOC offset " + std::to_string(*offset) +
                           " lies outside the blob of " + std::to_string(blob_size) + " bytes");
  }
  footer.toc_offset = *offset;
  return footer;
}

absl::StatusOr<std::string> ExtractTocJson(std::string_view member, const Limits& limits) {
  // zlib counts input in 32 bits; no TOC comes near that.
  const uint64_t limit = std::min<uint64_t>(limits.max_toc_bytes, UINT32_MAX);
  if (member.size() > limit) {
    return ResourceExhausted("TOC: " + std::to_string(member.size()) +
                             " compressed bytes, over the limit max_toc_bytes = " + std::to_string(limit));
  }
  Inflater inflater(member);
  std::string header(kTarBlock, '\0');
  HF_RETURN_IF_ERROR(inflater.Read(header.data(), header.size()));
  HF_ASSIGN_OR_RETURN(uint64_t size, TocSize(header));
  if (size > limit) {
    return ResourceExhausted("TOC: " + std::to_string(size) +
                             " bytes, over the limit max_toc_bytes = " + std::to_string(limit));
  }
  // Memory grows with what really comes out, not with what a header claims.
  std::string json;
  while (json.size() < size) {
    size_t at = json.size();
    size_t step = std::min<uint64_t>(size - at, std::max<size_t>(1 << 20, at));
    json.resize(at + step);
    HF_RETURN_IF_ERROR(inflater.Read(json.data() + at, step));
  }
  return json;
}

}  // namespace holdfast::toc
