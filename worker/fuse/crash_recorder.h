// What a dying worker leaves behind for its successor: which fatal signal, and which slot the thread was
// executing. The handlers touch only atomics in the ledger and system calls (async-signal-safe).
#pragma once

#include <csignal>
#include <vector>

#include "worker/fuse/ledger_view.h"

namespace holdfast::fuse {

// The handlers must run even when the thread's own stack is used up: for each thread that executes requests.
class AlternateStack {
 public:
  AlternateStack();
  ~AlternateStack();
  AlternateStack(const AlternateStack&) = delete;
  AlternateStack& operator=(const AlternateStack&) = delete;

 private:
  std::vector<char> memory_;
  stack_t before_{};
};

// Handlers for SIGSEGV, SIGBUS, SIGABRT, SIGILL and SIGFPE; afterwards the process dies as it would have
// without them.
void RecordCrashesIn(const LedgerView& ledger);
// The ledger is about to be unmapped: from now on its handlers record nothing.
void UninstallCrashRecorder(const LedgerView& ledger);

}  // namespace holdfast::fuse
