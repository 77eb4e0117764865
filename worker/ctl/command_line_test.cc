// holdfastctl as a process: what people meet who mistype a command or are not root.
#include <fcntl.h>
#include <grp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "common/io.h"
#include "common/testing/processes.h"
#include "common/unix_socket.h"
#include "gtest/gtest.h"

namespace holdfast::ctl {
namespace {

constexpr uid_t kNobody = 65534;

struct Output {
  int exit_code = -1;
  std::string text;  // standard output and error
};

// As nobody, when this is root.
Output RunAsNobody(const std::string& program, std::vector<std::string> words) {
  Output output;
  int ends[2];
  EXPECT_EQ(pipe2(ends, O_CLOEXEC), 0);
  UniqueFd read_end(ends[0]), write_end(ends[1]);
  words.insert(words.begin(), program);
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDOUT_FILENO);
    dup2(ends[1], STDERR_FILENO);
    if (geteuid() == 0 && (setgroups(0, nullptr) != 0 || setresgid(kNobody, kNobody, kNobody) != 0 ||
                           setresuid(kNobody, kNobody, kNobody) != 0))
      _exit(126);
    alarm(60);
    execv(argv[0], argv.data());
    _exit(127);
  }
  write_end.Reset();
  char buffer[4096];
  for (ssize_t size = 0; (size = read(read_end.get(), buffer, sizeof buffer)) > 0;)
    output.text.append(buffer, static_cast<size_t>(size));
  int status = 0;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  output.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  return output;
}

class CommandLineTest : public ::testing::Test {
 protected:
  // A copy, for the build's folder may be out of nobody's reach.
  CommandLineTest() {
    EXPECT_EQ(chmod(folder_.path().c_str(), 0711), 0);
    std::filesystem::copy_file(Bin("holdfastctl"), program_);
  }
  Output Run(std::vector<std::string> words) const {
    words.insert(words.begin(), {"--socket", socket_});
    return RunAsNobody(program_, std::move(words));
  }

  TempDir folder_;
  const std::string program_ = folder_.path() + "/holdfastctl";
  const std::string private_ = folder_.path() + "/run";
  const std::string socket_ = private_ + "/supervisor.sock";
};

// Hangs up on whoever comes, as a supervisor does on peers that are not root.
class NotRootTest : public CommandLineTest {
 protected:
  NotRootTest() {
    EXPECT_TRUE(MakeDirs(private_).ok());
    absl::StatusOr<UniqueFd> listener = ListenUnix(socket_);
    EXPECT_TRUE(listener.ok()) << listener.status();
    listener_ = std::move(*listener);
    EXPECT_EQ(pipe2(stop_, O_CLOEXEC), 0);
    thread_ = std::thread([this] {
      pollfd polls[] = {{.fd = listener_.get(), .events = POLLIN, .revents = 0},
                        {.fd = stop_[0], .events = POLLIN, .revents = 0}};
      while (poll(polls, 2, -1) > 0 && polls[1].revents == 0) {
        UniqueFd peer(accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
        ++turned_away_;
      }
    });
  }
  ~NotRootTest() noexcept override {
    close(stop_[1]);
    thread_.join();
    close(stop_[0]);
  }
  void ExpectToldToBeRoot(const Output& output) const {
    EXPECT_EQ(output.exit_code, 3);
    EXPECT_NE(output.text.find("the supervisor at " + socket_ + " answers only root"), std::string::npos)
        << output.text;
    EXPECT_NE(output.text.find("run it as root"), std::string::npos) << output.text;
    for (const char* noise : {"writev", "Broken pipe", "is a worker running", "serves on"})
      EXPECT_EQ(output.text.find(noise), std::string::npos) << output.text;
  }

  UniqueFd listener_;
  int stop_[2] = {-1, -1};
  std::atomic<int> turned_away_{0};
  std::thread thread_;
};

TEST_F(NotRootTest, WhoMayNotOpenTheSocketIsToldToBeRoot) {
  ASSERT_EQ(chmod(private_.c_str(), 0711), 0);
  ASSERT_EQ(chmod(socket_.c_str(), 0), 0);
  ExpectToldToBeRoot(Run({"status"}));
  EXPECT_EQ(turned_away_, 0);
}

TEST_F(NotRootTest, WhoIsTurnedAwayIsToldToBeRoot) {
  ASSERT_EQ(chmod(private_.c_str(), 0711), 0);
  ASSERT_EQ(chmod(socket_.c_str(), 0666), 0);
  for (const char* command : {"status", "layers", "upgrade"}) ExpectToldToBeRoot(Run({command}));
  ExpectToldToBeRoot(Run({"--json", "status"}));
  EXPECT_EQ(turned_away_, 4);
}

TEST_F(CommandLineTest, WhereNoSupervisorRunsItIsNotBlamedOnTheUser) {
  ASSERT_TRUE(MakeDirs(private_).ok());
  ASSERT_EQ(chmod(private_.c_str(), 0711), 0);
  const Output output = Run({"status"});
  EXPECT_EQ(output.exit_code, 3);
  EXPECT_NE(output.text.find("no supervisor at " + socket_), std::string::npos) << output.text;
  EXPECT_EQ(output.text.find("answers only root"), std::string::npos) << output.text;
}

TEST_F(CommandLineTest, AMistakeIsNamedAndPointsToTheHelp) {
  const struct {
    std::vector<std::string> words;
    std::string said;
  } kMistakes[] = {{{"nosuch"}, "unknown command 'nosuch'"},
                   {{"nosuch", "--json"}, "unknown command 'nosuch'"},
                   {{"nosuch", "and", "more"}, "unknown command 'nosuch'"},
                   {{"--nosuch"}, "unknown option '--nosuch'"},
                   {{"status", "--nosuch"}, "unknown option '--nosuch'"},
                   {{"status", "nosuch"}, "unknown word 'nosuch' beside status"},
                   {{}, "a command is missing"},
                   {{"trace", "--limit", "x"}, "--limit = x"}};
  for (const auto& [words, said] : kMistakes) {
    const Output output = Run(words);
    EXPECT_EQ(output.exit_code, 2) << output.text;
    EXPECT_EQ(output.text.find("holdfastctl: "), 0u) << output.text;
    EXPECT_NE(output.text.find(said), std::string::npos) << said << " in\n" << output.text;
    EXPECT_NE(output.text.find("holdfastctl --help"), std::string::npos) << output.text;
    EXPECT_EQ(std::count(output.text.begin(), output.text.end(), '\n'), 1) << output.text;
  }
  EXPECT_EQ(Run({"--help"}).exit_code, 0);
}

}  // namespace
}  // namespace holdfast::ctl
