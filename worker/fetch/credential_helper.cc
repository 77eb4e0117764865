// Running docker-credential-<helper>: see credentials.h.
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>

#include "common/clock.h"
#include "common/io.h"
#include "worker/fetch/credentials.h"

extern char** environ;

namespace holdfast::fetch {
namespace {

constexpr size_t kMaxAnswerBytes = 1 << 20;
constexpr int kPollMillis = 20;  // how soon a cancellation is noticed

// The name ends up in a program's name: no path, no option.
bool IsHelperName(const std::string& name) {
  return !name.empty() && name.size() <= 64 && std::all_of(name.begin(), name.end(), [](unsigned char c) {
    return std::isalnum(c) || c == '-' || c == '_' || c == '.';
  });
}

struct Pipe {
  UniqueFd read, write;
};

absl::StatusOr<Pipe> MakePipe() {
  int fds[2];
  if (pipe2(fds, O_CLOEXEC) != 0) return ErrnoStatus(errno, "pipe");
  return Pipe{UniqueFd(fds[0]), UniqueFd(fds[1])};
}

absl::StatusOr<pid_t> Spawn(const std::string& program, int in, int out) {
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, in, STDIN_FILENO);
  posix_spawn_file_actions_adddup2(&actions, out, STDOUT_FILENO);
  posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, "/dev/null", O_WRONLY, 0);
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  // Our own signal mask (SIGPIPE) is not the helper's; its own group lets its children be killed with it.
  sigset_t none;
  sigemptyset(&none);
  posix_spawnattr_setsigmask(&attributes, &none);
  posix_spawnattr_setpgroup(&attributes, 0);
  // It may leave a daemon behind, and we may be in real time just now (common/urgency.h).
  const sched_param ordinary{};
  posix_spawnattr_setschedpolicy(&attributes, SCHED_OTHER);
  posix_spawnattr_setschedparam(&attributes, &ordinary);
  posix_spawnattr_setflags(&attributes,
                           POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSCHEDULER);
  std::string name = program, verb = "get";
  char* const argv[] = {name.data(), verb.data(), nullptr};
  pid_t pid = -1;
  const int error = posix_spawnp(&pid, program.c_str(), &actions, &attributes, argv, environ);
  posix_spawnattr_destroy(&attributes);
  posix_spawn_file_actions_destroy(&actions);
  if (error != 0) return ErrnoStatus(error, "cannot run " + program);
  return pid;
}

// Reads until end of file; false when the time is up or it was cancelled.
bool ReadUntil(int fd, uint64_t until, const std::atomic<bool>* cancelled, std::string* answer) {
  while (Clock::Real()->BootNanos() < until && (cancelled == nullptr || !*cancelled)) {
    pollfd wait{fd, POLLIN, 0};
    if (poll(&wait, 1, kPollMillis) <= 0) continue;
    char chunk[4096];
    const ssize_t got = read(fd, chunk, sizeof chunk);
    if (got == 0) return true;
    if (got < 0 && errno != EINTR) return false;
    if (got > 0) answer->append(chunk, static_cast<size_t>(got));
    if (answer->size() > kMaxAnswerBytes) return false;
  }
  return false;
}

// A helper that closed its output and lives on is waited for as well, up to the same limit.
bool WaitForExit(pid_t pid, uint64_t until, const std::atomic<bool>* cancelled, int* status) {
  while (Clock::Real()->BootNanos() < until && (cancelled == nullptr || !*cancelled)) {
    const pid_t got = waitpid(pid, status, WNOHANG);
    if (got == pid) return true;
    if (got < 0 && errno != EINTR) return false;
    poll(nullptr, 0, 1);
  }
  return false;
}

}  // namespace

absl::StatusOr<Credentials> RunCredentialHelper(const std::string& helper, const std::string& server,
                                                uint64_t limit_nanos, const std::atomic<bool>* cancelled) {
  if (!IsHelperName(helper)) return InvalidArgument("docker config: malformed name of a credential helper");
  const std::string program = "docker-credential-" + helper;
  const uint64_t until = Clock::Real()->BootNanos() + limit_nanos;
  HF_ASSIGN_OR_RETURN(Pipe in, MakePipe());
  HF_ASSIGN_OR_RETURN(Pipe out, MakePipe());
  // Fits a pipe's buffer whole, so this never blocks; done first, so that nobody can have closed the reading
  // end.
  const std::string line = server + "\n";
  if (write(in.write.get(), line.data(), line.size()) != static_cast<ssize_t>(line.size())) {
    return ErrnoStatus(errno, "cannot talk to " + program);
  }
  in.write.Reset();
  HF_ASSIGN_OR_RETURN(const pid_t pid, Spawn(program, in.read.get(), out.write.get()));
  in.read.Reset();
  out.write.Reset();
  std::string answer;
  int status = 0;
  if (!ReadUntil(out.read.get(), until, cancelled, &answer) || !WaitForExit(pid, until, cancelled, &status)) {
    kill(-pid, SIGKILL);
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
    }
    if (cancelled != nullptr && *cancelled) return Cancelled(program + " was cancelled");
    return DeadlineExceeded(program + " did not answer in time");
  }
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
    return NotFound(program + " has no credentials for " + server);
  }
  return ParseHelperAnswer(answer);
}

}  // namespace holdfast::fetch
