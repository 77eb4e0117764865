#include "worker/snapshot/go_string.h"

#include <cstdint>

namespace holdfast::snapshot {
namespace {

int DigitValue(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return 99;
}

bool ReadNumber(std::string_view text, size_t at, size_t digits, int base, uint32_t* value) {
  if (text.size() - at < digits) return false;
  *value = 0;
  for (size_t i = 0; i < digits; i++) {
    int digit = DigitValue(text[at + i]);
    if (digit >= base) return false;
    *value = *value * static_cast<uint32_t>(base) + static_cast<uint32_t>(digit);
  }
  return true;
}

// False for values that are no character: surrogates and beyond U+10FFFF.
bool AppendUtf8(uint32_t code, std::string* out) {
  if (code > 0x10ffff || (code >= 0xd800 && code <= 0xdfff)) return false;
  auto put = [out](uint32_t byte) { out->push_back(static_cast<char>(byte)); };
  if (code < 0x80) {
    put(code);
  } else if (code < 0x800) {
    put(0xc0 | code >> 6);
    put(0x80 | (code & 0x3f));
  } else if (code < 0x10000) {
    put(0xe0 | code >> 12);
    put(0x80 | (code >> 6 & 0x3f));
    put(0x80 | (code & 0x3f));
  } else {
    put(0xf0 | code >> 18);
    put(0x80 | (code >> 12 & 0x3f));
    put(0x80 | (code >> 6 & 0x3f));
    put(0x80 | (code & 0x3f));
  }
  return true;
}

// `at` points behind the backslash. Returns the bytes consumed, 0 when it is no escape of Go's.
size_t ReadEscape(std::string_view text, size_t at, char quote, std::string* out) {
  static constexpr std::string_view kNames = "abfnrtv\\";
  static constexpr std::string_view kValues = "\a\b\f\n\r\t\v\\";
  char c = text[at];
  if (c == quote) return out->push_back(c), 1;
  if (size_t i = kNames.find(c); i != std::string_view::npos) return out->push_back(kValues[i]), 1;
  uint32_t value = 0;
  if (c == 'x' && ReadNumber(text, at + 1, 2, 16, &value)) return out->push_back(static_cast<char>(value)), 3;
  if (c == 'u' && ReadNumber(text, at + 1, 4, 16, &value) && AppendUtf8(value, out)) return 5;
  if (c == 'U' && ReadNumber(text, at + 1, 8, 16, &value) && AppendUtf8(value, out)) return 9;
  if (c >= '0' && c <= '7' && ReadNumber(text, at, 3, 8, &value) && value <= 255) {
    return out->push_back(static_cast<char>(value)), 3;
  }
  return 0;
}

}  // namespace

absl::StatusOr<std::string> UnquoteGoString(std::string_view text, size_t* used) {
  if (text.empty()) return InvalidArgument("expected a quote");
  const char quote = text[0];
  const bool verbatim = quote != '"';
  std::string out;
  size_t at = 1;
  while (at < text.size()) {
    char c = text[at];
    if (c == quote) {
      *used = at + 1;
      return out;
    }
    if (c == '\n') return InvalidArgument("line break in a quoted string");
    at++;
    if (c != '\\') {
      out.push_back(c);
      continue;
    }
    if (at >= text.size()) break;
    if (verbatim) {
      if (text[at] != quote) out.push_back('\\');
      out.push_back(text[at++]);
      continue;
    }
    size_t consumed = ReadEscape(text, at, quote, &out);
    if (consumed == 0) return InvalidArgument("unknown escape in a quoted string");
    at += consumed;
  }
  return InvalidArgument("quoted string is not closed");
}

}  // namespace holdfast::snapshot
