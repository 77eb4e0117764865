#pragma once

namespace holdfast::api {

// What containerd sets on its side of the connection, both ways.
inline constexpr int kMaxMessageBytes = 16 << 20;
// List answers come in blocks of this many, as containerd's own do.
inline constexpr int kListBlock = 100;

}  // namespace holdfast::api
