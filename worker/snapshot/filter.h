// containerd's filter language (List requests): selectors joined by ',' must all match; filters in a list are
// alternatives.
//
//   filter   := selector ("," selector)*          selector := fieldpath (operator value)?
//   fieldpath := field ("." field)*               field    := quoted | [A-Za-z0-9_]+
//   operator := "==" | "!=" | "~="                value    := quoted | characters up to a space or ','
//   quoted   := a Go string "..."; after "~=" also /.../ or |...|
//
// Fields: name, parent, kind (active, view, committed), labels.<key>. An unknown field is absent, which is no
// error. Input is untrusted; expressions run on RE2 (linear time, bounded memory). Immutable after Parse, so
// thread-safe.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "common/status.h"
#include "worker/metadata/metadata.h"

namespace holdfast::snapshot {

class Filter {
 public:
  virtual ~Filter() = default;
  virtual bool Matches(const metadata::SnapshotRow& row) const = 0;

  // An empty text matches everything. InvalidArgument says where the text is wrong.
  static absl::StatusOr<std::unique_ptr<Filter>> Parse(std::string_view text);
  // True when a row matches one of them; no filters match everything.
  static absl::StatusOr<std::unique_ptr<Filter>> ParseAny(const std::vector<std::string>& texts);
};

}  // namespace holdfast::snapshot
