#include <cstdio>
#include <nlohmann/json.hpp>

#include "worker/ctl/drill.h"
#include "worker/ctl/format.h"

namespace holdfast::ctl {

std::string DrillBeginText(const DrillReport& report) {
  char head[128];
  snprintf(head, sizeof head, "%-10s %-7s %8s  %7s  %6s  %12s\n", "CASE", "RESULT", "PAUSE", "READS",
           "FAILED", "LONGEST WAIT");
  return Count(report.files, "file") + " of " + Count(report.layers.size(), "layer") +
         " of this node, read without pause on a private instance; no container is touched\n" + head;
}

std::string DrillCaseText(const DrillCase& one) {
  char line[128];
  snprintf(line, sizeof line, "%-10s %-7s %8s  %7llu  %6llu  %12s", one.name.c_str(),
           one.ok() ? "ok" : "FAILED", one.pause_nanos == 0 ? "-" : HumanDuration(one.pause_nanos).c_str(),
           static_cast<unsigned long long>(one.reads), static_cast<unsigned long long>(one.failed_reads),
           HumanDuration(one.longest_wait_nanos).c_str());
  const std::string& why = one.failure.empty() ? one.detail : one.failure;
  return line + (why.empty() ? "" : "  " + why) + "\n";
}

std::string DrillEndText(const DrillReport& report) {
  if (report.ok()) return "every read was answered, with the right bytes\n";
  return "the drill FAILED. Do not upgrade this node before this is explained; the end of the private "
         "instance's log:\n" +
         report.log;
}

std::string DrillJson(const DrillReport& report) {
  nlohmann::ordered_json json;
  json["schema"] = 1;
  json["ok"] = report.ok();
  json["layers"] = report.layers;
  json["files"] = report.files;
  json["cases"] = nlohmann::ordered_json::array();
  for (const DrillCase& one : report.cases) {
    json["cases"].push_back({{"case", one.name},
                             {"ok", one.ok()},
                             {"pause_ns", one.pause_nanos},
                             {"longest_wait_ns", one.longest_wait_nanos},
                             {"reads", one.reads},
                             {"failed_reads", one.failed_reads},
                             {"detail", one.detail},
                             {"failure", one.failure}});
  }
  json["log"] = report.log;
  return json.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
}

}  // namespace holdfast::ctl
