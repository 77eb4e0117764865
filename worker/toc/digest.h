// The textual form of a digest. Hashing itself is worker/layer/digest.h.
// Thread safety: pure functions.
#pragma once

#include <string>
#include <string_view>

#include "worker/toc/toc.h"

namespace holdfast::toc {

// "sha256:" and 64 lower-case hexadecimal digits, nothing else: InvalidArgument otherwise. OCI allows no
// upper case.
absl::StatusOr<Digest> ParseDigest(std::string_view text);

// 64 lower-case hexadecimal digits.
std::string DigestHex(const Digest& digest);

}  // namespace holdfast::toc
