// For tests: how much longer everything may take in a sanitized build.
#pragma once

namespace holdfast {

#ifdef HOLDFAST_SANITIZED
inline constexpr int kTimeFactor = 5;
#else
inline constexpr int kTimeFactor = 1;
#endif

}  // namespace holdfast
