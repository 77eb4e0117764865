#include "supervisor/options.h"

#include <fcntl.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>

#include "common/io.h"
#include "gtest/gtest.h"

namespace holdfast::supervisor {
namespace {

TEST(OptionsTest, WhatFollowsTheDashesGoesToTheWorker) {
  auto options = ParseOptions({"--worker", "/w", "--state=/s", "--", "--config", "/c", "--"});
  ASSERT_TRUE(options.ok()) << options.status();
  EXPECT_EQ(options->worker, "/w");
  EXPECT_EQ(options->state_dir, "/s");
  EXPECT_EQ(options->runtime_dir, "/run/holdfast");
  EXPECT_EQ(options->worker_args, (std::vector<std::string>{"--config", "/c", "--"}));
}

TEST(OptionsTest, MistakesAreNamed) {
  EXPECT_NE(ParseOptions({"--nope"}).status().ToString().find("--nope"), std::string::npos);
  EXPECT_NE(ParseOptions({"stray"}).status().ToString().find("stray"), std::string::npos);
  EXPECT_NE(ParseOptions({"--worker"}).status().ToString().find("needs a value"), std::string::npos);
  EXPECT_NE(ParseOptions({"--state="}).status().ToString().find("needs a value"), std::string::npos);
  EXPECT_FALSE(ParseOptions({"--limits", "register=soon"}).ok());
  EXPECT_NE(ParseOptions({"--limits", "register=1,dance=2"}).status().ToString().find("dance=2"),
            std::string::npos);
  EXPECT_FALSE(ParseOptions({"--hang-limit", "3s"}).ok());
  EXPECT_FALSE(ParseOptions({"--hang-limit", "18446744073710"}).ok())
      << "too large to be counted in nanoseconds";
  EXPECT_EQ(ParseOptions({})->hang_limit_ms, 3'000u);
  EXPECT_EQ(ParseOptions({"--hang-limit=0"})->hang_limit_ms, 0u);
}

TEST(OptionsTest, TestsMayShortenTheTimeLimitsOfSteps) {
  auto options = ParseOptions({"--limits", "register=500,take=800"});
  ASSERT_TRUE(options.ok()) << options.status();
  EXPECT_EQ(options->limits.register_ms, 500u);
  EXPECT_EQ(options->limits.take_ms, 800u);
  EXPECT_EQ(options->limits.serve_ms, Limits().serve_ms);
}

// What PrepareProcess says in a process that `unfit` has changed: that it returned `code`, and `words`.
void ExpectRefusal(const std::function<bool()>& unfit, absl::StatusCode code, const std::string& words) {
  pid_t child = fork();
  if (child == 0) {
    if (!unfit()) _exit(2);
    absl::Status status = PrepareProcess();
    bool named = status.ToString().find(words) != std::string::npos;
    _exit(status.code() == code && named ? 0 : 1);
  }
  int result = 0;
  ASSERT_EQ(waitpid(child, &result, 0), child);
  EXPECT_TRUE(WIFEXITED(result));
  EXPECT_EQ(WEXITSTATUS(result), 0) << "1: another answer; 2: the process could not be changed";
}

TEST(PrepareProcessTest, WhoIsNotRootIsToldSo) {
  ExpectRefusal([] { return setresuid(65534, 65534, 65534) == 0; }, absl::StatusCode::kPermissionDenied,
                "must run as root");
}

TEST(PrepareProcessTest, WithoutTheFuseDeviceTheRemedyIsNamed) {
  auto hide = [] {
    return unshare(CLONE_NEWNS) == 0 && mount("", "/", "", MS_REC | MS_PRIVATE, nullptr) == 0 &&
           mount("tmpfs", "/dev", "tmpfs", 0, nullptr) == 0;
  };
  ExpectRefusal(hide, absl::StatusCode::kUnavailable, "modprobe fuse");
}

}  // namespace
}  // namespace holdfast::supervisor
