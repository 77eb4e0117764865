#include "worker/app/stack_dump.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <mutex>
#include <string>
#include <thread>

#include "common/io.h"
#include "gtest/gtest.h"

namespace holdfast::app {
namespace {

size_t CountOf(const std::string& text, const std::string& part) {
  size_t count = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++count;
  return count;
}

// In a child: one thread waits for a mutex for ever, one spins. Both are told to show their stacks.
[[noreturn]] void ShowStacks(int out) {
  dup2(out, STDERR_FILENO);
  InstallStackDump();
  static std::mutex locked;
  locked.lock();
  static std::atomic<pid_t> tids[2];
  std::thread([] {
    pthread_setname_np(pthread_self(), "deadlocked");
    tids[0] = static_cast<pid_t>(syscall(SYS_gettid));
    locked.lock();
  }).detach();
  std::thread([] {
    pthread_setname_np(pthread_self(), "spinning");
    tids[1] = static_cast<pid_t>(syscall(SYS_gettid));
    while (true) tids[1].load();
  }).detach();
  while (tids[0] == 0 || tids[1] == 0) std::this_thread::yield();
  for (const auto& tid : tids) syscall(SYS_tgkill, getpid(), tid.load(), SIGQUIT);
  alarm(30);
  while (true) pause();
}

TEST(StackDumpTest, EachThreadThatGetsTheSignalNamesItselfAndItsFrames) {
  TempDir dir;
  const std::string path = dir.path() + "/stderr";
  UniqueFd out = std::move(*OpenFile(path, O_RDWR | O_CREAT | O_APPEND));
  const pid_t child = fork();
  if (child == 0) ShowStacks(out.get());
  std::string text;
  const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (std::chrono::steady_clock::now() < give_up) {
    text = ReadFile(path).value();
    if (CountOf(text, "worker.stack thread=") == 2 && CountOf(text, "[0x") >= 6) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  EXPECT_EQ(CountOf(text, "worker.stack thread=deadlocked tid="), 1u) << text;
  EXPECT_EQ(CountOf(text, "worker.stack thread=spinning tid="), 1u) << text;
  EXPECT_GE(CountOf(text, "[0x"), 6u) << text;
  // One stack after the other: between the two headings are frames.
  const size_t first = text.find("worker.stack"), second = text.rfind("worker.stack");
  EXPECT_GE(CountOf(text.substr(first, second - first), "[0x"), 2u) << text;
}

}  // namespace
}  // namespace holdfast::app
