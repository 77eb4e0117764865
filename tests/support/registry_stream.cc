#include "tests/support/registry_stream.h"

#include <openssl/ssl.h>
#include <sys/socket.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstdlib>

namespace holdfast::test {

RegistryServer::Stream::Stream(int fd, ssl_ctx_st* context) : fd_(fd) {
  if (context == nullptr) return;
  ssl_ = SSL_new(context);
  SSL_set_fd(ssl_, fd);
  failed_ = SSL_accept(ssl_) != 1;
}

RegistryServer::Stream::~Stream() {
  if (ssl_ != nullptr) SSL_free(ssl_);
}

bool RegistryServer::Stream::Fill() {
  if (failed_) return false;
  char chunk[16384];
  ssize_t got;
  do {
    got = ssl_ != nullptr ? SSL_read(ssl_, chunk, sizeof chunk) : recv(fd_, chunk, sizeof chunk, 0);
  } while (got < 0 && ssl_ == nullptr && errno == EINTR);
  if (got <= 0) {
    failed_ = true;
    return false;
  }
  buffer_.append(chunk, static_cast<size_t>(got));
  return true;
}

bool RegistryServer::Stream::Write(std::string_view bytes) {
  while (!bytes.empty() && !failed_) {
    const size_t piece = std::min<size_t>(bytes.size(), 64 * 1024);
    const ssize_t put = ssl_ != nullptr ? SSL_write(ssl_, bytes.data(), static_cast<int>(piece))
                                        : send(fd_, bytes.data(), piece, MSG_NOSIGNAL);
    if (put > 0) {
      bytes.remove_prefix(static_cast<size_t>(put));
    } else if (ssl_ != nullptr || errno != EINTR) {
      failed_ = true;
    }
  }
  return !failed_;
}

bool RegistryServer::Stream::ReadRequest(RegistryRequest* request) {
  size_t end;
  while ((end = buffer_.find("\r\n\r\n")) == std::string::npos) {
    if (buffer_.size() > 64 * 1024 || !Fill()) return false;
  }
  const std::string head = buffer_.substr(0, end + 2);
  buffer_.erase(0, end + 4);
  size_t line_end = head.find("\r\n");
  const std::string first = head.substr(0, line_end);
  const size_t target = first.find(' ');
  const size_t version = first.rfind(' ');
  if (target == std::string::npos || version <= target) return false;
  request->method = first.substr(0, target);
  request->path = first.substr(target + 1, version - target - 1);
  if (const size_t mark = request->path.find('?'); mark != std::string::npos) {
    request->query = request->path.substr(mark + 1);
    request->path.resize(mark);
  }
  for (size_t at = line_end + 2; at < head.size(); at = line_end + 2) {
    line_end = head.find("\r\n", at);
    const std::string line = head.substr(at, line_end - at);
    const size_t colon = line.find(':');
    if (colon == std::string::npos) return false;
    std::string name = line.substr(0, colon);
    std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
    const size_t value = line.find_first_not_of(' ', colon + 1);
    request->headers[name] = value == std::string::npos ? "" : line.substr(value);
  }
  const size_t body = std::strtoul(request->Header("content-length").c_str(), nullptr, 10);
  while (buffer_.size() < body) {
    if (body > (1u << 20) || !Fill()) return false;
  }
  request->body = buffer_.substr(0, body);
  buffer_.erase(0, body);
  return true;
}

}  // namespace holdfast::test
