#include "worker/ctl/report.h"

#include <sys/mman.h>

#include <cstring>
#include <nlohmann/json.hpp>
#include <vector>

#include "gtest/gtest.h"
#include "schema/ledger_map.h"
#include "worker/ctl/format.h"
#include "worker/ctl/swap_report.h"

namespace holdfast::ctl {
namespace {

constexpr int64_t kNow = 1'700'000'000'000'000'000;
constexpr int64_t kSecond = 1'000'000'000;

TEST(FormatTest, BytesAreShownInBinaryUnits) {
  EXPECT_EQ(HumanBytes(0), "0 B");
  EXPECT_EQ(HumanBytes(1023), "1023 B");
  EXPECT_EQ(HumanBytes(1536), "1.5 KiB");
  EXPECT_EQ(HumanBytes(10ull << 30), "10 GiB");
  EXPECT_EQ(HumanBytes((1ull << 20) - 1), "1.0 MiB");
}

TEST(FormatTest, DurationsAreShownInTheUnitThatFits) {
  EXPECT_EQ(HumanDuration(850), "850 ns");
  EXPECT_EQ(HumanDuration(1'234'567), "1.2 ms");
  EXPECT_EQ(HumanDuration(15'000'000'000), "15 s");
  EXPECT_EQ(HumanDuration(180'000'000'000), "3.0 min");
  EXPECT_EQ(HumanAge(0, kNow), "never");
  EXPECT_EQ(HumanAge(kNow + 1, kNow), "now");
  EXPECT_EQ(HumanAge(kNow - 3 * 86400 * kSecond, kNow), "3.0 d");
}

TEST(FormatTest, ATimeThatIsKnownToItsHourIsNotShownAsExact) {
  constexpr int64_t kHour = kHourNanos, kBegin = 472'222 * kHour;
  EXPECT_EQ(HumanHourAge(0, kBegin), "never");
  // Read in the last second of that hour, or in its first.
  EXPECT_EQ(HumanHourAge(kBegin, kBegin), "< 1 h ago");
  EXPECT_EQ(HumanHourAge(kBegin, kBegin + kHour - 1), "< 1 h ago");
  EXPECT_EQ(HumanHourAge(kBegin, kBegin + kHour), "< 2 h ago");
  EXPECT_EQ(HumanHourAge(kBegin, kBegin + 2 * kHour), "2 h ago");
  EXPECT_EQ(HumanHourAge(kBegin, kBegin + 48 * kHour - 1), "47 h ago");
  EXPECT_EQ(HumanHourAge(kBegin, kBegin + 80 * kHour), "3 d ago");
  EXPECT_EQ(HumanHourAge(kBegin + kHour, kBegin), "< 1 h ago") << "the clock was set back";
}

TEST(FormatTest, ALayerWhoseBlocksExceedItsContentIsWhollyCached) {
  EXPECT_EQ(Percent(37, 100), "37 %");
  EXPECT_EQ(Percent(0, 0), "-");
  EXPECT_EQ(Percent(8192, 75), "100 %");
}

TEST(FormatTest, TableColumnsAlignAndNoLineEndsInSpaces) {
  Table table({{"NAME"}, {"N", true}, {"REST"}});
  table.Add({"a", "100", "x"});
  table.Add({"lönger", "7", ""});
  EXPECT_EQ(table.ToString(), "NAME      N  REST\na       100  x\nlönger    7\n");
}

NodeStatus Example() {
  NodeStatus node;
  SupervisorStatus& status = node.supervisor;
  status.build = "0.1.0";
  status.phase = "running";
  status.state_dir = "/var/lib/holdfast";
  status.pid = 10;
  status.started_wall_nanos = kNow - 60 * kSecond;
  status.mounts_live = 3;
  status.workers.push_back({2, 11, "owner", "0.1.0", std::string(64, 'a'), kNow - 5 * kSecond, 9, 8});
  status.last_swap = {"upgrade", "done", "0.1.0", "0.1.1", kNow - 5 * kSecond, 1'500'000, 12, {}};
  node.rollback_unknown = "the supervisor is older than this command";
  return node;
}

TEST(ReportTest, StatusShowsTheLastSwapWithPauseAndCarriedRequests) {
  const std::string text = StatusText(Example(), kNow);
  EXPECT_NE(text.find("upgrade, done, 5.0 s ago: pause 1.5 ms, 12 requests carried over, 0.1.0 -> 0.1.1"),
            std::string::npos)
      << text;
  EXPECT_NE(text.find("owner"), std::string::npos);
  EXPECT_NE(text.find("0 crashes"), std::string::npos) << text;
}

TEST(ReportTest, StatusWithoutAWorkerSaysSo) {
  NodeStatus status = Example();
  status.supervisor.workers.clear();
  EXPECT_NE(StatusText(status, kNow).find("no worker is running"), std::string::npos);
}

TEST(ReportTest, WhyTheLastWorkerDiedIsShownAndWhereMoreIsToldWhileNoneServes) {
  NodeStatus node = Example();
  EXPECT_EQ(StatusText(node, kNow).find("last death"), std::string::npos);
  EXPECT_TRUE(nlohmann::json::parse(StatusJson(node))["last_death"].is_null());
  node.supervisor.last_death = "exit 1";
  node.supervisor.last_death_wall_nanos = kNow - 2 * kSecond;
  EXPECT_NE(StatusText(node, kNow).find("\nlast death  2.0 s ago: exit 1\n"), std::string::npos)
      << StatusText(node, kNow);
  auto json = nlohmann::json::parse(StatusJson(node));
  EXPECT_EQ(json["last_death"]["reason"], "exit 1");
  EXPECT_EQ(json["last_death"]["wall_ns"], kNow - 2 * kSecond);
  node.supervisor.workers[0].role = "starting";
  EXPECT_NE(StatusText(node, kNow).find("2.0 s ago: exit 1; its log may say more"), std::string::npos)
      << StatusText(node, kNow);
  node.supervisor.workers.clear();
  EXPECT_NE(StatusText(node, kNow).find("exit 1; its log may say more"), std::string::npos);
  EXPECT_TRUE(nlohmann::json::parse(StatusJson(node))["start_check"].is_null());
  node.start_check = "exit code 1: c.toml:3: bad key";
  EXPECT_NE(StatusText(node, kNow).find("\nstart       tried by hand: exit code 1: c.toml:3: bad key\n"),
            std::string::npos)
      << StatusText(node, kNow);
  EXPECT_EQ(nlohmann::json::parse(StatusJson(node))["start_check"], node.start_check);
}

TEST(ReportTest, JsonIsVersionedAndHasNullWhereTheWorkerIsSilent) {
  auto json = nlohmann::json::parse(StatusJson(Example()));
  EXPECT_EQ(json["schema"], 1);
  EXPECT_TRUE(json["fetch"].is_null());
  EXPECT_EQ(json["last_swap"]["pause_ns"], 1'500'000);
  EXPECT_EQ(json["workers"][0]["generation"], 2);
}

TEST(ReportTest, LayersSayHowExactlyTheLastReadIsKnown) {
  LayerInfo layer;
  layer.last_access_wall_nanos = kNow - kNow % kHourNanos;
  const std::string text = LayersText({layer}, kNow);
  EXPECT_NE(text.find("LAST READ"), std::string::npos) << text;
  EXPECT_NE(text.find("< 1 h ago"), std::string::npos) << text;
  auto json = nlohmann::json::parse(LayersJson({layer}))["layers"][0];
  EXPECT_EQ(json["last_access_wall_ns"], layer.last_access_wall_nanos);
  EXPECT_EQ(json["last_access_granularity_ns"], 3'600'000'000'000);
}

TEST(ReportTest, JsonSurvivesNamesThatAreNoUtf8) {
  SnapshotInfo snapshot;
  snapshot.key = "default/1/\xff\xfe";
  auto json = nlohmann::json::parse(SnapshotsJson({snapshot}));
  EXPECT_EQ(json["snapshots"].size(), 1u);
}

TEST(ReportTest, AnOldSupervisorIsShownWithoutWhatItDoesNotKnow) {
  EXPECT_EQ(StatusText(Example(), kNow),
            "supervisor  0.1.0, pid 10, up 60 s\n"
            "state       running\n"
            "folder      /var/lib/holdfast\n"
            "mounts      3 live, 0 detached\n"
            "last swap   upgrade, done, 5.0 s ago: pause 1.5 ms, 12 requests carried over, 0.1.0 -> 0.1.1\n"
            "since start 0 swaps, 0 crashes, 0 requests carried over\n"
            "rollback    not known: the supervisor is older than this command\n"
            "\n"
            "GENERATION  ROLE   PID     UP  ANSWERED  BUILD  EXECUTABLE\n"
            "         2  owner   11  5.0 s         8  0.1.0  aaaaaaaaaaaa\n");
  EXPECT_TRUE(nlohmann::json::parse(StatusJson(Example()))["rollback"].is_null());
}

NodeStatus InProbation() {
  NodeStatus node = Example();
  SupervisorStatus& status = node.supervisor;
  status.state_source = "fd store";
  status.supervisor_restarts = 2;
  status.fd_store = true;
  status.crashes = 3;
  status.hangs = 1;
  status.probation_seconds = 42;
  status.last_good = std::string(64, 'b');
  status.spare = "ready";
  status.last_swap.result = "failed: 1 of 128 requests was answered differently";
  status.last_swap.pause_nanos = 0;
  status.last_swap.steps = {{"copy", 9'000'000, ""}, {"start", 90'000'000, ""}, {"rehearse", 0, ""}};
  node.rollback = RollbackCheck{true, std::string(64, 'b'), "holdfast-worker 0.1.0: self-test passed"};
  return node;
}

TEST(ReportTest, StatusShowsProbationSpareHangsAndThatARollbackIsReady) {
  EXPECT_EQ(
      StatusText(InProbation(), kNow),
      "supervisor  0.1.0, pid 10, up 60 s, state from the fd store (2 restarts)\n"
      "state       running\n"
      "folder      /var/lib/holdfast\n"
      "mounts      3 live, 0 detached\n"
      "last swap   upgrade, failed: 1 of 128 requests was answered differently, 5.0 s ago, at step rehearse\n"
      "since start 0 swaps, 3 crashes (1 hang), 0 requests carried over\n"
      "build       in probation for 42 s more; deaths in it bring back bbbbbbbbbbbb\n"
      "spare       ready\n"
      "fd store    used: a restarted supervisor gets everything back\n"
      "rollback    ready: bbbbbbbbbbbb: holdfast-worker 0.1.0: self-test passed\n"
      "\n"
      "GENERATION  ROLE   PID     UP  ANSWERED  BUILD  EXECUTABLE\n"
      "         2  owner   11  5.0 s         8  0.1.0  aaaaaaaaaaaa\n");
  auto json = nlohmann::json::parse(StatusJson(InProbation()));
  EXPECT_EQ(json["probation_seconds"], 42);
  EXPECT_EQ(json["hangs"], 1);
  EXPECT_EQ(json["spare"], "ready");
  EXPECT_EQ(json["supervisor_restarts"], 2);
  EXPECT_EQ(json["rollback"]["ready"], true);
  EXPECT_EQ(json["last_swap"]["steps"][2]["name"], "rehearse");
}

TEST(ReportTest, ASwapUnderWayShowsItsStep) {
  NodeStatus node = InProbation();
  node.supervisor.phase = "rehearsing";
  node.supervisor.in_progress = {{"copy", 1, ""}, {"rehearse", 0, ""}};
  node.supervisor.probation_seconds = 0;
  node.rollback = RollbackCheck{false, "", "no earlier build is kept"};
  const std::string text = StatusText(node, kNow);
  EXPECT_NE(text.find("state       rehearsing, step rehearse\n"), std::string::npos) << text;
  EXPECT_NE(text.find("build       proven: bbbbbbbbbbbb\n"), std::string::npos) << text;
  EXPECT_NE(text.find("rollback    NOT ready: no earlier build is kept\n"), std::string::npos) << text;
}

TEST(SwapReportTest, StepsAreOneLineEachWithTheirTime) {
  EXPECT_EQ(StepText({"prepare", 12'300'000, ""}), "  prepare        12 ms\n");
  EXPECT_EQ(StepText({"rehearse", 41'000'000, "128 requests and 60 files compared on 3 layers"}),
            "  rehearse       41 ms  128 requests and 60 files compared on 3 layers\n");
  EXPECT_EQ(FailedStepText("probe"), "  probe         FAILED\n");
}

TEST(SwapReportTest, TheStepThatFailedIsTheOneThatDidNotEnd) {
  StepLog log;
  log.Add({"copy", 0, ""}, false);
  log.Add({"copy", 5, "new"}, true);
  EXPECT_EQ(log.Unfinished(), "");
  log.Add({"start", 0, ""}, false);
  EXPECT_EQ(log.Unfinished(), "start");
  ASSERT_EQ(log.steps.size(), 2u);
  EXPECT_EQ(log.steps[0].detail, "new");
}

TEST(SwapReportTest, AnUpgradeShowsPauseAndCarriedRequests) {
  UpgradeResult result;
  EXPECT_NE(UpgradeText(result).find("--reexec"), std::string::npos);
  result.changed = true;
  result.swap = Example().supervisor.last_swap;
  EXPECT_EQ(UpgradeText(result),
            "upgrade     done\n"
            "build       0.1.0 -> 0.1.1\n"
            "pause       1.5 ms, for which reads waited\n"
            "carried     12 requests unanswered by the old worker, answered by the new one\n");
  result.swap.steps = {{"copy", 7, "what"}};
  auto json = nlohmann::json::parse(UpgradeJson(result));
  EXPECT_EQ(json["changed"], true);
  EXPECT_EQ(json["swap"]["steps"][0]["ns"], 7);
}

// Every kind of failure leads to another advice.
TEST(SwapReportTest, AFailureSaysWhatToDo) {
  auto advice = [](const std::string& step, const std::string& message, const std::string& verdict = "") {
    return SwapAdvice({"upgrade", message, step, "/w", verdict});
  };
  EXPECT_NE(advice("", "an upgrade is under way already").find("Try again when it is over"),
            std::string::npos);
  EXPECT_NE(advice("", "the running build is in probation").find("still in probation"), std::string::npos);
  EXPECT_NE(advice("copy", "worker /w: No such file").find("room for a copy"), std::string::npos);
  const std::string died = advice("start", "exit 1", "c.toml:3: unknown key 'x'");
  EXPECT_NE(died.find("tried by hand: c.toml:3: unknown key"), std::string::npos) << died;
  EXPECT_NE(advice("rehearse", "different").find("a bad build"), std::string::npos);
  EXPECT_NE(advice("copy", "what an earlier worker did is still being taken back").find("try again then"),
            std::string::npos);
  EXPECT_NE(advice("probe", "different").find("rolled back"), std::string::npos);
  for (const char* step : {"rehearse", "probe"}) {
    EXPECT_NE(advice(step, "the verifier died").find("holdfast-verifier is installed"), std::string::npos);
    EXPECT_NE(advice(step, "it took too long (phase rehearsing)").find("not judged to the end"),
              std::string::npos);
    EXPECT_NE(advice(step, "the running worker died while").find("no fault was found"), std::string::npos);
    const std::string late = "the probe did not answer within 5000 ms; it was at mount 12";
    EXPECT_NE(advice(step, late).find("not judged to the end"), std::string::npos);
    const std::string full = advice(step, "canary mount: mkdir /s/canary/7: No space left on device");
    EXPECT_NE(full.find("no fault was found with this build: the disk of the state folder is full"),
              std::string::npos)
        << full;
  }
  for (const char* step : {"park", "yield", "await-exit", "commit"}) {
    const std::string dead = advice(step, "the new worker died: hung: it took too long (phase committing)");
    EXPECT_NE(dead.find("rolled back: the new worker died or hung"), std::string::npos) << dead;
    EXPECT_NE(dead.find("do not use this build before its log lines are explained"), std::string::npos);
    EXPECT_NE(dead.find("supervisor/hangs"), std::string::npos) << dead;
  }
  EXPECT_NE(advice("", "a worker is being replaced or started already").find("just being started"),
            std::string::npos);
  EXPECT_NE(advice("commit", "no space").find("could not take the metadata"), std::string::npos);
  EXPECT_NE(SwapAdvice({"rollback", "none is kept", "", "", ""}).find("--worker PATH"), std::string::npos);
  StepLog log;
  log.Add({"start", 0, ""}, false);
  auto json = nlohmann::json::parse(SwapFailureJson({"upgrade", "why", "start", "", ""}, log, "do"));
  EXPECT_EQ(json["error"]["step"], "start");
  EXPECT_EQ(json["error"]["advice"], "do");
  EXPECT_EQ(json["steps"][0]["name"], "start");
}

TEST(ReportTest, EmptyListsSayThatTheyAreEmpty) {
  EXPECT_EQ(MountsText({}), "no mounts\n");
  EXPECT_EQ(LayersText({}, kNow), "no layers\n");
  EXPECT_EQ(SnapshotsText({}, kNow), "no snapshots\n");
  EXPECT_EQ(InflightText({}), "nothing in flight\n");
  EXPECT_EQ(TraceText({}), "no trace events\n");
}

TEST(InflightTest, SlotsAndRecordsInUseAreListedAndFreeOnesAreNot) {
  UniqueFd ledger = LedgerMap::Make(5).value();
  LedgerMap map = LedgerMap::MapGiven(ledger.get(), PROT_READ | PROT_WRITE).value();
  hf_slot* slot = map.slot(1);
  slot->state = HF_SLOT_EXECUTING;
  slot->mount_id = 3;
  slot->owner_generation = 5;
  slot->received_ns = 100;
  const uint32_t request[] = {40, 1 /* LOOKUP */, 77, 0, 9, 0};  // len, opcode, unique (low, high), nodeid
  memcpy(slot->request, request, sizeof request);
  hf_record* record = map.record(2);
  *record = {HF_RECORD_PENDING, 6, 4, 88, 10, 4096, 131072, 0, 5000, HF_MARK_INTERRUPTED, 0};
  map.header()->record_high_water = 3;

  auto found = ReadLedgerFd(ledger.get(), 1100);
  ASSERT_TRUE(found.ok()) << found.status();
  ASSERT_EQ(found->size(), 2u);
  EXPECT_TRUE((*found)[0].executing);
  EXPECT_EQ((*found)[0].opcode, 1u);
  EXPECT_EQ((*found)[0].unique, 77u);
  EXPECT_EQ((*found)[0].age_nanos, 1000u);
  EXPECT_EQ((*found)[1].ledger_generation, 5u);
  EXPECT_EQ((*found)[1].owner_generation, 6u);
  EXPECT_EQ((*found)[1].offset, 4096u);
  EXPECT_EQ((*found)[1].left_nanos, 3900u);
  EXPECT_TRUE((*found)[1].interrupted);

  MountInfo mount;
  mount.mount_id = 4;
  mount.layer_digest = "sha256:abc";
  const std::string text = InflightText({*found, {mount}});
  EXPECT_NE(text.find("LOOKUP"), std::string::npos) << text;
  EXPECT_NE(text.find("sha256:abc"), std::string::npos) << text;
  EXPECT_NE(text.find("interrupted"), std::string::npos) << text;
}

TEST(InflightTest, WhatIsNoLedgerIsRefused) {
  UniqueFd ledger = LedgerMap::Make(5).value();
  LedgerMap::MapGiven(ledger.get(), PROT_READ | PROT_WRITE)->header()->version = 2;
  EXPECT_EQ(ReadLedgerFd(ledger.get(), 0).status().code(), absl::StatusCode::kDataLoss);
}

}  // namespace
}  // namespace holdfast::ctl
