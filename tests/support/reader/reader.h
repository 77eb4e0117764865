// Reads a tree from many threads in several ways and verifies every byte against a manifest.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "tests/support/reader/histogram.h"
#include "tests/support/reader/manifest.h"

namespace holdfast::reader {

enum class Mode { kRead, kPread, kMmap, kDirect, kExec };

struct Options {
  std::string root;
  std::vector<Mode> modes = {Mode::kPread};
  std::vector<std::string> exec_paths;  // relative to root; run with no arguments, must exit with 0
  int threads = 4;
  double seconds = 0;         // > 0: random blocks until then
  double ops_per_second = 0;  // of each thread; 0 = as fast as it goes
  bool once = false;          // every block of every file exactly once (split over the threads)
  bool hold_open = false;     // open every file first and read through those descriptors only
  uint64_t seed = 1;
  int error_lines = 20;    // printed in full
  std::string ready_file;  // created once all files are open
};

struct Report {
  uint64_t operations = 0, bytes = 0, failed = 0, corrupt_bytes = 0;
  std::map<std::string, Histogram> latency;  // by mode
  std::vector<std::string> errors;           // the first ones
};

// `stop` ends a run early. Throws std::runtime_error when nothing can be read at all (root missing, manifest
// empty).
Report Run(const Options& options, const std::vector<File>& files, const std::atomic<bool>& stop);

}  // namespace holdfast::reader
