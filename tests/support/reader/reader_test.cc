#include "tests/support/reader/reader.h"

#include <sys/stat.h>
#include <unistd.h>

#include <fstream>

#include "common/io.h"
#include "gtest/gtest.h"

namespace holdfast::reader {
namespace {

class ReaderTest : public testing::Test {
 protected:
  void SetUp() override {
    Put("small", "hello");
    Put("empty", "");
    std::string large;
    for (int i = 0; i < 100'000; i++) large += std::to_string(i);
    Put("large", large);
    Write(Scan(dir_.path()), manifest_.path() + "/m");
    files_ = Load(manifest_.path() + "/m");
    options_.root = dir_.path();
    options_.once = true;
    options_.modes = {Mode::kRead, Mode::kPread, Mode::kMmap};
  }
  void Put(const std::string& name, const std::string& content) {
    std::ofstream(dir_.path() + "/" + name) << content;
  }

  TempDir dir_, manifest_;
  std::vector<File> files_;
  Options options_;
  std::atomic<bool> stop_{false};
};

TEST_F(ReaderTest, AnUnchangedTreePassesInEveryModeAndAllOfItIsRead) {
  Report report = reader::Run(options_, files_, stop_);
  EXPECT_EQ(report.failed, 0u);
  EXPECT_EQ(report.corrupt_bytes, 0u);
  EXPECT_EQ(report.bytes, 5u + 488'890u);
}

TEST_F(ReaderTest, OneChangedByteIsFound) {
  std::fstream file(dir_.path() + "/large", std::ios::in | std::ios::out);
  file.seekp(70'000);
  file.put('#');
  file.close();
  Report report = reader::Run(options_, files_, stop_);
  EXPECT_EQ(report.corrupt_bytes, kBlock);
  ASSERT_EQ(report.errors.size(), 1u);
  EXPECT_NE(report.errors[0].find("large at 65536"), std::string::npos);
}

TEST_F(ReaderTest, AMissingOrShortFileIsAFailure) {
  ASSERT_EQ(unlink((dir_.path() + "/small").c_str()), 0);
  ASSERT_EQ(truncate((dir_.path() + "/large").c_str(), 1000), 0);
  options_.modes = {Mode::kPread};
  Report report = reader::Run(options_, files_, stop_);
  EXPECT_EQ(report.failed, 1u + 8u);
}

TEST_F(ReaderTest, AMappingBeyondTheEndIsAFailureNotACrash) {
  ASSERT_EQ(truncate((dir_.path() + "/large").c_str(), 1000), 0);
  options_.modes = {Mode::kMmap};
  Report report = reader::Run(options_, files_, stop_);
  EXPECT_GE(report.failed, 7u);
}

TEST_F(ReaderTest, HeldFilesAreReadInEveryMode) {
  options_.hold_open = true;
  options_.modes = {Mode::kRead, Mode::kPread, Mode::kMmap, Mode::kDirect};
  options_.once = false;
  options_.seconds = 0.2;
  Report report = reader::Run(options_, files_, stop_);
  EXPECT_EQ(report.failed, 0u);
  EXPECT_GT(report.operations, 0u);
}

TEST_F(ReaderTest, AProgramThatFailsToRunIsAFailure) {
  Put("program", "#!/bin/false\n");
  ASSERT_EQ(chmod((dir_.path() + "/program").c_str(), 0755), 0);
  options_.modes = {Mode::kExec};
  options_.exec_paths = {"program"};
  Report report = reader::Run(options_, files_, stop_);
  EXPECT_EQ(report.failed, report.operations);
}

TEST(HistogramTest, PercentilesAreWithinSixPercent) {
  Histogram histogram;
  for (uint64_t i = 1; i <= 100'000; i++) histogram.Add(i * 10);
  EXPECT_NEAR(static_cast<double>(histogram.Percentile(0.5)), 500'000, 35'000);
  EXPECT_NEAR(static_cast<double>(histogram.Percentile(0.99)), 990'000, 65'000);
  EXPECT_EQ(histogram.max(), 1'000'000u);
}

}  // namespace
}  // namespace holdfast::reader
