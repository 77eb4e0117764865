#include "common/log.h"
#include "gtest/gtest.h"

int main(int argc, char** argv) {
  holdfast::InitLogging(argv[0]);
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
