#include "verifier/swap_checks.h"

#include <fcntl.h>
#include <kj/debug.h>
#include <linux/fuse.h>
#include <string.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <utility>

#include "common/fuse_mount.h"
#include "common/offload.h"
#include "schema/rpc.h"

namespace holdfast::verifier {
namespace {

fuse_init_out InitOut(capnp::Data::Reader reply) {
  fuse_init_out out{};
  size_t body = reply.size() - std::min(reply.size(), sizeof(fuse_out_header));
  if (body > 0) memcpy(&out, reply.begin() + sizeof(fuse_out_header), std::min(body, sizeof(out)));
  return out;
}

// A canary is mounted as its original was.
InitOptions OptionsOf(schema::MountEntry::Reader mount) {
  fuse_init_out out = InitOut(mount.getInitReply());
  InitOptions options;
  options.flags = uint64_t{out.flags} | uint64_t{out.flags2} << 32;
  options.max_background = out.max_background;
  options.congestion_threshold = out.congestion_threshold;
  if (out.max_pages != 0) options.max_pages = out.max_pages;
  return options;
}

bool KnowsProbe(schema::MountEntry::Reader mount) {
  return (InitOut(mount.getInitReply()).flags & FUSE_IOCTL_DIR) != 0;
}

std::string DescribeRequest(schema::SampleRequest::Reader sample) {
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

struct SwapChecks::Canary {
  uint64_t id = 0, original = 0;
  std::string path, blob;
  InitOptions options;
  absl::Status made;
  FuseInit init;
  // Ours until the candidate has it: whoever waits for a mount must not keep it alive, or not even SIGKILL
  // ends the wait.
  SharedFd device;
};

kj::Promise<absl::StatusOr<std::string>> CheckMountsWithin(kj::Timer& timer, ProbeRequest request,
                                                           uint64_t milliseconds) {
  using Result = absl::StatusOr<std::string>;
  auto at = std::make_shared<std::atomic<uint64_t>>(0);
  auto checked = Offload<Result>([request = std::move(request), at] {
                   return CheckMounts(request, [&](uint64_t mount) { *at = mount; });
                 }).then([](kj::Own<Result>&& result) -> Result { return std::move(*result); });
  auto late = timer.afterDelay(milliseconds * kj::MILLISECONDS).then([at, milliseconds]() -> Result {
    return DeadlineExceeded("the probe did not answer within " + std::to_string(milliseconds) +
                            " ms; it was at mount " + std::to_string(*at));
  });
  return checked.exclusiveJoin(kj::mv(late));
}

kj::Promise<std::string> SwapChecks::Rehearse(kj::Maybe<schema::Worker::Client> owner,
                                              schema::Worker::Client candidate,
                                              schema::MountView::Client mounts, std::string canary_folder) {
  files_.clear();
  mounts_ = kj::mv(mounts);
  canary_folder_ = std::move(canary_folder);
  kj::Promise<std::string> compared = std::string("nothing compared, for the running worker is not asked, ");
  KJ_IF_MAYBE (running, owner) {
    compared = CompareWith(*running, candidate);
  }
  return compared.then([this, candidate](std::string text) mutable {
    return WalkCanaries(candidate).then([this, text](size_t canaries) {
      size_t files = 0;
      for (const auto& [id, list] : files_) files += list.size();
      return text + std::to_string(canaries) + " canary mounts walked, " + std::to_string(files) + " samples";
    });
  });
}

kj::Promise<std::string> SwapChecks::CompareWith(schema::Worker::Client owner,
                                                 schema::Worker::Client candidate) {
  auto request = owner.samplesRequest();
  request.setLimit(kSamples);
  using Samples = capnp::Response<schema::Worker::SamplesResults>;
  auto sampled = [this, candidate](Samples&& samples) mutable {
    for (auto file : samples.getFiles()) files_[file.getMountId()].push_back(Convert(file));
    return Compare(candidate, kj::mv(samples));
  };
  // A running build with that fault must not keep every other one out.
  auto failed = [](kj::Exception&& exception) -> kj::Promise<std::string> {
    if (exception.getType() == kj::Exception::Type::DISCONNECTED) return kj::mv(exception);
    return "nothing compared, for the running worker cannot say what it answered (" + Describe(exception) +
           "), ";
  };
  kj::Promise<Samples> asked = request.send();
  return timer_.timeoutAfter(kSamplesMillis * kj::MILLISECONDS, kj::mv(asked))
      .then(kj::mv(sampled), kj::mv(failed));
}

// The candidate answers what the owner has answered.
kj::Promise<std::string> SwapChecks::Compare(schema::Worker::Client candidate,
                                             capnp::Response<schema::Worker::SamplesResults> samples) {
  auto replay = candidate.replayRequest();
  replay.setRequests(samples.getRequests());
  using Replayed = capnp::Response<schema::Worker::ReplayResults>;
  return replay.send().then([samples = kj::mv(samples)](Replayed&& result) {
    auto different = result.getDifferent();
    auto requests = samples.getRequests();
    if (different.size() != 0) {
      std::string first = different[0] < requests.size() ? DescribeRequest(requests[different[0]]) : "?";
      Throw(FailedPrecondition("the new worker answers " + std::to_string(different.size()) + " of " +
                               std::to_string(requests.size()) +
                               " requests otherwise than the running one, the first is: " + first));
    }
    size_t compared = requests.size() - std::min(requests.size(), result.getSkipped());
    return std::to_string(compared) + " requests compared, ";
  });
}

// Those with the most samples first.
std::vector<uint64_t> SwapChecks::SampledMounts() const {
  std::vector<uint64_t> ids;
  for (const auto& [id, list] : files_) ids.push_back(id);
  std::stable_sort(ids.begin(), ids.end(),
                   [&](uint64_t a, uint64_t b) { return files_.at(a).size() > files_.at(b).size(); });
  return ids;
}

kj::Promise<SwapChecks::Entries> SwapChecks::LiveMounts() {
  auto request = KJ_REQUIRE_NONNULL(mounts_, "nothing was rehearsed").liveRequest();
  auto sampled = SampledMounts();
  auto ids = request.initMountIds(static_cast<unsigned>(sampled.size()));
  for (unsigned i = 0; i < sampled.size(); ++i) ids.set(i, sampled[i]);
  return request.send();
}

// Of mounts that nothing was sampled of: which the running worker does not serve either, e.g. because their
// layer is damaged. Those say nothing of a candidate.
kj::Promise<void> SwapChecks::FindUnreadable(Live::Reader live) {
  std::map<uint64_t, std::string> roots;
  for (auto mount : live.getEntries()) {
    if (files_.count(mount.getMountId()) == 0) roots[mount.getMountId()] = mount.getPath().cStr();
  }
  using Ids = std::set<uint64_t>;
  auto asked = Offload<Ids>([roots] {
    Ids found;
    for (const auto& [id, root] : roots) {
      if (IsUnreadable(root)) found.insert(id);
    }
    return found;
  });
  auto late = timer_.afterDelay(kUnreadableMillis * kj::MILLISECONDS).then([roots] {
    Ids all;
    for (const auto& [id, root] : roots) all.insert(id);
    return all;
  });
  return asked.then([](kj::Own<Ids>&& found) { return std::move(*found); })
      .exclusiveJoin(kj::mv(late))
      .then([this](Ids&& found) { unreadable_ = std::move(found); });
}

kj::Promise<size_t> SwapChecks::WalkCanaries(schema::Worker::Client candidate) {
  return LiveMounts().then([this, candidate](Entries&& live) mutable {
    auto found = FindUnreadable(live);
    return found.then(
        [this, candidate, live = kj::mv(live)]() mutable { return WalkCanariesOf(candidate, live); });
  });
}

kj::Promise<size_t> SwapChecks::WalkCanariesOf(schema::Worker::Client candidate, Live::Reader live) {
  auto canaries = std::make_shared<std::vector<Canary>>();
  for (auto original : live.getEntries()) {
    if (canaries->size() == kCanaries) break;
    if (unreadable_.count(original.getMountId()) != 0) continue;
    Canary& canary = canaries->emplace_back();
    canary.original = original.getMountId();
    canary.blob = String(original.getBlob());
    canary.options = OptionsOf(original);
  }
  size_t count = canaries->size();
  if (count == 0) return count;
  auto looked = NumberCanaries(canaries, 0).then([this, candidate, canaries]() mutable {
    return LookAt(candidate, canaries);
  });
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

kj::Promise<void> SwapChecks::NumberCanaries(Canaries canaries, size_t done) {
  if (done == canaries->size()) return kj::READY_NOW;
  auto request = KJ_ASSERT_NONNULL(mounts_).newMountIdRequest();
  return request.send().then(
      [this, canaries, done](capnp::Response<schema::MountView::NewMountIdResults>&& result) {
        Canary& canary = (*canaries)[done];
        canary.id = result.getMountId();
        canary.path = canary_folder_ + "/" + std::to_string(canary.id);
        return NumberCanaries(canaries, done + 1);
      });
}

kj::Promise<void> SwapChecks::LookAt(schema::Worker::Client candidate, Canaries canaries) {
  auto mounted = Offload<int>([canaries, folder = canary_folder_] {
    for (Canary& canary : *canaries) {
      canary.made = [&]() -> absl::Status {
        HF_RETURN_IF_ERROR(MakeDirs(canary.path));
        HF_ASSIGN_OR_RETURN(UniqueFd root, OpenFile(folder, O_PATH | O_DIRECTORY));
        HF_ASSIGN_OR_RETURN(UniqueFd device, OpenFuseDevice());
        HF_ASSIGN_OR_RETURN(canary.init,
                            MountFuse(device.get(), root.get(), folder, canary.path, canary.options));
        canary.device = std::make_shared<UniqueFd>(std::move(device));
        return absl::OkStatus();
      }();
    }
    return 0;
  });
  return mounted.then([this, candidate, canaries](kj::Own<int>&&) mutable {
    auto request = candidate.addMountsRequest();
    auto entries = request.initEntries(static_cast<unsigned>(canaries->size()));
    ProbeRequest probe;
    for (unsigned i = 0; i < canaries->size(); ++i) {
      Canary& canary = (*canaries)[i];
      if (!canary.made.ok()) Throw(Annotate(canary.made, "canary mount"));
      entries[i].setMountId(canary.id);
      entries[i].setState(schema::MountState::LIVE);
      entries[i].setPath(canary.path.c_str());
      entries[i].setDevice(MakeDescriptor(canary.device));
      entries[i].setInitRequest(Bytes(canary.init.request));
      entries[i].setInitReply(Bytes(canary.init.reply));
      entries[i].setBlob(Bytes(canary.blob));
      probe.mounts.push_back({.id = canary.id, .root = canary.path, .files = files_[canary.original]});
    }
    return request.send().ignoreResult().then([this, canaries, probe = std::move(probe)]() mutable {
      // It has answered, so it has them; when it lets go of the capabilities is its own affair.
      for (const Canary& canary : *canaries) canary.device->Reset();
      return CheckMountsWithin(timer_, std::move(probe), kCanaryWalkMillis)
          .then([](absl::StatusOr<std::string> result) {
            if (!result.ok()) Throw(Annotate(result.status(), "canary walk"));
          });
    });
  });
}

kj::Promise<void> SwapChecks::RemoveCanaries(schema::Worker::Client candidate, Canaries canaries) {
  for (Canary& canary : *canaries) canary.device = nullptr;  // also those that nobody got
  auto unmounted = Offload<int>([canaries] {
    for (const Canary& canary : *canaries) {
      if (canary.init.request.empty()) continue;
      RemoveMount(canary.path).IgnoreError();
      rmdir(canary.path.c_str());
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
  return LiveMounts().then([this, generation](Entries&& live) -> kj::Promise<std::string> {
    ProbeRequest probe;
    for (auto mount : live.getEntries()) {
      if (probe.mounts.size() == kCanaries) break;
      if (unreadable_.count(mount.getMountId()) != 0) continue;
      probe.mounts.push_back({.id = mount.getMountId(),
                              .root = mount.getPath().cStr(),
                              .generation = generation,
                              .may_be_unsupported = !KnowsProbe(mount),
                              .files = files_[mount.getMountId()]});
    }
    size_t count = probe.mounts.size();
    if (count == 0) return std::string("no mount to look at");
    return CheckMountsWithin(timer_, std::move(probe), kLiveProbeMillis)
        .then([count](absl::StatusOr<std::string> result) {
          if (!result.ok()) Throw(result.status());
          return std::to_string(count) + " live mounts probed: " + *result;
        });
  });
}

}  // namespace holdfast::verifier
