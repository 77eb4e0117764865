// Makes the kernel forget what a worker on trial has told it (DESIGN 4.4).
//
// Runs on the caller's thread, under no lock and inside no Gate: the kernel waits for pages that a READ is
// filling, and that READ is answered by the pool.
#include <linux/fuse.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>

#include "glog/logging.h"
#include "worker/fuse/server_core.h"

namespace holdfast::fuse {

uint64_t ServerCore::ForgetNode(Mount& mount, uint64_t nodeid) {
  struct {
    fuse_out_header header;
    fuse_notify_inval_inode_out inval;
  } notice{};
  notice.header.len = sizeof notice;
  notice.header.error = FUSE_NOTIFY_INVAL_INODE;
  notice.inval.ino = nodeid;  // offset 0 and length 0: attributes, and content to the end
  ssize_t n;
  do {
    n = write(mount.device(), &notice, sizeof notice);
  } while (n < 0 && errno == EINTR);
  if (n >= 0) return 1;
  // ENOENT: the kernel does not know the node, or no more. The others: the connection has ended.
  if (errno != ENOENT && errno != ENODEV && errno != ENOTCONN && errno != ECONNABORTED) {
    PLOG_EVERY_N(ERROR, 1000) << "fuse.forget_failed mount=" << mount.id() << " node=" << nodeid;
  }
  return 0;
}

absl::StatusOr<uint64_t> ServerCore::ForgetCached(UniqueFd touched) {
  if (!started_ || parked_)
    return FailedPrecondition("the kernel can forget only while its requests are served");
  uint64_t start = options_.clock->BootNanos();
  std::optional<std::map<uint64_t, std::set<uint64_t>>> nodes;
  if (touched.valid()) {
    absl::StatusOr<std::unique_ptr<TouchedLog>> log = TouchedLog::Map(touched);
    if (log.ok()) {
      nodes = (*log)->Nodes();
    } else {
      LOG(ERROR) << "fuse.touched_unreadable error=\"" << log.status()
                 << "\" effect=\"all nodes are forgotten\"";
    }
  }
  uint64_t told = 0;
  if (nodes) {
    for (const auto& [mount_id, mount_nodes] : *nodes) {
      std::shared_ptr<Mount> mount = FindMount(mount_id);
      if (mount == nullptr) continue;
      for (uint64_t nodeid : mount_nodes) told += ForgetNode(*mount, nodeid);
    }
  } else {
    for (const auto& mount : AllMounts()) {
      // A mount whose layer cannot be opened has answered EIO only.
      absl::StatusOr<std::shared_ptr<layer::Layer>> layer = mount->GetLayer(*options_.clock);
      if (!layer.ok()) continue;
      for (uint64_t nodeid = 1, end = (*layer)->index().node_count(); nodeid <= end; nodeid++) {
        told += ForgetNode(*mount, nodeid);
      }
    }
  }
  LOG(WARNING) << "fuse.forgotten nodes=" << told << " all=" << !nodes.has_value()
               << " us=" << (options_.clock->BootNanos() - start) / 1000;
  return told;
}

}  // namespace holdfast::fuse
