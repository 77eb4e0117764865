// Answer headers, one a line, and the plan made from them.
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "worker/fetch/answer_check.h"
#include "worker/fetch/http_headers.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace holdfast::fetch;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const auto range = ParseContentRange(text);
  if (range && range->satisfied &&
      (range->last < range->first || (range->total && range->last >= *range->total))) {
    std::abort();
  }
  ParseRetryAfter(text, 1'700'000'000'000'000'000);
  HttpHeaders headers;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    AddHeaderLine(text.substr(at, end - at), &headers);
    at = end + 1;
  }
  for (const int status : {200, 206, 416}) {
    headers.status = status;
    for (const WantedRange& wanted : {WantedRange{10, 10, false}, WantedRange{0, 51, true}}) {
      const AnswerPlan plan = CheckAnswer(wanted, headers, std::nullopt);
      if (plan.kind != AnswerPlan::Kind::kTake) continue;
      if (plan.skip > kMaxWastedBytes || plan.take > wanted.length) std::abort();
    }
  }
  return 0;
}
