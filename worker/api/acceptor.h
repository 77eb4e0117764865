// Accepts connections from a shared listening socket on a thread of its own and hands each to `accepted`.
// Knows which of them are still open. Thread-safe.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <functional>
#include <thread>
#include <vector>

#include "common/io.h"
#include "common/mutex.h"
#include "common/status.h"

namespace holdfast::api {

class Acceptor {
 public:
  // `accepted` takes the non-blocking descriptor and closes it at the end of the connection.
  static absl::StatusOr<std::unique_ptr<Acceptor>> Create(UniqueFd listener,
                                                          std::function<void(int)> accepted);
  ~Acceptor();

  void Start();  // nothing after Close
  void Stop();
  // For good: as long as anybody holds the socket it looks in use to whoever wants to listen at its path.
  void Close();
  int OpenConnections() const;

 private:
  // gRPC has no count of its connections; a descriptor number that is still the same socket is still open.
  struct Connection {
    int fd;
    ino_t inode;
  };
  Acceptor(UniqueFd listener, UniqueFd wake, std::function<void(int)> accepted)
      : listener_(std::move(listener)), wake_(std::move(wake)), accepted_(std::move(accepted)) {}
  void Run();
  void AcceptOne();

  UniqueFd listener_;  // changes only while no thread runs
  const UniqueFd wake_;
  const std::function<void(int)> accepted_;
  std::atomic<bool> stopping_{false};
  Mutex thread_mutex_;
  std::thread thread_ ABSL_GUARDED_BY(thread_mutex_);
  mutable Mutex mutex_;
  mutable std::vector<Connection> connections_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace holdfast::api
