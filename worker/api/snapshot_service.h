// containerd's gRPC service containerd.services.snapshots.v1.Snapshots on a listening unix socket that all
// worker generations share. Translates, decides nothing: every call goes to the Snapshotter, or, after a
// hand-over, to the successor.
//
// States: waiting (calls wait for Attach, at most `owner_wait`), attached, forwarding. A planned swap in the
// old worker:
//   DetachAndForward(path)   stops accepting; aborts calls that wait for the network; returns when no call is
//   inside the Snapshotter
//                            any more. From here on every call on an old connection, the aborted ones
//                            included, is sent to the successor over `path` and its answer relayed.
//   (close the metadata store: the successor opens it, Attaches and StartAccepts)
//   WaitDrained(seconds)     the old connections age out; then this worker may exit.
// No call fails in this, however long it takes: connections have an unlimited grace (handover-pitfalls 13).
//
// Thread safety: all methods; DetachAndForward and WaitDrained block. gRPC types stay in the .cc files.
#pragma once

#include <chrono>
#include <memory>
#include <string>

#include "common/io.h"
#include "common/status.h"
#include "worker/snapshot/snapshotter.h"

namespace holdfast::api {

struct ServiceOptions {
  std::chrono::milliseconds max_connection_age{45'000};  // gRPC adds ±10 %
  std::chrono::milliseconds owner_wait{30'000};          // for Attach, and for the successor to answer
  std::chrono::milliseconds stall_warning{2'000};        // a call that takes longer is logged
};

class SnapshotService {
 public:
  // `listener`: a bound, listening unix socket (a dup; O_NONBLOCK is set on it). Does not accept yet.
  static absl::StatusOr<std::unique_ptr<SnapshotService>> Create(UniqueFd listener,
                                                                 const ServiceOptions& options = {});
  // Calls that are open are cancelled: drain first.
  virtual ~SnapshotService() = default;

  virtual void StartAccepting() = 0;
  // Closes the listening socket for good: this worker will not be the owner again. Connections stay.
  virtual void CloseListener() = 0;

  // `snapshotter` must stay until DetachAndForward has returned (or this object is destroyed).
  virtual void Attach(snapshot::Snapshotter* snapshotter) = 0;
  // Calls Abort on the attached snapshotter. `socket_path`: where the successor answers. Attach afterwards
  // (the successor failed) ends the forwarding.
  virtual void DetachAndForward(const std::string& socket_path) = 0;

  // True when no connection is left; false at the time limit. Call after DetachAndForward.
  virtual bool WaitDrained(std::chrono::milliseconds limit) = 0;

  virtual int OpenConnections() const = 0;
  virtual int OpenCalls() const = 0;  // being answered here or forwarded
};

}  // namespace holdfast::api
