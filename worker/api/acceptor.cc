#include "worker/api/acceptor.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "glog/logging.h"

namespace holdfast::api {
namespace {

constexpr int kPauseWhenOutOfDescriptorsMillis = 100;

}  // namespace

absl::StatusOr<std::unique_ptr<Acceptor>> Acceptor::Create(UniqueFd listener,
                                                           std::function<void(int)> accepted) {
  // Several generations poll one socket: who loses the race must not block in accept.
  int flags = fcntl(listener.get(), F_GETFL);
  if (flags < 0 || fcntl(listener.get(), F_SETFL, flags | O_NONBLOCK) != 0) {
    return ErrnoStatus(errno, "listening socket of the snapshots API");
  }
  UniqueFd wake(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!wake.valid()) return ErrnoStatus(errno, "eventfd");
  return std::unique_ptr<Acceptor>(new Acceptor(std::move(listener), std::move(wake), std::move(accepted)));
}

Acceptor::~Acceptor() { Stop(); }

void Acceptor::Start() {
  MutexLock lock(&thread_mutex_);
  if (thread_.joinable() || !listener_.valid()) return;
  stopping_ = false;
  thread_ = std::thread([this] { Run(); });
}

void Acceptor::Stop() {
  MutexLock lock(&thread_mutex_);
  if (!thread_.joinable()) return;
  stopping_ = true;
  uint64_t one = 1;
  if (write(wake_.get(), &one, sizeof one) < 0) LOG(ERROR) << "api.wake_failed errno=" << errno;
  thread_.join();
  if (read(wake_.get(), &one, sizeof one) < 0) LOG(ERROR) << "api.wake_failed errno=" << errno;
}

void Acceptor::Close() {
  Stop();
  MutexLock lock(&thread_mutex_);
  if (!thread_.joinable()) listener_.Reset();
}

void Acceptor::Run() {
  while (!stopping_) {
    pollfd fds[2] = {{listener_.get(), POLLIN, 0}, {wake_.get(), POLLIN, 0}};
    if (poll(fds, 2, -1) < 0 && errno != EINTR) {
      LOG(ERROR) << "api.poll_failed errno=" << errno;
      return;
    }
    if (!stopping_ && (fds[0].revents & POLLIN) != 0) AcceptOne();
  }
}

void Acceptor::AcceptOne() {
  int fd = accept4(listener_.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
  if (fd < 0) {
    if (errno == EAGAIN || errno == EINTR || errno == ECONNABORTED) return;
    LOG(ERROR) << "api.accept_failed errno=" << errno;
    pollfd wake{wake_.get(), POLLIN, 0};
    poll(&wake, 1, kPauseWhenOutOfDescriptorsMillis);
    return;
  }
  struct stat st;
  if (fstat(fd, &st) == 0) {
    OpenConnections();  // forgets the closed ones, so the list stays short
    MutexLock lock(&mutex_);
    connections_.push_back({fd, st.st_ino});
  }
  accepted_(fd);
}

int Acceptor::OpenConnections() const {
  MutexLock lock(&mutex_);
  auto closed = [](const Connection& connection) {
    struct stat st;
    return fstat(connection.fd, &st) != 0 || !S_ISSOCK(st.st_mode) || st.st_ino != connection.inode;
  };
  connections_.erase(std::remove_if(connections_.begin(), connections_.end(), closed), connections_.end());
  return static_cast<int>(connections_.size());
}

}  // namespace holdfast::api
