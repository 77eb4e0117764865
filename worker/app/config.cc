#include "worker/app/config.h"

#include <array>
#include <cctype>
#include <cerrno>
#include <charconv>
#include <functional>
#include <set>
#include <utility>
#include <vector>

#define TOML_EXCEPTIONS 1
#include <toml++/toml.h>

#include "common/io.h"
#include "schema/ledger.h"

namespace holdfast::app {
namespace {

// A number and its unit, from a fixed table.
struct Unit {
  std::string_view name;
  uint64_t factor;
};

absl::StatusOr<uint64_t> ParseWithUnit(std::string_view text, const std::vector<Unit>& units,
                                       const std::string& example) {
  uint64_t number = 0;
  const char* end = text.data() + text.size();
  auto [rest, error] = std::from_chars(text.data(), end, number);
  std::string_view unit(rest, static_cast<size_t>(end - rest));
  while (!unit.empty() && unit.front() == ' ') unit.remove_prefix(1);
  if (error == std::errc()) {
    for (const Unit& candidate : units) {
      if (candidate.name != unit) continue;
      uint64_t result = 0;
      if (__builtin_mul_overflow(number, candidate.factor, &result)) break;
      return result;
    }
  }
  return InvalidArgument("'" + std::string(text) + "' is not a value like " + example);
}

// Collects the first error with its place; later reads then do nothing.
class Reader {
 public:
  explicit Reader(std::string name) : name_(std::move(name)) {}

  void Fail(const toml::node& node, const std::string& what) { FailAt(node.source().begin.line, what); }
  void FailAt(uint32_t line, const std::string& what) {
    if (status_.ok()) status_ = InvalidArgument(name_ + ":" + std::to_string(line) + ": " + what);
  }
  bool ok() const { return status_.ok(); }
  const absl::Status& status() const { return status_; }

 private:
  const std::string name_;
  absl::Status status_;
};

// One table of the file: takes known keys out, then complains about what is left.
class Section {
 public:
  Section(Reader* reader, const toml::table* table, std::string path)
      : reader_(reader), table_(table), path_(std::move(path)) {}

  void Bool(const std::string& key, bool* out) {
    const toml::node* node = Take(key);
    if (node == nullptr) return;
    if (!node->is_boolean()) return Mistyped(*node, key, "true or false");
    *out = node->as_boolean()->get();
  }

  void Text(const std::string& key, std::string* out) {
    const toml::node* node = Take(key);
    if (node == nullptr) return;
    if (!node->is_string()) return Mistyped(*node, key, "a string");
    *out = node->as_string()->get();
  }

  void Count(const std::string& key, uint32_t least, uint32_t most, uint32_t* out) {
    const toml::node* node = Take(key);
    if (node == nullptr) return;
    if (!node->is_integer()) return Mistyped(*node, key, "an integer");
    int64_t value = node->as_integer()->get();
    if (value < least || value > most) {
      return Bad(*node, key, "must be " + std::to_string(least) + " to " + std::to_string(most));
    }
    *out = static_cast<uint32_t>(value);
  }

  void Size(const std::string& key, uint64_t* out) {
    const toml::node* node = Take(key);
    if (node == nullptr) return;
    if (node->is_integer()) {
      int64_t value = node->as_integer()->get();
      if (value < 0) return Bad(*node, key, "must not be negative");
      *out = static_cast<uint64_t>(value);
      return;
    }
    if (!node->is_string()) return Mistyped(*node, key, "a size: bytes, or a string like \"10GiB\"");
    Assign(*node, key, ParseSize(node->as_string()->get()), out);
  }

  void Duration(const std::string& key, uint64_t* out) {
    const toml::node* node = Take(key);
    if (node == nullptr) return;
    if (!node->is_string()) return Mistyped(*node, key, "a duration: a string like \"60s\" or \"500ms\"");
    uint64_t value = *out;
    Assign(*node, key, ParseDuration(node->as_string()->get()), &value);
    if (reader_->ok() && value == 0) return Bad(*node, key, "must be more than 0");
    *out = value;
  }

  // Calls `read` with the subtable, if the file has it.
  void Table(const std::string& key, const std::function<void(const toml::table&)>& read) {
    const toml::node* node = Take(key);
    if (node == nullptr) return;
    if (!node->is_table()) return Mistyped(*node, key, "a table, [" + Full(key) + "]");
    read(*node->as_table());
  }

  void NoOtherKeys() {
    for (auto&& [key, value] : *table_) {
      std::string name(key.str());
      if (known_.count(name) != 0) continue;
      std::string list;
      for (const std::string& known : known_) list += (list.empty() ? "" : ", ") + known;
      const std::string where = path_.empty() ? "the file" : "[" + path_ + "]";
      reader_->FailAt(key.source().begin.line, "unknown key '" + name + "'; " + where + " may hold: " + list);
      return;
    }
  }

 private:
  const toml::node* Take(const std::string& key) {
    known_.insert(key);
    return table_->get(key);
  }
  std::string Full(const std::string& key) const { return path_.empty() ? key : path_ + "." + key; }
  void Mistyped(const toml::node& node, const std::string& key, const std::string& wanted) {
    Bad(node, key, "must be " + wanted);
  }
  void Bad(const toml::node& node, const std::string& key, const std::string& what) {
    reader_->Fail(node, "'" + Full(key) + "' " + what);
  }
  void Assign(const toml::node& node, const std::string& key, absl::StatusOr<uint64_t> value, uint64_t* out) {
    if (!value.ok()) return Bad(node, key, std::string(FromAbsl(value.status().message())));
    *out = *value;
  }

  Reader* const reader_;
  const toml::table* const table_;
  const std::string path_;
  std::set<std::string> known_;
};

void ReadRegistries(Reader* reader, const toml::table& table, std::map<std::string, Config::Registry>* out) {
  for (auto&& [key, value] : table) {
    const std::string host(key.str());
    const std::string path = "registry.\"" + host + "\"";
    if (!value.is_table()) return reader->Fail(value, "'" + path + "' must be a table, [" + path + "]");
    if (host.empty() || host.find('/') != std::string::npos) {
      return reader->Fail(value, "'" + host + "' is not a host or host:port");
    }
    Config::Registry entry;
    Section section(reader, value.as_table(), path);
    section.Bool("plain_http", &entry.plain_http);
    section.Text("ca_file", &entry.ca_file);
    section.Text("username", &entry.username);
    section.Text("password", &entry.password);
    section.NoOtherKeys();
    if (entry.username.empty() != entry.password.empty()) {
      reader->Fail(value, "[" + path + "] needs username and password together");
    }
    (*out)[host] = std::move(entry);
  }
}

Config ReadAll(Reader* reader, const toml::table& root) {
  Config config;
  Section top(reader, &root, "");
  top.Table("cache", [&](const toml::table& table) {
    Section section(reader, &table, "cache");
    section.Size("limit", &config.cache.limit_bytes);
    section.Size("free_floor", &config.cache.free_floor_bytes);
    section.NoOtherKeys();
  });
  top.Table("fetch", [&](const toml::table& table) {
    Section section(reader, &table, "fetch");
    section.Duration("miss_timeout", &config.fetch.miss_timeout_nanos);
    section.Text("docker_config", &config.fetch.docker_config);
    section.Count("max_connections_per_host", 1, 1024, &config.fetch.max_connections_per_host);
    section.NoOtherKeys();
  });
  top.Table("registry", [&](const toml::table& table) { ReadRegistries(reader, table, &config.registry); });
  top.Table("snapshotter", [&](const toml::table& table) {
    Section section(reader, &table, "snapshotter");
    section.Duration("lazy_deadline", &config.snapshotter.lazy_deadline_nanos);
    section.NoOtherKeys();
  });
  top.Table("fuse", [&](const toml::table& table) {
    Section section(reader, &table, "fuse");
    section.Count("threads", 1, HF_LEDGER_SLOTS, &config.fuse.threads);
    section.NoOtherKeys();
  });
  top.NoOtherKeys();
  return config;
}

}  // namespace

absl::StatusOr<uint64_t> ParseSize(std::string_view text) {
  static const std::vector<Unit> units = {
      {"", 1}, {"B", 1}, {"KiB", 1ull << 10}, {"MiB", 1ull << 20}, {"GiB", 1ull << 30}, {"TiB", 1ull << 40}};
  return ParseWithUnit(text, units, "\"500MiB\" or \"10GiB\"");
}

absl::StatusOr<uint64_t> ParseDuration(std::string_view text) {
  static const std::vector<Unit> units = {
      {"ms", 1'000'000}, {"s", 1'000'000'000}, {"m", 60'000'000'000}, {"h", 3'600'000'000'000}};
  return ParseWithUnit(text, units, "\"60s\", \"500ms\" or \"2m\"");
}

absl::StatusOr<Config> ParseConfig(std::string_view text, const std::string& name) {
  toml::table root;
  try {
    root = toml::parse(text, name);
  } catch (const toml::parse_error& error) {
    return InvalidArgument(name + ":" + std::to_string(error.source().begin.line) + ": " +
                           std::string(error.description()));
  }
  Reader reader(name);
  Config config = ReadAll(&reader, root);
  if (!reader.ok()) return reader.status();
  return config;
}

absl::StatusOr<Config> LoadConfig(const std::string& path) {
  const std::string& used = path.empty() ? kDefaultConfigPath : path;
  absl::StatusOr<std::string> text = ReadFile(used);
  if (!text.ok()) {
    if (path.empty() && StatusErrno(text.status()) == ENOENT) return Config();
    return Annotate(text.status(), "configuration");
  }
  return ParseConfig(*text, used);
}

}  // namespace holdfast::app
