// A thread of a dying worker that takes a last request from the kernel: with the worker's own descriptors,
// into the worker's own ledger, as schema/ledger.h says, while the worker cannot end (HeldExit).
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "common/io.h"
#include "common/status.h"
#include "schema/ledger_map.h"
#include "worker/ctl/control_client.h"

namespace holdfast::test {

class DyingThread {
 public:
  // `mounts` are those it may take from, with their folders.
  static absl::StatusOr<DyingThread> Of(pid_t pid, uint64_t generation,
                                        const std::vector<ctl::MountInfo>& mounts);
  // Takes the next request that expects an answer. Stop whoever else reads, or it comes first.
  absl::Status TakeOne(int seconds);
  // It lies there still.
  bool Unanswered() const;
  std::string what() const { return what_; }

 private:
  explicit DyingThread(LedgerMap ledger) : ledger_(std::move(ledger)) {}
  std::vector<std::pair<uint64_t, UniqueFd>> devices_;  // mount id, /dev/fuse
  LedgerMap ledger_;
  hf_slot* slot_ = nullptr;  // that it is in
  std::string what_;
};

}  // namespace holdfast::test
