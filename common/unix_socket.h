// Listening unix sockets.
#pragma once

#include <string>

#include "common/io.h"
#include "common/status.h"

namespace holdfast {

// A listening unix socket, mode 0600. A stale socket is replaced; AlreadyExists when a living process has it.
absl::StatusOr<UniqueFd> ListenUnix(const std::string& path);

// A listening unix socket of that path, which is there.
bool IsListeningOn(int fd, const std::string& path);

}  // namespace holdfast
