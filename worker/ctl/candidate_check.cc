#include "worker/ctl/candidate_check.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "common/clock.h"
#include "common/io.h"
#include "common/process.h"
#include "worker/ctl/format.h"

extern char** environ;

namespace holdfast::ctl {
namespace {

constexpr char kInstalledWorker[] = "/usr/lib/holdfast/holdfast-worker";
constexpr int kKillMillis = 200;
constexpr size_t kMostOutput = 64 * 1024;
// What a worker says that came so far and finds no supervisor: its configuration is in order.
constexpr char kNoSupervisor[] = "not started by holdfast-supervisor";

struct RunResult {
  std::string failed;     // could not be run; else empty
  std::string last_line;  // of both outputs
  int status = 0;         // of waitpid
  bool too_long = false;
};

std::string LastLine(std::string text) {
  while (!text.empty() && text.back() == '\n') text.pop_back();
  return text.substr(text.rfind('\n') + 1);
}

// Appends what can be read now; false at the end of it. Only the last of it is kept.
bool ReadSome(int fd, std::string* text) {
  char buffer[4096];
  const ssize_t size = read(fd, buffer, sizeof buffer);
  if (size <= 0) return size < 0 && (errno == EAGAIN || errno == EINTR);
  text->append(buffer, static_cast<size_t>(size));
  if (text->size() > kMostOutput) text->erase(0, text->size() - kMostOutput);
  return true;
}

// Its output, until it exits or its time is over: others may hold the pipe open for longer.
std::string ReadUntilExit(int pidfd, int output, uint64_t limit_nanos) {
  std::string text;
  const uint64_t deadline = Clock::Real()->BootNanos() + limit_nanos;
  for (uint64_t now = 0; (now = Clock::Real()->BootNanos()) < deadline;) {
    pollfd ready[2] = {{.fd = pidfd, .events = POLLIN, .revents = 0},
                       {.fd = output, .events = POLLIN, .revents = 0}};
    if (poll(ready, 2, static_cast<int>((deadline - now) / 1'000'000) + 1) < 0) continue;
    if (ready[1].revents != 0 && !ReadSome(output, &text)) output = -1;
    if (ready[0].revents != 0) break;
  }
  // What is still in the pipe, and not more.
  for (size_t read = 0; output >= 0 && read < kMostOutput; read += 4096) {
    if (!ReadSome(output, &text)) break;
  }
  return text;
}

RunResult RunProgram(const std::string& path, const std::vector<std::string>& args, const std::string& folder,
                     uint64_t limit_nanos) {
  RunResult result;
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return {strerror(errno), "", 0, false};
  UniqueFd output(ends[0]), input(ends[1]);
  fcntl(output.get(), F_SETFL, O_NONBLOCK);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&actions, input.get(), STDOUT_FILENO);
  posix_spawn_file_actions_adddup2(&actions, input.get(), STDERR_FILENO);
  posix_spawn_file_actions_addchdir_np(&actions, folder.c_str());
  std::vector<std::string> words = {path};
  words.insert(words.end(), args.begin(), args.end());
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  // A session and so a group of its own: all of it is ended, whatever the candidate has started.
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSID);
  pid_t pid = 0;
  const int error = posix_spawn(&pid, path.c_str(), &actions, &attributes, argv.data(), environ);
  posix_spawnattr_destroy(&attributes);
  posix_spawn_file_actions_destroy(&actions);
  if (error != 0) return {strerror(error), "", 0, false};
  input.Reset();
  absl::StatusOr<UniqueFd> pidfd = OpenPidfd(pid);
  if (!pidfd.ok()) {
    kill(-pid, SIGKILL);
    waitpid(pid, nullptr, 0);
    return {std::string(FromAbsl(pidfd.status().message())), "", 0, false};
  }
  result.last_line = LastLine(ReadUntilExit(pidfd->get(), output.get(), limit_nanos));
  result.too_long = !HasExited(pidfd->get());
  kill(-pid, SIGKILL);  // before it is reaped: until then the number is its own
  // Not for ever: the kernel need not let it die.
  pollfd exit{.fd = pidfd->get(), .events = POLLIN, .revents = 0};
  if (poll(&exit, 1, kKillMillis) == 1) waitpid(pid, &result.status, 0);
  return result;
}

std::string How(const RunResult& result, uint64_t limit_nanos) {
  if (result.too_long) return "had not ended after " + HumanDuration(limit_nanos);
  if (WIFSIGNALED(result.status)) return std::string("died of ") + strsignal(WTERMSIG(result.status));
  return "exit code " + std::to_string(WEXITSTATUS(result.status)) +
         (result.last_line.empty() ? "" : ": " + result.last_line);
}

}  // namespace

WorkerCommand ParseSupervisorCommand(const std::string& cmdline) {
  WorkerCommand command;
  command.worker = kInstalledWorker;
  std::vector<std::string> words;
  for (size_t begin = 0; begin < cmdline.size();) {
    const size_t end = std::min(cmdline.find('\0', begin), cmdline.size());
    words.push_back(cmdline.substr(begin, end - begin));
    begin = end + 1;
  }
  for (size_t i = 1; i < words.size(); ++i) {
    if (words[i] == "--") {
      command.args.assign(words.begin() + static_cast<ptrdiff_t>(i) + 1, words.end());
      break;
    }
    if (words[i] == "--worker" && i + 1 < words.size()) command.worker = words[++i];
    if (words[i].rfind("--worker=", 0) == 0) command.worker = words[i].substr(sizeof "--worker=" - 1);
  }
  return command;
}

std::string TryCandidate(const std::string& worker, pid_t supervisor, uint64_t limit_nanos) {
  const std::string process = "/proc/" + std::to_string(supervisor);
  absl::StatusOr<std::string> cmdline = ReadFile(process + "/cmdline");
  const WorkerCommand command = ParseSupervisorCommand(cmdline.ok() ? *cmdline : "");
  const std::string path = worker.empty() ? command.worker : worker;
  // Relative paths, also those in the worker's arguments, are relative to where the supervisor runs.
  const std::string folder = process + "/cwd";
  RunResult test = RunProgram(path, {"--self-test"}, folder, limit_nanos);
  if (!test.failed.empty()) return path + " cannot be executed: " + test.failed;
  if (test.too_long || test.status != 0) return path + " --self-test: " + How(test, limit_nanos);
  RunResult start = RunProgram(path, command.args, folder, limit_nanos);
  if (start.last_line.find(kNoSupervisor) != std::string::npos) {
    return "its self-test passes and it accepts its arguments and configuration";
  }
  return "its self-test passes, but it does not accept its arguments or its configuration: " +
         How(start, limit_nanos);
}

}  // namespace holdfast::ctl
