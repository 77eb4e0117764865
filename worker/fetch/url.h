// URLs as the client needs them: taken apart and resolved by libcurl's parser, compared by origin, shown
// without secrets. Pure functions.
#pragma once

#include <string>
#include <string_view>

#include "common/status.h"

namespace holdfast::fetch {

struct Url {
  std::string full;       // what is asked for, query included; never logged
  std::string scheme;     // "http" or "https"
  std::string authority;  // host[:port], lower case, the scheme's default port left out; IPv6 in brackets
  bool SameOrigin(const Url& other) const { return scheme == other.scheme && authority == other.authority; }
};

// Only http and https, without user information. InvalidArgument otherwise; messages never contain the URL's
// query.
absl::StatusOr<Url> ParseUrl(const std::string& text);
// `location` is absolute or relative to `base`.
absl::StatusOr<Url> ResolveUrl(const Url& base, const std::string& location);

// "host[:port]" is 127.0.0.0/8, ::1 or localhost. Names that merely look alike are not.
bool IsLoopback(std::string_view authority);

// For query values and form bodies (RFC 3986 unreserved characters stay).
std::string PercentEncode(std::string_view text);

std::string Base64Encode(std::string_view plain);
absl::StatusOr<std::string> Base64Decode(std::string_view encoded);

}  // namespace holdfast::fetch
