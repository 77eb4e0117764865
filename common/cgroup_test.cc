#include "common/cgroup.h"

#include <unistd.h>

#include "gtest/gtest.h"

namespace holdfast {
namespace {

TEST(CgroupTest, EveryGroupFromTheProcessUpwardsIsLookedAtButNotTheRoot) {
  EXPECT_EQ(CpuStatPaths("0::/system.slice/holdfast.service\n"),
            (std::vector<std::string>{"/sys/fs/cgroup/system.slice/holdfast.service/cpu.stat",
                                      "/sys/fs/cgroup/unified/system.slice/holdfast.service/cpu.stat",
                                      "/sys/fs/cgroup/system.slice/cpu.stat",
                                      "/sys/fs/cgroup/unified/system.slice/cpu.stat"}));
  EXPECT_EQ(CpuStatPaths("5:cpuset:/a\n4:cpu,cpuacct:/a/b\n2:cpuacct:/c\n"),
            (std::vector<std::string>{"/sys/fs/cgroup/cpu,cpuacct/a/b/cpu.stat",
                                      "/sys/fs/cgroup/cpu,cpuacct/a/cpu.stat"}));
  EXPECT_TRUE(CpuStatPaths("0::/\nnonsense\n").empty());
}

TEST(CgroupTest, BothVersionsOfThrottledTimeAreRead) {
  EXPECT_EQ(ParseThrottledNanos("usage_usec 7\nnr_periods 1\nnr_throttled 1\nthrottled_usec 250\n"),
            250'000u);
  EXPECT_EQ(ParseThrottledNanos("nr_periods 1\nnr_throttled 1\nthrottled_time 250\n"), 250u);
  EXPECT_EQ(ParseThrottledNanos("usage_usec 7\n"), 0u);
  EXPECT_EQ(ParseThrottledNanos("throttled_usec x"), 0u);
}

TEST(CgroupTest, AProcessThatIsGoneWasNeverThrottled) {
  EXPECT_EQ(ThrottledNanos(0), 0u);
  EXPECT_LT(ThrottledNanos(getpid()), uint64_t{1} << 62);
}

}  // namespace
}  // namespace holdfast
