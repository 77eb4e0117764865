// Private copies of programs, kept by their digest: what is started from one stays what it was when the
// original is upgraded or removed. Layout: <folder>/<sha256>/<name>. Blocks. Thread-safe but for two writers
// of one folder.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "common/io.h"
#include "common/status.h"
#include "common/unhurried.h"

namespace holdfast {

// A worker has some 10 MB. A larger file was named by mistake, and would fill the disk.
inline constexpr int64_t kMostExecutableBytes = int64_t{1} << 30;

struct Executable {
  std::string sha256;
  UniqueFd file;
};

class ExecutableStore {
 public:
  // `folder` is made when the first copy is.
  ExecutableStore(std::string folder, std::string name)
      : folder_(std::move(folder)), name_(std::move(name)) {}

  // Copies the program at `path`, synced, mode 0555. The error says what is wrong with it, also when it is
  // larger than kMostExecutableBytes. `unhurried`: it rests in between.
  absl::StatusOr<std::shared_ptr<const Executable>> Add(const std::string& path,
                                                        Unhurried* unhurried = nullptr) const;
  // The copy that was kept under this digest; null when there is none, or it is damaged.
  std::shared_ptr<const Executable> Open(const std::string& sha256) const;
  // Removes the copies not named in `keep`. Errors are left for the next time.
  void Keep(const std::vector<std::string>& keep) const;

 private:
  std::string PathOf(const std::string& sha256) const { return folder_ + "/" + sha256 + "/" + name_; }
  absl::StatusOr<std::string> Install(int source, Unhurried* unhurried) const;

  const std::string folder_, name_;
};

}  // namespace holdfast
