// What containerd's labels say about a layer. Annotations of an image manifest reach us as labels, so an
// image's author may have written any of them: everything is checked before it is used.
//
// Sources: containerd.io/snapshot/cri.{image-ref,layer-digest,image-layers} (CRI, nerdctl, docker) and
// containerd.io/snapshot/remote/stargz.{reference,digest,layers} (ctr-remote).
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "common/status.h"
#include "worker/snapshot/layer_mounter.h"

namespace holdfast::snapshot {

using Labels = std::map<std::string, std::string>;

inline constexpr char kTargetLabel[] = "containerd.io/snapshot.ref";
inline constexpr char kTocDigestLabel[] = "containerd.io/snapshot/stargz/toc.digest";
inline constexpr char kRemoteLabel[] = "containerd.io/snapshot/remote";
inline constexpr char kRemoteLabelValue[] = "remote snapshot";
// Set by containerd 2.4: the chain below this layer. With an empty parent it means that layers are unpacked
// in parallel.
inline constexpr char kParentChainLabel[] = "containerd.io/snapshot/parent-chain-id";

// sha256:<64 lower-case hexadecimal digits>
bool IsDigest(std::string_view text);
// A registry reference: [host[:port]/]path[:tag][@digest]; at most 1,024 bytes.
bool IsReference(std::string_view text);

// The namespace of a backend key "<namespace>/<id>/<client key>"; "" when the key does not look like one.
std::string TenantOf(std::string_view key);

// The label's value, or "".
const std::string& LabelOr(const Labels& labels, const std::string& name);
// Without labels of empty value: containerd drops those.
Labels WithoutEmpty(const Labels& labels);

// One request for each source that names the layer, in the order to try them. FailedPrecondition when there
// is none or one is malformed.
absl::StatusOr<std::vector<LayerRequest>> LayerRequestsFrom(const Labels& labels, std::string_view key);

}  // namespace holdfast::snapshot
