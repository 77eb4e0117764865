// What this executable calls itself: "0.1.0+1f2e3d4c", the version and the start of the linker's build id.
#pragma once

#include <string>

namespace holdfast::app {

std::string BuildName();

}  // namespace holdfast::app
