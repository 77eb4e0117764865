#include "worker/snapshot/labels.h"

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/str_split.h"

namespace holdfast::snapshot {
namespace {

constexpr size_t kMaxNeighbours = 256;
constexpr size_t kMaxReferenceBytes = 1024;
constexpr size_t kMaxLabelBytes = 4096;
// Would switch verification off; an image's author must not be able to.
constexpr char kSkipVerifyLabel[] = "containerd.io/snapshot/remote/stargz.skipverify";

struct Source {
  const char* reference;
  const char* digest;
  const char* layers;
};

constexpr Source kSources[] = {
    {"containerd.io/snapshot/cri.image-ref", "containerd.io/snapshot/cri.layer-digest",
     "containerd.io/snapshot/cri.image-layers"},
    {"containerd.io/snapshot/remote/stargz.reference", "containerd.io/snapshot/remote/stargz.digest",
     "containerd.io/snapshot/remote/stargz.layers"},
};

bool IsPlainText(std::string_view text) {
  return std::all_of(text.begin(), text.end(),
                     [](char c) { return static_cast<unsigned char>(c) >= ' ' && c != 0x7f; });
}

// Neighbours only save time: bad entries are skipped, the rest is used.
std::vector<std::string> NeighboursFrom(const std::string& list, const std::string& self) {
  std::vector<std::string> result;
  for (absl::string_view entry : absl::StrSplit(list, ',')) {
    std::string digest(entry);
    if (!IsDigest(digest) || digest == self) continue;
    if (std::find(result.begin(), result.end(), digest) != result.end()) continue;
    result.push_back(std::move(digest));
    if (result.size() == kMaxNeighbours) break;
  }
  return result;
}

Labels PassedOn(const Labels& labels) {
  Labels result;
  for (const auto& [name, value] : labels) {
    if (name == kSkipVerifyLabel || name.size() + value.size() > kMaxLabelBytes) continue;
    if (IsPlainText(name) && IsPlainText(value)) result.emplace(name, value);
  }
  return result;
}

}  // namespace

bool IsDigest(std::string_view text) {
  constexpr std::string_view kPrefix = "sha256:";
  if (text.size() != kPrefix.size() + 64 || text.substr(0, kPrefix.size()) != kPrefix) return false;
  std::string_view hex = text.substr(kPrefix.size());
  return std::all_of(hex.begin(), hex.end(),
                     [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
}

bool IsReference(std::string_view text) {
  if (text.empty() || text.size() > kMaxReferenceBytes) return false;
  auto allowed = [](char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
           std::string_view("._-:/@[]").find(c) != std::string_view::npos;
  };
  if (!std::all_of(text.begin(), text.end(), allowed)) return false;
  for (absl::string_view part : absl::StrSplit(ToAbsl(text), '/')) {
    if (part.empty() || part == "." || part == "..") return false;
  }
  return true;
}

std::string TenantOf(std::string_view key) {
  size_t first = key.find('/');
  if (first == std::string_view::npos || first == 0) return "";
  size_t second = key.find('/', first + 1);
  if (second == std::string_view::npos || second == first + 1) return "";
  std::string_view id = key.substr(first + 1, second - first - 1);
  if (!std::all_of(id.begin(), id.end(), [](char c) { return c >= '0' && c <= '9'; })) return "";
  return std::string(key.substr(0, first));
}

const std::string& LabelOr(const Labels& labels, const std::string& name) {
  static const std::string kNone;
  auto it = labels.find(name);
  return it == labels.end() ? kNone : it->second;
}

Labels WithoutEmpty(const Labels& labels) {
  Labels result;
  for (const auto& [name, value] : labels) {
    if (!value.empty()) result.emplace(name, value);
  }
  return result;
}

absl::StatusOr<std::vector<LayerRequest>> LayerRequestsFrom(const Labels& labels, std::string_view key) {
  const std::string& toc_digest = LabelOr(labels, kTocDigestLabel);
  if (!toc_digest.empty() && !IsDigest(toc_digest)) {
    return FailedPrecondition(std::string("label ") + kTocDigestLabel + " is not a digest");
  }
  std::vector<LayerRequest> requests;
  for (const Source& source : kSources) {
    LayerRequest request;
    request.image_ref = LabelOr(labels, source.reference);
    request.layer_digest = LabelOr(labels, source.digest);
    if (request.image_ref.empty() && request.layer_digest.empty()) continue;
    if (!IsReference(request.image_ref)) {
      return FailedPrecondition(std::string("label ") + source.reference + " is not an image reference");
    }
    if (!IsDigest(request.layer_digest)) {
      return FailedPrecondition(std::string("label ") + source.digest + " is not a digest");
    }
    request.toc_digest = toc_digest;
    request.neighbours = NeighboursFrom(LabelOr(labels, source.layers), request.layer_digest);
    request.labels = PassedOn(labels);
    request.tenant = TenantOf(key);
    requests.push_back(std::move(request));
  }
  if (requests.empty()) return FailedPrecondition("no label names the image and the layer");
  return requests;
}

}  // namespace holdfast::snapshot
