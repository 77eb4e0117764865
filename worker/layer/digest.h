// SHA-256 over OpenSSL, and the textual forms of digests.
// Thread safety: pure functions; a DigestStream belongs to one thread. Errors: InvalidArgument for malformed
// digests.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

#include "common/status.h"
#include "worker/toc/toc.h"

namespace holdfast::layer {

toc::Digest Sha256Raw(std::string_view bytes);
std::string Sha256Hex(std::string_view bytes);   // 64 lower-case hexadecimal digits
std::string Sha256Name(std::string_view bytes);  // "sha256:" + hex

std::string DigestHex(const toc::Digest& digest);
std::string DigestName(const toc::Digest& digest);  // "sha256:" + hex

// Exactly "sha256:" and 64 lower-case hexadecimal digits: also safe as (part of) a file name.
bool IsSha256Digest(std::string_view text);
absl::StatusOr<toc::Digest> ParseSha256(std::string_view text);

// Digest of bytes that come in pieces.
class DigestStream {
 public:
  DigestStream();
  ~DigestStream();
  DigestStream(DigestStream&&) noexcept;
  DigestStream& operator=(DigestStream&&) noexcept;

  void Update(std::string_view bytes);
  void Update(const void* data, size_t size);
  // The digest of everything given so far; the stream starts anew afterwards.
  toc::Digest Finish();
  std::string FinishHex();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace holdfast::layer
