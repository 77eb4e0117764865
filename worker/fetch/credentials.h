// Who we are to a registry: the static user of the configuration, else docker's config.json with its
// credential helpers. The file is read anew when its modification time or size changed, so a `docker login`
// needs no restart.
#pragma once

#include <sys/stat.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>

#include "common/mutex.h"
#include "common/status.h"

namespace holdfast::fetch {

struct Credentials {
  std::string username, password;
  std::string identity_token;  // an OAuth2 refresh token; username and password are unused then
  bool empty() const { return username.empty() && password.empty() && identity_token.empty(); }
};

struct DockerConfig {
  std::map<std::string, Credentials> auths;    // by the file's own key: host, or an old-style URL
  std::map<std::string, std::string> helpers;  // credHelpers: host -> suffix of docker-credential-<suffix>
  std::string default_helper;                  // credsStore
};
// docker's config.json. Unknown keys are ignored, an entry that makes no sense is left out; InvalidArgument
// only when the whole is no JSON object. Messages never quote the content. Fuzzed.
absl::StatusOr<DockerConfig> ParseDockerConfig(std::string_view text);

// What a credential helper prints for `get`: {"Username": ..., "Secret": ...}.
absl::StatusOr<Credentials> ParseHelperAnswer(std::string_view text);

// Runs `docker-credential-<helper> get` with `server` on its standard input. Blocks up to `limit_nanos`, then
// kills it; also when `*cancelled` becomes true. NotFound: the helper knows no such server.
absl::StatusOr<Credentials> RunCredentialHelper(const std::string& helper, const std::string& server,
                                                uint64_t limit_nanos, const std::atomic<bool>* cancelled);

// Thread-safe.
class CredentialStore {
 public:
  explicit CredentialStore(std::string docker_config_path) : path_(std::move(docker_config_path)) {}

  struct Source {
    std::string helper, server;  // helper set: run it; if it knows nothing, `stored` holds
    Credentials stored;          // empty = anonymous
    std::string problem;         // why the file could not be used; "" also when there is no file
  };
  // For a registry host as in ImageReference.host. Reads the file if it changed; never blocks on anything
  // else.
  Source Find(const std::string& host);

  const std::string& path() const { return path_; }

 private:
  void Reload() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::string path_;
  Mutex mutex_;
  bool loaded_ ABSL_GUARDED_BY(mutex_) = false;
  struct stat seen_ ABSL_GUARDED_BY(mutex_) {};
  DockerConfig config_ ABSL_GUARDED_BY(mutex_);
  std::string problem_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace holdfast::fetch
