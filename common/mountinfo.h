// What is mounted where, in this process's mount namespace. Format: proc(5), mountinfo.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "common/status.h"

namespace holdfast {

struct MountInfo {
  std::string device;  // "major:minor"
  std::string path;
  std::string type;
};
// Parses mountinfo; lines that are none are left out.
std::vector<MountInfo> ParseMountInfo(const std::string& text);
absl::StatusOr<std::vector<MountInfo>> ReadMountInfo();

// True when `path` is `folder` or lies below it.
bool IsUnder(std::string_view path, std::string_view folder);

}  // namespace holdfast
