// Reads request ledgers (schema/ledger.h) for `holdfastctl inflight`, from a read-only mapping: works when
// the worker is dead or wedged. Words change while they are read; what is shown is a moment's picture.
#pragma once

#include <cstdint>
#include <vector>

#include "common/status.h"

namespace holdfast::ctl {

struct InflightRequest {
  uint64_t ledger_generation = 0;  // whose ledger holds it
  uint64_t owner_generation = 0;   // who is to answer it
  bool executing = false;          // in a receive slot; else a READ that waits for content
  uint64_t mount_id = 0, unique = 0, nodeid = 0, offset = 0;
  uint32_t opcode = 0, size = 0;
  uint64_t age_nanos = 0;   // slots: since it was received
  uint64_t left_nanos = 0;  // records: until it is answered EIO
  bool interrupted = false;
};

// DataLoss when it is no version 1 ledger or its header does not fit the size.
absl::StatusOr<std::vector<InflightRequest>> ReadLedgerFd(int ledger, uint64_t now_boot_nanos);

}  // namespace holdfast::ctl
