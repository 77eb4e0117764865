// Makes the kernel forget what a worker on trial has told it (DESIGN 4.4).
//
// FUSE_NOTIFY_INC_EPOCH (6.16) would drop all names at once, and must not be used: the overlay of a running
// container holds dentries of the layer, finds them invalid, and answers ESTALE for them ever after (measured
// on 6.18). With times-to-live of 0 the kernel asks for every name anew anyway.
//
// Runs on the caller's thread, under no lock and inside no Gate: the kernel waits for pages that a READ is
// filling, and that READ is answered by the pool.
#include <fcntl.h>
#include <linux/fuse.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>

#include "common/io.h"
#include "common/log.h"
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

// A name that an overlay has once found absent in its layers is a negative dentry of the overlay, which no
// layer can revalidate or drop (measured on 6.18). Twice, because the first pass may only age what was used
// lately.
void ServerCore::DropDentries() {
  for (int i = 0; i < 2; i++) {
    absl::StatusOr<UniqueFd> file = OpenFile(options_.drop_caches, O_WRONLY);
    absl::Status dropped = file.status();
    if (file.ok() && write(file->get(), "2", 1) != 1) dropped = ErrnoStatus(errno, options_.drop_caches);
    if (!dropped.ok()) {
      LOG(ERROR) << "fuse.dentries_not_dropped error=" << LogValue(dropped.ToString())
                 << " effect=\"an overlay may keep a name absent that the worker on trial did not find\"";
      return;
    }
  }
  LOG(WARNING) << "fuse.dentries_dropped reason=\"absent names were answered on trial\"";
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
  bool absent_names = !nodes.has_value();
  if (nodes) {
    for (const auto& [mount_id, mount_nodes] : *nodes) {
      std::shared_ptr<Mount> mount = FindMount(mount_id);
      if (mount == nullptr) continue;
      for (uint64_t nodeid : mount_nodes) {
        if (nodeid == 0) {
          absent_names = true;
        } else {
          told += ForgetNode(*mount, nodeid);
        }
      }
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
  if (absent_names) DropDentries();
  LOG(WARNING) << "fuse.forgotten nodes=" << told << " all=" << !nodes.has_value()
               << " us=" << (options_.clock->BootNanos() - start) / 1000;
  return told;
}

}  // namespace holdfast::fuse
