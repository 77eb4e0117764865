// glog set up alike in all programs: to standard error (journald or a file takes it from there), one line an
// event, "event key=value key=value".
#pragma once

#include <string>
#include <string_view>

namespace holdfast {

// Call once, first thing in main. `program` must outlive the process (argv[0] does).
void InitLogging(const char* program);

// A value quoted when it holds a space, a quote or a control character, so one event stays one line.
std::string LogValue(std::string_view value);

}  // namespace holdfast
