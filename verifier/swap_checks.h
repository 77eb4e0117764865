// What a candidate must pass before it may have a swap (DESIGN 4.4): the rehearsal, in which no container is
// touched, and the live probe, while it serves on trial. What they mean is in schema/verifier.capnp.
//
// Event loop's thread only; owns the canaries while they exist. How it fails: the promise is rejected with a
// reason for people. A worker that does not answer is the supervisor's affair (the swap machine's time
// limit); a mount that does not answer is left to its thread at the deadline.
#pragma once

#include <kj/async.h>
#include <kj/timer.h>

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "schema/verifier.capnp.h"
#include "verifier/probe.h"

namespace holdfast::verifier {

inline constexpr uint32_t kSamples = 256;  // requests, and things shown, that are asked for
inline constexpr unsigned kCanaries = 3;   // mounts
inline constexpr uint64_t kUnreadableMillis = 1'000;
inline constexpr uint64_t kSamplesMillis = 10'000;
inline constexpr uint64_t kCanaryWalkMillis = 10'000;
inline constexpr uint64_t kLiveProbeMillis = 5'000;

// CheckMounts on a thread of its own. DeadlineExceeded names the mount it was at; the thread stays there for
// as long as the kernel wants.
kj::Promise<absl::StatusOr<std::string>> CheckMountsWithin(kj::Timer& timer, ProbeRequest request,
                                                           uint64_t milliseconds);

class SwapChecks {
 public:
  explicit SwapChecks(kj::Timer& timer) : timer_(timer) {}

  // What was compared, in words. Without `owner` there is nothing to compare with.
  kj::Promise<std::string> Rehearse(kj::Maybe<schema::Worker::Client> owner, schema::Worker::Client candidate,
                                    schema::MountView::Client mounts, std::string canary_folder);
  // Uses what the last rehearsal's owner named.
  kj::Promise<std::string> ProbeLive(uint64_t generation);

 private:
  struct Canary;
  using Canaries = std::shared_ptr<std::vector<Canary>>;
  using Live = schema::MountView::LiveResults;
  using Entries = capnp::Response<Live>;

  kj::Promise<std::string> CompareWith(schema::Worker::Client owner, schema::Worker::Client candidate);
  kj::Promise<std::string> Compare(schema::Worker::Client candidate,
                                   capnp::Response<schema::Worker::SamplesResults> samples);
  std::vector<uint64_t> SampledMounts() const;
  kj::Promise<Entries> LiveMounts();
  kj::Promise<void> FindUnreadable(Live::Reader live);
  kj::Promise<size_t> WalkCanaries(schema::Worker::Client candidate);
  kj::Promise<size_t> WalkCanariesOf(schema::Worker::Client candidate, Live::Reader live);
  kj::Promise<void> NumberCanaries(Canaries canaries, size_t done);
  kj::Promise<void> LookAt(schema::Worker::Client candidate, Canaries canaries);
  kj::Promise<void> RemoveCanaries(schema::Worker::Client candidate, Canaries canaries);

  kj::Timer& timer_;
  std::string canary_folder_;
  kj::Maybe<schema::MountView::Client> mounts_;
  std::set<uint64_t> unreadable_;                     // mounts, of the last rehearsal
  std::map<uint64_t, std::vector<ProbeFile>> files_;  // by mount, of the last rehearsal
};

}  // namespace holdfast::verifier
