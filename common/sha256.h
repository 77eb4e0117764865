// SHA-256 (FIPS 180-4). Only for the supervisor, which names its copies of executables by digest and links no
// OpenSSL (docs/adr/0002), and its verifier; everything in the worker uses worker/layer/digest.h, OpenSSL's.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "common/status.h"
#include "common/unhurried.h"

namespace holdfast {

class Sha256 {
 public:
  enum class Code { kFastest, kPortable };
  // kFastest: with the processor's SHA instructions, if it has them: some ten times faster.
  explicit Sha256(Code code = Code::kFastest);
  static bool HasSha();

  void Update(const void* data, size_t size);
  // Lower-case hexadecimal. The object is spent afterwards.
  std::string FinishHex();

 private:
  void Blocks(const uint8_t* data, size_t blocks);

  const bool fast_;
  std::array<uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<uint8_t, 64> buffer_{};
  uint64_t total_bytes_ = 0;
};

// Digest of everything readable from the start of `fd`; the file offset is not used. `unhurried`: it rests in
// between.
absl::StatusOr<std::string> Sha256OfFile(int fd, Unhurried* unhurried = nullptr);

}  // namespace holdfast
