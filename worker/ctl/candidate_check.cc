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

extern char** environ;

namespace holdfast::ctl {
namespace {

constexpr char kInstalledWorker[] = "/usr/lib/holdfast/holdfast-worker";
constexpr uint64_t kRunNanos = 5'000'000'000;
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

// Reads until the end, or until the time is over.
std::string ReadUntil(int fd, uint64_t deadline) {
  std::string text;
  char buffer[4096];
  while (text.size() < kMostOutput) {
    const uint64_t now = Clock::Real()->BootNanos();
    pollfd ready{.fd = fd, .events = POLLIN, .revents = 0};
    if (now >= deadline || poll(&ready, 1, static_cast<int>((deadline - now) / 1'000'000) + 1) < 0) break;
    if (ready.revents == 0) continue;
    const ssize_t size = read(fd, buffer, sizeof buffer);
    if (size <= 0) break;
    text.append(buffer, static_cast<size_t>(size));
  }
  return text;
}

RunResult RunProgram(const std::string& path, const std::vector<std::string>& args,
                     const std::string& folder) {
  RunResult result;
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return {strerror(errno), "", 0, false};
  UniqueFd output(ends[0]), input(ends[1]);
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
  pid_t pid = 0;
  const int error = posix_spawn(&pid, path.c_str(), &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  if (error != 0) return {strerror(error), "", 0, false};
  input.Reset();
  const uint64_t deadline = Clock::Real()->BootNanos() + kRunNanos;
  result.last_line = LastLine(ReadUntil(output.get(), deadline));
  result.too_long = Clock::Real()->BootNanos() >= deadline;
  // It has closed its output: it ends, or it is made to.
  for (int tries = 0; waitpid(pid, &result.status, WNOHANG) == 0; ++tries) {
    if (tries == 100 || result.too_long) kill(pid, SIGKILL);
    usleep(10'000);
  }
  return result;
}

std::string How(const RunResult& result) {
  if (result.too_long) return "had not ended after 5 s";
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

std::string TryCandidate(const std::string& worker, pid_t supervisor) {
  const std::string process = "/proc/" + std::to_string(supervisor);
  absl::StatusOr<std::string> cmdline = ReadFile(process + "/cmdline");
  const WorkerCommand command = ParseSupervisorCommand(cmdline.ok() ? *cmdline : "");
  const std::string path = worker.empty() ? command.worker : worker;
  // Relative paths, also those in the worker's arguments, are relative to where the supervisor runs.
  const std::string folder = process + "/cwd";
  RunResult test = RunProgram(path, {"--self-test"}, folder);
  if (!test.failed.empty()) return path + " cannot be executed: " + test.failed;
  if (test.too_long || test.status != 0) return path + " --self-test: " + How(test);
  RunResult start = RunProgram(path, command.args, folder);
  if (start.last_line.find(kNoSupervisor) != std::string::npos) {
    return "its self-test passes and it accepts its arguments and configuration";
  }
  return "its self-test passes, but it does not accept its arguments or its configuration: " + How(start);
}

}  // namespace holdfast::ctl
