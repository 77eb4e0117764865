// CRC-32C (Castagnoli, reflected polynomial 0x82f63b78, as in RFC 3720 B.4), with the processor's instruction
// where there is one. Part of formats on disk and of the ledger. Thread safety: pure functions.
#pragma once

#include <cstddef>
#include <cstdint>

namespace holdfast {

// Continues from `crc`, the value returned for the bytes before (0 at the start).
uint32_t Crc32c(const void* data, size_t size, uint32_t crc = 0);

// The table-driven form, for tests: both must agree.
uint32_t Crc32cPortable(const void* data, size_t size, uint32_t crc = 0);

}  // namespace holdfast
