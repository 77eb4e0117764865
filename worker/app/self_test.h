// `holdfast-worker --self-test`: proves that this build starts here, that its libraries load, and that a
// layer's TOC becomes an index that answers. Touches nothing but a temporary folder.
#pragma once

#include "common/status.h"

namespace holdfast::app {

absl::Status SelfTest();

}  // namespace holdfast::app
