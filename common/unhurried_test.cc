#include "common/unhurried.h"

#include <fcntl.h>
#include <time.h>

#include <chrono>
#include <string>

#include "common/io.h"
#include "common/sha256.h"
#include "gtest/gtest.h"

namespace holdfast {
namespace {

using std::chrono::steady_clock;

std::chrono::nanoseconds ProcessorTime() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
}

TEST(UnhurriedTest, WorkHasHalfOfAProcessorAtMost) {
  const auto begin = steady_clock::now(), used = steady_clock::time_point(ProcessorTime());
  Unhurried unhurried;
  while (steady_clock::now() - begin < std::chrono::milliseconds(200)) unhurried.Rest();
  const auto took = steady_clock::now() - begin;
  EXPECT_LT((steady_clock::time_point(ProcessorTime()) - used) * 10, took * 7);
}

TEST(UnhurriedTest, AFilesDigestIsTheSame) {
  TempDir dir;
  ASSERT_TRUE(WriteFileAtomic(dir.path() + "/file", std::string(3'000'001, 'x')).ok());
  const UniqueFd file = OpenFile(dir.path() + "/file", O_RDONLY).value();
  Unhurried unhurried;
  EXPECT_EQ(*Sha256OfFile(file.get(), &unhurried), *Sha256OfFile(file.get()));
}

}  // namespace
}  // namespace holdfast
