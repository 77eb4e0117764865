#include "supervisor/options.h"

#include <fcntl.h>
#include <linux/fuse.h>
#include <sched.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>

#include "gtest/gtest.h"
#include "supervisor/fuse_mount.h"
#include "supervisor/spawner.h"

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

TEST(ListenUnixTest, AStaleSocketIsReplacedALivingOneAndAFileAreNot) {
  TempDir dir;
  std::string path = dir.path() + "/s";
  {
    auto first = ListenUnix(path);
    ASSERT_TRUE(first.ok()) << first.status();
    struct stat info;
    ASSERT_EQ(stat(path.c_str(), &info), 0);
    EXPECT_EQ(info.st_mode & 0777, 0600u);
    EXPECT_EQ(ListenUnix(path).status().code(), absl::StatusCode::kAlreadyExists);
  }
  EXPECT_TRUE(ListenUnix(path).ok());
  ASSERT_TRUE(WriteFileAtomic(dir.path() + "/file", "x").ok());
  EXPECT_EQ(ListenUnix(dir.path() + "/file").status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_FALSE(ListenUnix(dir.path() + "/" + std::string(200, 'x')).ok());
}

std::string InitRequest(uint32_t flags, uint32_t flags2) {
  fuse_in_header header{};
  fuse_init_in init{};
  header.opcode = FUSE_INIT;
  header.unique = 2;
  header.len = sizeof(header) + sizeof(init);
  init.major = 7;
  init.minor = 31;
  init.max_readahead = 131'072;
  init.flags = flags;
  init.flags2 = flags2;
  std::string out(header.len, '\0');
  memcpy(out.data(), &header, sizeof(header));
  memcpy(out.data() + sizeof(header), &init, sizeof(init));
  return out;
}

TEST(InitReplyTest, OnlyOfferedFlagsAreAnsweredAndTheUpperHalfOnlyWhenItIsValid) {
  InitOptions options;
  options.flags = (uint64_t{0x101} << 32) | 0x5;
  options.max_readahead = 65'536;
  fuse_init_out out;
  auto reply = BuildInitReply(InitRequest(0x1u | (1u << 30), 0x100), options);
  ASSERT_TRUE(reply.ok());
  memcpy(&out, reply->data() + sizeof(fuse_out_header), sizeof(out));
  EXPECT_EQ(out.flags, 0x1u | (1u << 30));
  EXPECT_EQ(out.flags2, 0x100u);
  EXPECT_EQ(out.minor, 31u);
  EXPECT_EQ(out.max_readahead, 65'536u);
  EXPECT_EQ(out.max_pages, 0) << "not agreed on";
  reply = BuildInitReply(InitRequest(0x5, 0x101), options);
  ASSERT_TRUE(reply.ok());
  memcpy(&out, reply->data() + sizeof(fuse_out_header), sizeof(out));
  EXPECT_EQ(out.flags, 0x5u);
  EXPECT_EQ(out.flags2, 0u) << "the kernel did not say that flags2 is valid";
}

TEST(InitReplyTest, AnythingElseIsRefused) {
  std::string request = InitRequest(1, 0);
  EXPECT_FALSE(BuildInitReply("short", InitOptions()).ok());
  EXPECT_FALSE(BuildInitReply(request.substr(0, 44), InitOptions()).ok());
  request[4] = 1;  // LOOKUP
  EXPECT_FALSE(BuildInitReply(request, InitOptions()).ok());
}

TEST(ExecutableTest, ADamagedPrivateCopyIsReplaced) {
  TempDir dir;
  std::string program = dir.path() + "/program";
  ASSERT_TRUE(WriteFileAtomic(program, "#!/bin/true\n", 0755).ok());
  ASSERT_EQ(chmod(program.c_str(), 0755), 0);
  auto first = CopyExecutable(program, dir.path());
  ASSERT_TRUE(first.ok()) << first.status();
  std::string copy = dir.path() + "/bin/" + (*first)->sha256 + "/holdfast-worker";
  struct stat info;
  ASSERT_EQ(stat(copy.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777, 0555u);
  ASSERT_TRUE(WriteFileAtomic(copy, "damaged").ok());
  auto second = CopyExecutable(program, dir.path());
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ(ReadFile(copy).value(), "#!/bin/true\n");
  RemoveOtherExecutables(dir.path(), {});
  EXPECT_FALSE(PathExists(copy));
}

TEST(ExecutableTest, WhatCannotBeAWorkerIsRefusedWithTheReason) {
  TempDir dir;
  EXPECT_FALSE(CopyExecutable(dir.path() + "/missing", dir.path()).ok());
  EXPECT_FALSE(CopyExecutable(dir.path(), dir.path()).ok());
  ASSERT_TRUE(WriteFileAtomic(dir.path() + "/plain", "x", 0644).ok());
  EXPECT_EQ(CopyExecutable(dir.path() + "/plain", dir.path()).status().code(),
            absl::StatusCode::kPermissionDenied);
}

}  // namespace
}  // namespace holdfast::supervisor
