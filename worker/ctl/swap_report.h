// What `upgrade` and `rollback` print: each step as it happens, the result, and for one that failed what to
// do. Pure functions, tested with golden texts.
#pragma once

#include <string>
#include <vector>

#include "worker/ctl/control_client.h"

namespace holdfast::ctl {

// The steps of a swap as they are told, in order.
struct StepLog {
  std::vector<SwapStep> steps;
  bool last_ended = true;

  void Add(const SwapStep& step, bool done);
  // The step that began and did not end; empty when there is none.
  std::string Unfinished() const { return last_ended || steps.empty() ? "" : steps.back().name; }
};

struct SwapFailure {
  std::string command;  // "upgrade" or "rollback"
  std::string message;  // the supervisor's
  std::string step;     // that failed; empty: refused before the first
  std::string worker;   // path of the executable; empty: the installed one
  std::string verdict;  // of the executable when it was tried by hand; empty: it was not
};

// "prepare     12 ms  3 mounts"
std::string StepText(const SwapStep& step);
std::string FailedStepText(const std::string& step);
std::string UpgradeText(const UpgradeResult& result);
std::string UpgradeJson(const UpgradeResult& result);
std::string RollbackText(const SwapStatus& swap);
std::string RollbackJson(const SwapStatus& swap);
// What it means and what to do, one or a few lines.
std::string SwapAdvice(const SwapFailure& failure);
std::string SwapFailureJson(const SwapFailure& failure, const StepLog& log, const std::string& advice);

}  // namespace holdfast::ctl
