#include "common/urgency.h"

#include <fcntl.h>
#include <linux/capability.h>
#include <poll.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <functional>
#include <future>
#include <string>
#include <thread>
#include <vector>

#include "common/process.h"
#include "gtest/gtest.h"

namespace holdfast {
namespace {

using std::chrono::milliseconds;

// In a process of its own, so that nothing of it stays; its exit code.
int InChild(const std::function<int()>& body) {
  const pid_t pid = fork();
  if (pid == 0) _exit(body());
  int status = 0;
  waitpid(pid, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

bool Permitted() {
  return InChild([] { return BecomeUrgent().ok() ? 0 : 1; }) == 0;
}

void GiveUpTheRight() {
  const rlimit none{0, 0};
  setrlimit(RLIMIT_RTPRIO, &none);
  __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
  __user_cap_data_struct data[2]{};
  syscall(SYS_capget, &header, data);
  data[0].effective &= ~(1u << CAP_SYS_NICE);
  data[0].permitted &= ~(1u << CAP_SYS_NICE);
  syscall(SYS_capset, &header, data);
}

bool UrgentInThread() {
  return std::async(std::launch::async, [] { return IsUrgent(); }).get();
}

// 'T' of a process that inherited urgency, else 'F': field 41 of proc(5) stat is the policy.
bool StartedUrgent(bool urgent) {
  int ends[2];
  EXPECT_EQ(pipe2(ends, O_CLOEXEC), 0);
  UniqueFd read_end(ends[0]), write_end(ends[1]);
  UniqueFd program = OpenFile("/bin/sh", O_RDONLY).value();
  ProcessSpec spec{.program = program.get(),
                   .argv = {"sh", "-c", "read -r stat < /proc/self/stat; set -- ${stat#*) }; echo ${39} >&9"},
                   .environment = {},
                   .descriptors = {{write_end.get(), 9}},
                   .urgent = urgent};
  Process child = StartProcess(spec).value();
  write_end.Reset();
  char text[16] = {};
  EXPECT_GT(read(read_end.get(), text, sizeof text), 0);
  pollfd exit{.fd = child.pidfd.get(), .events = POLLIN, .revents = 0};
  EXPECT_EQ(poll(&exit, 1, 20'000), 1);
  EXPECT_EQ(ReapReason(child.pidfd.get()), "exit 0");
  return std::string(text) == std::to_string(SCHED_RR) + "\n";
}

TEST(UrgencyTest, AnUrgentThreadsThreadsAndProcessesAreOrdinary) {
  std::async(std::launch::async, [] {
    EXPECT_FALSE(IsUrgent());
    EXPECT_EQ(BecomeUrgent().ok(), Permitted());
    EXPECT_EQ(IsUrgent(), Permitted());
    EXPECT_FALSE(UrgentInThread());
    EXPECT_FALSE(StartedUrgent(false));
    LeaveUrgency();
    EXPECT_FALSE(IsUrgent());
  }).get();
}

TEST(UrgencyTest, AProcessStartedUrgentIsSoAndItsMakerIsAsBefore) {
  std::async(std::launch::async, [] {
    EXPECT_EQ(StartedUrgent(true), Permitted());
    EXPECT_EQ(sched_getscheduler(0), SCHED_OTHER);
    if (!BecomeUrgent().ok()) return;
    EXPECT_TRUE(StartedUrgent(true));
    EXPECT_EQ(sched_getscheduler(0), SCHED_RR | SCHED_RESET_ON_FORK);
    EXPECT_FALSE(UrgentInThread());
  }).get();
}

TEST(UrgencyTest, AnOrdinaryProcessOfAnUrgentOneIsOrdinary) {
  std::async(std::launch::async, [] {
    UrgentChildren urgent;
    EXPECT_EQ(IsUrgent(), Permitted());
    EXPECT_EQ(UrgentInThread(), Permitted());
    EXPECT_FALSE(StartedUrgent(false));
  }).get();
  EXPECT_FALSE(IsUrgent());
}

// Some threads that wait, and their policies.
class Threads {
 public:
  explicit Threads(int count) {
    for (int i = 0; i < count; ++i) threads_.emplace_back([this] { Wait(); });
    while (running_ < count) sched_yield();
  }
  ~Threads() {
    stop_ = true;
    for (std::thread& thread : threads_) thread.join();
  }
  int Urgent() {
    urgent_ = 0;
    seen_ = 0;
    const int round = ++round_;
    while (seen_ < running_ && round == round_) sched_yield();
    return urgent_;
  }

 private:
  void Wait() {
    ++running_;
    for (int told = 0; !stop_;) {
      if (const int round = round_; round != told) {
        urgent_ += IsUrgent();
        told = round;
        ++seen_;
      }
      usleep(500);
    }
  }
  std::atomic<int> running_{0}, round_{0}, seen_{0}, urgent_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> threads_;
};

TEST(UrgencyTest, AllThreadsAreUrgentForTheTimeAndNoneAfterIt) {
  const int wanted = Permitted() ? 8 : 0;
  Threads threads(8);
  UrgentTime time;
  EXPECT_EQ(time.Begin(milliseconds(60'000)).ok(), Permitted());
  EXPECT_EQ(IsUrgent(), Permitted());
  while (threads.Urgent() != wanted) sched_yield();
  EXPECT_EQ(UrgentInThread(), Permitted());
  time.EndIn(milliseconds(0));
  while (IsUrgent()) sched_yield();
  while (threads.Urgent() != 0) sched_yield();  // the walk may be under way
  EXPECT_FALSE(UrgentInThread());
  // And again, as for a worker that is told to serve a second time.
  EXPECT_EQ(time.Begin(milliseconds(1)).ok(), Permitted());
  while (IsUrgent() || threads.Urgent() != 0) sched_yield();
}

TEST(UrgencyTest, ThoseWhoJoinedAreUrgentUntilOneOfThemFindsTheTimeOver) {
  const bool permitted = Permitted();
  UrgentThreads group;
  std::atomic<int> joined{0};
  std::atomic<bool> stop{false};
  std::vector<std::thread> members;
  std::vector<pid_t> ids(2);
  auto add = [&](size_t i) {
    members.emplace_back([&, i] {
      group.Join();
      ids[i] = gettid();
      ++joined;
      while (!stop) usleep(500);
    });
    while (joined <= static_cast<int>(i)) sched_yield();
  };
  auto urgent = [&](size_t i) { return IsUrgent(ids[i]); };
  add(0);
  EXPECT_FALSE(urgent(0));
  group.Begin(1000);
  EXPECT_EQ(urgent(0), permitted);
  EXPECT_FALSE(IsUrgent()) << "who begins it is none of them";
  add(1);
  EXPECT_EQ(urgent(1), permitted) << "one that comes while it lasts";
  group.Passed(999);
  EXPECT_EQ(urgent(0), permitted);
  group.Begin(2000);
  group.Passed(1000);
  EXPECT_EQ(urgent(0), permitted) << "it had begun anew";
  group.Passed(2000);
  EXPECT_FALSE(urgent(0) || urgent(1));
  group.Begin(9000);
  group.End();
  EXPECT_FALSE(urgent(0) || urgent(1));
  group.End();
  stop = true;
  for (std::thread& member : members) member.join();
}

TEST(UrgencyTest, TheEventLoopsGoBeforeWhatTheyHaveToNotice) {
  std::async(std::launch::async, [] {
    sched_param loop{}, other{};
    EXPECT_EQ(BecomeUrgent().ok(), Permitted());
    sched_getparam(0, &loop);
    MakeUrgent(gettid());
    sched_getparam(0, &other);
    EXPECT_EQ(loop.sched_priority > other.sched_priority, Permitted());
  }).get();
}

TEST(UrgencyTest, ItEndsByItselfWhateverTheOtherThreadsDo) {
  // A process that was started urgent and never serves: two threads that spin, more than one in its turn.
  EXPECT_EQ(InChild([] {
              UrgentChildren as_if_started_so;
              std::atomic<bool> stop{false};
              auto spin = [&stop] {
                while (!stop) {
                }
              };
              UrgentTime time;
              if (time.Begin(milliseconds(50)).ok() != Permitted()) return 1;
              std::thread one(spin), other(spin);
              while (IsUrgent()) {
              }
              stop = true;
              one.join();
              other.join();
              return 0;
            }),
            0);
}

TEST(UrgencyTest, RefusedItIsAnErrorThatSaysSoAndEverythingGoesOn) {
  EXPECT_EQ(InChild([] {
              GiveUpTheRight();
              const absl::Status status = BecomeUrgent();
              if (!absl::IsPermissionDenied(status)) return 1;
              if (status.message().find("SCHED_RR") == absl::string_view::npos) return 2;
              UrgentTime time;
              if (!absl::IsPermissionDenied(time.Begin(milliseconds(1)))) return 3;
              time.EndIn(milliseconds(1));
              if (IsUrgent() || StartedUrgent(true) || IsUrgent()) return 4;
              return ::testing::Test::HasFailure() ? 5 : 0;
            }),
            0);
}

TEST(UrgencyTest, AProcessWithoutTheRightCanStillGiveItUp) {
  EXPECT_EQ(InChild([] {
              const bool urgent = BecomeUrgent().ok();
              GiveUpTheRight();
              if (IsUrgent() != urgent) return 1;
              LeaveUrgency();
              return IsUrgent() ? 2 : 0;
            }),
            0);
}

}  // namespace
}  // namespace holdfast
