#include "worker/toc/digest.h"

namespace holdfast::toc {
namespace {

int HexValue(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  return -1;
}

}  // namespace

absl::StatusOr<Digest> ParseDigest(std::string_view text) {
  constexpr std::string_view kPrefix = "sha256:";
  if (!text.starts_with(kPrefix)) return InvalidArgument("digest does not begin with sha256:");
  text.remove_prefix(kPrefix.size());
  Digest digest;
  if (text.size() != 2 * digest.size()) return InvalidArgument("sha256 digest does not have 64 digits");
  for (size_t i = 0; i < digest.size(); i++) {
    int high = HexValue(text[2 * i]), low = HexValue(text[2 * i + 1]);
    if (high < 0 || low < 0) return InvalidArgument("sha256 digest is not lower-case hexadecimal");
    digest[i] = static_cast<uint8_t>(high * 16 + low);
  }
  return digest;
}

std::string DigestHex(const Digest& digest) {
  static constexpr char kHex[] = "0123456789abcdef";
  std::string hex;
  hex.reserve(2 * digest.size());
  for (uint8_t byte : digest) {
    hex += kHex[byte >> 4];
    hex += kHex[byte & 15];
  }
  return hex;
}

}  // namespace holdfast::toc
