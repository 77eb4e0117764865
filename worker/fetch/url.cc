#include "worker/fetch/url.h"

#include <arpa/inet.h>

#include <algorithm>
#include <cctype>

#include "absl/strings/escaping.h"
#include "worker/fetch/libcurl.h"

namespace holdfast::fetch {
namespace {

using UrlHandle = CurlHandle<CURLU, &Libcurl::curl_url_cleanup>;

std::string Part(const Libcurl& curl, CURLU* url, CURLUPart part) {
  char* text = nullptr;
  if (curl.curl_url_get(url, part, &text, 0) != CURLUE_OK) return "";
  std::string value = text;
  curl.curl_free(text);
  return value;
}

absl::StatusOr<Url> Finish(const Libcurl& curl, CURLU* handle) {
  Url url;
  url.scheme = Part(curl, handle, CURLUPART_SCHEME);
  if (url.scheme != "http" && url.scheme != "https") return InvalidArgument("URL is neither http nor https");
  if (!Part(curl, handle, CURLUPART_USER).empty() || !Part(curl, handle, CURLUPART_PASSWORD).empty()) {
    return InvalidArgument("URL carries a user name or password");
  }
  url.authority = Part(curl, handle, CURLUPART_HOST);
  std::transform(url.authority.begin(), url.authority.end(), url.authority.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  if (url.authority.empty()) return InvalidArgument("URL has no host");
  const std::string port = Part(curl, handle, CURLUPART_PORT);
  if (!port.empty() && port != (url.scheme == "http" ? "80" : "443")) url.authority += ":" + port;
  curl.curl_url_set(handle, CURLUPART_FRAGMENT, nullptr, 0);
  url.full = Part(curl, handle, CURLUPART_URL);
  return url;
}

bool HasControl(const std::string& text) {
  return std::any_of(text.begin(), text.end(), [](unsigned char c) { return c <= 0x20 || c == 0x7f; });
}

absl::StatusOr<Url> Parse(const std::string* base, const std::string& text) {
  if (text.size() > 16384 || HasControl(text))
    return InvalidArgument("URL is too long or has control characters");
  HF_ASSIGN_OR_RETURN(const Libcurl* curl, LoadLibcurl());
  UrlHandle handle(curl->curl_url(), {curl});
  if (base != nullptr) curl->curl_url_set(handle.get(), CURLUPART_URL, base->c_str(), 0);
  if (curl->curl_url_set(handle.get(), CURLUPART_URL, text.c_str(), 0) != CURLUE_OK)
    return InvalidArgument("not a URL");
  return Finish(*curl, handle.get());
}

}  // namespace

absl::StatusOr<Url> ParseUrl(const std::string& text) { return Parse(nullptr, text); }

absl::StatusOr<Url> ResolveUrl(const Url& base, const std::string& location) {
  return Parse(&base.full, location);
}

bool IsLoopback(std::string_view authority) {
  std::string host(authority);
  if (!host.empty() && host[0] == '[') {
    host = host.substr(1, host.find(']') == std::string::npos ? 0 : host.find(']') - 1);
  } else if (const size_t colon = host.find(':'); colon != std::string::npos) {
    host.resize(colon);
  }
  if (host == "localhost") return true;
  in_addr v4;
  if (inet_pton(AF_INET, host.c_str(), &v4) == 1) return (ntohl(v4.s_addr) >> 24) == 127;
  in6_addr v6;
  return inet_pton(AF_INET6, host.c_str(), &v6) == 1 && IN6_IS_ADDR_LOOPBACK(&v6);
}

std::string PercentEncode(std::string_view text) {
  constexpr char kHex[] = "0123456789ABCDEF";
  std::string out;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (std::isalnum(byte) || c == '-' || c == '.' || c == '_' || c == '~') {
      out += c;
    } else {
      out += {'%', kHex[byte >> 4], kHex[byte & 15]};
    }
  }
  return out;
}

std::string Base64Encode(std::string_view plain) { return absl::Base64Escape(ToAbsl(plain)); }

absl::StatusOr<std::string> Base64Decode(std::string_view encoded) {
  std::string plain;
  if (!absl::Base64Unescape(ToAbsl(encoded), &plain)) return InvalidArgument("not base64");
  return plain;
}

}  // namespace holdfast::fetch
