// Memory that processes share: a memfd whose size nobody can change. A truncation by one of them would be a
// SIGBUS in the others.
#pragma once

#include <cstdint>
#include <string>

#include "common/io.h"
#include "common/status.h"

namespace holdfast {

// `bytes` zeros, writable; `name` is what /proc shows.
absl::StatusOr<UniqueFd> MakeSealedMemory(const std::string& name, uint64_t bytes);

}  // namespace holdfast
