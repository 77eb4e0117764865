#include "worker/fetch/http_headers.h"

#include <strings.h>

#include <algorithm>
#include <cctype>
#include <charconv>

#include "worker/fetch/libcurl.h"

namespace holdfast::fetch {
namespace {

constexpr size_t kMaxChallengeLines = 16;

std::string_view Trim(std::string_view text) {
  const auto is_space = [](char c) { return c == ' ' || c == '\t' || c == '\r' || c == '\n'; };
  while (!text.empty() && is_space(text.front())) text.remove_prefix(1);
  while (!text.empty() && is_space(text.back())) text.remove_suffix(1);
  return text;
}

bool SameName(std::string_view a, std::string_view b) {
  return a.size() == b.size() && strncasecmp(a.data(), b.data(), a.size()) == 0;
}

}  // namespace

std::optional<uint64_t> ParseDecimal(std::string_view text) {
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (text.empty() || error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

std::optional<ContentRange> ParseContentRange(std::string_view text) {
  text = Trim(text);
  if (text.size() < 6 || !SameName(text.substr(0, 5), "bytes") || text[5] != ' ') return std::nullopt;
  text = Trim(text.substr(6));
  const size_t slash = text.find('/');
  if (slash == std::string_view::npos) return std::nullopt;
  ContentRange range;
  const std::string_view total = text.substr(slash + 1);
  if (total != "*") {
    range.total = ParseDecimal(total);
    if (!range.total) return std::nullopt;
  }
  const std::string_view span = text.substr(0, slash);
  if (span == "*") return range.total ? std::optional(range) : std::nullopt;
  const size_t dash = span.find('-');
  if (dash == std::string_view::npos) return std::nullopt;
  const auto first = ParseDecimal(span.substr(0, dash));
  const auto last = ParseDecimal(span.substr(dash + 1));
  if (!first || !last || *last < *first || *last == UINT64_MAX || (range.total && *last >= *range.total)) {
    return std::nullopt;
  }
  range.satisfied = true;
  range.first = *first;
  range.last = *last;
  return range;
}

std::optional<uint64_t> ParseRetryAfter(std::string_view text, int64_t wall_nanos) {
  constexpr uint64_t kSecond = 1'000'000'000;
  constexpr uint64_t kLongest = 365 * 86400;
  text = Trim(text);
  if (text.empty() || text.size() > 64) return std::nullopt;
  if (std::all_of(text.begin(), text.end(), [](unsigned char c) { return std::isdigit(c); })) {
    return std::min(ParseDecimal(text).value_or(kLongest), kLongest) * kSecond;
  }
  const absl::StatusOr<const Libcurl*> curl = LoadLibcurl();  // an answer came, so it is there
  if (!curl.ok()) return std::nullopt;
  const time_t date = (*curl)->curl_getdate(std::string(text).c_str(), nullptr);
  if (date < 0) return std::nullopt;
  const int64_t away = static_cast<int64_t>(date) - wall_nanos / static_cast<int64_t>(kSecond);
  return std::min(static_cast<uint64_t>(std::max<int64_t>(away, 0)), kLongest) * kSecond;
}

void AddHeaderLine(std::string_view line, HttpHeaders* headers) {
  const size_t colon = line.find(':');
  if (colon == std::string_view::npos) return;
  const std::string_view name = line.substr(0, colon);
  const std::string value(Trim(line.substr(colon + 1)));
  if (SameName(name, "content-length")) {
    headers->content_length = ParseDecimal(value);
  } else if (SameName(name, "content-range")) {
    headers->content_range = value;
  } else if (SameName(name, "location")) {
    headers->location = value;
  } else if (SameName(name, "retry-after")) {
    headers->retry_after = value;
  } else if (SameName(name, "www-authenticate") && headers->www_authenticate.size() < kMaxChallengeLines) {
    headers->www_authenticate.push_back(value);
  }
}

}  // namespace holdfast::fetch
