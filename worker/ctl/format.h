// How holdfastctl shows numbers and tables to people. Pure functions.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace holdfast::ctl {

inline constexpr int64_t kHourNanos = 3'600'000'000'000;

std::string HumanBytes(uint64_t bytes);     // "0 B", "1.5 KiB", "12 GiB"
std::string HumanDuration(uint64_t nanos);  // "850 ns", "1.2 ms", "12 s", "3 min", "5.0 h", "12 d"
// Time since `then`, both wall clock nanoseconds; "never" for 0, "now" for the future.
std::string HumanAge(int64_t then_wall_nanos, int64_t now_wall_nanos);
// The same of a time that is known to its hour: `hour` is when that began, so it may be up to an hour less.
std::string HumanHourAge(int64_t hour_wall_nanos, int64_t now_wall_nanos);
std::string Count(uint64_t number, const char* noun);  // "1 request", "12 requests", "2 crashes"
// "37 %", "-" of nothing; never above 100, though what is on disk comes in whole blocks.
std::string Percent(uint64_t part, uint64_t whole);
// The name of a FUSE opcode, or its number.
std::string OpcodeName(uint32_t opcode);

// Columns as wide as their widest cell, two spaces apart; numbers are right-aligned by saying so. No trailing
// spaces.
class Table {
 public:
  struct Column {
    std::string title;
    bool right = false;
  };
  explicit Table(std::vector<Column> columns) : columns_(std::move(columns)) {}
  void Add(std::vector<std::string> cells);
  bool empty() const { return rows_.empty(); }
  std::string ToString() const;

 private:
  std::vector<Column> columns_;
  std::vector<std::vector<std::string>> rows_;
};

}  // namespace holdfast::ctl
