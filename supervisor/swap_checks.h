// What a candidate must pass before it may have a swap (DESIGN 4.4): the rehearsal, in which no container is
// touched, and the live probe, while it serves on trial.
//
// Rehearsal: the owner names requests it answered and things its mounts show, all of it on this disk; the
// candidate must answer the same requests with the same bytes, then serve canaries, private mounts with the
// blobs of real ones, in which a helper process finds what the owner said. Live probe: a helper asks real
// mounts who serves them, and reads from them past the page cache.
//
// Main thread only; owns the canaries while they exist. How it fails: the promise is rejected with a reason
// for people; a worker that does not answer is the caller's affair (the machine's time limit), a helper is
// killed at its deadline.
#pragma once

#include <kj/async.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "schema/handover.capnp.h"
#include "supervisor/fuse_mount.h"
#include "supervisor/helper.h"
#include "supervisor/vault.h"

namespace holdfast::supervisor {

inline constexpr uint32_t kSamples = 256;  // requests, and things shown, that are asked for
inline constexpr size_t kCanaries = 3;     // mounts
inline constexpr char kCanaryFolder[] = "supervisor/canary";  // in the state folder
inline constexpr uint64_t kCanaryWalkMillis = 10'000;
inline constexpr uint64_t kLiveProbeMillis = 5'000;

class SwapChecks {
 public:
  // All outlive it. `state_fd` is the state folder, opened.
  SwapChecks(int state_fd, std::string state_dir, Vault* vault, Helpers* helpers)
      : state_fd_(state_fd), state_dir_(std::move(state_dir)), vault_(*vault), helpers_(*helpers) {}

  // What was compared, in words.
  kj::Promise<std::string> Rehearse(schema::Worker::Client owner, schema::Worker::Client candidate);
  // Uses what the last rehearsal's owner named. `generation` must answer.
  kj::Promise<std::string> ProbeLive(uint64_t generation);

 private:
  struct Canary {
    uint64_t id = 0, original = 0;
    Mount mount;
    InitOptions options;
    absl::Status made;
  };
  using Canaries = std::shared_ptr<std::vector<Canary>>;

  kj::Promise<size_t> WalkCanaries(schema::Worker::Client candidate);
  std::vector<const Mount*> SampledMounts() const;
  kj::Promise<void> LookAt(schema::Worker::Client candidate, const Canaries& canaries);
  kj::Promise<void> RemoveCanaries(schema::Worker::Client candidate, Canaries canaries);

  const int state_fd_;
  const std::string state_dir_;
  Vault& vault_;
  Helpers& helpers_;
  std::map<uint64_t, std::vector<ProbeFile>> files_;  // by mount, of the last rehearsal
};

}  // namespace holdfast::supervisor
