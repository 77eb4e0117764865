// Descriptors kept outside this process: the service manager holds a duplicate of each under a name and gives
// all back to the next process of the service. Names should be short: all come back in one environment
// string.
//
// Nothing is told of what the manager did not keep: beyond its limit it drops silently.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "common/io.h"
#include "common/mutex.h"

namespace holdfast {

using StoredFds = std::map<std::string, std::vector<UniqueFd>>;

// Thread-safe. Push and Remove do not block; they take effect in order.
class FdStore {
 public:
  virtual ~FdStore() = default;
  virtual bool enabled() const = 0;
  virtual void Push(const std::string& name, std::vector<SharedFd> fds) = 0;
  virtual void Remove(const std::string& name) = 0;
  // Blocks until everything asked for before is on its way; false after `milliseconds`.
  virtual bool Flush(int milliseconds) = 0;
  // What the operator must know, or nothing.
  virtual std::optional<std::string> Warning() const = 0;
};

// systemd's (sd_notify). Does nothing without NOTIFY_SOCKET. A thread of its own sends, because the manager's
// socket blocks while the manager is busy. FDPOLL=0: with polling, a fresh /dev/fuse would be dropped at
// once, and each FUSE request would wake the manager.
class SystemdFdStore final : public FdStore {
 public:
  // `held`: descriptors that it gave back to us, and keeps. The limit is read from the variable FDSTORE,
  // which the unit or a newer systemd sets.
  explicit SystemdFdStore(const StoredFds& held);
  ~SystemdFdStore() override;
  bool enabled() const override { return enabled_; }
  void Push(const std::string& name, std::vector<SharedFd> fds) override;
  void Remove(const std::string& name) override;
  bool Flush(int milliseconds) override;
  std::optional<std::string> Warning() const override;

 private:
  struct Message {
    std::string text;
    std::vector<SharedFd> fds;
  };
  void Loop();

  const bool enabled_;
  const size_t limit_;  // 0: not known
  mutable Mutex mutex_;
  CondVar changed_;
  std::deque<Message> queue_ ABSL_GUARDED_BY(mutex_);
  std::map<std::string, size_t> counts_ ABSL_GUARDED_BY(mutex_);
  uint64_t asked_ ABSL_GUARDED_BY(mutex_) = 0, sent_ ABSL_GUARDED_BY(mutex_) = 0;
  bool failed_ ABSL_GUARDED_BY(mutex_) = false, ending_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

// What the service manager gave to this process (sd_listen_fds), all close-on-exec. Before any thread starts.
StoredFds TakeStoredFds();

}  // namespace holdfast
