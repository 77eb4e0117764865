// What a dying worker leaves behind for its successor: which fatal signal, and which slot the thread was
// executing. The handlers touch only atomics in the ledger and system calls (async-signal-safe).
#pragma once

#include "worker/fuse/ledger_view.h"

namespace holdfast::fuse {

// Handlers for SIGSEGV, SIGBUS, SIGABRT, SIGILL and SIGFPE; afterwards the process dies as it would have
// without them.
void RecordCrashesIn(const LedgerView& ledger);
// The ledger is about to be unmapped: from now on its handlers record nothing.
void UninstallCrashRecorder(const LedgerView& ledger);

}  // namespace holdfast::fuse
