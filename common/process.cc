#include "common/process.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <optional>
#include <sstream>

#include "absl/strings/numbers.h"
#include "common/urgency.h"

extern char** environ;

namespace holdfast {
namespace {

constexpr idtype_t kPidfd = static_cast<idtype_t>(3);  // P_PIDFD
constexpr int kSocketOfChild = 3;
constexpr size_t kStartTimeAfterName = 19;  // field 22 of proc(5) stat, counted from the state on
constexpr size_t kExitCodeAfterName = 49;   // field 52

std::vector<char*> Pointers(std::vector<std::string>& strings) {
  std::vector<char*> pointers;
  for (std::string& text : strings) pointers.push_back(text.data());
  pointers.push_back(nullptr);
  return pointers;
}

class SpawnSettings {
 public:
  explicit SpawnSettings(bool leave_urgency) {
    posix_spawn_file_actions_init(&actions);
    posix_spawnattr_init(&attributes);
    sigset_t none, all;
    sigemptyset(&none);
    sigfillset(&all);
    posix_spawnattr_setsigmask(&attributes, &none);
    posix_spawnattr_setsigdefault(&attributes, &all);
    int flags = POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETSID;
    if (leave_urgency) {
      const sched_param ordinary{};
      posix_spawnattr_setschedpolicy(&attributes, SCHED_OTHER);
      posix_spawnattr_setschedparam(&attributes, &ordinary);
      flags |= POSIX_SPAWN_SETSCHEDULER;
    }
    posix_spawnattr_setflags(&attributes, static_cast<short>(flags));
  }
  ~SpawnSettings() {
    posix_spawn_file_actions_destroy(&actions);
    posix_spawnattr_destroy(&attributes);
  }
  SpawnSettings(const SpawnSettings&) = delete;
  SpawnSettings& operator=(const SpawnSettings&) = delete;
  posix_spawn_file_actions_t actions;
  posix_spawnattr_t attributes;
};

std::string SignalText(int signal) {
  return "signal " + std::to_string(signal) + " (" + strsignal(signal) + ")";
}

// Of proc(5) stat: a number, counted from the state on.
absl::StatusOr<uint64_t> StatField(pid_t pid, size_t index) {
  std::string path = "/proc/" + std::to_string(pid) + "/stat";
  absl::StatusOr<std::string> text = ReadFile(path);
  if (!text.ok()) return NotFound("no process " + std::to_string(pid));
  size_t name_end = text->rfind(')');  // the name before it may hold anything
  if (name_end == std::string::npos) return DataLoss(path + " cannot be read");
  std::istringstream words(text->substr(name_end + 1));
  std::vector<std::string> fields{std::istream_iterator<std::string>(words), {}};
  uint64_t value = 0;
  if (fields.size() <= index || !absl::SimpleAtoi(fields[index], &value)) {
    return DataLoss(path + " cannot be read");
  }
  return value;
}

}  // namespace

absl::StatusOr<Process> StartProcess(const ProcessSpec& spec) {
  // Copies above the child's numbers, so that one dup2 there cannot hit what the next one needs.
  int above = 16;
  for (const auto& entry : spec.descriptors) above = std::max(above, entry.second + 1);
  std::vector<UniqueFd> copies;
  auto copy = [&](int fd) {
    copies.emplace_back(fcntl(fd, F_DUPFD_CLOEXEC, above));
    return copies.back().get();
  };
  SpawnSettings settings(!spec.urgent && IsUrgent());
  int program = copy(spec.program);
  for (const auto& [ours, theirs] : spec.descriptors) {
    posix_spawn_file_actions_adddup2(&settings.actions, copy(ours), theirs);
  }
  for (const UniqueFd& fd : copies) {
    if (!fd.valid()) return InvalidArgument("a descriptor for the new process cannot be duplicated");
  }
  std::vector<std::string> argv = spec.argv, environment = spec.environment;
  std::string path = "/proc/self/fd/" + std::to_string(program);
  Process process;
  int error = 0;
  {
    // Inherited: a child that made itself urgent would first have to get its turn.
    std::optional<UrgentChildren> urgency;
    if (spec.urgent) urgency.emplace();
    error = posix_spawn(&process.pid, path.c_str(), &settings.actions, &settings.attributes,
                        Pointers(argv).data(), Pointers(environment).data());
  }
  if (error != 0) return ErrnoStatus(error, "starting " + (argv.empty() ? path : argv[0]));
  // Our own child, not reaped before its pidfd fires: the pid cannot have been reused.
  absl::StatusOr<UniqueFd> pidfd = OpenPidfd(process.pid);
  if (!pidfd.ok()) {
    kill(process.pid, SIGKILL);
    waitpid(process.pid, nullptr, 0);
    return pidfd.status();
  }
  process.pidfd = std::move(*pidfd);
  return process;
}

std::vector<std::string> EnvironmentWithout(const std::vector<std::string_view>& prefixes) {
  std::vector<std::string> environment;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    std::string_view text = *entry;
    bool left_out = std::any_of(prefixes.begin(), prefixes.end(), [&](std::string_view prefix) {
      return text.substr(0, prefix.size()) == prefix;
    });
    if (!left_out) environment.emplace_back(text);
  }
  return environment;
}

absl::StatusOr<ConnectedProcess> StartConnected(ProcessSpec spec) {
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) return ErrnoStatus(errno, "socketpair");
  UniqueFd ours(ends[0]), theirs(ends[1]);
  spec.descriptors.emplace_back(theirs.get(), kSocketOfChild);
  for (std::string& variable :
       EnvironmentWithout({"HOLDFAST_TOKEN=", "NOTIFY_SOCKET=", "LISTEN_", "WATCHDOG_"})) {
    spec.environment.push_back(std::move(variable));
  }
  HF_ASSIGN_OR_RETURN(Process process, StartProcess(spec));
  return ConnectedProcess{std::move(process), std::move(ours)};
}

absl::StatusOr<UniqueFd> OpenPidfd(pid_t pid) {
  UniqueFd pidfd(static_cast<int>(syscall(SYS_pidfd_open, pid, 0)));
  if (!pidfd.valid()) return ErrnoStatus(errno, "pidfd_open of " + std::to_string(pid));
  return pidfd;
}

bool HasExited(int pidfd) {
  pollfd exit{.fd = pidfd, .events = POLLIN, .revents = 0};
  return poll(&exit, 1, 0) == 1;
}

std::string ReapReason(int pidfd) {
  siginfo_t info{};
  // It has exited, so this does not sleep and cannot be interrupted.
  if (waitid(kPidfd, static_cast<id_t>(pidfd), &info, WEXITED) != 0) return "unknown";
  if (info.si_code == CLD_EXITED) return "exit " + std::to_string(info.si_status);
  return SignalText(info.si_status);
}

absl::StatusOr<uint64_t> ProcessStartTicks(pid_t pid) { return StatField(pid, kStartTimeAfterName); }

std::string EndingReason(pid_t pid) {
  // A wait status: the signal is in the low seven bits.
  const auto signal = static_cast<int>(StatField(pid, kExitCodeAfterName).value_or(0) & 0x7f);
  return signal == 0 ? "" : SignalText(signal);
}

}  // namespace holdfast
