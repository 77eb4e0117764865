// What a thread knows about the request that it executes. libfuse hands its callbacks only a session, and one
// session serves all mounts, so the thread carries the rest (DESIGN 4.2).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "schema/ledger.h"
#include "worker/fuse/mount.h"
#include "worker/fuse/reply_pipe.h"

namespace holdfast::fuse {

class ServerCore;

// Where the answer of a replayed request goes instead of to the kernel.
struct Capture {
  std::string reply;
  bool not_on_disk = false;  // it has no answer without the network
};

struct Exchange {
  ServerCore* core = nullptr;
  Mount* mount = nullptr;  // null: nothing is sent (the replayed INIT)
  std::shared_ptr<layer::Layer> layer;
  ReplyPipe* pipe = nullptr;
  uint64_t unique = 0;
  uint32_t opcode = 0;
  // Words of the ledgers that count how often this request has ended a worker: where it lies and, of an
  // adopted one, where it was adopted from. The crash recorder raises them.
  uint32_t* strikes[2] = {nullptr, nullptr};
  uint32_t own_slot = 0;       // index + 1 in the own ledger; 0 for a record
  Capture* capture = nullptr;  // set: a replay, the kernel hears nothing of it
  bool adopted = false;
  std::optional<uint64_t> waits;  // a record was made for it: fetch once the slot is free

  ReplyTarget target() const { return {mount->device(), capture == nullptr ? nullptr : &capture->reply}; }
};

// The exchange of this thread, or null. Async-signal-safe.
Exchange* CurrentExchange();

class ExchangeScope {
 public:
  explicit ExchangeScope(Exchange* exchange);
  ~ExchangeScope();
  ExchangeScope(const ExchangeScope&) = delete;
  ExchangeScope& operator=(const ExchangeScope&) = delete;

 private:
  Exchange* const before_;
};

}  // namespace holdfast::fuse
