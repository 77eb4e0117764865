#include <cstdio>
#include <ctime>
#include <map>
#include <string_view>

#include "worker/ctl/format.h"
#include "worker/ctl/report.h"

namespace holdfast::ctl {
namespace {

std::string Line(const std::string& name, const std::string& value) {
  char padded[32];
  snprintf(padded, sizeof padded, "%-12s", name.c_str());
  return std::string(padded) + value + "\n";
}

std::string OrDash(const std::string& text) { return text.empty() ? "-" : text; }

std::string SwapText(const SwapStatus& swap, int64_t now) {
  if (swap.kind.empty() || swap.kind == "none") return "none yet";
  std::string text = swap.kind + ", " + swap.result;
  if (swap.result == "running") return text;
  text += ", " + HumanAge(swap.finished_wall_nanos, now) + " ago";
  if (swap.result != "done") {
    // Most fail before anybody stopped reading.
    if (!swap.steps.empty()) text += ", at step " + swap.steps.back().name;
    if (swap.pause_nanos != 0) text += ", pause " + HumanDuration(swap.pause_nanos);
    return text;
  }
  text += ": pause " + HumanDuration(swap.pause_nanos) + ", " + Count(swap.requests_carried_over, "request") +
          " carried over";
  if (swap.from_build != swap.to_build)
    text += ", " + OrDash(swap.from_build) + " -> " + OrDash(swap.to_build);
  return text;
}

// Where the state of a supervisor came from; nothing of one that does not say.
std::string OriginText(const SupervisorStatus& status) {
  if (status.state_source.empty() || status.state_source == "new") return "";
  return ", state from the " + status.state_source + " (" + Count(status.supervisor_restarts, "restart") +
         ")";
}

std::string StepsText(const std::vector<SwapStep>& steps) {
  if (steps.empty()) return "";
  return ", step " + steps.back().name + (steps.back().detail.empty() ? "" : ": " + steps.back().detail);
}

std::string SafetyText(const SupervisorStatus& status) {
  std::string proof;
  if (status.probation_seconds != 0) {
    proof = "in probation for " + std::to_string(status.probation_seconds) + " s more";
    if (!status.last_good.empty()) proof += "; deaths in it bring back " + status.last_good.substr(0, 12);
  } else {
    proof = status.last_good.empty() ? "none yet" : "proven: " + status.last_good.substr(0, 12);
  }
  std::string out = Line("build", proof);
  out += Line("spare", OrDash(status.spare));
  if (status.state_source.empty()) return out;
  out +=
      Line("fd store", status.fd_store ? "used: a restarted supervisor gets everything back"
                                       : "none: a restarted supervisor gets everything back from the worker, "
                                         "if that lives");
  return out;
}

std::string DeathText(const SupervisorStatus& status, int64_t now) {
  std::string text = HumanAge(status.last_death_wall_nanos, now) + " ago: " + status.last_death;
  for (const WorkerStatus& worker : status.workers) {
    if (worker.role == "owner" || worker.role == "parked") return text;
  }
  return text + "; its log may say more (journalctl -u holdfast)";
}

std::string RollbackCheckText(const NodeStatus& node) {
  if (!node.rollback.has_value()) return "not known: " + node.rollback_unknown;
  const RollbackCheck& check = *node.rollback;
  for (const WorkerStatus& worker : node.supervisor.workers) {
    if (worker.role != "owner" || worker.executable != check.executable) continue;
    return std::string("no other build is kept; the running one ") +
           (check.ready ? "can be started again: " : "can NOT be started again: ") + check.reason;
  }
  const std::string build = check.executable.empty() ? "" : check.executable.substr(0, 12) + ": ";
  return (check.ready ? "ready: " : "NOT ready: ") + build + check.reason;
}

std::string ClockTime(int64_t wall_nanos) {
  const time_t seconds = static_cast<time_t>(wall_nanos / 1'000'000'000);
  tm parts{};
  localtime_r(&seconds, &parts);
  char text[64];
  snprintf(text, sizeof text, "%02d:%02d:%02d.%06d", parts.tm_hour, parts.tm_min, parts.tm_sec,
           static_cast<int>(wall_nanos % 1'000'000'000 / 1000));
  return text;
}

}  // namespace

std::string StatusText(const NodeStatus& node, int64_t now) {
  const SupervisorStatus& status = node.supervisor;
  const std::optional<WorkerStats>& stats = node.worker;
  std::string out = Line("supervisor", status.build + ", pid " + std::to_string(status.pid) + ", up " +
                                           HumanAge(status.started_wall_nanos, now) + OriginText(status));
  out += Line("state", status.phase + StepsText(status.in_progress));
  out += Line("folder", status.state_dir);
  out += Line("mounts", std::to_string(status.mounts_live) + " live, " +
                            std::to_string(status.mounts_detached) + " detached");
  out += Line("last swap", SwapText(status.last_swap, now));
  out += Line("since start", Count(status.swaps, "swap") + ", " + Count(status.crashes, "crash") +
                                 (status.hangs == 0 ? "" : " (" + Count(status.hangs, "hang") + ")") + ", " +
                                 Count(status.carried_over_total, "request") + " carried over");
  if (!status.last_death.empty()) out += Line("last death", DeathText(status, now));
  if (!node.start_check.empty()) out += Line("start", "tried by hand: " + node.start_check);
  if (!status.spare.empty()) out += SafetyText(status);
  out += Line("rollback", RollbackCheckText(node));
  if (stats.has_value()) {
    out += Line("fetched", HumanBytes(stats->fetch_bytes) + " in " + Count(stats->fetch_requests, "request") +
                               ", " + Count(stats->fetch_failures, "failure") + ", " +
                               std::to_string(stats->fetch_in_flight) + " in flight");
    out += Line("cache", HumanBytes(stats->cache_bytes) +
                             (stats->cache_limit_bytes == 0 ? std::string(", no limit")
                                                            : " of " + HumanBytes(stats->cache_limit_bytes)) +
                             ", " + HumanBytes(stats->cache_evicted_bytes) + " evicted, " +
                             Count(stats->cache_damaged_chunks, "damaged chunk") + " fetched again");
  }
  if (status.workers.empty()) {
    out += "\nno worker is running: reads that need one wait for it\n";
  } else {
    Table table({{"GENERATION", true},
                 {"ROLE"},
                 {"PID", true},
                 {"UP", true},
                 {"ANSWERED", true},
                 {"BUILD"},
                 {"EXECUTABLE"}});
    for (const WorkerStatus& worker : status.workers) {
      table.Add({std::to_string(worker.generation), worker.role, std::to_string(worker.pid),
                 HumanAge(worker.started_wall_nanos, now), std::to_string(worker.requests_answered),
                 worker.build, worker.executable.substr(0, 12)});
    }
    out += "\n" + table.ToString();
  }
  for (const std::string& warning : status.warnings) out += "warning: " + warning + "\n";
  return out;
}

std::string MountsText(const std::vector<MountInfo>& mounts) {
  if (mounts.empty()) return "no mounts\n";
  Table table({{"MOUNT", true}, {"STATE"}, {"SNAPSHOT", true}, {"LAYER"}, {"IMAGE"}, {"PATH"}});
  for (const MountInfo& mount : mounts) {
    table.Add({std::to_string(mount.mount_id), mount.state, std::to_string(mount.snapshot_id),
               OrDash(mount.layer_digest), OrDash(mount.image), mount.path});
  }
  return table.ToString();
}

std::string LayersText(const std::vector<LayerInfo>& layers, int64_t now) {
  if (layers.empty()) return "no layers\n";
  Table table({{"LAYER"},
               {"CACHED", true},
               {"OF", true},
               {"", true},
               {"FETCHED", true},
               {"BLOB", true},
               {"FILES", true},
               {"MOUNTS", true},
               {"LAST READ", true},
               {"IMAGE"}});
  for (const LayerInfo& layer : layers) {
    table.Add({layer.digest, HumanBytes(layer.cached_bytes), HumanBytes(layer.content_bytes),
               Percent(layer.cached_bytes, layer.content_bytes), HumanBytes(layer.fetched_bytes),
               HumanBytes(layer.compressed_bytes), std::to_string(layer.files), std::to_string(layer.mounts),
               HumanHourAge(layer.last_access_wall_nanos, now), OrDash(layer.image)});
  }
  return table.ToString();
}

std::string SnapshotsText(const std::vector<SnapshotInfo>& snapshots, int64_t now) {
  if (snapshots.empty()) return "no snapshots\n";
  Table table({{"ID", true}, {"KIND"}, {"AGE", true}, {"KEY"}, {"PARENT"}, {"LAZY LAYER"}});
  for (const SnapshotInfo& snapshot : snapshots) {
    table.Add({std::to_string(snapshot.id), snapshot.kind, HumanAge(snapshot.created_wall_nanos, now),
               snapshot.key, OrDash(snapshot.parent), OrDash(snapshot.lazy_digest)});
  }
  return table.ToString();
}

std::string InflightText(const Inflight& inflight) {
  if (inflight.requests.empty()) return "nothing in flight\n";
  std::map<uint64_t, const MountInfo*> mounts;
  for (const MountInfo& mount : inflight.mounts) mounts[mount.mount_id] = &mount;
  Table table({{"MOUNT", true},
               {"OPERATION"},
               {"NODE", true},
               {"OFFSET", true},
               {"SIZE", true},
               {"STATE"},
               {"LEDGER", true},
               {"OWNER", true},
               {"LAYER"}});
  for (const InflightRequest& request : inflight.requests) {
    std::string state = request.executing ? "executing for " + HumanDuration(request.age_nanos)
                                          : "waits, EIO in " + HumanDuration(request.left_nanos);
    if (request.interrupted) state += ", interrupted";
    auto mount = mounts.find(request.mount_id);
    const bool read = request.opcode == 15;
    table.Add({std::to_string(request.mount_id), OpcodeName(request.opcode), std::to_string(request.nodeid),
               read ? std::to_string(request.offset) : "-", read ? std::to_string(request.size) : "-", state,
               std::to_string(request.ledger_generation), std::to_string(request.owner_generation),
               mount == mounts.end() ? "-" : OrDash(mount->second->layer_digest)});
  }
  return table.ToString();
}

std::string TraceText(const std::vector<TraceEntry>& events) {
  if (events.empty()) return "no trace events\n";
  Table table({{"TIME"}, {"TOOK", true}, {"EVENT"}, {"DETAIL"}});
  for (const TraceEntry& event : events) {
    table.Add({ClockTime(event.wall_nanos), HumanDuration(event.duration_nanos), event.event, event.detail});
  }
  return table.ToString();
}

}  // namespace holdfast::ctl
