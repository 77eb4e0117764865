#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "worker/fetch/auth_challenge.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view header(reinterpret_cast<const char*>(data), size);
  const auto challenges = holdfast::fetch::ParseAuthChallenges(header);
  if (challenges.size() > 8) std::abort();
  for (const auto& challenge : challenges) {
    if (challenge.scheme.empty() || challenge.params.size() > 16) std::abort();
  }
  const auto chosen = holdfast::fetch::ChooseChallenge({std::string(header)});
  if (chosen && chosen->scheme != "bearer" && chosen->scheme != "basic") std::abort();
  return 0;
}
