// Go's interpreted string literals, as containerd writes them into filters.
#pragma once

#include <string>
#include <string_view>

#include "common/status.h"

namespace holdfast::snapshot {

// Reads the quoted string at the start of `text`; its first byte is the quote (", / or |). Escapes between ":
// \a \b \f \n \r \t \v
// \\ \", \ooo, \xhh, \uhhhh, \Uhhhhhhhh. Between / or | (expressions) only the quote is unescaped. `used`
// gets the bytes consumed, quotes included. InvalidArgument otherwise.
absl::StatusOr<std::string> UnquoteGoString(std::string_view text, size_t* used);

}  // namespace holdfast::snapshot
