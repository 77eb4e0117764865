// What each command prints: for people, or as JSON of schema 1 ({"schema": 1, ...}; keys are only ever
// added). Pure functions of what was asked for, so they are tested without a supervisor.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "worker/ctl/control_client.h"
#include "worker/ctl/inflight.h"

namespace holdfast::ctl {

struct Inflight {
  std::vector<InflightRequest> requests;
  std::vector<MountInfo> mounts;  // to name them
};

// `now` is the wall clock in nanoseconds. `upgrade`, `rollback` and `drill` have reports of their own.
// Of `status`: what the supervisor said, and what it had to ask for, where an answer came in time.
struct NodeStatus {
  SupervisorStatus supervisor;
  std::optional<WorkerStats> worker;
  std::optional<RollbackCheck> rollback;
  std::string rollback_unknown;  // why there is no `rollback`
  std::string start_check;       // what the installed worker said, tried by hand; empty: it was not
};

std::string StatusText(const NodeStatus& status, int64_t now);
std::string StatusJson(const NodeStatus& status);
std::string MountsText(const std::vector<MountInfo>& mounts);
std::string MountsJson(const std::vector<MountInfo>& mounts);
std::string LayersText(const std::vector<LayerInfo>& layers, int64_t now);
std::string LayersJson(const std::vector<LayerInfo>& layers);
std::string SnapshotsText(const std::vector<SnapshotInfo>& snapshots, int64_t now);
std::string SnapshotsJson(const std::vector<SnapshotInfo>& snapshots);
std::string InflightText(const Inflight& inflight);
std::string InflightJson(const Inflight& inflight);
std::string TraceText(const std::vector<TraceEntry>& events);
std::string TraceJson(const std::vector<TraceEntry>& events);
// What to do about a command that failed.
std::string ErrorJson(const std::string& command, const std::string& message, const std::string& advice);

}  // namespace holdfast::ctl
