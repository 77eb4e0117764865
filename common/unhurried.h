// For work that nobody waits for, beside work that others wait for: an upgrade's copy of the worker, for
// one, is 70 MB of SHA-256, and on a small machine those who read noticed that more than the upgrade itself
// (docs/benchmarks.md). A lower priority does not help: between control groups, and between sessions
// (sched(7), autogroup), nice values mean nothing.
//
// So such work rests after each piece for as long as the piece took, and never has a processor for longer
// than one piece. Where it has to wait for its turn, a piece takes longer, and so does the rest. One thread.
#pragma once

#include <chrono>

namespace holdfast {

class Unhurried {
 public:
  // After each piece, however small: it rests when they add up to 0.2 ms, for 20 ms at most.
  void Rest();

 private:
  std::chrono::steady_clock::time_point begun_ = std::chrono::steady_clock::now();
};

}  // namespace holdfast
