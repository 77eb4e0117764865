// Between Cap'n Proto's values and ours, for everybody who speaks a protocol of this folder.
#pragma once

#include <capnp/capability.h>
#include <kj/exception.h>

#include <memory>
#include <string>
#include <utility>

#include "common/io.h"
#include "common/status.h"
#include "schema/handover.capnp.h"

namespace holdfast {

std::string String(capnp::Data::Reader data);
// Not a copy.
kj::ArrayPtr<const kj::byte> Bytes(const std::string& text);

// For callers to read: nothing but the reason.
kj::Exception Failed(const std::string& reason);
[[noreturn]] void Throw(const absl::Status& status);
template <typename T>
T OrThrow(absl::StatusOr<T> value) {
  if (!value.ok()) Throw(value.status());
  return *std::move(value);
}
std::string Describe(const kj::Exception& exception);

// A capability that carries `fd` and keeps it open.
schema::Descriptor::Client MakeDescriptor(SharedFd fd);
inline schema::Descriptor::Client MakeDescriptor(UniqueFd fd) {
  return MakeDescriptor(std::make_shared<UniqueFd>(std::move(fd)));
}

}  // namespace holdfast
