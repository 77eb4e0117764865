// The worker's configuration file, TOML. Every key is known by name and type; anything else is an error that
// names file, line and key, so a typing error never silently means a default.
//
// Sizes are integers (bytes) or strings with a binary unit ("10GiB"); durations are strings with a unit
// ("60s", "500ms", "2m"). packaging/config.toml shows every key with its default.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>

#include "common/status.h"

namespace holdfast::app {

inline constexpr char kDefaultConfigPath[] = "/etc/holdfast/config.toml";

struct Config {
  struct Cache {
    uint64_t limit_bytes = 0;  // 0 = only the free floor bounds it
    uint64_t free_floor_bytes = 1ull << 30;
  };
  struct Fetch {
    uint64_t miss_timeout_nanos = 60'000'000'000;  // a read that waits longer gets EIO
    std::string docker_config;                     // "" = $DOCKER_CONFIG or /root/.docker/config.json
    uint32_t max_connections_per_host = 8;
  };
  struct Registry {  // [registry."host:port"]
    bool plain_http = false;
    std::string ca_file;
    std::string username, password;
  };
  struct Snapshotter {
    uint64_t lazy_deadline_nanos = 20'000'000'000;  // then Prepare falls back to an ordinary snapshot
  };
  struct Fuse {
    uint32_t threads = 0;  // 0 = one a processor, at most the ledger's slots
  };

  Cache cache;
  Fetch fetch;
  std::map<std::string, Registry> registry;
  Snapshotter snapshotter;
  Fuse fuse;
};

// `name` is what errors call the text. InvalidArgument: "<name>:<line>: <what>".
absl::StatusOr<Config> ParseConfig(std::string_view text, const std::string& name);

// Reads kDefaultConfigPath when `path` is empty: that file may be missing (defaults), a named one may not.
absl::StatusOr<Config> LoadConfig(const std::string& path);

// Exposed for tests and for messages that show limits. InvalidArgument says what a right value looks like.
absl::StatusOr<uint64_t> ParseSize(std::string_view text);
absl::StatusOr<uint64_t> ParseDuration(std::string_view text);  // nanoseconds

}  // namespace holdfast::app
