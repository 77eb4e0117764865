#include "common/unhurried.h"

#include <algorithm>
#include <thread>

namespace holdfast {
namespace {

constexpr std::chrono::steady_clock::duration kPiece = std::chrono::microseconds(200);
constexpr std::chrono::steady_clock::duration kLongestRest = std::chrono::milliseconds(20);

}  // namespace

void Unhurried::Rest() {
  const auto took = std::chrono::steady_clock::now() - begun_;
  if (took < kPiece) return;
  std::this_thread::sleep_for(std::min(took, kLongestRest));
  begun_ = std::chrono::steady_clock::now();
}

}  // namespace holdfast
