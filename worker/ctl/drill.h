// `holdfastctl drill`: proves swap, crash, hang, refusal and rollback on this machine, with the builds that
// run on it and layers that lie on it, on a private instance (private_node.h). No container is touched, no
// byte is fetched.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "worker/ctl/control_client.h"

namespace holdfast::ctl {

struct DrillCase {
  std::string name;
  std::string failure;  // empty: it went as it should
  std::string detail;
  uint64_t pause_nanos = 0;  // as the supervisor measured it
  uint64_t longest_wait_nanos = 0, reads = 0, failed_reads = 0;
  bool ok() const { return failure.empty() && failed_reads == 0; }
};

struct DrillReport {
  std::vector<std::string> layers;
  uint64_t files = 0;
  std::vector<DrillCase> cases;
  std::string log;  // the private instance's last lines, when a case failed
  bool ok() const;
};

// The layers to copy: cached ones, the most complete first, small ones before large ones; at most `limit`.
std::vector<LayerInfo> ChooseLayers(std::vector<LayerInfo> layers, size_t limit);

// `client` talks to the node's supervisor on `socket_path`; it is given up, for a thread has one client at a
// time. `on_case` is called as each case ends. Returns an error when nothing could be proven, and leaves
// nothing behind in any case, also when SIGINT, SIGTERM or SIGHUP ends it: then it cleans up and leaves the
// process with exit code 1. Call it before the process has other threads.
absl::StatusOr<DrillReport> RunDrill(std::unique_ptr<ControlClient> client, const std::string& socket_path,
                                     const std::function<void(const DrillReport&)>& on_begin,
                                     const std::function<void(const DrillCase&)>& on_case);

std::string DrillBeginText(const DrillReport& report);
std::string DrillCaseText(const DrillCase& one);
std::string DrillEndText(const DrillReport& report);
std::string DrillJson(const DrillReport& report);

}  // namespace holdfast::ctl
