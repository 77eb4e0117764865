// A stand-in for systemd in the supervisor's tests: takes sd_notify messages with descriptors, and gives the
// stored ones to the next process that it starts. Thread-safe; a thread of its own receives.
#pragma once

#include <atomic>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "common/io.h"
#include "common/mutex.h"

namespace holdfast::supervisor::testing {

class ServiceManager {
 public:
  explicit ServiceManager(const std::string& socket_path);
  ~ServiceManager();

  // Waits until every message sent so far is taken, also of processes that are dead.
  void Sync();
  // In a child, before exec: passes the descriptors on as systemd does (sd_listen_fds) and says where to
  // notify.
  void PrepareChild() const ABSL_NO_THREAD_SAFETY_ANALYSIS;
  std::map<std::string, size_t> Stored() const;  // how many under each name
  void Replace(const std::string& name, UniqueFd fd);
  void Drop(const std::string& name);
  void Clear();
  int messages(const std::string& text) const;  // how many contained it

 private:
  void Loop();
  void Take(const std::string& text, std::vector<UniqueFd> fds);

  const std::string path_;
  UniqueFd socket_;
  std::atomic<bool> ending_{false};
  mutable Mutex mutex_;
  CondVar changed_;
  std::map<std::string, std::vector<UniqueFd>> stored_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::string> texts_ ABSL_GUARDED_BY(mutex_);
  int synced_ ABSL_GUARDED_BY(mutex_) = 0;
  std::thread thread_;
};

}  // namespace holdfast::supervisor::testing
