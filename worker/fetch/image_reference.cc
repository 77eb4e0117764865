#include "worker/fetch/image_reference.h"

#include <algorithm>
#include <string>

#include "worker/fetch/registry_client.h"

namespace holdfast::fetch {
namespace {

bool IsDigit(char c) { return c >= '0' && c <= '9'; }
bool IsLower(char c) { return c >= 'a' && c <= 'z'; }
bool IsAlnum(char c) { return IsDigit(c) || IsLower(c) || (c >= 'A' && c <= 'Z'); }

bool IsValidPort(std::string_view port) {
  return !port.empty() && port.size() <= 5 && std::all_of(port.begin(), port.end(), IsDigit) &&
         std::stoul(std::string(port)) >= 1 && std::stoul(std::string(port)) <= 65535;
}

// One path component: runs of [a-z0-9] joined by ".", "_", "__" or dashes.
bool IsValidComponent(std::string_view part) {
  const auto is_word = [](char c) { return IsDigit(c) || IsLower(c); };
  if (part.empty() || !is_word(part.front()) || !is_word(part.back())) return false;
  for (size_t i = 0; i < part.size();) {
    size_t end = i;
    while (end < part.size() && !is_word(part[end])) end++;
    const std::string_view separator = part.substr(i, end - i);
    const bool dashes = std::all_of(separator.begin(), separator.end(), [](char c) { return c == '-'; });
    if (!dashes && separator != "." && separator != "_" && separator != "__") return false;
    i = end + 1;
  }
  return true;
}

}  // namespace

bool IsValidRegistryHost(std::string_view host) {
  if (host.empty() || host.size() > 255) return false;
  std::string_view name = host;
  if (host[0] == '[') {
    const size_t close = host.find(']');
    if (close == std::string_view::npos || close < 3) return false;
    const std::string_view rest = host.substr(close + 1);
    if (!rest.empty() && (rest[0] != ':' || !IsValidPort(rest.substr(1)))) return false;
    const std::string_view address = host.substr(1, close - 1);
    return address.find_first_not_of("0123456789abcdefABCDEF:.") == std::string_view::npos;
  }
  if (const size_t colon = host.find(':'); colon != std::string_view::npos) {
    if (!IsValidPort(host.substr(colon + 1))) return false;
    name = host.substr(0, colon);
  }
  return !name.empty() && IsAlnum(name.front()) && IsAlnum(name.back()) &&
         std::all_of(name.begin(), name.end(),
                     [](char c) { return IsAlnum(c) || c == '-' || c == '.' || c == '_'; });
}

bool IsValidRepository(std::string_view repository) {
  if (repository.empty() || repository.size() > 255) return false;
  while (true) {
    const size_t slash = repository.find('/');
    if (!IsValidComponent(repository.substr(0, slash))) return false;
    if (slash == std::string_view::npos) return true;
    repository.remove_prefix(slash + 1);
  }
}

bool IsValidDigest(std::string_view digest) {
  constexpr std::string_view kPrefix = "sha256:";
  return digest.size() == kPrefix.size() + 64 && digest.substr(0, kPrefix.size()) == kPrefix &&
         digest.substr(kPrefix.size()).find_first_not_of("0123456789abcdef") == std::string_view::npos;
}

bool IsValidTag(std::string_view tag) {
  return !tag.empty() && tag.size() <= 128 && (IsAlnum(tag[0]) || tag[0] == '_') &&
         std::all_of(tag.begin(), tag.end(),
                     [](char c) { return IsAlnum(c) || c == '_' || c == '.' || c == '-'; });
}

absl::StatusOr<ImageReference> ParseImageReference(const std::string& reference) {
  // The text may hold anything; it is shown only as far as it is harmless.
  const auto refuse = [&](const char* why) {
    std::string shown = reference.substr(0, 200);
    std::replace_if(
        shown.begin(), shown.end(), [](char c) { return c < 0x20 || c == 0x7f; }, '?');
    return InvalidArgument("image reference '" + shown + "': " + why);
  };
  ImageReference image;
  std::string rest = reference;
  image.tag_or_digest = "latest";
  std::string digest;
  if (const size_t at = rest.find('@'); at != std::string::npos) {
    digest = rest.substr(at + 1);
    rest.resize(at);
    if (!IsValidDigest(digest)) return refuse("the digest is not sha256:<64 hexadecimal digits>");
  }
  const size_t slash = rest.find('/');
  const std::string first = rest.substr(0, slash);
  const bool has_host =
      slash != std::string::npos &&
      (first.find_first_of(".:") != std::string::npos || first == "localhost" ||
       std::any_of(first.begin(), first.end(), [](char c) { return c >= 'A' && c <= 'Z'; }));
  image.host = has_host ? first : "docker.io";
  if (has_host) rest = rest.substr(slash + 1);
  if (const size_t colon = rest.find(':'); colon != std::string::npos) {
    image.tag_or_digest = rest.substr(colon + 1);
    rest.resize(colon);
    if (!IsValidTag(image.tag_or_digest)) return refuse("the tag is malformed");
  }
  if (!digest.empty()) image.tag_or_digest = digest;
  image.repository = rest;
  if (image.host == "docker.io" || image.host == "index.docker.io") {
    image.host = "registry-1.docker.io";
    if (rest.find('/') == std::string::npos) image.repository = "library/" + rest;
  }
  if (!IsValidRegistryHost(image.host)) return refuse("the registry host is malformed");
  if (!IsValidRepository(image.repository)) return refuse("the repository name is malformed");
  return image;
}

}  // namespace holdfast::fetch
