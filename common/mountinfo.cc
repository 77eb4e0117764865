#include "common/mountinfo.h"

#include <algorithm>
#include <iterator>
#include <sstream>

#include "absl/strings/escaping.h"
#include "common/io.h"

namespace holdfast {
namespace {

std::string Unescape(const std::string& text) {  // mountinfo writes a space as \040
  std::string out;
  return absl::CUnescape(text, &out) ? out : text;
}

}  // namespace

std::vector<MountInfo> ParseMountInfo(const std::string& text) {
  std::vector<MountInfo> mounts;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    // id parent major:minor root path options [optional...] - type source super-options
    std::istringstream words(line);
    std::vector<std::string> fields{std::istream_iterator<std::string>(words), {}};
    auto dash = std::find(fields.begin(), fields.end(), "-");
    if (fields.size() < 6 || fields.end() - dash < 4) continue;
    mounts.push_back({fields[2], Unescape(fields[4]), dash[1]});
  }
  return mounts;
}

absl::StatusOr<std::vector<MountInfo>> ReadMountInfo() {
  HF_ASSIGN_OR_RETURN(std::string text, ReadFile("/proc/self/mountinfo"));
  return ParseMountInfo(text);
}

bool IsUnder(std::string_view path, std::string_view folder) {
  if (folder == "/") return path.substr(0, 1) == "/";
  return path.substr(0, folder.size()) == folder &&
         (path.size() == folder.size() || path[folder.size()] == '/');
}

}  // namespace holdfast
