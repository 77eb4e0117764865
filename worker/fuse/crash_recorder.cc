#include "worker/fuse/crash_recorder.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <csignal>
#include <cstring>

#include "worker/fuse/exchange.h"

namespace holdfast::fuse {
namespace {

constexpr int kFatal[] = {SIGSEGV, SIGBUS, SIGABRT, SIGILL, SIGFPE};
constexpr size_t kFatalCount = sizeof kFatal / sizeof kFatal[0];

// A signal handler can reach nothing but statics.
std::atomic<hf_ledger_header*> crash_header{nullptr};
struct sigaction actions_before[kFatalCount];

void Record(int signal) {
  hf_ledger_header* header = crash_header.load();
  if (header == nullptr) return;
  Exchange* x = CurrentExchange();
  // Only this request is a suspect. An adopted one lies in two ledgers, and a successor may come upon either.
  if (x != nullptr) {
    for (uint32_t* strikes : x->strikes) {
      if (strikes != nullptr) Shared(*strikes).fetch_add(1);
    }
  }
  uint32_t none = 0;
  if (!Shared(header->exit_signal).compare_exchange_strong(none, static_cast<uint32_t>(signal))) return;
  Shared(header->exit_slot).store(x == nullptr ? 0 : x->own_slot);
  Shared(header->exit_cause).store(HF_EXIT_FATAL_SIGNAL, std::memory_order_release);
}

void OnFatal(int signal, siginfo_t*, void*) {
  Record(signal);
  for (size_t i = 0; i < kFatalCount; i++) {
    if (kFatal[i] == signal) sigaction(signal, &actions_before[i], nullptr);
  }
  // Pending until this handler returns; a fault would come again by itself, a signal that was sent would not.
  syscall(SYS_tgkill, getpid(), syscall(SYS_gettid), signal);
}

}  // namespace

AlternateStack::AlternateStack() : memory_(64 * 1024) {
  stack_t stack{};
  stack.ss_sp = memory_.data();
  stack.ss_size = memory_.size();
  sigaltstack(&stack, &before_);
}

AlternateStack::~AlternateStack() { sigaltstack(&before_, nullptr); }

void RecordCrashesIn(const LedgerView& ledger) {
  if (crash_header.exchange(ledger.header()) != nullptr) return;
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = OnFatal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&action.sa_mask);
  for (size_t i = 0; i < kFatalCount; i++) sigaction(kFatal[i], &action, &actions_before[i]);
}

void UninstallCrashRecorder(const LedgerView& ledger) {
  hf_ledger_header* mine = ledger.header();
  if (!crash_header.compare_exchange_strong(mine, nullptr)) return;
  for (size_t i = 0; i < kFatalCount; i++) sigaction(kFatal[i], &actions_before[i], nullptr);
}

}  // namespace holdfast::fuse
