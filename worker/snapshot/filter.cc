#include "worker/snapshot/filter.h"

#include <re2/re2.h>

#include <optional>

#include "worker/snapshot/go_string.h"

namespace holdfast::snapshot {
namespace {

constexpr size_t kMaxFilterBytes = 64 << 10;
constexpr int64_t kRegexMemoryBytes = 1 << 20;

enum class Operator { kPresent, kEqual, kNotEqual, kMatches };

struct Selector {
  std::vector<std::string> path;
  Operator op = Operator::kPresent;
  std::string value;
  std::unique_ptr<re2::RE2> regex;
};

std::string JoinFrom(const std::vector<std::string>& path, size_t first) {
  std::string joined;
  for (size_t i = first; i < path.size(); i++) {
    if (i > first) joined += '.';
    joined += path[i];
  }
  return joined;
}

std::optional<std::string> FieldOf(const metadata::SnapshotRow& row, const std::vector<std::string>& path) {
  if (path[0] == "name") return row.key;
  if (path[0] == "parent") return row.parent;
  if (path[0] == "kind") return metadata::KindName(row.kind);
  if (path[0] != "labels" || path.size() < 2) return std::nullopt;
  auto it = row.labels.find(JoinFrom(path, 1));
  if (it == row.labels.end()) return std::nullopt;
  return it->second;
}

bool SelectorMatches(const Selector& selector, const metadata::SnapshotRow& row) {
  std::optional<std::string> field = FieldOf(row, selector.path);
  switch (selector.op) {
    case Operator::kPresent:
      return field.has_value();
    case Operator::kEqual:
      return field.has_value() && *field == selector.value;
    case Operator::kNotEqual:
      return field.value_or("") != selector.value;
    case Operator::kMatches:
      return re2::RE2::PartialMatch(field.value_or(""), *selector.regex);
  }
  return false;
}

class All final : public Filter {
 public:
  explicit All(std::vector<Selector> selectors) : selectors_(std::move(selectors)) {}
  bool Matches(const metadata::SnapshotRow& row) const override {
    for (const Selector& selector : selectors_) {
      if (!SelectorMatches(selector, row)) return false;
    }
    return true;
  }

 private:
  const std::vector<Selector> selectors_;
};

class Any final : public Filter {
 public:
  explicit Any(std::vector<std::unique_ptr<Filter>> filters) : filters_(std::move(filters)) {}
  bool Matches(const metadata::SnapshotRow& row) const override {
    for (const auto& filter : filters_) {
      if (filter->Matches(row)) return true;
    }
    return filters_.empty();
  }

 private:
  const std::vector<std::unique_ptr<Filter>> filters_;
};

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  absl::StatusOr<std::vector<Selector>> Run() {
    std::vector<Selector> selectors;
    SkipSpace();
    if (AtEnd()) return selectors;
    while (true) {
      HF_ASSIGN_OR_RETURN(Selector selector, ParseSelector());
      selectors.push_back(std::move(selector));
      SkipSpace();
      if (AtEnd()) return selectors;
      if (text_[at_] != ',') return Wrong("expected ','");
      at_++;
    }
  }

 private:
  bool AtEnd() const { return at_ >= text_.size(); }
  char Peek() const { return AtEnd() ? '\0' : text_[at_]; }
  void SkipSpace() {
    while (!AtEnd() && (Peek() == ' ' || (Peek() >= '\t' && Peek() <= '\r'))) at_++;
  }
  absl::Status Wrong(std::string_view what) const {
    return InvalidArgument("filter at byte " + std::to_string(at_) + ": " + std::string(what));
  }
  static bool IsFieldCharacter(char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
  }

  absl::StatusOr<Selector> ParseSelector() {
    Selector selector;
    while (true) {
      SkipSpace();
      HF_ASSIGN_OR_RETURN(std::string field, ParseField());
      selector.path.push_back(std::move(field));
      SkipSpace();
      if (Peek() != '.') break;
      at_++;
    }
    if (AtEnd() || Peek() == ',') return selector;
    HF_RETURN_IF_ERROR(ParseOperator(&selector.op));
    SkipSpace();
    HF_ASSIGN_OR_RETURN(selector.value, ParseValue(selector.op == Operator::kMatches));
    if (selector.op != Operator::kMatches) return selector;
    re2::RE2::Options options;
    options.set_log_errors(false);
    options.set_max_mem(kRegexMemoryBytes);
    selector.regex = std::make_unique<re2::RE2>(selector.value, options);
    if (!selector.regex->ok()) return Wrong("bad expression: " + selector.regex->error());
    return selector;
  }

  absl::StatusOr<std::string> ParseField() {
    if (Peek() == '"') return ParseQuoted();
    size_t start = at_;
    while (!AtEnd() && IsFieldCharacter(Peek())) at_++;
    if (at_ == start) return Wrong("expected a field");
    return std::string(text_.substr(start, at_ - start));
  }

  absl::Status ParseOperator(Operator* op) {
    std::string_view token = text_.substr(at_, 2);
    if (token == "==") {
      *op = Operator::kEqual;
    } else if (token == "!=") {
      *op = Operator::kNotEqual;
    } else if (token == "~=") {
      *op = Operator::kMatches;
    } else {
      return Wrong("expected ==, != or ~=");
    }
    at_ += 2;
    return absl::OkStatus();
  }

  absl::StatusOr<std::string> ParseValue(bool alternative_quotes) {
    if (Peek() == '"' || (alternative_quotes && (Peek() == '/' || Peek() == '|'))) return ParseQuoted();
    size_t start = at_;
    while (!AtEnd() && static_cast<unsigned char>(Peek()) > ' ' && Peek() != 0x7f && Peek() != ',') at_++;
    if (at_ == start) return Wrong("expected a value");
    return std::string(text_.substr(start, at_ - start));
  }

  absl::StatusOr<std::string> ParseQuoted() {
    size_t used = 0;
    absl::StatusOr<std::string> value = UnquoteGoString(text_.substr(at_), &used);
    if (!value.ok()) return Wrong(FromAbsl(value.status().message()));
    at_ += used;
    return value;
  }

  const std::string_view text_;
  size_t at_ = 0;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Filter>> Filter::Parse(std::string_view text) {
  if (text.size() > kMaxFilterBytes) return InvalidArgument("filter is longer than 64 KiB");
  HF_ASSIGN_OR_RETURN(std::vector<Selector> selectors, Parser(text).Run());
  return std::unique_ptr<Filter>(std::make_unique<All>(std::move(selectors)));
}

absl::StatusOr<std::unique_ptr<Filter>> Filter::ParseAny(const std::vector<std::string>& texts) {
  std::vector<std::unique_ptr<Filter>> filters;
  for (const std::string& text : texts) {
    HF_ASSIGN_OR_RETURN(std::unique_ptr<Filter> filter, Parse(text));
    filters.push_back(std::move(filter));
  }
  return std::unique_ptr<Filter>(std::make_unique<Any>(std::move(filters)));
}

}  // namespace holdfast::snapshot
