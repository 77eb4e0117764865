// One accepted connection of the test registry, plain or TLS: blocking reads and writes, and the parsing of
// requests. Used by one thread; shutting the descriptor down from another thread ends a blocked call.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "tests/support/registry_server.h"

struct ssl_st;

namespace holdfast::test {

class RegistryServer::Stream {
 public:
  // `context` null = plain. Does not own the descriptor.
  Stream(int fd, ssl_ctx_st* context);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  // False when the peer closed or sent nonsense.
  bool ReadRequest(RegistryRequest* request);
  bool Write(std::string_view bytes);

 private:
  bool Fill();

  const int fd_;
  ssl_st* ssl_ = nullptr;
  bool failed_ = false;
  std::string buffer_;
};

}  // namespace holdfast::test
