#include "worker/snapshot/mounts.h"

#include "absl/strings/str_join.h"

namespace holdfast::snapshot {

std::vector<Mount> BuildMounts(metadata::Kind kind, const std::string& fs, const std::string& work,
                               const std::vector<std::string>& parents, bool index_off) {
  const bool view = kind == metadata::Kind::kView;
  if (parents.empty()) return {{"bind", fs, {view ? "ro" : "rw", "rbind"}}};
  if (view && parents.size() == 1) return {{"bind", parents[0], {"ro", "rbind"}}};
  Mount overlay{"overlay", "overlay", {}};
  if (index_off) overlay.options.push_back("index=off");
  if (!view) {
    overlay.options.push_back("workdir=" + work);
    overlay.options.push_back("upperdir=" + fs);
  }
  overlay.options.push_back("lowerdir=" + absl::StrJoin(parents, ":"));
  return {overlay};
}

}  // namespace holdfast::snapshot
