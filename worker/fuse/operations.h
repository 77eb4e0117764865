// The file system that a layer is: libfuse's low-level operations, answered from a LayerIndex. Read-only, no
// lookup counts, generation 0, nodeids from the index.
//
// One libfuse session serves all mounts (libfuse has at most some 1,000 a process): the callbacks learn from
// the thread's Exchange which mount is meant, and the session's writev sends there. The session reads nothing
// itself.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>

#include "common/status.h"

struct fuse_session;

namespace holdfast::fuse {

class FuseSession {
 public:
  // `init_request` is what the kernel sent when some mount was made; the reply that libfuse gives to it is
  // swallowed (the supervisor has answered long ago).
  static absl::StatusOr<std::unique_ptr<FuseSession>> Create(std::string_view init_request);
  ~FuseSession();
  FuseSession(const FuseSession&) = delete;
  FuseSession& operator=(const FuseSession&) = delete;

  // Executes one request for the thread's Exchange. Thread-safe. The bytes after `length` must hold a zero.
  void Process(const uint8_t* request, uint32_t length);

 private:
  FuseSession() = default;
  fuse_session* session_ = nullptr;
  bool initialized_ = false;  // libfuse has understood the INIT; without it, it answers everything EIO
};

}  // namespace holdfast::fuse
