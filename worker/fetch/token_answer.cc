// The token endpoint's JSON: see authenticator.h.
#include <algorithm>

#include "nlohmann/json.hpp"
#include "worker/fetch/authenticator.h"

namespace holdfast::fetch {

absl::StatusOr<TokenAnswer> ParseTokenAnswer(std::string_view text) {
  using nlohmann::json;
  constexpr int kMaxDepth = 16;
  constexpr int64_t kDefaultSeconds = 60;  // the token specification's
  constexpr int64_t kMaxSeconds = 86400;
  TokenAnswer answer;
  try {
    const json::parser_callback_t limit = [](int depth, json::parse_event_t, json&) {
      if (depth > kMaxDepth) throw std::runtime_error("nested too deeply");
      return true;
    };
    const json root = json::parse(text.begin(), text.end(), limit);
    if (!root.is_object()) return InvalidArgument("the answer is no JSON object");
    for (const char* name : {"token", "access_token"}) {
      const auto it = root.find(name);
      if (answer.token.empty() && it != root.end() && it->is_string()) answer.token = it->get<std::string>();
    }
    int64_t seconds = kDefaultSeconds;
    const auto it = root.find("expires_in");
    if (it != root.end() && it->is_number()) {
      seconds = static_cast<int64_t>(std::clamp(it->get<double>(), 1.0, static_cast<double>(kMaxSeconds)));
    }
    answer.lifetime_nanos = static_cast<uint64_t>(seconds) * 1'000'000'000;
  } catch (const std::exception&) {
    return InvalidArgument("the answer is not valid JSON");
  }
  // It goes into a header line.
  const bool printable =
      std::all_of(answer.token.begin(), answer.token.end(), [](char c) { return c > 0x20 && c < 0x7f; });
  if (answer.token.empty() || !printable) return InvalidArgument("the answer has no usable token");
  return answer;
}

}  // namespace holdfast::fetch
