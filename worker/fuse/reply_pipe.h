// Sends replies to /dev/fuse through a private pipe: first everything goes into the pipe, then one splice
// hands it to the kernel. No user page is touched while the kernel holds a request half-answered, so a kill
// at any instruction turns no request into EIO (reference: handover pitfalls 1). File content goes from the
// page cache to the kernel without a copy.
//
// Thread safety: none; one thread at a time uses a ReplyPipe.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "common/fault.h"
#include "common/io.h"
#include "common/status.h"
#include "worker/layer/layer.h"

namespace holdfast::fuse {

enum class SendResult {
  kSent,     // answered, or the kernel no longer waits for it (ENOENT, connection gone)
  kDamaged,  // the content file is shorter than its index says or cannot be read; nothing was sent
};

// Where a reply goes: to the kernel or, of a replayed request, into a string.
struct ReplyTarget {
  ReplyTarget(int device_fd, std::string* capture_into = nullptr)  // NOLINT: a descriptor is a target
      : device(device_fd), capture(capture_into) {}
  int device;
  std::string* capture;
};

// The bytes of `content` as one piece; false when they are not all there.
bool CopyContent(const layer::ReadResult& content, char* out);

class ReplyPipe {
 public:
  explicit ReplyPipe(FaultPoints* faults) : faults_(faults) {}

  // Sends a reply that lies in memory; the first 16 bytes are a fuse_out_header with its length set.
  void SendMemory(const ReplyTarget& to, const iovec* parts, int count);
  // A reply that is only a header. `error` is an errno or 0.
  void SendError(const ReplyTarget& to, uint64_t unique, int error);
  // Answers a READ.
  SendResult SendContent(const ReplyTarget& to, uint64_t unique, const layer::ReadResult& content);

 private:
  bool EnsurePipe();
  // All bytes of the parts into the pipe; false leaves an unknown rest in it.
  bool Fill(const iovec* parts, int count, uint64_t total);
  bool FillSegment(const layer::ReadResult::Segment& segment, bool* damaged);
  // Splices `total` bytes from the pipe to the kernel (or reads them into the string).
  void SpliceOut(const ReplyTarget& to, uint64_t total);
  SendResult SendCopied(const ReplyTarget& to, uint64_t unique, const layer::ReadResult& content);

  FaultPoints* const faults_;
  UniqueFd read_end_, write_end_;
  uint64_t capacity_pages_ = 0;
  std::vector<char> copy_;
};

}  // namespace holdfast::fuse
