// What may appear in a request's path: checks on text that an image's author may have crafted (containerd
// labels). ParseImageReference itself is declared in registry_client.h. Pure functions.
#pragma once

#include <string_view>

namespace holdfast::fetch {

bool IsValidRegistryHost(std::string_view host);      // name, IPv4 or [IPv6], with an optional port
bool IsValidRepository(std::string_view repository);  // OCI distribution spec's <name>
bool IsValidDigest(std::string_view digest);          // sha256:<64 lower-case hexadecimal digits>
bool IsValidTag(std::string_view tag);

}  // namespace holdfast::fetch
