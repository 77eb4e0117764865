// What a path of a mount must show, so that a helper process can look whether a worker shows it (SampleFile
// in handover.capnp): pieces of files, listings of folders, names that do not exist. Taken from the layers'
// indexes as the FUSE mount shows them: a whiteout is a device file of that name, an opaque mark no name.
//
// Only what lies on this disk and matches its digest is chosen, and nothing is fetched. What is not known to
// match (all of it after a distrust or a boot) is read and hashed here, if that does not take long. A piece
// that is a chunk has the digest that its image's table of contents states; a larger chunk's first bytes are
// read and hashed here.
// Each call chooses anew, at random. Thread safety: one call at a time for one layer is not needed.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "common/clock.h"
#include "worker/handover/supervisor_link.h"
#include "worker/layer/layer.h"

namespace holdfast::app {

inline constexpr uint64_t kSampleBytes = 256 * 1024;  // the longest piece of a file

struct SampledMount {
  uint64_t mount_id = 0;
  std::shared_ptr<layer::Layer> layer;  // null: it cannot be opened
};

// At most `limit` samples, spread over `mounts` mounts; `open` gives one of them, when its turn comes. Stops
// at the deadline with what it has.
std::vector<handover::SampleFile> SampleMounts(size_t mounts, const std::function<SampledMount(size_t)>& open,
                                               uint32_t limit, uint64_t deadline_boot_nanos,
                                               const Clock& clock);

}  // namespace holdfast::app
