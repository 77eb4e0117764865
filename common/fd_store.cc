#include "common/fd_store.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <systemd/sd-daemon.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/numbers.h"
#include "common/log.h"
#include "glog/logging.h"

namespace holdfast {
namespace {

size_t LimitFromEnvironment() {
  const char* text = getenv("FDSTORE");
  size_t limit = 0;
  return text != nullptr && absl::SimpleAtoi(text, &limit) ? limit : 0;
}

}  // namespace

SystemdFdStore::SystemdFdStore(const StoredFds& held)
    : enabled_(getenv("NOTIFY_SOCKET") != nullptr), limit_(LimitFromEnvironment()) {
  for (const auto& [name, fds] : held) counts_[name] = fds.size();
  if (!enabled_) return;
  // Signals are for the threads that ask for them.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  thread_ = std::thread([this] { Loop(); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

SystemdFdStore::~SystemdFdStore() {
  if (!enabled_) return;
  {
    MutexLock lock(&mutex_);
    ending_ = true;
    changed_.SignalAll();
  }
  thread_.join();
}

void SystemdFdStore::Push(const std::string& name, std::vector<SharedFd> fds) {
  if (!enabled_) return;
  MutexLock lock(&mutex_);
  counts_[name] += fds.size();
  queue_.push_back({"FDSTORE=1\nFDPOLL=0\nFDNAME=" + name, std::move(fds)});
  ++asked_;
  changed_.SignalAll();
}

void SystemdFdStore::Remove(const std::string& name) {
  if (!enabled_) return;
  MutexLock lock(&mutex_);
  if (counts_.erase(name) == 0) return;
  queue_.push_back({"FDSTOREREMOVE=1\nFDNAME=" + name, {}});
  ++asked_;
  changed_.SignalAll();
}

void SystemdFdStore::Loop() {
  for (;;) {
    Message message;
    {
      MutexLock lock(&mutex_);
      while (queue_.empty() && !ending_) changed_.Wait(&mutex_);
      if (queue_.empty()) return;
      message = std::move(queue_.front());
      queue_.pop_front();
    }
    std::vector<int> fds;
    for (const SharedFd& fd : message.fds) fds.push_back(fd->get());
    int result =
        sd_pid_notify_with_fds(0, 0, message.text.c_str(), fds.data(), static_cast<unsigned>(fds.size()));
    if (result < 0) {
      LOG(ERROR) << "event=fd_store message=" << LogValue(message.text)
                 << " error=" << LogValue(strerror(-result));
    }
    MutexLock lock(&mutex_);
    ++sent_;
    failed_ |= result < 0;
    changed_.SignalAll();
  }
}

bool SystemdFdStore::Flush(int milliseconds) {
  auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(milliseconds);
  MutexLock lock(&mutex_);
  const uint64_t wanted = asked_;
  while (sent_ < wanted) {
    if (!changed_.WaitUntil(&mutex_, deadline) && sent_ < wanted) return false;
  }
  return true;
}

std::optional<std::string> SystemdFdStore::Warning() const {
  MutexLock lock(&mutex_);
  size_t held = 0;
  for (const auto& [name, count] : counts_) held += count;
  if (failed_) return "the service manager refused a descriptor; what it names may not survive";
  if (limit_ == 0 || held + limit_ / 10 < limit_) return std::nullopt;
  return "the service manager keeps " + std::to_string(held) + " of at most " + std::to_string(limit_) +
         " descriptors and drops what is beyond; raise FileDescriptorStoreMax";
}

StoredFds TakeStoredFds() {
  StoredFds stored;
  char** names = nullptr;
  int count = sd_listen_fds_with_names(1, &names);
  for (int i = 0; i < count; ++i) {
    stored[names[i]].emplace_back(SD_LISTEN_FDS_START + i);
    free(names[i]);
  }
  free(names);
  return stored;
}

}  // namespace holdfast
