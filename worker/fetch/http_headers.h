// The answer headers that matter to a range request, and the parsers of their values. Pure functions; fuzzed.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace holdfast::fetch {

struct HttpHeaders {
  int status = 0;
  std::optional<uint64_t> content_length;
  std::string content_range, location, retry_after;
  std::vector<std::string> www_authenticate;
};

// Content-Range (RFC 9110 14.4): "bytes 0-9/100", "bytes 0-9/*", "bytes */100".
struct ContentRange {
  bool satisfied = false;  // first and last are set
  uint64_t first = 0, last = 0;
  std::optional<uint64_t> total;
};
std::optional<ContentRange> ParseContentRange(std::string_view text);

// Retry-After: seconds, or an HTTP date, as nanoseconds from `wall_nanos`; a past date is 0.
std::optional<uint64_t> ParseRetryAfter(std::string_view text, int64_t wall_nanos);

// Decimal digits only, nothing else, no overflow.
std::optional<uint64_t> ParseDecimal(std::string_view text);

// One header line "Name: value\r\n" into `headers`; names that do not matter are skipped.
void AddHeaderLine(std::string_view line, HttpHeaders* headers);

}  // namespace holdfast::fetch
