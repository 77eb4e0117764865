#include "worker/ctl/swap_report.h"

#include <cstdio>
#include <string_view>

#include "worker/ctl/format.h"

namespace holdfast::ctl {
namespace {

std::string Line(const std::string& name, const std::string& value) {
  char padded[32];
  snprintf(padded, sizeof padded, "%-12s", name.c_str());
  return std::string(padded) + value + "\n";
}

std::string OrDash(const std::string& text) { return text.empty() ? "-" : text; }

bool Has(const std::string& text, std::string_view part) { return text.find(part) != std::string::npos; }

std::string ResultText(const std::string& command, const SwapStatus& swap) {
  std::string out = Line(command, swap.result);
  out += Line("build", OrDash(swap.from_build) + " -> " + OrDash(swap.to_build));
  out += Line("pause", HumanDuration(swap.pause_nanos) + ", for which reads waited");
  out += Line("carried", Count(swap.requests_carried_over, "request") +
                             " unanswered by the old worker, answered by the new one");
  return out;
}

// Before anything of the running worker was touched.
std::string RefusedAdvice(const SwapFailure& failure) {
  if (Has(failure.message, "under way")) {
    return "another swap is under way and goes on; `holdfastctl status` shows its step. Try again when it is "
           "over";
  }
  if (Has(failure.message, "taking over") || Has(failure.message, "being replaced")) {
    return "a worker is just being started; `holdfastctl status` shows when one runs. Try again then";
  }
  if (Has(failure.message, "being taken back")) {
    return "nothing was changed. It takes some seconds, three minutes at most; try again then";
  }
  if (Has(failure.message, "probation")) {
    return "the running build is still in probation; `holdfastctl status` says for how long. Wait until it "
           "is over, or "
           "go back with `holdfastctl rollback`";
  }
  if (Has(failure.message, "shutting down")) return "start the supervisor first: systemctl start holdfast";
  if (failure.command == "rollback") {
    return "nothing was changed. Without an earlier build on this node, install one and swap to it: "
           "holdfastctl upgrade "
           "--worker PATH";
  }
  return "nothing was changed. The file must be a holdfast-worker for this machine that root may read and "
         "execute, and "
         "the state folder needs room for a copy of it";
}

std::string StartAdvice(const SwapFailure& failure) {
  std::string out =
      "the new worker died, or did not register, while it started; the old one serves on and was not touched";
  if (!failure.verdict.empty()) out += "\n  tried by hand: " + failure.verdict;
  return out + "\n  its log lines: journalctl -u holdfast (or the supervisor's standard error)";
}

// Where the reason says that nobody has found a fault with the build; else "".
std::string NotJudgedAdvice(const SwapFailure& failure) {
  if (Has(failure.message, "the running worker died")) {
    return "no fault was found with this build: the running worker died meanwhile, and is replaced. "
           "`holdfastctl status` shows by what; try again. If it dies each time: `holdfastctl rollback` "
           "leaves it without asking it";
  }
  if (Has(failure.message, "No space left on device")) {
    return "no fault was found with this build: the disk of the state folder is full. The old worker serves\n"
           "  make room and try again";
  }
  if (Has(failure.message, "verifier") || Has(failure.message, "Connection reset")) {
    return "no fault was found with this build: the verifier did not work, so nothing could be said of it. "
           "The old "
           "worker serves\n"
           "  see that holdfast-verifier is installed beside holdfast-supervisor (or where --verifier says), "
           "then "
           "try again";
  }
  if (Has(failure.message, "took too long") || Has(failure.message, "did not answer within")) {
    return "no wrong answer was seen, but it was not judged to the end. The old worker serves\n"
           "  try again when the machine is less busy; if it happens again, look for its log lines: "
           "journalctl -u "
           "holdfast";
  }
  return "";
}

// Once the old worker was told to stop reading.
std::string NewWorkerDiedAdvice() {
  return "rolled back: the new worker died or hung (see above); `holdfastctl status` shows who serves\n"
         "  do not use this build before its log lines are explained: journalctl -u holdfast\n"
         "  if it hung: what its threads did is in supervisor/hangs of the state folder";
}

}  // namespace

void StepLog::Add(const SwapStep& step, bool done) {
  if (done && !last_ended && !steps.empty() && steps.back().name == step.name) {
    steps.back() = step;
  } else {
    steps.push_back(step);
  }
  last_ended = done;
}

std::string StepText(const SwapStep& step) {
  char text[64];
  snprintf(text, sizeof text, "  %-11s %8s", step.name.c_str(), HumanDuration(step.nanos).c_str());
  return text + (step.detail.empty() ? "" : "  " + step.detail) + "\n";
}

std::string FailedStepText(const std::string& step) {
  char text[64];
  snprintf(text, sizeof text, "  %-11s   FAILED\n", step.c_str());
  return text;
}

std::string UpgradeText(const UpgradeResult& result) {
  if (!result.changed) {
    return "nothing to do: that build already runs (--reexec swaps to it all the same, for new libraries or "
           "a changed "
           "configuration)\n";
  }
  return ResultText("upgrade", result.swap);
}

std::string RollbackText(const SwapStatus& swap) { return ResultText("rollback", swap); }

std::string SwapAdvice(const SwapFailure& failure) {
  const std::string& step = failure.step;
  if (Has(failure.message, "is shutting down")) {
    return "no fault was found with this build: holdfast was being ended. Nothing serves any more";
  }
  if (Has(failure.message, "could not be taken back")) {
    return "the kernel may still hold what that worker had answered; `holdfastctl status` shows who serves\n"
           "  restart the containers that read from lazily pulled layers, when it suits";
  }
  if (step.empty() || step == "copy") return RefusedAdvice(failure);
  if (step == "start") return StartAdvice(failure);
  if (step == "prepare") {
    return "the new worker could not load what this node serves; the old one serves on and was not touched\n"
           "  do not use this build before its log lines are explained: journalctl -u holdfast";
  }
  if (step == "rehearse" || step == "probe") {
    if (std::string advice = NotJudgedAdvice(failure); !advice.empty()) return advice;
  }
  if (step == "rehearse" && failure.command == "rollback") {
    return "the build to go back to does not answer. No container saw it; the running one serves on\n"
           "  another one: `holdfastctl upgrade --worker PATH`";
  }
  if (step == "rehearse") {
    return "a bad build: it does not answer as the running one does. No container saw it; the old one serves "
           "on\n"
           "  do not use it; keep the message above for a bug report. If it is the running build that "
           "answers\n"
           "  wrongly: `holdfastctl rollback` leaves it without asking it";
  }
  const bool handing_over = step == "park" || step == "yield" || step == "await-exit" || step == "commit";
  if (handing_over && Has(failure.message, "the new worker died")) return NewWorkerDiedAdvice();
  if (step == "serve" || step == "probe") {
    return "rolled back: the new worker failed under the live mounts. `holdfastctl status` shows which build "
           "serves; what the new one had answered was forgotten, what it had stored is verified once more\n"
           "  do not use this build before its log lines are explained: journalctl -u holdfast";
  }
  if (step == "await-exit" || step == "commit") {
    return "rolled back: the new worker could not take the metadata, e.g. because the disk is full. "
           "`holdfastctl status` "
           "shows who serves; the journal says what it could not do";
  }
  return "see `holdfastctl status` for who serves now, and journalctl -u holdfast for why";
}

}  // namespace holdfast::ctl
