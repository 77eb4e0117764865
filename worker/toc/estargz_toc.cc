// Reads the TOC's JSON as a stream of events: memory holds the result, never a document tree.
#include <algorithm>
#include <exception>
#include <nlohmann/json.hpp>
#include <optional>

#include "worker/toc/entry_builder.h"

namespace holdfast::toc {
namespace {

using Json = nlohmann::json;

constexpr int kMaxUnknownDepth = 64;  // nesting inside members that nobody knows

struct KnownField {
  std::string_view key;
  std::optional<TextField> text;
  std::optional<NumberField> number;
};

constexpr KnownField kKnownFields[] = {
    {"name", TextField::kName, {}},
    {"type", TextField::kType, {}},
    {"size", {}, NumberField::kSize},
    {"modtime", TextField::kModTime, {}},
    {"linkName", TextField::kLinkName, {}},
    {"mode", {}, NumberField::kMode},
    {"uid", {}, NumberField::kUid},
    {"gid", {}, NumberField::kGid},
    {"offset", {}, NumberField::kOffset},
    {"innerOffset", {}, NumberField::kInnerOffset},
    {"devMajor", {}, NumberField::kDevMajor},
    {"devMinor", {}, NumberField::kDevMinor},
    {"digest", TextField::kDigest, {}},
    {"chunkOffset", {}, NumberField::kChunkOffset},
    {"chunkSize", {}, NumberField::kChunkSize},
    {"chunkDigest", TextField::kChunkDigest, {}},
};

// The events of nlohmann's parser. A method that returns false ends the parsing; status() says why.
class TocReader {
 public:
  explicit TocReader(EntryBuilder* builder) : builder_(builder) {}
  const absl::Status& status() const { return status_; }
  bool saw_entries() const { return saw_entries_; }

  bool null() {
    if (skip_depth_ > 0 || where_ == Where::kEntry) return true;
    if (where_ == Where::kXattrs) return raw_.xattrs.emplace_back(std::move(xattr_name_), ""), true;
    if (where_ == Where::kTop) return key_ != "entries" || OpenEntries();
    return Fail("null where an object belongs");
  }
  bool boolean(bool) { return Scalar("a boolean"); }
  bool number_float(double, const std::string&) { return Scalar("a number with a fraction or out of range"); }
  bool binary(Json::binary_t&) { return Scalar("binary data"); }
  bool number_integer(int64_t value) {
    return value >= 0 ? Number(static_cast<uint64_t>(value)) : Scalar("a negative number");
  }
  bool number_unsigned(uint64_t value) { return Number(value); }

  bool string(std::string& value) {
    if (skip_depth_ > 0) return true;
    if (where_ == Where::kXattrs)
      return raw_.xattrs.emplace_back(std::move(xattr_name_), std::move(value)), true;
    if (where_ != Where::kEntry || field_ == nullptr || !field_->text.has_value()) return Scalar("a string");
    raw_.texts[static_cast<size_t>(*field_->text)] = std::move(value);
    if (*field_->text == TextField::kName) raw_.has_name = true;
    return true;
  }

  bool key(std::string& key) {
    if (skip_depth_ > 0) return true;
    if (where_ == Where::kXattrs) return xattr_name_ = std::move(key), true;
    if (where_ == Where::kEntry) {
      const auto* found = std::find_if(std::begin(kKnownFields), std::end(kKnownFields),
                                       [&](const KnownField& known) { return known.key == key; });
      field_ = found == std::end(kKnownFields) ? nullptr : found;
      xattrs_field_ = key == "xattrs";
    }
    key_ = std::move(key);
    return true;
  }

  bool start_object(size_t) {
    if (skip_depth_ > 0) return Skip();
    if (where_ == Where::kStart) return where_ = Where::kTop, true;
    if (where_ == Where::kEntries) return raw_.Clear(), where_ = Where::kEntry, true;
    if (where_ == Where::kEntry && xattrs_field_) return where_ = Where::kXattrs, true;
    return UnknownHere() ? Skip() : Fail("an object where it does not belong");
  }
  bool end_object() {
    if (skip_depth_ > 0) return skip_depth_--, true;
    if (where_ == Where::kXattrs) return where_ = Where::kEntry, true;
    if (where_ == Where::kTop) return where_ = Where::kEnd, true;
    where_ = Where::kEntries;
    status_ = builder_->Add(raw_);
    entries_++;
    return status_.ok();
  }
  bool start_array(size_t) {
    if (skip_depth_ > 0) return Skip();
    if (where_ == Where::kTop && key_ == "entries") return where_ = Where::kEntries, OpenEntries();
    return UnknownHere() ? Skip() : Fail("an array where it does not belong");
  }
  bool end_array() {
    if (skip_depth_ > 0) return skip_depth_--, true;
    where_ = Where::kTop;
    key_.clear();
    return true;
  }
  bool parse_error(size_t position, const std::string&, const Json::exception& error) {
    status_ =
        InvalidArgument("TOC: not valid JSON at byte " + std::to_string(position) + ": " + error.what());
    return false;
  }

 private:
  enum class Where { kStart, kTop, kEntries, kEntry, kXattrs, kEnd };

  bool Fail(std::string_view message) {
    std::string at = where_ == Where::kEntry || where_ == Where::kXattrs || where_ == Where::kEntries
                         ? "entry " + std::to_string(entries_) + ": "
                         : "";
    status_ = InvalidArgument("TOC: " + at + std::string(message));
    return false;
  }
  bool UnknownHere() const {
    if (where_ == Where::kTop) return key_ != "entries" && key_ != "version";
    return where_ == Where::kEntry && field_ == nullptr && !xattrs_field_;
  }
  bool Skip() {
    if (++skip_depth_ > kMaxUnknownDepth) return Fail("nested too deeply");
    return true;
  }
  bool OpenEntries() {
    if (saw_entries_) return Fail("\"entries\" stands there twice");
    saw_entries_ = true;
    return true;
  }
  // A value of a kind that no known member takes.
  bool Scalar(std::string_view kind) {
    if (skip_depth_ > 0 || UnknownHere()) return true;
    return Fail((key_.empty() ? std::string("a value") : "\"" + key_.substr(0, 50) + "\"") + " is " +
                std::string(kind));
  }
  bool Number(uint64_t value) {
    if (skip_depth_ > 0) return true;
    if (where_ == Where::kTop && key_ == "version") {
      return value == 1 || Fail("version " + std::to_string(value) + " is not supported");
    }
    if (where_ != Where::kEntry || field_ == nullptr || !field_->number.has_value())
      return Scalar("a number");
    if (value > INT64_MAX) return Scalar("a number out of range");
    raw_.numbers[static_cast<size_t>(*field_->number)] = value;
    return true;
  }

  EntryBuilder* const builder_;
  absl::Status status_;
  Where where_ = Where::kStart;
  int skip_depth_ = 0;
  std::string key_;
  std::string xattr_name_;
  const KnownField* field_ = nullptr;
  bool xattrs_field_ = false;
  RawEntry raw_;
  bool saw_entries_ = false;
  uint64_t entries_ = 0;
};

// Objects inside arrays inside the outermost object: in a valid TOC, its entries. A scan without memory, so
// that a TOC of too many entries is refused before anything is built, and one within the limit gets its table
// in one piece.
uint64_t CountEntries(std::string_view json) {
  uint64_t count = 0;
  int64_t depth = 0;
  for (size_t i = 0; i < json.size(); i++) {
    char c = json[i];
    if (c == '"') {
      for (i++; i < json.size() && json[i] != '"'; i++) {
        if (json[i] == '\\') i++;
      }
    } else if (c == '{' || c == '[') {
      if (c == '{' && depth == 2) count++;
      depth++;
    } else if (c == '}' || c == ']') {
      depth--;
    }
  }
  return count;
}

}  // namespace

absl::StatusOr<Toc> ParseEstargzToc(std::string_view json, uint64_t toc_offset, uint64_t blob_size,
                                    const Limits& limits) {
  if (toc_offset >= blob_size) return InvalidArgument("TOC: its offset lies outside the blob");
  if (json.size() > limits.max_toc_bytes) {
    return ResourceExhausted("TOC: over the limit max_toc_bytes = " + std::to_string(limits.max_toc_bytes));
  }
  uint64_t count = CountEntries(json);
  if (count > limits.max_entries) {
    return ResourceExhausted("TOC: " + std::to_string(count) +
                             " entries, over the limit max_entries = " + std::to_string(limits.max_entries));
  }
  EntryBuilder builder(toc_offset, limits);
  builder.Reserve(count);
  TocReader reader(&builder);
  try {
    if (!Json::sax_parse(json.begin(), json.end(), &reader)) return reader.status();
  } catch (const std::exception& error) {
    return InvalidArgument(std::string("TOC: not readable as JSON: ") + error.what());
  }
  if (!reader.saw_entries()) return InvalidArgument("TOC: it has no \"entries\"");
  return builder.Finish();
}

}  // namespace holdfast::toc
