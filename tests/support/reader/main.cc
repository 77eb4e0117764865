// holdfast-reader: see --help. Statically linked, so it also runs inside a container.
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <sstream>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "tests/support/reader/reader.h"

namespace {

using holdfast::reader::Mode;

std::atomic<bool> stop{false};

const std::map<std::string, Mode> kModes = {{"read", Mode::kRead},
                                            {"pread", Mode::kPread},
                                            {"mmap", Mode::kMmap},
                                            {"direct", Mode::kDirect},
                                            {"exec", Mode::kExec}};

nlohmann::json ToJson(const holdfast::reader::Report& report) {
  nlohmann::json json = {{"operations", report.operations}, {"bytes", report.bytes},
                         {"failed", report.failed},         {"corrupt_bytes", report.corrupt_bytes},
                         {"errors", report.errors},         {"latency_ms", nlohmann::json::object()}};
  auto ms = [](uint64_t nanos) { return static_cast<double>(nanos) / 1e6; };
  for (const auto& [mode, histogram] : report.latency) {
    json["latency_ms"][mode] = {{"count", histogram.count()},
                                {"p50", ms(histogram.Percentile(0.5))},
                                {"p99", ms(histogram.Percentile(0.99))},
                                {"max", ms(histogram.max())}};
  }
  return json;
}

int Read(const holdfast::reader::Options& options, const std::string& manifest,
         const std::string& json_path) {
  auto report = holdfast::reader::Run(options, holdfast::reader::Load(manifest), stop);
  nlohmann::json json = ToJson(report);
  for (const std::string& error : report.errors) std::cerr << error << '\n';
  std::cout << json.dump() << std::endl;
  if (!json_path.empty()) std::ofstream(json_path) << json.dump(2) << '\n';
  return report.failed == 0 && report.corrupt_bytes == 0 && report.operations > 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{
      "Verifies every byte it reads. Ends with 0 only if something was read, nothing failed and nothing was "
      "corrupt; prints its counts and latencies as one line of JSON. SIGTERM ends a run early."};
  app.require_subcommand(1);
  std::string root, manifest, json_path;
  CLI::App* scan = app.add_subcommand("manifest", "Write the manifest of a tree that is known to be right");
  scan->add_option("root", root)->required();
  scan->add_option("manifest", manifest)->required();

  holdfast::reader::Options options;
  std::vector<std::string> modes = {"pread"};
  CLI::App* read = app.add_subcommand("read", "Read a tree and verify it against a manifest");
  read->add_option("root", options.root)->required();
  read->add_option("manifest", manifest)->required();
  read->add_option("--modes", modes, "read, pread, mmap, direct, exec; comma separated")->delimiter(',');
  read->add_option("--exec", options.exec_paths, "Program under the root for mode exec");
  read->add_option("--threads", options.threads);
  read->add_option("--seconds", options.seconds, "Read random blocks for so long");
  read->add_option("--ops-per-second", options.ops_per_second,
                   "Of each thread, with --seconds; 0 = no limit");
  read->add_flag("--once", options.once, "Read every block once, in random order");
  read->add_flag("--hold-open", options.hold_open,
                 "Open every file first, read through those descriptors only");
  read->add_option("--seed", options.seed);
  read->add_option("--ready-file", options.ready_file, "Created when all files are open");
  read->add_option("--json", json_path);
  CLI11_PARSE(app, argc, argv);

  std::signal(SIGTERM, [](int) { stop = true; });
  rlimit files = {};
  if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
  }
  try {
    if (scan->parsed()) {
      holdfast::reader::Write(holdfast::reader::Scan(root), manifest);
      return 0;
    }
    options.modes.clear();
    for (const std::string& mode : modes) options.modes.push_back(kModes.at(mode));
    if (!options.once && options.seconds <= 0) options.once = true;
    bool exec = std::find(options.modes.begin(), options.modes.end(), Mode::kExec) != options.modes.end();
    if (exec != !options.exec_paths.empty()) throw std::runtime_error("mode exec and --exec go together");
    return Read(options, manifest, json_path);
  } catch (const std::exception& error) {
    std::cerr << "holdfast-reader: " << error.what() << '\n';
    return 2;
  }
}
