#include "schema/rpc.h"

#include <utility>

// Generated server bases have a protected life cycle (kj::Own) and no virtual destructor.
#pragma GCC diagnostic ignored "-Wnon-virtual-dtor"

namespace holdfast {
namespace {

class DescriptorServer final : public schema::Descriptor::Server {
 public:
  explicit DescriptorServer(SharedFd fd) : fd_(std::move(fd)) {}
  kj::Maybe<int> getFd() override { return fd_->get(); }

 private:
  const SharedFd fd_;
};

}  // namespace

std::string String(capnp::Data::Reader data) {
  auto chars = data.asChars();
  return std::string(chars.begin(), chars.size());
}

kj::ArrayPtr<const kj::byte> Bytes(const std::string& text) {
  return kj::arrayPtr(reinterpret_cast<const kj::byte*>(text.data()), text.size());
}

// KJ_EXCEPTION and KJ_REQUIRE would put the text of the expression before the reason, which people read.
kj::Exception Failed(const std::string& reason) {
  return kj::Exception(kj::Exception::Type::FAILED, __FILE__, __LINE__, kj::str(reason.c_str()));
}

void Throw(const absl::Status& status) {
  kj::throwFatalException(Failed(std::string(FromAbsl(status.message()))));
  __builtin_unreachable();
}

std::string Describe(const kj::Exception& exception) {
  std::string reason = exception.getDescription().cStr();
  // Each connection that it came through puts this before it.
  static constexpr std::string_view kPrefix = "remote exception: ";
  while (reason.rfind(kPrefix, 0) == 0) reason.erase(0, kPrefix.size());
  return reason;
}

schema::Descriptor::Client MakeDescriptor(SharedFd fd) { return kj::heap<DescriptorServer>(std::move(fd)); }

}  // namespace holdfast
