// CRC-32C (Castagnoli), as schema/ledger.h states it for slots and records. Pure function.
#pragma once

#include <cstddef>
#include <cstdint>

namespace holdfast::fuse {

uint32_t Crc32c(const void* data, size_t size);

}  // namespace holdfast::fuse
