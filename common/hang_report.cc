#include "common/hang_report.h"

#include <fcntl.h>
#include <signal.h>
#include <time.h>

#include <algorithm>
#include <filesystem>
#include <system_error>
#include <vector>

#include "common/io.h"
#include "common/thread_dump.h"

namespace holdfast {
namespace {

constexpr size_t kMaxReportBytes = 1 << 20;

void RemoveOldReports(const std::string& folder) {
  std::vector<std::filesystem::path> reports;
  std::error_code error;
  std::filesystem::directory_iterator it(folder, error), end;
  for (; !error && it != end; it.increment(error)) reports.push_back(it->path());
  std::sort(reports.begin(), reports.end());  // their names begin with the time
  for (size_t i = 0; i + kHangReportsKept < reports.size(); ++i) std::filesystem::remove(reports[i], error);
}

}  // namespace

absl::StatusOr<std::string> SaveStacks(const std::string& folder, pid_t pid, uint64_t generation,
                                       const std::string& verdict, int64_t wall_nanos) {
  std::string report = "worker generation " + std::to_string(generation) + ", pid " + std::to_string(pid) +
                       ": " + verdict + "\n\n" + DumpThreads(pid, kMaxReportBytes);
  SignalThreads(pid, SIGQUIT);
  time_t seconds = wall_nanos / 1'000'000'000;
  tm utc{};
  char name[32];
  strftime(name, sizeof(name), "%Y%m%dT%H%M%SZ", gmtime_r(&seconds, &utc));
  std::string path = folder + "/" + name + "-g" + std::to_string(generation) + ".txt";
  HF_RETURN_IF_ERROR(MakeDirs(folder));
  // Not synced: a disk that hangs must not keep the worker from being replaced.
  HF_ASSIGN_OR_RETURN(UniqueFd file, OpenFile(path, O_WRONLY | O_CREAT | O_TRUNC));
  HF_RETURN_IF_ERROR(PwriteFull(file.get(), report.data(), report.size(), 0));
  RemoveOldReports(folder);
  return path;
}

}  // namespace holdfast
