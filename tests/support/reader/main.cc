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

#include "tests/support/reader/load.h"
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

using holdfast::reader::LoadKind;

// A JSON list of {"root", "warm": manifest, "cold": manifest or "", "programs": [paths], "ancestors": bool}.
std::vector<holdfast::reader::LoadTarget> LoadTargets(const std::string& path) {
  std::ifstream in(path);
  if (!in) throw std::runtime_error(path + ": cannot be read");
  std::vector<holdfast::reader::LoadTarget> targets;
  for (const nlohmann::json& one : nlohmann::json::parse(in)) {
    holdfast::reader::LoadTarget target;
    target.root = one.at("root");
    target.warm = holdfast::reader::Load(one.at("warm"));
    std::string cold = one.value("cold", "");
    if (!cold.empty()) target.cold = holdfast::reader::Load(cold);
    target.ancestors = one.value("ancestors", true);
    target.programs = one.value("programs", std::vector<std::string>());
    targets.push_back(std::move(target));
  }
  return targets;
}

std::vector<LoadKind> KindsOf(const std::vector<std::string>& names) {
  std::vector<LoadKind> kinds;
  for (const std::string& name : names) {
    for (int i = 0; i < holdfast::reader::kLoadKinds; i++) {
      auto kind = static_cast<LoadKind>(i);
      if (kind != LoadKind::kCold && holdfast::reader::LoadKindName(kind) == name) kinds.push_back(kind);
    }
  }
  if (kinds.empty() || kinds.size() != names.size()) throw std::runtime_error("--kinds: unknown operation");
  return kinds;
}

int Finish(holdfast::reader::LoadReport report, const std::string& log) {
  uint64_t failed = 0, corrupt = 0;
  std::map<std::string, uint64_t> counts;
  for (const auto& record : report.records) {
    counts[holdfast::reader::LoadKindName(static_cast<LoadKind>(record.kind))]++;
    if (record.result == static_cast<uint16_t>(holdfast::reader::LoadResult::kFailed)) failed++;
    if (record.result == static_cast<uint16_t>(holdfast::reader::LoadResult::kCorrupt)) corrupt++;
  }
  std::ofstream out(log, std::ios::binary);
  out.write(reinterpret_cast<const char*>(report.records.data()),
            static_cast<std::streamsize>(report.records.size() * sizeof(holdfast::reader::LoadRecord)));
  out.close();
  if (!out) throw std::runtime_error(log + ": cannot be written");
  for (const std::string& error : report.errors) std::cerr << error << '\n';
  nlohmann::json json = {{"operations", report.records.size()},
                         {"failed", failed},
                         {"corrupt", corrupt},
                         {"counts", counts},
                         {"errors", report.errors},
                         {"cold_used_up", report.cold_used_up}};
  std::cout << json.dump() << std::endl;
  return failed == 0 && corrupt == 0 && !report.records.empty() ? 0 : 1;
}

// Says "ready", then answers each line of standard input; its end, or "end", ends the load.
int RunLoad(const holdfast::reader::LoadOptions& options, const std::string& log) {
  auto load = holdfast::reader::MixedLoad::Start(options);
  std::cout << "ready" << std::endl;
  for (std::string line; std::getline(std::cin, line) && line != "end";) {
    std::istringstream words(line);
    std::string word;
    int threads = 0;
    double gap_ms = 0;
    if (!(words >> word >> threads >> gap_ms) || word != "cold" || threads < 0 || gap_ms < 0) {
      std::cout << "what? (cold THREADS GAP_MS, or end)" << std::endl;
      continue;
    }
    load->Cold(threads, gap_ms);
    std::cout << "ok " << load->cold_reads() << std::endl;
  }
  return Finish(load->Stop(), log);
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

  holdfast::reader::LoadOptions load_options;
  std::string targets, log;
  std::vector<std::string> kinds = {"direct", "absent", "list"};
  CLI::App* load =
      app.add_subcommand("load",
                         "A steady mixed load on many trees; every operation's begin and end go to a log. "
                         "Says \"ready\", then takes lines on "
                         "standard input: \"cold THREADS GAP_MS\" (read what was never read), \"end\"");
  load->add_option("targets", targets,
                   "JSON list of {root, warm: manifest, cold: manifest or \"\", programs: [path]}")
      ->required();
  load->add_option("log", log, "Written at the end: records as in load.h")->required();
  load->add_option("--kinds", kinds,
                   "direct, absent, list, cached, mapped, open, unlinked, exec; comma separated; one named "
                   "twice comes twice "
                   "as often")
      ->delimiter(',');
  load->add_option("--ops-per-second", load_options.ops_per_second, "Of each tree")
      ->check(CLI::PositiveNumber);
  load->add_option("--seed", load_options.seed);
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
    if (load->parsed()) {
      load_options.kinds = KindsOf(kinds);
      load_options.targets = LoadTargets(targets);
      return RunLoad(load_options, log);
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
