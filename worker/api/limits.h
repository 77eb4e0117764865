#pragma once

#include <grpc/grpc.h>

namespace holdfast::api {

// What containerd sets on its side of the connection, both ways.
inline constexpr int kMaxMessageBytes = 16 << 20;
// List answers come in blocks of this many, as containerd's own do.
inline constexpr int kListBlock = 100;
// 0 = gRPC does not probe the bandwidth, with pings between the calls; nor is there much to find on a unix
// socket. A connection that grew old is closed behind its last answer. Whoever writes to it just then, a ping
// or the answer to one, may lose that answer: gRPC's C++ client reads no further once it could not write, and
// the kernel resets what is closed with bytes unread.
inline constexpr char kBandwidthProbe[] = GRPC_ARG_HTTP2_BDP_PROBE;

}  // namespace holdfast::api
