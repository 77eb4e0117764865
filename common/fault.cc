#include "common/fault.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "common/io.h"
#include "glog/logging.h"

namespace holdfast {

absl::Status FaultPoints::Parse(std::string_view spec) {
  for (absl::string_view item : absl::StrSplit(ToAbsl(spec), ';', absl::SkipEmpty())) {
    std::pair<std::string, std::string> parts = absl::StrSplit(item, absl::MaxSplits('=', 1));
    std::pair<std::string, std::string> action = absl::StrSplit(parts.second, absl::MaxSplits('@', 1));
    int nth = 1;
    if (!action.second.empty() && !absl::SimpleAtoi(action.second, &nth)) {
      return InvalidArgument("fault point '" + std::string(item) + "': the pass is not a number");
    }
    if (action.first == "kill") {
      KillAt(parts.first, nth);
    } else if (action.first == "stop") {
      Arm(parts.first, Kind::kKill, Internal("stop"), nth);  // not SIGKILL but SIGSTOP
    } else if (action.first == "block") {
      BlockAt(parts.first, nth);
    } else if (action.first == "wrong") {
      FailAt(parts.first, Internal("injected at " + parts.first), nth);
    } else if (action.first == "eio") {
      FailAt(parts.first, ErrnoStatus(EIO, "injected at " + parts.first), nth);
    } else if (action.first == "enospc") {
      FailAt(parts.first, ErrnoStatus(ENOSPC, "injected at " + parts.first), nth);
    } else {
      return InvalidArgument("fault point '" + std::string(item) +
                             "': the action is not kill, stop, block, wrong, eio or enospc");
    }
  }
  return absl::OkStatus();
}

void FaultPoints::Arm(std::string_view point, Kind kind, absl::Status status, int nth) {
  MutexLock lock(&mutex_);
  Point& p = points_[std::string(point)];
  p.kind = kind;
  p.status = std::move(status);
  p.countdown = nth == 0 ? -1 : nth;
  p.released = false;
}

void FaultPoints::FailAt(std::string_view point, absl::Status status, int nth) {
  Arm(point, Kind::kFail, std::move(status), nth);
}
void FaultPoints::BlockAt(std::string_view point, int nth) {
  Arm(point, Kind::kBlock, absl::OkStatus(), nth);
}
void FaultPoints::KillAt(std::string_view point, int nth) { Arm(point, Kind::kKill, absl::OkStatus(), nth); }

void FaultPoints::Release(std::string_view point) {
  MutexLock lock(&mutex_);
  points_[std::string(point)].released = true;
  changed_.SignalAll();
}

const char* FaultPoints::NameOf(Kind kind) {
  switch (kind) {
    case Kind::kFail:
      return "fail";
    case Kind::kBlock:
      return "block";
    case Kind::kKill:
      return "kill";
    case Kind::kNone:
      break;
  }
  return "none";
}

absl::Status FaultPoints::Pass(std::string_view point) {
  MutexLock lock(&mutex_);
  Point& p = points_[std::string(point)];
  p.passes++;
  if (p.kind == Kind::kNone || p.countdown == 0) return absl::OkStatus();
  if (p.countdown > 0 && --p.countdown > 0) return absl::OkStatus();
  p.fired++;
  changed_.SignalAll();
  // An injected fault can always be told from a real one.
  if (p.fired <= 10 || p.fired % 1000 == 0) {
    const bool stop = p.kind == Kind::kKill && !p.status.ok();
    LOG(WARNING) << "fault.fired point=" << point << " action=" << (stop ? "stop" : NameOf(p.kind))
                 << " times=" << p.fired;
    if (p.kind == Kind::kKill) google::FlushLogFiles(google::INFO);
  }
  switch (p.kind) {
    case Kind::kFail:
      return p.status;
    case Kind::kKill:
      // To this very thread: so it does not go on for a moment.
      raise(p.status.ok() ? SIGKILL : SIGSTOP);
      return absl::OkStatus();
    case Kind::kBlock:
      while (!p.released) changed_.Wait(&mutex_);
      return absl::OkStatus();
    case Kind::kNone:
      break;
  }
  return absl::OkStatus();
}

int FaultPoints::passes(std::string_view point) const {
  MutexLock lock(&mutex_);
  auto it = points_.find(point);
  return it == points_.end() ? 0 : it->second.passes;
}

int FaultPoints::fired(std::string_view point) const {
  MutexLock lock(&mutex_);
  auto it = points_.find(point);
  return it == points_.end() ? 0 : it->second.fired;
}

bool FaultPoints::WaitFired(std::string_view point, int count, int seconds) const {
  auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  MutexLock lock(&mutex_);
  while (true) {
    auto it = points_.find(point);
    if (it != points_.end() && it->second.fired >= count) return true;
    if (!changed_.WaitUntil(&mutex_, deadline)) return false;
  }
}

absl::StatusOr<std::string> FaultSpecFrom(const std::string& value, const std::string& executable) {
  constexpr size_t kTailBytes = 512;
  constexpr std::string_view kMark = "HFFAULTS:";
  if (value != "@exe") return value;
  HF_ASSIGN_OR_RETURN(UniqueFd file, OpenFile(executable, O_RDONLY));
  struct stat st {};
  if (fstat(file.get(), &st) != 0) return ErrnoStatus(errno, executable);
  const auto size = static_cast<uint64_t>(st.st_size);
  std::string tail(std::min<uint64_t>(size, kTailBytes), '\0');
  HF_RETURN_IF_ERROR(PreadFull(file.get(), tail.data(), tail.size(), size - tail.size()));
  const size_t mark = tail.rfind(kMark);
  if (mark == std::string::npos) return std::string();
  const size_t end = tail.find('\n', mark);
  if (end == std::string::npos)
    return InvalidArgument("HFFAULTS at the end of " + executable + " has no line end");
  return tail.substr(mark + kMark.size(), end - mark - kMark.size());
}

}  // namespace holdfast
