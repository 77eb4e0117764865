#include "worker/fetch/credentials.h"

#include <algorithm>
#include <vector>

#include "common/io.h"
#include "nlohmann/json.hpp"
#include "worker/fetch/url.h"

namespace holdfast::fetch {
namespace {

using nlohmann::json;

constexpr off_t kMaxConfigBytes = 4 << 20;

std::string StringMember(const json& object, const char* name) {
  const auto it = object.find(name);
  return it != object.end() && it->is_string() ? it->get<std::string>() : "";
}

Credentials ParseAuthEntry(const json& entry) {
  Credentials credentials;
  credentials.username = StringMember(entry, "username");
  credentials.password = StringMember(entry, "password");
  credentials.identity_token = StringMember(entry, "identitytoken");
  const std::string auth = StringMember(entry, "auth");
  if (auth.empty()) return credentials;
  const absl::StatusOr<std::string> plain = Base64Decode(auth);
  const size_t colon = plain.ok() ? plain->find(':') : std::string::npos;
  if (colon == std::string::npos) return credentials;
  credentials.username = plain->substr(0, colon);
  credentials.password = plain->substr(colon + 1);
  // Some versions of docker pad the decoded text with NULs.
  while (!credentials.password.empty() && credentials.password.back() == '\0')
    credentials.password.pop_back();
  return credentials;
}

// The host of a key such as "https://index.docker.io/v1/", "registry.example:5000" or
// "registry.example/team".
std::string KeyHost(std::string key) {
  for (const char* scheme : {"https://", "http://"}) {
    if (key.rfind(scheme, 0) == 0) key = key.substr(std::string_view(scheme).size());
  }
  return key.substr(0, key.find('/'));
}

// The names under which credentials for `host` may be kept, the preferred one first.
std::vector<std::string> NamesOf(const std::string& host) {
  if (host != "registry-1.docker.io") return {host};
  return {"https://index.docker.io/v1/", "index.docker.io", "docker.io", host};
}

template <typename Value>
const Value* FindForHost(const std::map<std::string, Value>& values, const std::string& host) {
  const std::vector<std::string> names = NamesOf(host);
  for (const std::string& name : names) {
    if (const auto it = values.find(name); it != values.end()) return &it->second;
  }
  for (const auto& [key, value] : values) {
    if (std::find(names.begin(), names.end(), KeyHost(key)) != names.end()) return &value;
  }
  return nullptr;
}

DockerConfig FromJson(const json& root) {
  DockerConfig config;
  config.default_helper = StringMember(root, "credsStore");
  if (const auto helpers = root.find("credHelpers"); helpers != root.end() && helpers->is_object()) {
    for (const auto& [host, helper] : helpers->items()) {
      if (helper.is_string()) config.helpers[host] = helper.get<std::string>();
    }
  }
  if (const auto auths = root.find("auths"); auths != root.end() && auths->is_object()) {
    for (const auto& [host, entry] : auths->items()) {
      if (!entry.is_object()) continue;
      Credentials credentials = ParseAuthEntry(entry);
      if (!credentials.empty()) config.auths[host] = std::move(credentials);
    }
  }
  return config;
}

// Parses without a DOM deeper than docker ever writes: a hostile file must not exhaust the stack.
json ParseBounded(std::string_view text) {
  constexpr int kMaxDepth = 32;
  const json::parser_callback_t limit = [](int depth, json::parse_event_t, json&) {
    if (depth > kMaxDepth) throw std::runtime_error("nested too deeply");
    return true;
  };
  return json::parse(text.begin(), text.end(), limit);
}

}  // namespace

absl::StatusOr<DockerConfig> ParseDockerConfig(std::string_view text) {
  try {
    const json root = ParseBounded(text);
    if (!root.is_object()) return InvalidArgument("not a JSON object");
    return FromJson(root);
  } catch (const json::parse_error& error) {
    return InvalidArgument("not valid JSON at byte " + std::to_string(error.byte));
  } catch (const std::exception&) {
    return InvalidArgument("not usable JSON");
  }
}

absl::StatusOr<Credentials> ParseHelperAnswer(std::string_view text) {
  try {
    const json root = ParseBounded(text);
    if (!root.is_object()) return InvalidArgument("the credential helper printed no JSON object");
    Credentials credentials;
    credentials.username = StringMember(root, "Username");
    credentials.password = StringMember(root, "Secret");
    // The credential helper protocol's way to say that the secret is an identity token.
    if (credentials.username == "<token>") {
      credentials.identity_token = credentials.password;
      credentials.username = credentials.password = "";
    }
    if (credentials.empty()) return NotFound("the credential helper knows no such server");
    return credentials;
  } catch (const std::exception&) {
    return InvalidArgument("the credential helper printed no valid JSON");
  }
}

CredentialStore::Source CredentialStore::Find(const std::string& host) {
  MutexLock lock(&mutex_);
  Reload();
  Source source;
  source.problem = problem_;
  source.server = NamesOf(host).front();
  if (const Credentials* stored = FindForHost(config_.auths, host)) source.stored = *stored;
  const std::string* helper = FindForHost(config_.helpers, host);
  source.helper = helper != nullptr ? *helper : config_.default_helper;
  return source;
}

void CredentialStore::Reload() {
  struct stat now {};
  if (stat(path_.c_str(), &now) != 0) now = {};
  if (loaded_ && now.st_mtim.tv_sec == seen_.st_mtim.tv_sec && now.st_mtim.tv_nsec == seen_.st_mtim.tv_nsec &&
      now.st_size == seen_.st_size && now.st_ino == seen_.st_ino) {
    return;
  }
  loaded_ = true;
  seen_ = now;
  config_ = {};
  problem_.clear();
  if (now.st_ino == 0) return;
  if (!S_ISREG(now.st_mode) || now.st_size > kMaxConfigBytes) {
    problem_ = path_ + ": not a regular file of a sensible size";
    return;
  }
  const absl::StatusOr<std::string> text = ReadFile(path_);
  absl::StatusOr<DockerConfig> config = text.ok() ? ParseDockerConfig(*text) : text.status();
  if (config.ok()) {
    config_ = std::move(*config);
  } else {
    problem_ = path_ + ": " + std::string(FromAbsl(config.status().message()));
  }
}

}  // namespace holdfast::fetch
