#include "verifier/self_test.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>

#include "common/process.h"
#include "common/sealed_memory.h"

namespace holdfast::verifier {
namespace {

constexpr off_t kOutputBytes = 1 << 20;  // of a fixed size, so that no build can fill the memory
constexpr int kKillMillis = 200;
constexpr size_t kShownBytes = 2'000;  // the end of it

// The end of what was written, without the line ends after it.
std::string ReadOutput(int fd) {
  std::string text(kOutputBytes, '\0');
  ssize_t got = pread(fd, text.data(), text.size(), 0);
  text.resize(got < 0 ? 0 : static_cast<size_t>(got));
  text.resize(std::min(text.find('\0'), text.size()));
  while (!text.empty() && text.back() == '\n') text.pop_back();
  return text.size() <= kShownBytes ? text : text.substr(text.size() - kShownBytes);
}

absl::StatusOr<Process> Start(int executable, int output) {
  HF_ASSIGN_OR_RETURN(UniqueFd nothing, OpenFile("/dev/null", O_RDONLY));
  return StartProcess({.program = executable,
                       .argv = {"holdfast-worker", "--self-test"},
                       .environment = EnvironmentWithout({}),
                       .descriptors = {{nothing.get(), 0}, {output, 1}, {output, 2}}});
}

}  // namespace

SelfTestResult RunSelfTest(int executable, uint64_t deadline_ms) {
  auto output = MakeSealedMemory("holdfast-self-test", kOutputBytes);
  if (!output.ok()) return {false, std::string(FromAbsl(output.status().message()))};
  auto process = Start(executable, output->get());
  if (!process.ok()) return {false, std::string(FromAbsl(process.status().message()))};
  pollfd exit{.fd = process->pidfd.get(), .events = POLLIN, .revents = 0};
  int ended = 0;
  while ((ended = poll(&exit, 1, static_cast<int>(deadline_ms))) < 0 && errno == EINTR) continue;
  // With all that it started: it leads a session. Before it is reaped: until then the number is its own.
  kill(-process->pid, SIGKILL);
  std::string how;
  // Not for ever: the kernel need not let it die.
  if (poll(&exit, 1, kKillMillis) == 1) how = ReapReason(process->pidfd.get());
  std::string text = ReadOutput(output->get());
  if (ended == 1 && how == "exit 0") return {true, text};
  std::string why =
      ended == 1 ? "ended with " + how : "did not end within " + std::to_string(deadline_ms) + " ms";
  return {false, "the self-test " + why + ": " + text};
}

}  // namespace holdfast::verifier
