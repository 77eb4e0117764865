#include <nlohmann/json.hpp>

#include "worker/ctl/format.h"
#include "worker/ctl/report.h"
#include "worker/ctl/swap_report.h"

namespace holdfast::ctl {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kSchema = 1;

Json Document() {
  Json json;
  json["schema"] = kSchema;
  return json;
}

// Names from outside (paths, labels) may hold bytes that are not UTF-8; they are replaced, never an error.
std::string Dump(const Json& json) { return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n"; }

Json StepsJson(const std::vector<SwapStep>& steps) {
  Json json = Json::array();
  for (const SwapStep& step : steps) {
    json.push_back({{"name", step.name}, {"ns", step.nanos}, {"detail", step.detail}});
  }
  return json;
}

Json SwapJson(const SwapStatus& swap) {
  Json json;
  json["kind"] = swap.kind;
  json["result"] = swap.result;
  json["finished_wall_ns"] = swap.finished_wall_nanos;
  json["pause_ns"] = swap.pause_nanos;
  json["requests_carried_over"] = swap.requests_carried_over;
  json["from_build"] = swap.from_build;
  json["to_build"] = swap.to_build;
  json["steps"] = StepsJson(swap.steps);
  return json;
}

}  // namespace

std::string StatusJson(const NodeStatus& node) {
  const SupervisorStatus& status = node.supervisor;
  const std::optional<WorkerStats>& stats = node.worker;
  Json json = Document();
  json["supervisor"] = {
      {"build", status.build}, {"pid", status.pid}, {"started_wall_ns", status.started_wall_nanos}};
  json["phase"] = status.phase;
  json["state_dir"] = status.state_dir;
  json["mounts_live"] = status.mounts_live;
  json["mounts_detached"] = status.mounts_detached;
  json["swaps"] = status.swaps;
  json["crashes"] = status.crashes;
  json["requests_carried_over_total"] = status.carried_over_total;
  json["last_swap"] = SwapJson(status.last_swap);
  json["workers"] = Json::array();
  for (const WorkerStatus& worker : status.workers) {
    json["workers"].push_back({{"generation", worker.generation},
                               {"role", worker.role},
                               {"pid", worker.pid},
                               {"build", worker.build},
                               {"executable", worker.executable},
                               {"started_wall_ns", worker.started_wall_nanos},
                               {"requests_received", worker.requests_received},
                               {"requests_answered", worker.requests_answered}});
  }
  json["fetch"] = nullptr;
  json["cache"] = nullptr;
  if (stats.has_value()) {
    json["fetch"] = {{"requests", stats->fetch_requests},
                     {"bytes", stats->fetch_bytes},
                     {"failures", stats->fetch_failures},
                     {"retries", stats->fetch_retries},
                     {"in_flight", stats->fetch_in_flight}};
    json["cache"] = {{"bytes", stats->cache_bytes},
                     {"limit_bytes", stats->cache_limit_bytes},
                     {"evicted_bytes", stats->cache_evicted_bytes},
                     {"damaged_chunks", stats->cache_damaged_chunks},
                     {"unstored_bytes", stats->cache_unstored_bytes}};
  }
  json["warnings"] = status.warnings;
  json["hangs"] = status.hangs;
  json["probation_seconds"] = status.probation_seconds;
  json["last_good"] = status.last_good;
  json["spare"] = status.spare;
  json["supervisor_restarts"] = status.supervisor_restarts;
  json["state_source"] = status.state_source;
  json["fd_store"] = status.fd_store;
  json["in_progress"] = StepsJson(status.in_progress);
  json["last_death"] = nullptr;  // of a worker: none, or not known
  if (!status.last_death.empty())
    json["last_death"] = {{"reason", status.last_death}, {"wall_ns", status.last_death_wall_nanos}};
  json["start_check"] = nullptr;  // not tried
  if (!node.start_check.empty()) json["start_check"] = node.start_check;
  json["rollback"] = nullptr;  // not known
  if (node.rollback.has_value()) {
    json["rollback"] = {{"ready", node.rollback->ready},
                        {"executable", node.rollback->executable},
                        {"reason", node.rollback->reason}};
  }
  return Dump(json);
}

std::string MountsJson(const std::vector<MountInfo>& mounts) {
  Json json = Document();
  json["mounts"] = Json::array();
  for (const MountInfo& mount : mounts) {
    json["mounts"].push_back({{"mount_id", mount.mount_id},
                              {"state", mount.state},
                              {"path", mount.path},
                              {"snapshot_id", mount.snapshot_id},
                              {"layer_digest", mount.layer_digest},
                              {"index_digest", mount.index_digest},
                              {"image", mount.image}});
  }
  return Dump(json);
}

std::string LayersJson(const std::vector<LayerInfo>& layers) {
  Json json = Document();
  json["layers"] = Json::array();
  for (const LayerInfo& layer : layers) {
    json["layers"].push_back({{"digest", layer.digest},
                              {"image", layer.image},
                              {"compressed_bytes", layer.compressed_bytes},
                              {"content_bytes", layer.content_bytes},
                              {"cached_bytes", layer.cached_bytes},
                              {"fetched_bytes", layer.fetched_bytes},
                              {"touched_bytes", layer.touched_bytes},
                              {"files", layer.files},
                              {"mounts", layer.mounts},
                              {"last_access_wall_ns", layer.last_access_wall_nanos},
                              {"index_digest", layer.index_digest},
                              {"last_access_granularity_ns", kHourNanos}});
  }
  return Dump(json);
}

std::string SnapshotsJson(const std::vector<SnapshotInfo>& snapshots) {
  Json json = Document();
  json["snapshots"] = Json::array();
  for (const SnapshotInfo& snapshot : snapshots) {
    json["snapshots"].push_back({{"id", snapshot.id},
                                 {"key", snapshot.key},
                                 {"parent", snapshot.parent},
                                 {"kind", snapshot.kind},
                                 {"created_wall_ns", snapshot.created_wall_nanos},
                                 {"lazy_digest", snapshot.lazy_digest},
                                 {"image", snapshot.image}});
  }
  return Dump(json);
}

std::string InflightJson(const Inflight& inflight) {
  Json json = Document();
  json["requests"] = Json::array();
  for (const InflightRequest& request : inflight.requests) {
    json["requests"].push_back({{"ledger_generation", request.ledger_generation},
                                {"owner_generation", request.owner_generation},
                                {"state", request.executing ? "executing" : "waiting"},
                                {"mount_id", request.mount_id},
                                {"unique", request.unique},
                                {"operation", OpcodeName(request.opcode)},
                                {"opcode", request.opcode},
                                {"nodeid", request.nodeid},
                                {"offset", request.offset},
                                {"size", request.size},
                                {"age_ns", request.age_nanos},
                                {"left_ns", request.left_nanos},
                                {"interrupted", request.interrupted}});
  }
  return Dump(json);
}

std::string UpgradeJson(const UpgradeResult& result) {
  Json json = Document();
  json["changed"] = result.changed;
  json["swap"] = SwapJson(result.swap);
  return Dump(json);
}

std::string RollbackJson(const SwapStatus& swap) {
  Json json = Document();
  json["changed"] = true;
  json["swap"] = SwapJson(swap);
  return Dump(json);
}

std::string SwapFailureJson(const SwapFailure& failure, const StepLog& log, const std::string& advice) {
  Json json = Document();
  json["error"] = {{"command", failure.command}, {"message", failure.message}, {"advice", advice}};
  json["error"]["step"] = failure.step;
  json["steps"] = StepsJson(log.steps);
  return Dump(json);
}

std::string TraceJson(const std::vector<TraceEntry>& events) {
  Json json = Document();
  json["events"] = Json::array();
  for (const TraceEntry& event : events) {
    json["events"].push_back({{"wall_ns", event.wall_nanos},
                              {"duration_ns", event.duration_nanos},
                              {"event", event.event},
                              {"detail", event.detail}});
  }
  return Dump(json);
}

std::string ErrorJson(const std::string& command, const std::string& message, const std::string& advice) {
  Json json = Document();
  json["error"] = {{"command", command}, {"message", message}, {"advice", advice}};
  return Dump(json);
}

}  // namespace holdfast::ctl
