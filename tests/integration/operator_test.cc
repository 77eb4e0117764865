// What an operator does on a node, with the real holdfastctl: upgrade, a refused upgrade, rollback, status
// while the worker is dead or wedged, drill. Containers' reads go on meanwhile, and none may fail.
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <thread>

#include "gtest/gtest.h"
#include "tests/integration/lazy_image.h"
#include "tests/integration/node.h"
#include "tests/support/registry_server.h"

namespace holdfast::test {
namespace {

using Json = nlohmann::json;

struct Output {
  int exit_code = -1;
  std::string text;  // standard output and error
};

class OperatorTest : public ::testing::Test {
 protected:
  OperatorTest() : node_(kConfig) {}

  std::string CommandLine(const std::string& words) const {
    return std::string(getenv("HOLDFAST_BIN")) + "/holdfastctl --socket " + node_.control_socket() + " " +
           words;
  }
  // With its standard error, or without.
  Output Ctl(const std::string& words, const std::string& errors = "2>&1") const {
    Output output;
    FILE* pipe = popen(("timeout 150 " + CommandLine(words) + " " + errors).c_str(), "re");
    char buffer[4096];
    for (size_t size = 0; (size = fread(buffer, 1, sizeof buffer, pipe)) != 0;)
      output.text.append(buffer, size);
    const int status = pclose(pipe);
    output.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    return output;
  }
  Json CtlJson(const std::string& words, int exit_code) const {
    const Output output = Ctl("--json " + words, "2>/dev/null");
    EXPECT_EQ(output.exit_code, exit_code) << output.text;
    return Json::parse(output.text, nullptr, false);
  }

  std::string PullAndMount() {
    auto parent = PullLazily(node_.snapshots(), &registry_, image_, "image");
    EXPECT_TRUE(parent.ok()) << parent.status();
    if (!parent.ok()) return "";
    auto mounts = node_.snapshots()->Prepare("default/9/container", *parent, {});
    EXPECT_TRUE(mounts.ok()) << mounts.status();
    return mounts.ok() ? node_.MountAll(*mounts) : "";
  }
  // The same program under another digest.
  std::string OtherWorker() const {
    const std::string path = node_.root() + "/other-worker";
    std::filesystem::copy_file(std::string(getenv("HOLDFAST_BIN")) + "/holdfast-worker", path);
    UniqueFd file(open(path.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC));
    EXPECT_EQ(write(file.get(), "other\n", 6), 6);
    return path;
  }
  std::string OwnerExecutable() const {
    const Json status = CtlJson("status", 0);
    for (const Json& worker : status["workers"]) {
      if (worker["role"] == "owner") return worker["executable"];
    }
    return "no owner";
  }
  std::string Script(const std::string& text) const {
    const std::string path = node_.root() + "/script";
    EXPECT_TRUE(WriteFileAtomic(path, "#!/bin/sh\n" + text + "\n", 0755).ok());
    return path;
  }

  static constexpr char kConfig[] = "[cache]\nfree_floor = 0\n[fetch]\nmiss_timeout = \"50s\"\n";
  RegistryServer registry_;
  const Image image_ = MakeImage(7, {.small_files = 40, .large_bytes = 1u << 20});
  Node node_;
};

std::vector<std::string> StepNames(const Json& steps) {
  std::vector<std::string> names;
  for (const Json& step : steps) names.push_back(step["name"]);
  return names;
}

const std::vector<std::string> kAllSteps = {"copy",  "start", "prepare", "rehearse", "park",
                                            "serve", "probe", "yield",   "commit"};

TEST_F(OperatorTest, AnUpgradeShowsEachStepAndItsPauseWhileReadsGoOn) {
  const std::string root = PullAndMount();
  Readers(image_, root, 2, Readers::Until::kAllRead).Wait();
  Readers readers(image_, root, 2, Readers::Until::kStopped);
  Output output = Ctl("upgrade");
  EXPECT_EQ(output.exit_code, 0) << output.text;
  EXPECT_NE(output.text.find("nothing to do"), std::string::npos) << output.text;

  output = Ctl("upgrade --reexec");
  EXPECT_EQ(output.exit_code, 0) << output.text;
  size_t at = 0;
  for (const std::string& step : kAllSteps) {
    at = output.text.find("  " + step + " ", at);
    ASSERT_NE(at, std::string::npos) << step << " in\n" << output.text;
  }
  EXPECT_NE(output.text.find("compared"), std::string::npos) << output.text;
  EXPECT_NE(output.text.find("\nupgrade     done\n"), std::string::npos) << output.text;
  EXPECT_NE(output.text.find("\npause "), std::string::npos) << output.text;

  const Json json = CtlJson("upgrade --force", 0);
  EXPECT_EQ(StepNames(json["swap"]["steps"]), kAllSteps);
  EXPECT_GT(json["swap"]["pause_ns"], 0);
  const Json status = CtlJson("status", 0);
  EXPECT_EQ(status["last_swap"]["kind"], "upgrade");
  EXPECT_EQ(status["last_swap"]["result"], "done");
  EXPECT_EQ(status["swaps"], 2);
  EXPECT_EQ(status["in_progress"].size(), 0u);
  readers.Stop();
  EXPECT_GT(readers.read(), 0u);
  EXPECT_EQ(readers.wrong(), 0u) << readers.first_error();
}

TEST_F(OperatorTest, LayersSayWhenTheyWereLastReadToTheHourAndNotMoreExactly) {
  const std::string root = PullAndMount();
  Readers(image_, root, 2, Readers::Until::kAllRead).Wait();
  const Output output = Ctl("layers");
  EXPECT_EQ(output.exit_code, 0) << output.text;
  EXPECT_NE(output.text.find(" h ago"), std::string::npos) << output.text;
  const Json layers = CtlJson("layers", 0)["layers"];
  ASSERT_EQ(layers.size(), 2u) << layers;
  for (const Json& layer : layers) {
    const int64_t granularity = layer["last_access_granularity_ns"];
    EXPECT_GT(granularity, 0);
    EXPECT_EQ(layer["last_access_wall_ns"].get<int64_t>() % granularity, 0) << layer;
  }
}

TEST_F(OperatorTest, ARefusedUpgradeSaysAtWhichStepWhyAndWhatToDo) {
  const std::string before = OwnerExecutable();
  Output output = Ctl("upgrade --worker /nonexistent/worker");
  EXPECT_EQ(output.exit_code, 1) << output.text;
  EXPECT_NE(output.text.find("/nonexistent/worker"), std::string::npos) << output.text;
  EXPECT_NE(output.text.find("nothing was changed"), std::string::npos) << output.text;

  output = Ctl("upgrade --worker " + Script("echo no such library >&2; exit 127"));
  EXPECT_EQ(output.exit_code, 1) << output.text;
  EXPECT_NE(output.text.find("FAILED"), std::string::npos) << output.text;
  EXPECT_NE(output.text.find("exit code 127: no such library"), std::string::npos) << output.text;
  Json json = CtlJson("upgrade --worker " + node_.root() + "/script", 1);
  EXPECT_EQ(json["error"]["step"], "start") << json;
  EXPECT_EQ(json["steps"].back()["name"], "start") << json;

  ASSERT_TRUE(WriteFileAtomic(node_.root() + "/config.toml", "[cache]\nlimt = 1\n").ok());
  output = Ctl("upgrade --reexec");
  EXPECT_EQ(output.exit_code, 1) << output.text;
  EXPECT_NE(output.text.find("config.toml:2: unknown key 'limt'"), std::string::npos) << output.text;
  EXPECT_NE(output.text.find("the new worker died: exit 1\n"), std::string::npos) << output.text;
  ASSERT_TRUE(WriteFileAtomic(node_.root() + "/config.toml", kConfig).ok());

  json = CtlJson("status", 0);
  EXPECT_EQ(json["last_swap"]["result"].get<std::string>().rfind("failed: ", 0), 0u) << json;
  EXPECT_EQ(OwnerExecutable(), before);
}

TEST_F(OperatorTest, ARollbackBringsTheEarlierBuildBackWhileReadsGoOn) {
  const std::string root = PullAndMount();
  Readers(image_, root, 2, Readers::Until::kAllRead).Wait();
  Readers readers(image_, root, 2, Readers::Until::kStopped);
  const std::string first = OwnerExecutable();
  Output output = Ctl("rollback");
  EXPECT_EQ(output.exit_code, 1) << output.text;
  EXPECT_NE(output.text.find("no other build is kept"), std::string::npos) << output.text;
  EXPECT_NE(output.text.find("nothing was changed"), std::string::npos) << output.text;

  output = Ctl("upgrade --worker " + OtherWorker());
  EXPECT_EQ(output.exit_code, 0) << output.text;
  EXPECT_NE(OwnerExecutable(), first);
  Json status = CtlJson("status", 0);
  EXPECT_GT(status["probation_seconds"], 0) << status;
  EXPECT_EQ(status["rollback"]["ready"], true) << status;
  EXPECT_EQ(status["rollback"]["executable"], first) << status;
  EXPECT_NE(status["rollback"]["reason"].get<std::string>().find("self-test passed"), std::string::npos)
      << status;

  output = Ctl("rollback");
  EXPECT_EQ(output.exit_code, 0) << output.text;
  EXPECT_NE(output.text.find("\nrollback    done\n"), std::string::npos) << output.text;
  EXPECT_EQ(OwnerExecutable(), first);
  EXPECT_EQ(CtlJson("status", 0)["last_swap"]["kind"], "rollback");
  readers.Stop();
  EXPECT_GT(readers.read(), 0u);
  EXPECT_EQ(readers.wrong(), 0u) << readers.first_error();
}

TEST_F(OperatorTest, StatusAnswersWhileTheWorkerIsStoppedAndWhileNoneStarts) {
  const pid_t worker = node_.WorkerPid();
  ASSERT_GT(worker, 0);
  ASSERT_EQ(kill(worker, SIGSTOP), 0);
  const auto begin = std::chrono::steady_clock::now();
  Output output = Ctl("status");
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(15));
  EXPECT_EQ(output.exit_code, 0) << output.text;
  EXPECT_NE(output.text.find("last swap"), std::string::npos) << output.text;

  // No successor can start with this configuration.
  ASSERT_TRUE(WriteFileAtomic(node_.root() + "/config.toml", "nonsense\n").ok());
  kill(worker, SIGKILL);
  ASSERT_TRUE(node_.WaitEnded(worker));
  output = Ctl("status");
  EXPECT_EQ(output.exit_code, 0) << output.text;
  EXPECT_EQ(output.text.find("\n         1  owner "), std::string::npos) << output.text;
  Json status;
  do {
    status = CtlJson("status", 0);
    ASSERT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(40)) << status;
  } while (status["last_death"].is_null() || status["last_death"]["reason"] != "exit 1");
  EXPECT_GE(status["crashes"], 1);
  EXPECT_GT(status["last_death"]["wall_ns"], 0) << status;
  EXPECT_NE(Ctl("status").text.find("\nlast death  "), std::string::npos);
  while (status["start_check"].is_null()) {  // in the next pause between two starts
    status = CtlJson("status", 0);
    ASSERT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(60)) << status;
  }
  EXPECT_NE(status["start_check"].get<std::string>().find("config.toml:1: "), std::string::npos) << status;
  EXPECT_EQ(Ctl("inflight").exit_code, 0);
  EXPECT_EQ(Ctl("layers").exit_code, 1);
  ASSERT_TRUE(WriteFileAtomic(node_.root() + "/config.toml", kConfig).ok());
  EXPECT_TRUE(node_.WaitRunning(30));
}

class DrillTest : public OperatorTest {
 protected:
  // What a drill may leave: nothing.
  std::vector<std::string> Left() const {
    std::vector<std::string> left;
    for (const std::string& path : node_.MountsLeft()) {
      if (path.find("/drill/") != std::string::npos) left.push_back("mount " + path);
    }
    if (PathExists(node_.root() + "/state/drill")) left.push_back("folder state/drill");
    for (const auto& entry : std::filesystem::directory_iterator(node_.root() + "/run")) {
      if (entry.path().filename().string().rfind("drill", 0) == 0) left.push_back(entry.path());
    }
    for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
      std::error_code error;
      const std::string exe = std::filesystem::read_symlink(entry.path() / "exe", error);
      if (!error && exe.rfind(node_.root() + "/state/drill/", 0) == 0) left.push_back("process " + exe);
      std::string cmdline = ReadFile(entry.path().string() + "/cmdline").value_or("");
      if (cmdline.find(node_.root() + "/state/drill/") != std::string::npos)
        left.push_back("process " + cmdline);
    }
    return left;
  }
};

TEST_F(DrillTest, EveryCasePassesWithoutTheNetworkAndNothingOfTheNodeIsTouched) {
  const std::string root = PullAndMount();
  Readers(image_, root, 4, Readers::Until::kAllRead).Wait();
  Readers readers(image_, root, 1, Readers::Until::kStopped);
  const Json before = CtlJson("status", 0);
  const uint64_t requests = registry_.requests();
  const Json drill = CtlJson("drill", 0);
  ASSERT_TRUE(drill.is_object() && drill.contains("ok")) << drill.dump(2);
  EXPECT_EQ(drill["ok"], true) << drill.dump(2);
  EXPECT_GT(drill["files"], 10) << drill.dump(2);
  std::vector<std::string> names;
  for (const Json& one : drill["cases"]) {
    names.push_back(one["case"]);
    EXPECT_EQ(one["failed_reads"], 0) << one;
    EXPECT_GT(one["reads"], 0) << one;
  }
  EXPECT_EQ(names, (std::vector<std::string>{"swap", "crash", "hang", "refusal", "rollback"}));
  EXPECT_EQ(registry_.requests(), requests);
  const Json after = CtlJson("status", 0);
  EXPECT_EQ(before["workers"][0]["pid"], after["workers"][0]["pid"]);
  EXPECT_EQ(before["swaps"], after["swaps"]);
  EXPECT_EQ(before["mounts_live"], after["mounts_live"]);
  EXPECT_EQ(Left(), std::vector<std::string>());
  readers.Stop();
  EXPECT_EQ(readers.wrong(), 0u) << readers.first_error();
}

TEST_F(DrillTest, WithoutALazyLayerItSaysSo) {
  Output output = Ctl("drill");
  EXPECT_EQ(output.exit_code, 1) << output.text;
  EXPECT_NE(output.text.find("no lazily served layer has content on this disk yet"), std::string::npos)
      << output.text;
  EXPECT_EQ(Left(), std::vector<std::string>());
}

TEST_F(DrillTest, OneThatIsInterruptedLeavesNothing) {
  const std::string root = PullAndMount();
  Readers(image_, root, 4, Readers::Until::kAllRead).Wait();
  // Once by the signal that it handles, once by the one that it cannot: then the next one cleans up.
  for (const char* signal : {"INT", "KILL"}) {
    const std::string script = Script(CommandLine("drill") + " > " + node_.root() + "/out 2>&1 &\n" +
                                      "pid=$!\n"
                                      "for i in $(seq 600); do grep -q '^swap' " +
                                      node_.root() +
                                      "/out && break; sleep 0.05; done\n"
                                      "kill -" +
                                      signal + " $pid; wait $pid; exit $?");
    const int status = system(script.c_str());
    ASSERT_TRUE(WIFEXITED(status));
    EXPECT_EQ(WEXITSTATUS(status), signal == std::string("INT") ? 1 : 128 + SIGKILL);
    EXPECT_NE(ReadFile(node_.root() + "/out").value_or("").find("swap"), std::string::npos);
    if (signal == std::string("KILL")) {
      EXPECT_NE(Left(), std::vector<std::string>()) << "it was not killed in its midst";
      EXPECT_EQ(Ctl("drill").exit_code, 0);
    }
    EXPECT_EQ(Left(), std::vector<std::string>()) << signal;
  }
}

}  // namespace
}  // namespace holdfast::test
