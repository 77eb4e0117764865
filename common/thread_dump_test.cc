#include "common/thread_dump.h"

#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <thread>

#include "common/io.h"
#include "gtest/gtest.h"

namespace holdfast {
namespace {

// A child with a second thread, "sleeper"; tells through a pipe when it is there.
pid_t StartChild() {
  int ends[2];
  if (pipe(ends) != 0) return -1;
  UniqueFd read_end(ends[0]), write_end(ends[1]);
  pid_t pid = fork();
  if (pid == 0) {
    std::thread thread([&] {
      pthread_setname_np(pthread_self(), "sleeper");
      if (write(write_end.get(), "x", 1) != 1) _exit(1);
      pause();
    });
    thread.join();
    _exit(0);
  }
  write_end.Reset();
  char byte = 0;
  EXPECT_EQ(read(read_end.get(), &byte, 1), 1);
  return pid;
}

TEST(ThreadDumpTest, AStoppedProcessShowsItsThreads) {
  pid_t pid = StartChild();
  ASSERT_EQ(kill(pid, SIGSTOP), 0);
  int status = 0;
  ASSERT_EQ(waitpid(pid, &status, WUNTRACED), pid);
  std::string dump = DumpThreads(pid, 1 << 20);
  EXPECT_NE(dump.find("thread " + std::to_string(pid) + " "), std::string::npos) << dump;
  EXPECT_NE(dump.find("sleeper: T (stopped), wchan "), std::string::npos) << dump;
  EXPECT_EQ(DumpThreads(pid, 10).size(), 10u);
  kill(pid, SIGKILL);
  waitpid(pid, nullptr, 0);
  EXPECT_EQ(DumpThreads(pid, 1 << 20), "") << "gone";
}

TEST(ThreadDumpTest, ASignalReachesTheThreads) {
  pid_t pid = StartChild();
  SignalThreads(pid, SIGTERM);
  int status = 0;
  ASSERT_EQ(waitpid(pid, &status, 0), pid);
  EXPECT_TRUE(WIFSIGNALED(status));
  EXPECT_EQ(WTERMSIG(status), SIGTERM);
}

}  // namespace
}  // namespace holdfast
