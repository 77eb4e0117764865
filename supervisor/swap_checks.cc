#include "supervisor/swap_checks.h"

#include <linux/fuse.h>
#include <string.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "supervisor/offload.h"
#include "supervisor/rpc.h"

namespace holdfast::supervisor {
namespace {

fuse_init_out InitOut(const std::string& reply) {
  fuse_init_out out{};
  size_t body = reply.size() - std::min(reply.size(), sizeof(fuse_out_header));
  if (body > 0) memcpy(&out, reply.data() + sizeof(fuse_out_header), std::min(body, sizeof(out)));
  return out;
}

// A canary is mounted as its original was.
InitOptions OptionsOf(const Mount& mount) {
  fuse_init_out out = InitOut(mount.init_reply);
  InitOptions options;
  options.flags = uint64_t{out.flags} | uint64_t{out.flags2} << 32;
  options.max_background = out.max_background;
  options.congestion_threshold = out.congestion_threshold;
  if (out.max_pages != 0) options.max_pages = out.max_pages;
  return options;
}

bool KnowsProbe(const Mount& mount) { return (InitOut(mount.init_reply).flags & FUSE_IOCTL_DIR) != 0; }

std::string Describe(schema::SampleRequest::Reader sample) {
  fuse_in_header in{};
  auto bytes = sample.getRequest();
  memcpy(&in, bytes.begin(), std::min(bytes.size(), sizeof(in)));
  return "mount " + std::to_string(sample.getMountId()) + " opcode " + std::to_string(in.opcode) + " node " +
         std::to_string(in.nodeid);
}

ProbeFile Convert(schema::SampleFile::Reader in) {
  auto kind = in.getKind() == schema::SampleKind::FILE     ? ProbeKind::kFile
              : in.getKind() == schema::SampleKind::FOLDER ? ProbeKind::kFolder
                                                           : ProbeKind::kAbsent;
  return {kind, String(in.getPath()), in.getOffset(), in.getLength(), String(in.getDigest())};
}

}  // namespace

kj::Promise<std::string> SwapChecks::Rehearse(schema::Worker::Client owner,
                                              schema::Worker::Client candidate) {
  files_.clear();
  auto request = owner.samplesRequest();
  request.setLimit(kSamples);
  using Samples = capnp::Response<schema::Worker::SamplesResults>;
  return request.send().then([this, candidate](Samples&& samples) mutable -> kj::Promise<std::string> {
    for (auto file : samples.getFiles()) files_[file.getMountId()].push_back(Convert(file));
    auto replay = candidate.replayRequest();
    replay.setRequests(samples.getRequests());
    auto replayed = replay.send();
    using Replayed = capnp::Response<schema::Worker::ReplayResults>;
    return replayed.then([this, candidate, samples = kj::mv(samples)](Replayed&& result) mutable {
      auto different = result.getDifferent();
      auto requests = samples.getRequests();
      if (different.size() != 0) {
        std::string first = different[0] < requests.size() ? Describe(requests[different[0]]) : "?";
        Throw(FailedPrecondition("the new worker answers " + std::to_string(different.size()) + " of " +
                                 std::to_string(requests.size()) +
                                 " requests otherwise than the running one, the first is: " + first));
      }
      size_t compared = requests.size() - std::min(requests.size(), result.getSkipped());
      return WalkCanaries(candidate).then([this, compared](size_t canaries) {
        size_t files = 0;
        for (const auto& [id, list] : files_) files += list.size();
        return std::to_string(compared) + " requests compared, " + std::to_string(canaries) +
               " canary mounts walked, " + std::to_string(files) + " samples";
      });
    });
  });
}

// Live mounts with samples, those with the most first.
std::vector<const Mount*> SwapChecks::SampledMounts() const {
  std::vector<const Mount*> mounts;
  for (const auto& [id, list] : files_) {
    const Mount* mount = vault_.Find(id);
    if (mount != nullptr && mount->state == MountState::kLive) mounts.push_back(mount);
  }
  std::stable_sort(mounts.begin(), mounts.end(), [&](const Mount* a, const Mount* b) {
    return files_.at(a->id).size() > files_.at(b->id).size();
  });
  if (mounts.size() > kCanaries) mounts.resize(kCanaries);
  return mounts;
}

kj::Promise<size_t> SwapChecks::WalkCanaries(schema::Worker::Client candidate) {
  auto canaries = std::make_shared<std::vector<Canary>>();
  for (const Mount* original : SampledMounts()) {
    auto id = vault_.NextId();
    if (!id.ok()) Throw(id.status());
    Canary canary{
        .id = *id, .original = original->id, .mount = {}, .options = OptionsOf(*original), .made = {}};
    canary.mount.id = *id;
    canary.mount.state = MountState::kLive;
    canary.mount.blob = original->blob;
    canary.mount.path = state_dir_ + "/" + kCanaryFolder + "/" + std::to_string(*id);
    canaries->push_back(std::move(canary));
  }
  size_t count = canaries->size();
  if (count == 0) return count;
  auto mounted = Offload<int>([canaries, fd = state_fd_, state_dir = state_dir_] {
    for (Canary& canary : *canaries) {
      canary.made = MakeDirs(canary.mount.path);
      if (!canary.made.ok()) continue;
      auto device = OpenFuseDevice();
      canary.made = device.status();
      if (!device.ok()) continue;
      auto made = MountFuse(device->get(), fd, state_dir, canary.mount.path, canary.options);
      canary.made = made.status();
      if (!made.ok()) continue;
      canary.mount.device = std::make_shared<UniqueFd>(std::move(*device));
      canary.mount.init_request = std::move(made->request);
      canary.mount.init_reply = std::move(made->reply);
    }
    return 0;
  });
  auto looked = mounted.then(
      [this, candidate, canaries](kj::Own<int>&&) mutable { return LookAt(candidate, canaries); });
  // Whatever came of it, they go.
  return looked.then(
      [this, candidate, canaries, count]() mutable {
        return RemoveCanaries(candidate, canaries).then([count] { return count; });
      },
      [this, candidate, canaries](kj::Exception&& failed) mutable -> kj::Promise<size_t> {
        return RemoveCanaries(candidate, canaries)
            .then([failed = kj::mv(failed)]() mutable -> kj::Promise<size_t> { return kj::mv(failed); });
      });
}

kj::Promise<void> SwapChecks::LookAt(schema::Worker::Client candidate, const Canaries& canaries) {
  auto request = candidate.addMountsRequest();
  auto entries = request.initEntries(static_cast<unsigned>(canaries->size()));
  ProbeRequest probe;
  for (unsigned i = 0; i < canaries->size(); ++i) {
    const Canary& canary = (*canaries)[i];
    if (!canary.made.ok()) Throw(Annotate(canary.made, "canary mount"));
    FillMountEntry(canary.mount, true, entries[i]);
    probe.mounts.push_back({.id = canary.id, .root = canary.mount.path, .files = files_[canary.original]});
  }
  return request.send().ignoreResult().then([this, probe = std::move(probe)] {
    return helpers_.Probe(probe, kCanaryWalkMillis).then([](absl::StatusOr<std::string> result) {
      if (!result.ok()) Throw(Annotate(result.status(), "canary walk"));
    });
  });
}

kj::Promise<void> SwapChecks::RemoveCanaries(schema::Worker::Client candidate, Canaries canaries) {
  auto unmounted = Offload<int>([canaries] {
    for (const Canary& canary : *canaries) {
      if (canary.mount.device == nullptr) continue;
      UnmountFuse(canary.mount.path, canary.mount.device->get()).status().IgnoreError();
      rmdir(canary.mount.path.c_str());
    }
    return 0;
  });
  return unmounted.then([candidate, canaries](kj::Own<int>&&) mutable {
    auto request = candidate.mountsGoneRequest();
    auto ids = request.initMountIds(static_cast<unsigned>(canaries->size()));
    for (unsigned i = 0; i < canaries->size(); ++i) ids.set(i, (*canaries)[i].id);
    // A candidate that is dead need not know.
    return request.send().ignoreResult().catch_([](kj::Exception&&) {});
  });
}

kj::Promise<std::string> SwapChecks::ProbeLive(uint64_t generation) {
  ProbeRequest probe;
  for (const Mount* mount : SampledMounts()) {
    probe.mounts.push_back({.id = mount->id,
                            .root = mount->path,
                            .generation = generation,
                            .may_be_unsupported = !KnowsProbe(*mount),
                            .files = files_[mount->id]});
  }
  if (probe.mounts.empty()) return std::string("no mount with cached content to look at");
  return helpers_.Probe(probe, kLiveProbeMillis)
      .then([count = probe.mounts.size()](absl::StatusOr<std::string> result) {
        if (!result.ok()) Throw(result.status());
        return std::to_string(count) + " live mounts probed: " + *result;
      });
}

}  // namespace holdfast::supervisor
