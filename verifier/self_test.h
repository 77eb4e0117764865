// Does a worker build start here? Its --self-test touches nothing.
#pragma once

#include <cstdint>
#include <string>

namespace holdfast::verifier {

inline constexpr uint64_t kSelfTestMillis = 5'000;

struct SelfTestResult {
  bool passed = false;
  std::string output;  // what it printed, else what went wrong
};

// Blocks until it ends, at most until the deadline: then it is killed. What it started ends with it.
// `executable`: a program, opened.
SelfTestResult RunSelfTest(int executable, uint64_t deadline_ms = kSelfTestMillis);

}  // namespace holdfast::verifier
