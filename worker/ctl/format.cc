#include "worker/ctl/format.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <string_view>
#include <utility>

namespace holdfast::ctl {
namespace {

// Two significant digits below 10, else whole numbers.
std::string Scaled(double value, const char* unit) {
  char text[64];
  snprintf(text, sizeof text, value < 9.95 ? "%.1f %s" : "%.0f %s", value, unit);
  return text;
}

// Width in characters, not bytes: UTF-8 continuation bytes take no column.
size_t Width(const std::string& text) {
  size_t width = 0;
  for (char c : text) width += (static_cast<unsigned char>(c) & 0xc0) != 0x80;
  return width;
}

}  // namespace

std::string HumanBytes(uint64_t bytes) {
  static constexpr std::array<const char*, 6> kUnits = {"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  if (bytes < 1024) return std::to_string(bytes) + " B";
  double value = static_cast<double>(bytes) / 1024;
  size_t unit = 0;
  while (value >= 1023.5 && unit + 1 < kUnits.size()) {
    value /= 1024;
    unit++;
  }
  return Scaled(value, kUnits[unit]);
}

std::string HumanDuration(uint64_t nanos) {
  const double value = static_cast<double>(nanos);
  if (nanos < 1'000) return std::to_string(nanos) + " ns";
  if (nanos < 1'000'000) return Scaled(value / 1e3, "us");
  if (nanos < 1'000'000'000) return Scaled(value / 1e6, "ms");
  if (nanos < 120'000'000'000) return Scaled(value / 1e9, "s");
  if (nanos < 7'200'000'000'000) return Scaled(value / 60e9, "min");
  if (nanos < 172'800'000'000'000) return Scaled(value / 3600e9, "h");
  return Scaled(value / 86400e9, "d");
}

std::string HumanAge(int64_t then_wall_nanos, int64_t now_wall_nanos) {
  if (then_wall_nanos == 0) return "never";
  if (then_wall_nanos >= now_wall_nanos) return "now";
  return HumanDuration(static_cast<uint64_t>(now_wall_nanos - then_wall_nanos));
}

std::string HumanHourAge(int64_t hour_wall_nanos, int64_t now_wall_nanos) {
  if (hour_wall_nanos == 0) return "never";
  const int64_t hours = std::max<int64_t>(now_wall_nanos - hour_wall_nanos, 0) / kHourNanos;
  if (hours < 2) return "< " + std::to_string(hours + 1) + " h ago";
  return hours < 48 ? std::to_string(hours) + " h ago" : std::to_string(hours / 24) + " d ago";
}

std::string Count(uint64_t number, const char* noun) {
  if (number == 1) return "1 " + std::string(noun);
  return std::to_string(number) + " " + noun + (std::string_view(noun) == "crash" ? "es" : "s");
}

std::string Percent(uint64_t part, uint64_t whole) {
  if (whole == 0) return "-";
  char text[32];
  snprintf(text, sizeof text, "%.0f %%",
           100.0 * static_cast<double>(std::min(part, whole)) / static_cast<double>(whole));
  return text;
}

std::string OpcodeName(uint32_t opcode) {
  // include/uapi/linux/fuse.h, enum fuse_opcode: what a read-only mount can see.
  static constexpr std::array<std::pair<uint32_t, const char*>, 18> kNames = {{{1, "LOOKUP"},
                                                                               {2, "FORGET"},
                                                                               {3, "GETATTR"},
                                                                               {5, "READLINK"},
                                                                               {14, "OPEN"},
                                                                               {15, "READ"},
                                                                               {17, "STATFS"},
                                                                               {18, "RELEASE"},
                                                                               {22, "GETXATTR"},
                                                                               {23, "LISTXATTR"},
                                                                               {25, "FLUSH"},
                                                                               {27, "OPENDIR"},
                                                                               {28, "READDIR"},
                                                                               {29, "RELEASEDIR"},
                                                                               {34, "ACCESS"},
                                                                               {36, "INTERRUPT"},
                                                                               {42, "BATCH_FORGET"},
                                                                               {44, "READDIRPLUS"}}};
  for (const auto& [number, name] : kNames) {
    if (number == opcode) return name;
  }
  return "opcode " + std::to_string(opcode);
}

void Table::Add(std::vector<std::string> cells) {
  cells.resize(columns_.size());
  rows_.push_back(std::move(cells));
}

std::string Table::ToString() const {
  std::vector<size_t> widths;
  for (const Column& column : columns_) widths.push_back(Width(column.title));
  for (const auto& row : rows_) {
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], Width(row[i]));
  }
  std::string out;
  auto add_line = [&](auto&& cell_of) {
    std::string line;
    for (size_t i = 0; i < columns_.size(); ++i) {
      const std::string& cell = cell_of(i);
      const std::string padding(widths[i] - Width(cell), ' ');
      if (i > 0) line += "  ";
      line += columns_[i].right ? padding + cell : cell + padding;
    }
    line.erase(line.find_last_not_of(' ') + 1);
    out += line + "\n";
  };
  add_line([&](size_t i) -> const std::string& { return columns_[i].title; });
  for (const auto& row : rows_) add_line([&](size_t i) -> const std::string& { return row[i]; });
  return out;
}

}  // namespace holdfast::ctl
