#include <algorithm>

#include "worker/toc/entry_builder.h"

namespace holdfast::toc {
namespace {

// A fixed number of decimal digits at `at`; false if there are none.
bool Digits(std::string_view text, size_t at, size_t count, int64_t low, int64_t high, int64_t* value) {
  if (text.size() < at + count) return false;
  *value = 0;
  for (char c : text.substr(at, count)) {
    if (c < '0' || c > '9') return false;
    *value = *value * 10 + (c - '0');
  }
  return *value >= low && *value <= high;
}

int64_t DaysInMonth(int64_t year, int64_t month) {
  static constexpr std::array<int64_t, 12> kDays = {31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31};
  bool leap = (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
  return month == 2 && leap ? 29 : kDays[static_cast<size_t>(month - 1)];
}

// The last second whose nanoseconds fit 64 bits (2262-04-11). An ordinary unpack sets what is later to 0.
constexpr int64_t kMaxSeconds = 9'223'372'036;

// Days since 1970-01-01 in the proleptic Gregorian calendar; the year counts from March, so the leap day
// comes last.
int64_t DaysSinceEpoch(int64_t year, int64_t month, int64_t day) {
  year -= month <= 2 ? 1 : 0;
  int64_t era = (year >= 0 ? year : year - 399) / 400;
  int64_t year_of_era = year - era * 400;
  int64_t day_of_year = (153 * (month + (month > 2 ? -3 : 9)) + 2) / 5 + day - 1;
  return era * 146097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719468;
}

// "Z" or "+hh:mm": seconds east of UTC.
bool Zone(std::string_view text, int64_t* east) {
  *east = 0;
  if (text == "Z") return true;
  int64_t hours = 0, minutes = 0;
  if (text.size() != 6 || (text[0] != '+' && text[0] != '-') || text[3] != ':') return false;
  if (!Digits(text, 1, 2, 0, 23, &hours) || !Digits(text, 4, 2, 0, 59, &minutes)) return false;
  *east = (hours * 60 + minutes) * 60 * (text[0] == '-' ? -1 : 1);
  return true;
}

}  // namespace

absl::StatusOr<std::string> CleanName(std::string_view name, const Limits& limits) {
  if (name.find('\0') != std::string_view::npos) return InvalidArgument("its path holds a NUL");
  std::string clean;
  uint64_t depth = 0;
  while (!name.empty()) {
    size_t slash = std::min(name.find('/'), name.size());
    std::string_view part = name.substr(0, slash);
    name.remove_prefix(std::min(slash + 1, name.size()));
    if (part.empty() || part == ".") continue;
    if (part == "..") return InvalidArgument("its path holds \"..\"");
    if (part.size() > limits.max_name_bytes) {
      return ResourceExhausted("a name in its path is over the limit max_name_bytes = " +
                               std::to_string(limits.max_name_bytes));
    }
    if (++depth > limits.max_depth) {
      return ResourceExhausted("its path is over the limit max_depth = " + std::to_string(limits.max_depth));
    }
    if (!clean.empty()) clean += '/';
    clean += part;
  }
  if (clean.size() > limits.max_path_bytes) {
    return ResourceExhausted("its path is over the limit max_path_bytes = " +
                             std::to_string(limits.max_path_bytes));
  }
  return clean;
}

absl::Status ParseTime(std::string_view text, int64_t* seconds, uint32_t* nanos) {
  const absl::Status bad = InvalidArgument("its modtime is not RFC 3339");
  int64_t year = 0, month = 0, day = 0, hour = 0, minute = 0, second = 0;
  // "2006-01-02T15:04:05" and a zone at least.
  if (text.size() < 20 || text[4] != '-' || text[7] != '-' || text[10] != 'T' || text[13] != ':' ||
      text[16] != ':') {
    return bad;
  }
  if (!Digits(text, 0, 4, 0, 9999, &year) || !Digits(text, 5, 2, 1, 12, &month)) return bad;
  if (!Digits(text, 8, 2, 1, DaysInMonth(year, month), &day) || !Digits(text, 11, 2, 0, 23, &hour))
    return bad;
  if (!Digits(text, 14, 2, 0, 59, &minute) || !Digits(text, 17, 2, 0, 59, &second)) return bad;
  size_t at = 19;
  int64_t fraction = 0;
  if (text[at] == '.') {
    size_t begin = ++at;
    int64_t scale = 100'000'000;
    for (; at < text.size() && text[at] >= '0' && text[at] <= '9'; at++, scale /= 10) {
      fraction += (text[at] - '0') * scale;
    }
    if (at == begin) return bad;
  }
  int64_t east = 0;
  if (!Zone(text.substr(at), &east)) return bad;
  *seconds = DaysSinceEpoch(year, month, day) * 86400 + hour * 3600 + minute * 60 + second - east;
  *nanos = static_cast<uint32_t>(fraction);
  if (*seconds < 0 || *seconds > kMaxSeconds) {
    *seconds = 0;
    *nanos = 0;
  }
  return absl::OkStatus();
}

}  // namespace holdfast::toc
