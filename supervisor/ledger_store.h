// The request ledgers (schema/ledger.h): made here, one a generation, sealed against resizing, kept until nothing
// unanswered is in them and their owner's exit is proven. What workers write there is read as numbers only, never as an index.
//
// Used on the main thread only.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "common/io.h"
#include "common/status.h"
#include "schema/ledger.h"
#include "supervisor/vault.h"

namespace holdfast::supervisor {

struct Pipe {
  SharedFd read_end;
  SharedFd write_end;
};

class Ledger {
 public:
  static absl::StatusOr<std::unique_ptr<Ledger>> Create(uint64_t generation);
  ~Ledger();
  Ledger(const Ledger&) = delete;
  Ledger& operator=(const Ledger&) = delete;

  uint64_t generation() const { return generation_; }
  const SharedFd& memory() const { return memory_; }
  const std::vector<Pipe>& pipes() const { return pipes_; }  // one a slot, O_NONBLOCK

  // Requests that a successor would have to answer now.
  uint64_t CountUnanswered() const;
  uint64_t received() const;
  uint64_t answered() const;

  bool owner_exited = false;

 private:
  Ledger(uint64_t generation, SharedFd memory, char* base)
      : generation_(generation), memory_(std::move(memory)), base_(base) {}
  bool SlotIsUnanswered(uint32_t index) const;

  const uint64_t generation_;
  const SharedFd memory_;
  char* const base_;
  std::vector<Pipe> pipes_;
};

class LedgerStore {
 public:
  absl::StatusOr<Ledger*> Create(uint64_t generation);
  Ledger* Find(uint64_t generation) const;  // null when unknown or dropped
  // With generation > after, but not `except`, in order; at most `limit`.
  std::vector<Ledger*> Page(uint64_t after, uint64_t except, size_t limit, bool* more) const;

  void OwnerExited(uint64_t generation);
  // A worker says that nothing unanswered is left there. Before the owner's exit is proven that may become untrue again.
  void Drained(uint64_t generation);
  uint64_t CountUnanswered(uint64_t except) const;

 private:
  std::map<uint64_t, std::unique_ptr<Ledger>> ledgers_;
};

}  // namespace holdfast::supervisor
