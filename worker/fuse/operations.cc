#include "worker/fuse/operations.h"

#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "schema/probe.h"
#include "worker/fuse/server_core.h"

namespace holdfast::fuse {
namespace {

using layer::ChildRecord;
using layer::LayerIndex;
using layer::NodeRecord;

// The kernel's struct fuse_open_out: libfuse 3.14 does not send all flags.
struct OpenOut {
  uint64_t fh;
  uint32_t open_flags;
  uint32_t padding;
};
constexpr uint32_t kOpenKeepCache = 1u << 1;
constexpr uint32_t kOpenNoFlush = 1u << 5;
constexpr uint64_t kBlock = 4096;

Exchange& Current() { return *CurrentExchange(); }
const LayerIndex& Index() { return Current().layer->index(); }

bool IsFolder(const NodeRecord& node) { return (node.mode & S_IFMT) == S_IFDIR; }

// Null after an error reply.
const NodeRecord* NodeOrReply(fuse_req_t req, fuse_ino_t ino) {
  const NodeRecord* node = Index().node(ino);
  if (node == nullptr) fuse_reply_err(req, ESTALE);
  return node;
}

struct stat Attributes(uint64_t nodeid, const NodeRecord& node) {
  struct stat st {};
  st.st_ino = nodeid;
  st.st_mode = node.mode;
  st.st_nlink = node.nlink;
  st.st_uid = node.uid;
  st.st_gid = node.gid;
  st.st_rdev = node.rdev;
  st.st_size = static_cast<off_t>((node.mode & S_IFMT) == S_IFLNK ? node.link_length : node.size);
  st.st_blksize = kBlock;
  st.st_blocks = static_cast<blkcnt_t>((node.size + 511) / 512);
  st.st_mtim.tv_sec = node.mtime_seconds;
  st.st_mtim.tv_nsec = node.mtime_nanos;
  st.st_atim = st.st_ctim = st.st_mtim;
  return st;
}

double Ttl() {
  const ServerCore& core = *Current().core;
  return core.on_trial() ? 0 : static_cast<double>(core.options().entry_ttl_seconds);
}

// Fault points of tests: does one want this answer to be wrong? Those of a trial fire only on trial, and
// never in a replay.
bool TrialFaults() { return Current().core->on_trial() && Current().capture == nullptr; }
bool WrongEnoent() {
  FaultPoints* faults = Current().core->options().faults;
  if (!PassFault(faults, "fuse.wrong_enoent").ok()) return true;
  return TrialFaults() && !PassFault(faults, "fuse.trial_wrong_enoent").ok();
}
bool WrongListing() {
  FaultPoints* faults = Current().core->options().faults;
  if (!PassFault(faults, "fuse.wrong_listing").ok()) return true;
  return TrialFaults() && !PassFault(faults, "fuse.trial_wrong_listing").ok();
}

fuse_entry_param Entry(uint64_t nodeid) {
  fuse_entry_param entry{};
  entry.ino = nodeid;  // 0: there is no such name, which the kernel may remember as long
  entry.entry_timeout = entry.attr_timeout = Ttl();
  if (nodeid != 0) entry.attr = Attributes(nodeid, *Index().node(nodeid));
  return entry;
}

void Lookup(fuse_req_t req, fuse_ino_t parent, const char* name) {
  const NodeRecord* folder = NodeOrReply(req, parent);
  if (folder == nullptr) return;
  if (!IsFolder(*folder)) {
    fuse_reply_err(req, ENOTDIR);
    return;
  }
  uint64_t nodeid = Index().Lookup(parent, name);
  if (nodeid != 0 && WrongEnoent()) nodeid = 0;
  if (nodeid != 0 && Index().node(nodeid) == nullptr) {
    fuse_reply_err(req, EIO);
    return;
  }
  fuse_entry_param entry = Entry(nodeid);
  Current().core->NoteTouched(Current(), nodeid);
  fuse_reply_entry(req, &entry);
}

void GetAttr(fuse_req_t req, fuse_ino_t ino, fuse_file_info*) {
  const NodeRecord* node = NodeOrReply(req, ino);
  if (node == nullptr) return;
  struct stat st = Attributes(ino, *node);
  fuse_reply_attr(req, &st, Ttl());
}

void ReadLink(fuse_req_t req, fuse_ino_t ino) {
  const NodeRecord* node = NodeOrReply(req, ino);
  if (node == nullptr) return;
  if ((node->mode & S_IFMT) != S_IFLNK) {
    fuse_reply_err(req, EINVAL);
    return;
  }
  fuse_reply_readlink(req, std::string(Index().link_target(*node)).c_str());
}

void Open(fuse_req_t req, fuse_ino_t ino, fuse_file_info* info) {
  if (Current().mount->flags().zero_open) {
    fuse_reply_err(req, ENOSYS);
    return;
  }
  if (NodeOrReply(req, ino) == nullptr) return;
  if ((info->flags & O_ACCMODE) != O_RDONLY || (info->flags & O_TRUNC) != 0) {
    fuse_reply_err(req, EROFS);
    return;
  }
  OpenOut out{ino, kOpenNoFlush, 0};
  if (!Current().core->on_trial()) out.open_flags |= kOpenKeepCache;
  char bytes[sizeof out];
  memcpy(bytes, &out, sizeof out);
  fuse_reply_buf(req, bytes, sizeof bytes);
}

void Read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset, fuse_file_info*) {
  const NodeRecord* node = NodeOrReply(req, ino);
  if (node == nullptr) return;
  if ((node->mode & S_IFMT) != S_IFREG || offset < 0) {
    fuse_reply_err(req, IsFolder(*node) ? EISDIR : EINVAL);
    return;
  }
  auto begin = static_cast<uint64_t>(offset);
  if (begin >= node->size || size == 0) {
    fuse_reply_buf(req, nullptr, 0);
    return;
  }
  fuse_reply_none(req);  // the reply goes without libfuse, by splice and perhaps later
  Current().core->Read(Current(), ino, begin, std::min<uint64_t>(size, node->size - begin));
}

void ReplyOk(fuse_req_t req, fuse_ino_t, fuse_file_info*) { fuse_reply_err(req, 0); }

// Nothing is ever written back, and after this answer the kernel asks no more: with zero-open a close costs
// nothing.
void Flush(fuse_req_t req, fuse_ino_t, fuse_file_info*) { fuse_reply_err(req, ENOSYS); }

// The kernel then opens, keeps and closes folders by itself, for the connection's life.
void OpenDir(fuse_req_t req, fuse_ino_t, fuse_file_info*) { fuse_reply_err(req, ENOSYS); }

// Row 0 is ".", row 1 is "..", then the children; the cookie of a row is the number of the next one.
void ReadFolder(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset, bool plus) {
  const NodeRecord* folder = NodeOrReply(req, ino);
  if (folder == nullptr) return;
  if (!IsFolder(*folder)) {
    fuse_reply_err(req, ENOTDIR);
    return;
  }
  const LayerIndex& index = Index();
  std::span<const ChildRecord> children = index.children(ino);
  std::vector<char> buffer(std::min<size_t>(size, 1 << 20));
  size_t used = 0;
  for (uint64_t row = offset < 0 ? 0 : static_cast<uint64_t>(offset); row < children.size() + 2; row++) {
    uint64_t nodeid = row == 0 ? ino : row == 1 ? folder->parent : children[row - 2].nodeid;
    std::string name = row == 0 ? "." : row == 1 ? ".." : std::string(index.name(children[row - 2]));
    if (index.node(nodeid) == nullptr) continue;
    if (row == 2 && WrongListing()) continue;
    fuse_entry_param entry = Entry(nodeid);
    if (row < 2) entry.ino = 0;  // no lookup of "." and ".."
    auto next = static_cast<off_t>(row + 1);
    size_t left = buffer.size() - used;
    size_t needed = plus
                        ? fuse_add_direntry_plus(req, buffer.data() + used, left, name.c_str(), &entry, next)
                        : fuse_add_direntry(req, buffer.data() + used, left, name.c_str(), &entry.attr, next);
    if (needed > left) break;
    used += needed;
    if (plus) Current().core->NoteTouched(Current(), nodeid);
  }
  fuse_reply_buf(req, buffer.data(), used);
}

void ReadDir(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset, fuse_file_info*) {
  ReadFolder(req, ino, size, offset, false);
}
void ReadDirPlus(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset, fuse_file_info*) {
  ReadFolder(req, ino, size, offset, true);
}

std::string_view OpaqueName() {
  return Current().mount->flags().opaque_user ? "user.overlay.opaque" : "trusted.overlay.opaque";
}

void ReplyValue(fuse_req_t req, std::string_view value, size_t size) {
  if (size == 0) {
    fuse_reply_xattr(req, value.size());
  } else if (value.size() > size) {
    fuse_reply_err(req, ERANGE);
  } else {
    fuse_reply_buf(req, value.data(), value.size());
  }
}

void GetXattr(fuse_req_t req, fuse_ino_t ino, const char* name, size_t size) {
  if (Current().mount->flags().no_xattrs) {
    fuse_reply_err(req, ENOSYS);
    return;
  }
  const NodeRecord* node = NodeOrReply(req, ino);
  if (node == nullptr) return;
  if ((node->flags & layer::kNodeOpaque) != 0 && name == OpaqueName()) return ReplyValue(req, "y", size);
  if (node->xattr_count > 0) {
    for (const auto& [key, value] : Index().xattrs(*node)) {
      if (key == name) return ReplyValue(req, value, size);
    }
  }
  fuse_reply_err(req, ENODATA);
}

void ListXattr(fuse_req_t req, fuse_ino_t ino, size_t size) {
  if (Current().mount->flags().no_xattrs) {
    ReplyValue(req, "",
               size);  // ENOSYS would make listxattr(2) fail where an ordinary unpack has an empty list
    return;
  }
  const NodeRecord* node = NodeOrReply(req, ino);
  if (node == nullptr) return;
  std::string names;
  if ((node->flags & layer::kNodeOpaque) != 0) names += std::string(OpaqueName()) + '\0';
  for (const auto& [key, value] : Index().xattrs(*node)) names += std::string(key) + '\0';
  ReplyValue(req, names, size);
}

void StatFs(fuse_req_t req, fuse_ino_t) {
  struct statvfs st {};
  st.f_bsize = st.f_frsize = kBlock;
  st.f_blocks = std::max<uint64_t>(1, (Index().content_bytes() + kBlock - 1) / kBlock);
  st.f_files = Index().node_count();
  st.f_namemax = 255;
  fuse_reply_statfs(req, &st);
}

// The kernel hands the command over as it came, and expects at most _IOC_SIZE bytes.
void Ioctl(fuse_req_t req, fuse_ino_t ino, unsigned int command, void*, fuse_file_info*, unsigned,
           const void*, size_t, size_t out_size) {
  if (ino != layer::kRootNode || command != HF_PROBE_LIVE || out_size < sizeof(hf_probe_live)) {
    fuse_reply_err(req, ENOTTY);
    return;
  }
  const ServerOptions& options = Current().core->options();
  if (absl::Status fault = PassFault(options.faults, "fuse.probe"); !fault.ok()) {
    fuse_reply_err(req, StatusErrno(fault));
    return;
  }
  hf_probe_live live{};
  live.generation = options.generation;
  options.build.copy(live.build, sizeof live.build - 1);
  fuse_reply_ioctl(req, 0, &live, sizeof live);
}

void Init(void* initialized, fuse_conn_info* conn) {
  conn->want = conn->capable & FUSE_CAP_IOCTL_DIR;  // else libfuse itself refuses ioctls on folders
  *static_cast<bool*>(initialized) = true;
}

// What is not here libfuse answers with ENOSYS; which operations are missing must stay as it is, since the
// kernel remembers it for a mount's life (docs/HANDOVER.md).
fuse_lowlevel_ops Operations() {
  fuse_lowlevel_ops ops{};
  ops.init = Init;
  ops.lookup = Lookup;
  ops.getattr = GetAttr;
  ops.readlink = ReadLink;
  ops.open = Open;
  ops.read = Read;
  ops.flush = Flush;
  ops.release = ReplyOk;
  ops.opendir = OpenDir;
  ops.readdir = ReadDir;
  ops.readdirplus = ReadDirPlus;
  ops.releasedir = ReplyOk;
  ops.statfs = StatFs;
  ops.getxattr = GetXattr;
  ops.listxattr = ListXattr;
  ops.ioctl = Ioctl;
  return ops;
}

// libfuse writes its replies here. Always "all sent": whether the kernel still wants a reply is no concern of
// libfuse.
ssize_t SendReply(int, iovec* parts, int count, void*) {
  size_t total = 0;
  for (int i = 0; i < count; i++) total += parts[i].iov_len;
  Exchange* x = CurrentExchange();
  if (x != nullptr && x->core != nullptr) x->core->ReplyParts(*x, parts, count);
  return static_cast<ssize_t>(total);
}

ssize_t NeverRead(int, void*, size_t, void*) {
  errno = ENOTSUP;
  return -1;
}

}  // namespace

absl::StatusOr<std::unique_ptr<FuseSession>> FuseSession::Create(std::string_view init_request) {
  char name[] = "holdfast";
  char* argv[] = {name, nullptr};
  fuse_args args = FUSE_ARGS_INIT(1, argv);
  fuse_lowlevel_ops ops = Operations();
  std::unique_ptr<FuseSession> result(new FuseSession());
  fuse_session* session = fuse_session_new(&args, &ops, sizeof ops, &result->initialized_);
  fuse_opt_free_args(&args);  // it has made a copy
  if (session == nullptr) return Internal("fuse_session_new failed");
  result->session_ = session;
  fuse_custom_io io{};
  io.writev = SendReply;
  io.read = NeverRead;
  // libfuse wants a descriptor and closes it in the end; replies never go there.
  int placeholder = eventfd(0, EFD_CLOEXEC);
  if (placeholder < 0) return ErrnoStatus(errno, "eventfd");
  if (int error = fuse_session_custom_io(session, &io, placeholder); error != 0) {
    close(placeholder);
    return ErrnoStatus(-error, "fuse_session_custom_io");
  }
  std::string request(init_request);
  request.append(64, '\0');
  Exchange nowhere;
  ExchangeScope scope(&nowhere);
  fuse_buf buffer{};
  buffer.mem = request.data();
  buffer.size = init_request.size();
  fuse_session_process_buf(session, &buffer);
  if (!result->initialized_ || fuse_session_exited(session) != 0)
    return InvalidArgument("libfuse refused the saved INIT request");
  return result;
}

FuseSession::~FuseSession() {
  if (session_ != nullptr) fuse_session_destroy(session_);
}

void FuseSession::Process(const uint8_t* request, uint32_t length) {
  fuse_buf buffer{};
  buffer.mem = const_cast<uint8_t*>(request);
  buffer.size = length;
  fuse_session_process_buf(session_, &buffer);
}

}  // namespace holdfast::fuse
