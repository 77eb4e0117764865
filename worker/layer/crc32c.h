// CRC-32C (Castagnoli, reflected polynomial 0x82f63b78, as in RFC 3720 B.4), with the processor's instruction
// where there is one. Thread safety: pure function.
#pragma once

#include <cstdint>
#include <string_view>

namespace holdfast::layer {

// Continues from `crc`, the value returned for the bytes before (0 at the start).
uint32_t Crc32c(std::string_view bytes, uint32_t crc = 0);

// The table-driven form, for tests: both must agree.
uint32_t Crc32cPortable(std::string_view bytes, uint32_t crc = 0);

}  // namespace holdfast::layer
