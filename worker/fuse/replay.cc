// Samples of requests with the digests of their answers, and their repetition by another build (DESIGN 4.4).
// A replay runs through the same operations and the same reply pipe as a request of the kernel; only where
// the reply goes differs.
#include <linux/fuse.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <map>
#include <random>
#include <set>
#include <string>
#include <utility>

#include "common/unhurried.h"
#include "worker/fuse/server_core.h"
#include "worker/layer/digest.h"

namespace holdfast::fuse {
namespace {

constexpr size_t kLongestRequest = 65536;
constexpr uint32_t kMadeUpRead = 16384;  // bytes

// Times-to-live say how long to believe an answer, not what it is; on trial they are 0.
void ClearTimes(uint32_t opcode, std::string* reply) {
  char* body = reply->data() + sizeof(fuse_out_header);
  const size_t size = reply->size() - sizeof(fuse_out_header);
  auto clear_entry = [](char* at) {
    memset(at + offsetof(fuse_entry_out, entry_valid), 0, 2 * sizeof(uint64_t));
    memset(at + offsetof(fuse_entry_out, entry_valid_nsec), 0, 2 * sizeof(uint32_t));
  };
  static_assert(offsetof(fuse_entry_out, attr_valid) == offsetof(fuse_entry_out, entry_valid) + 8);
  static_assert(offsetof(fuse_entry_out, attr_valid_nsec) == offsetof(fuse_entry_out, entry_valid_nsec) + 4);
  if (opcode == FUSE_LOOKUP && size >= sizeof(fuse_entry_out)) clear_entry(body);
  if (opcode == FUSE_GETATTR && size >= sizeof(fuse_attr_out)) {
    memset(body + offsetof(fuse_attr_out, attr_valid), 0, sizeof(uint64_t));
    memset(body + offsetof(fuse_attr_out, attr_valid_nsec), 0, sizeof(uint32_t));
  }
  if (opcode != FUSE_READDIRPLUS) return;
  for (size_t at = 0; size - at >= offsetof(fuse_direntplus, dirent) + FUSE_NAME_OFFSET;) {
    clear_entry(body + at);
    fuse_dirent dirent;
    memcpy(&dirent, body + at + offsetof(fuse_direntplus, dirent), FUSE_NAME_OFFSET);
    size_t step = FUSE_DIRENT_ALIGN(offsetof(fuse_direntplus, dirent) + FUSE_NAME_OFFSET + dirent.namelen);
    if (step > size - at) break;
    at += step;
  }
}

template <typename T>
std::string BytesOf(const T& value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof value);
}

std::string MakeRequest(uint32_t opcode, uint64_t nodeid, const std::string& arguments) {
  fuse_in_header in{};
  in.len = static_cast<uint32_t>(sizeof in + arguments.size());
  in.opcode = opcode;
  in.unique = 2;
  in.nodeid = nodeid;
  return BytesOf(in) + arguments;
}

std::string MakeRead(uint32_t opcode, uint64_t nodeid, uint64_t offset, uint32_t size) {
  fuse_read_in read{};
  read.offset = offset;
  read.size = size;
  return MakeRequest(opcode, nodeid, BytesOf(read));
}

// Something that a container could ask of a node.
std::string MakeUp(const layer::LayerIndex& index, std::mt19937_64& random) {
  uint64_t nodeid = random() % index.node_count() + 1;
  const layer::NodeRecord& node = *index.node(nodeid);
  auto names = index.children(nodeid);
  switch (node.mode & S_IFMT) {
    case S_IFDIR:
      if (random() % 3 == 0) return MakeRead(FUSE_READDIR, nodeid, random() % (names.size() + 2), 4096);
      if (random() % 2 == 0) return MakeRead(FUSE_READDIRPLUS, nodeid, random() % (names.size() + 2), 4096);
      if (names.empty()) return MakeRequest(FUSE_LOOKUP, nodeid, std::string("no such name\0", 13));
      return MakeRequest(FUSE_LOOKUP, nodeid, std::string(index.name(names[random() % names.size()])) + '\0');
    case S_IFREG:
      if (node.size > 0 && random() % 4 != 0) {
        return MakeRead(FUSE_READ, nodeid, random() % node.size / 4096 * 4096, kMadeUpRead);
      }
      break;
    case S_IFLNK:
      if (random() % 2 == 0) return MakeRequest(FUSE_READLINK, nodeid, "");
      break;
    default:
      break;
  }
  if (node.xattr_count > 0) return MakeRequest(FUSE_LISTXATTR, nodeid, BytesOf(fuse_getxattr_in{4096, 0}));
  return MakeRequest(FUSE_GETATTR, nodeid, BytesOf(fuse_getattr_in{}));
}

// What makes two requests the same: all but their number and who asks.
std::string Identity(uint64_t mount_id, const std::string& request) {
  fuse_in_header in;
  memcpy(&in, request.data(), sizeof in);
  return BytesOf(mount_id) + BytesOf(in.opcode) + BytesOf(in.nodeid) + request.substr(sizeof in);
}

}  // namespace

absl::StatusOr<std::string> ServerCore::Replay(const std::shared_ptr<Mount>& mount, std::string_view request,
                                               int* error) {
  fuse_in_header in;
  if (request.size() < sizeof in || request.size() > kLongestRequest) return InvalidArgument("not a request");
  memcpy(&in, request.data(), sizeof in);
  SampleLane lane;
  if (in.len != request.size() || !Sampler::LaneOf(in.opcode, &lane)) {
    return InvalidArgument("not a request that can be repeated");
  }
  std::string bytes(request);
  bytes.append(128, '\0');  // arguments that are missing are zeros
  Capture capture;
  BorrowedPipe pipe(this);
  Exchange x;
  x.core = this;
  x.mount = mount.get();
  x.pipe = pipe.get();
  x.unique = in.unique;
  x.opcode = in.opcode;
  x.capture = &capture;
  Execute(x, reinterpret_cast<const uint8_t*>(bytes.data()), in.len);
  if (capture.not_on_disk) return Unavailable("its content is not on this disk");
  fuse_out_header out;
  if (capture.reply.size() < sizeof out) return Internal("the request had no answer");
  memcpy(&out, capture.reply.data(), sizeof out);
  *error = -out.error;
  if (out.error == 0) ClearTimes(in.opcode, &capture.reply);
  layer::DigestStream digest;
  digest.Update(&out.error, sizeof out.error);
  digest.Update(std::string_view(capture.reply).substr(sizeof out));
  toc::Digest result = digest.Finish();
  return std::string(reinterpret_cast<const char*>(result.data()), result.size());
}

absl::StatusOr<std::string> ServerCore::Replay(uint64_t mount_id, std::string_view request) {
  std::shared_ptr<Mount> mount = FindMount(mount_id);
  if (mount == nullptr) return NotFound("mount " + std::to_string(mount_id) + " is not served here");
  int error = 0;
  return Replay(mount, request, &error);
}

std::vector<Sample> ServerCore::Samples(size_t limit, uint64_t deadline_boot_nanos) {
  std::vector<Sample> samples;
  std::set<std::string> known;
  Unhurried unhurried;
  auto add = [&](const std::shared_ptr<Mount>& mount, std::string request) {
    unhurried.Rest();
    if (!known.insert(Identity(mount->id(), request)).second) return;
    int error = 0;
    absl::StatusOr<std::string> digest = Replay(mount, request, &error);
    // EIO says that something is wrong here, not what is right.
    if (digest.ok() && error != EIO) samples.push_back({mount->id(), std::move(request), *std::move(digest)});
  };

  // Those of the kernel, the newest of each mount first, mount by mount.
  std::vector<Sampler::Kept> all = sampler_.All();
  std::sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.when > b.when; });
  std::map<uint64_t, std::vector<Sampler::Kept>> by_mount;
  for (Sampler::Kept& kept : all) by_mount[kept.mount_id].push_back(std::move(kept));
  size_t from_kernel = limit - limit / 4;
  const auto in_time = [&] { return options_.clock->BootNanos() < deadline_boot_nanos; };
  for (size_t round = 0, left = 1; left > 0 && samples.size() < from_kernel; round++) {
    left = 0;
    for (auto& [mount_id, kept] : by_mount) {
      if (round >= kept.size() || samples.size() >= from_kernel || !in_time()) continue;
      left++;
      if (std::shared_ptr<Mount> mount = FindMount(mount_id)) add(mount, std::move(kept[round].request));
    }
  }

  // Where everything is cached the kernel asks nothing: made-up requests look at nodes it has long known.
  std::vector<std::shared_ptr<Mount>> mounts = AllMounts();
  std::mt19937_64 random(options_.clock->BootNanos());
  std::shuffle(mounts.begin(), mounts.end(), random);
  for (size_t tries = 0; !mounts.empty() && tries < 4 * limit && samples.size() < limit && in_time();
       tries++) {
    const auto& mount = mounts[tries % mounts.size()];
    absl::StatusOr<std::shared_ptr<layer::Layer>> layer = mount->GetLayer(*options_.clock);
    if (layer.ok()) add(mount, MakeUp((*layer)->index(), random));
  }
  return samples;
}

}  // namespace holdfast::fuse
