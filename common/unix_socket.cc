#include "common/unix_socket.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

namespace holdfast {
namespace {

absl::StatusOr<sockaddr_un> SocketAddress(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof(address.sun_path)) return InvalidArgument("longer than 107 bytes: " + path);
  memcpy(address.sun_path, path.c_str(), path.size() + 1);
  return address;
}

absl::StatusOr<UniqueFd> UnixSocket() {
  UniqueFd fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd.valid()) return ErrnoStatus(errno, "socket");
  return fd;
}

absl::Status RemoveStaleSocket(const std::string& path, const sockaddr_un& address) {
  struct stat info;
  if (lstat(path.c_str(), &info) != 0) return errno == ENOENT ? absl::OkStatus() : ErrnoStatus(errno, path);
  if (!S_ISSOCK(info.st_mode)) return AlreadyExists("socket path " + path + " exists and is not a socket");
  // An orphaned worker needs a moment to notice that its supervisor is dead and to close the socket.
  for (int tries = 20;; --tries) {
    HF_ASSIGN_OR_RETURN(UniqueFd probe, UnixSocket());
    int result = connect(probe.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address));
    if (result != 0 && errno != EAGAIN) break;
    if (tries == 0) return AlreadyExists("socket " + path + " is in use by a running process");
    usleep(50'000);
  }
  if (unlink(path.c_str()) != 0) return ErrnoStatus(errno, "removing the stale socket " + path);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<UniqueFd> ListenUnix(const std::string& path) {
  HF_ASSIGN_OR_RETURN(sockaddr_un address, SocketAddress(path));
  HF_RETURN_IF_ERROR(RemoveStaleSocket(path, address));
  HF_ASSIGN_OR_RETURN(UniqueFd fd, UnixSocket());
  mode_t before = umask(0177);  // never open to others, not even for a moment
  int result = bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address));
  int error = errno;
  umask(before);
  if (result != 0) return ErrnoStatus(error, "binding " + path);
  if (listen(fd.get(), SOMAXCONN) != 0) return ErrnoStatus(errno, "listening on " + path);
  return fd;
}

bool IsListeningOn(int fd, const std::string& path) {
  int listening = 0;
  socklen_t size = sizeof(listening);
  if (getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &size) != 0 || listening == 0) return false;
  sockaddr_un address{};
  size = sizeof(address);
  return getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size) == 0 &&
         address.sun_family == AF_UNIX && path == address.sun_path && PathExists(path);
}

}  // namespace holdfast
