#include "worker/fuse/reply_pipe.h"

#include <fcntl.h>
#include <linux/fuse.h>
#include <sys/ioctl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "glog/logging.h"

namespace holdfast::fuse {
namespace {

using Segment = layer::ReadResult::Segment;

constexpr uint64_t kPage = 4096;
constexpr int kWantedPipeBytes =
    2 << 20;  // the largest READ (1 MiB), its header and unaligned ends; a power of two
constexpr int kAllowedPipeBytes = 1 << 20;  // fs.pipe-max-size unless changed: enough for all but the largest
constexpr size_t kZeroBytes = 16384;
const char kZeros[kZeroBytes] = {};

uint64_t PagesOf(uint64_t begin, uint64_t length) { return (begin % kPage + length + kPage - 1) / kPage; }

// How many pipe buffers (pages) a reply takes at most.
uint64_t PagesFor(const layer::ReadResult& content) {
  uint64_t pages = 1;
  for (const Segment& s : content.segments)
    pages += s.file ? PagesOf(s.file_offset, s.length) : s.length / kPage + 2;
  return pages;
}

fuse_out_header Header(uint64_t unique, int error, uint64_t payload) {
  fuse_out_header header{};
  header.len = static_cast<uint32_t>(sizeof header + payload);
  header.error = -error;
  header.unique = unique;
  return header;
}

// Errors after which nobody waits for the reply any more: interrupted or answered by another generation,
// unmounted, aborted.
bool NobodyWaits(int error) {
  return error == ENOENT || error == ENODEV || error == ECONNABORTED || error == ENOTCONN;
}

uint64_t Total(const iovec* parts, int count) {
  uint64_t total = 0;
  for (int i = 0; i < count; i++) total += parts[i].iov_len;
  return total;
}

bool CopySegment(const Segment& segment, char* out) {
  if (segment.file) {
    return PreadFull(segment.file->data.get(), out, segment.length, segment.file_offset).ok();
  }
  if (segment.memory) {
    if (segment.memory_offset > segment.memory->size() ||
        segment.length > segment.memory->size() - segment.memory_offset) {
      return false;
    }
    memcpy(out, segment.memory->data() + segment.memory_offset, segment.length);
  } else {
    memset(out, 0, segment.length);
  }
  return true;
}

// Last resort where no pipe of the size can be had: the kernel copies from this process's pages.
void WriteDirectly(const ReplyTarget& to, const iovec* parts, int count) {
  if (to.capture != nullptr) {
    for (int i = 0; i < count; i++) {
      to.capture->append(static_cast<const char*>(parts[i].iov_base), parts[i].iov_len);
    }
    return;
  }
  ssize_t n;
  do {
    n = writev(to.device, parts, count);
  } while (n < 0 && errno == EINTR);
  int error = n < 0 ? errno : 0;
  if (error != 0 && !NobodyWaits(error)) {
    LOG_EVERY_T(ERROR, 1) << "fuse.reply_failed errno=" << error;
  }
}

}  // namespace

bool CopyContent(const layer::ReadResult& content, char* out) {
  uint64_t at = 0;
  for (const Segment& s : content.segments) {
    if (s.length > content.length - at || !CopySegment(s, out + at)) return false;
    at += s.length;
  }
  return at == content.length;
}

bool ReplyPipe::EnsurePipe() {
  if (read_end_.valid()) return true;
  int ends[2];
  if (pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0) return false;
  read_end_.Reset(ends[0]);
  write_end_.Reset(ends[1]);
  int size = fcntl(write_end_.get(), F_SETPIPE_SZ, kWantedPipeBytes);
  if (size < 0) size = fcntl(write_end_.get(), F_SETPIPE_SZ, kAllowedPipeBytes);
  if (size < 0) size = fcntl(write_end_.get(), F_GETPIPE_SZ);
  capacity_pages_ = size > 0 ? static_cast<uint64_t>(size) / kPage : 0;
  return true;
}

bool ReplyPipe::Fill(const iovec* parts, int count, uint64_t total) {
  ssize_t n;
  do {
    n = writev(write_end_.get(), parts, count);
  } while (n < 0 && errno == EINTR);
  return n >= 0 && static_cast<uint64_t>(n) == total;
}

void ReplyPipe::SpliceOut(const ReplyTarget& to, uint64_t total) {
  ssize_t n;
  int left = 0;
  if (to.capture != nullptr) {
    size_t at = to.capture->size();
    to.capture->resize(at + total);
    for (uint64_t done = 0; done < total;) {
      n = read(read_end_.get(), to.capture->data() + at + done, total - done);
      PCHECK(n > 0 || (n < 0 && errno == EINTR)) << "a reply pipe gave less than went in";
      if (n > 0) done += static_cast<uint64_t>(n);
    }
    return;
  }
  (void)PassFault(faults_, "fuse.before_splice_out");
  do {
    // Not SPLICE_F_MOVE: it would take the pages out of the content file's page cache.
    n = splice(read_end_.get(), nullptr, to.device, nullptr, total, 0);
  } while (n < 0 && (errno == EINTR || errno == EAGAIN) && ioctl(read_end_.get(), FIONREAD, &left) == 0 &&
           static_cast<uint64_t>(left) == total);
  if (n >= 0 && static_cast<uint64_t>(n) == total) return;
  int error = n < 0 ? errno : 0;
  if (!NobodyWaits(error)) {
    LOG_EVERY_T(ERROR, 1) << "fuse.reply_failed bytes=" << total << " sent=" << n << " errno=" << error;
  }
  // Nothing of this reply may be left for the next one.
  if (ioctl(read_end_.get(), FIONREAD, &left) != 0 || left != 0) {
    read_end_.Reset();
    write_end_.Reset();
  }
}

void ReplyPipe::SendMemory(const ReplyTarget& to, const iovec* parts, int count) {
  if (to.capture == nullptr) (void)PassFault(faults_, "fuse.before_reply");
  uint64_t total = Total(parts, count);
  if (!EnsurePipe() || total / kPage + 2 > capacity_pages_) return WriteDirectly(to, parts, count);
  if (!Fill(parts, count, total)) {
    read_end_.Reset();
    write_end_.Reset();
    return WriteDirectly(to, parts, count);
  }
  SpliceOut(to, total);
}

void ReplyPipe::SendError(const ReplyTarget& to, uint64_t unique, int error) {
  fuse_out_header header = Header(unique, error, 0);
  iovec part{&header, sizeof header};
  SendMemory(to, &part, 1);
}

bool ReplyPipe::FillSegment(const Segment& segment, bool* damaged) {
  if (segment.file) {
    auto offset = static_cast<off_t>(segment.file_offset);
    uint64_t left = segment.length;
    while (left > 0) {
      ssize_t n =
          splice(segment.file->data.get(), &offset, write_end_.get(), nullptr, left, SPLICE_F_NONBLOCK);
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) {
        *damaged = n == 0 || errno != EAGAIN;  // EAGAIN: the pipe is full
        return false;
      }
      left -= static_cast<uint64_t>(n);
    }
    return true;
  }
  if (segment.memory) {
    if (segment.memory_offset > segment.memory->size() ||
        segment.length > segment.memory->size() - segment.memory_offset) {
      *damaged = true;
      return false;
    }
    iovec part{const_cast<char*>(segment.memory->data()) + segment.memory_offset, segment.length};
    return Fill(&part, 1, segment.length);
  }
  for (uint64_t left = segment.length; left > 0;) {
    iovec part{const_cast<char*>(kZeros), std::min<uint64_t>(left, kZeroBytes)};
    if (!Fill(&part, 1, part.iov_len)) return false;
    left -= part.iov_len;
  }
  return true;
}

SendResult ReplyPipe::SendCopied(const ReplyTarget& to, uint64_t unique, const layer::ReadResult& content) {
  copy_.resize(content.length);
  bool ok = CopyContent(content, copy_.data());
  if (ok) {
    fuse_out_header header = Header(unique, 0, content.length);
    iovec parts[2] = {{&header, sizeof header}, {copy_.data(), copy_.size()}};
    SendMemory(to, parts, 2);
  }
  std::vector<char>().swap(copy_);  // rare and large
  return ok ? SendResult::kSent : SendResult::kDamaged;
}

SendResult ReplyPipe::SendContent(const ReplyTarget& to, uint64_t unique, const layer::ReadResult& content) {
  if (to.capture == nullptr) (void)PassFault(faults_, "fuse.before_reply");
  if (!EnsurePipe() || PagesFor(content) > capacity_pages_) return SendCopied(to, unique, content);
  fuse_out_header header = Header(unique, 0, content.length);
  iovec part{&header, sizeof header};
  bool damaged = false;
  bool filled = Fill(&part, 1, sizeof header);
  uint64_t total = 0;
  for (const Segment& s : content.segments) {
    filled = filled && FillSegment(s, &damaged);
    total += s.length;
  }
  if (total != content.length) damaged = true;
  if (!filled || damaged) {
    read_end_.Reset();  // with the half reply in it
    write_end_.Reset();
    return damaged ? SendResult::kDamaged : SendCopied(to, unique, content);
  }
  SpliceOut(to, sizeof header + total);
  return SendResult::kSent;
}

}  // namespace holdfast::fuse
