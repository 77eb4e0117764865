// WWW-Authenticate (RFC 7235, and the registry token specification for Bearer). The header comes from the
// network: any input gives a result, bounded in size. Pure functions; fuzzed.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace holdfast::fetch {

struct AuthChallenge {
  std::string scheme;                         // lower case: "bearer", "basic", ...
  std::map<std::string, std::string> params;  // names in lower case: realm, service, scope, error
};

// The challenges of one header value, in order; what cannot be understood ends the list.
std::vector<AuthChallenge> ParseAuthChallenges(std::string_view header);

// The one to follow of all header lines: a bearer challenge with a realm, else basic; nothing = no way to
// authenticate.
std::optional<AuthChallenge> ChooseChallenge(const std::vector<std::string>& headers);

}  // namespace holdfast::fetch
