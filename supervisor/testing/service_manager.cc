#include "supervisor/testing/service_manager.h"

#include <fcntl.h>
#include <linux/kcmp.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "glog/logging.h"

namespace holdfast::supervisor::testing {
namespace {

constexpr char kSync[] = "X_SYNC=1";
constexpr int kListenStart = 3;

sockaddr_un Address(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  CHECK_LT(path.size(), sizeof(address.sun_path));
  memcpy(address.sun_path, path.c_str(), path.size());
  return address;
}

std::string Field(const std::string& text, const std::string& name) {
  size_t at = ("\n" + text).find("\n" + name + "=");
  if (at == std::string::npos) return "";
  at += name.size() + 1;
  return text.substr(at, text.find('\n', at) - at);
}

bool SameFile(int a, int b) { return syscall(SYS_kcmp, getpid(), getpid(), KCMP_FILE, a, b) == 0; }

}  // namespace

ServiceManager::ServiceManager(const std::string& socket_path)
    : path_(socket_path), socket_(socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0)) {
  sockaddr_un address = Address(path_);
  CHECK_EQ(bind(socket_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0) << path_;
  thread_ = std::thread([this] { Loop(); });
}

ServiceManager::~ServiceManager() {
  ending_ = true;
  thread_.join();
}

void ServiceManager::Loop() {
  while (!ending_) {
    pollfd ready{.fd = socket_.get(), .events = POLLIN, .revents = 0};
    if (poll(&ready, 1, 20) != 1) continue;
    char text[4096];
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * 253)];
    iovec vector{.iov_base = text, .iov_len = sizeof(text)};
    msghdr message{};
    message.msg_iov = &vector;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    ssize_t got = recvmsg(socket_.get(), &message, MSG_CMSG_CLOEXEC);
    if (got < 0) continue;
    std::vector<UniqueFd> fds;
    for (cmsghdr* c = CMSG_FIRSTHDR(&message); c != nullptr; c = CMSG_NXTHDR(&message, c)) {
      if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
      size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
      for (size_t i = 0; i < count; ++i) {
        int fd;
        memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
        fds.emplace_back(fd);
      }
    }
    Take(std::string(text, static_cast<size_t>(got)), std::move(fds));
  }
}

void ServiceManager::Take(const std::string& text, std::vector<UniqueFd> fds) {
  MutexLock lock(&mutex_);
  if (text == kSync) ++synced_;
  texts_.push_back(text);
  std::string name = Field(text, "FDNAME");
  if (Field(text, "FDSTOREREMOVE") == "1") stored_.erase(name);
  if (Field(text, "FDSTORE") == "1") {
    for (UniqueFd& fd : fds) {
      auto& kept = stored_[name];
      bool known = std::any_of(kept.begin(), kept.end(),
                               [&](const UniqueFd& other) { return SameFile(other.get(), fd.get()); });
      if (!known) kept.push_back(std::move(fd));
    }
  }
  changed_.SignalAll();
}

void ServiceManager::Sync() {
  MutexLock lock(&mutex_);
  int wanted = synced_ + 1;
  UniqueFd sender(socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  sockaddr_un address = Address(path_);
  CHECK_GT(sendto(sender.get(), kSync, strlen(kSync), 0, reinterpret_cast<const sockaddr*>(&address),
                  sizeof(address)),
           0);
  while (synced_ < wanted) changed_.Wait(&mutex_);
}

void ServiceManager::PrepareChild() const {
  std::string names;
  std::vector<int> high;
  for (const auto& [name, fds] : stored_) {
    for (const UniqueFd& fd : fds) {
      high.push_back(fcntl(fd.get(), F_DUPFD_CLOEXEC, 3'000));
      names += (names.empty() ? "" : ":") + name;
    }
  }
  for (size_t i = 0; i < high.size(); ++i) dup2(high[i], kListenStart + static_cast<int>(i));
  setenv("NOTIFY_SOCKET", path_.c_str(), 1);
  if (high.empty()) return;
  setenv("LISTEN_FDS", std::to_string(high.size()).c_str(), 1);
  setenv("LISTEN_PID", std::to_string(getpid()).c_str(), 1);
  setenv("LISTEN_FDNAMES", names.c_str(), 1);
}

std::map<std::string, size_t> ServiceManager::Stored() const {
  MutexLock lock(&mutex_);
  std::map<std::string, size_t> counts;
  for (const auto& [name, fds] : stored_) counts[name] = fds.size();
  return counts;
}

void ServiceManager::Replace(const std::string& name, UniqueFd fd) {
  MutexLock lock(&mutex_);
  stored_[name].clear();
  stored_[name].push_back(std::move(fd));
}

void ServiceManager::Drop(const std::string& name) {
  MutexLock lock(&mutex_);
  stored_.erase(name);
}

void ServiceManager::Clear() {
  MutexLock lock(&mutex_);
  stored_.clear();
}

int ServiceManager::messages(const std::string& text) const {
  MutexLock lock(&mutex_);
  return static_cast<int>(std::count_if(texts_.begin(), texts_.end(), [&](const std::string& message) {
    return message.find(text) != std::string::npos;
  }));
}

}  // namespace holdfast::supervisor::testing
