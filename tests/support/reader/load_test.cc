#include "tests/support/reader/load.h"

#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <map>
#include <set>
#include <thread>

#include "common/io.h"
#include "gtest/gtest.h"

namespace holdfast::reader {
namespace {

class LoadTest : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(MakeDirs(dir_.path() + "/folder/deep").ok());
    for (int i = 0; i < 40; i++)
      Put("folder/deep/warm" + std::to_string(i), std::string(9000, static_cast<char>('a' + i % 26)));
    for (int i = 0; i < 10; i++) Put("folder/cold" + std::to_string(i), std::string(80'000, 'c'));
    Put("program", "#!/bin/true\n");
    ASSERT_EQ(chmod((dir_.path() + "/program").c_str(), 0755), 0);
    LoadTarget target;
    target.root = dir_.path();
    target.programs = {"program"};
    for (File& file : Scan(dir_.path())) {
      if (file.path == "program") continue;
      bool cold = file.path.find("cold") != std::string::npos;
      (cold ? target.cold : target.warm).push_back(std::move(file));
    }
    options_.targets = {target};
    options_.ops_per_second = 2000;
    options_.kinds = {LoadKind::kDirect, LoadKind::kAbsent, LoadKind::kList,     LoadKind::kCached,
                      LoadKind::kMapped, LoadKind::kOpen,   LoadKind::kUnlinked, LoadKind::kExec};
  }
  void Put(const std::string& name, const std::string& content) {
    std::ofstream(dir_.path() + "/" + name) << content;
  }
  static std::map<LoadKind, int> Count(const LoadReport& report, LoadResult result) {
    std::map<LoadKind, int> counts;
    for (const LoadRecord& record : report.records) {
      if (record.result == static_cast<uint16_t>(result)) counts[static_cast<LoadKind>(record.kind)]++;
    }
    return counts;
  }
  static void Wait(int milliseconds) { std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds)); }

  TempDir dir_;
  LoadOptions options_;
};

TEST_F(LoadTest, AnUndisturbedTreeIsReadInEveryWayWithoutAFault) {
  auto load = MixedLoad::Start(options_);
  load->Cold(2, 0);
  Wait(500);
  LoadReport report = load->Stop();
  EXPECT_EQ(report.errors, std::vector<std::string>());
  std::map<LoadKind, int> right = Count(report, LoadResult::kRight);
  for (LoadKind kind : options_.kinds) EXPECT_GT(right[kind], 0) << LoadKindName(kind);
  EXPECT_EQ(right[LoadKind::kCold], 10);
  EXPECT_TRUE(report.cold_used_up);
  for (const LoadRecord& record : report.records) EXPECT_LE(record.begin_ns, record.end_ns);
}

TEST_F(LoadTest, AHeldFileThatChangesIsCorruptInEveryWayThatReadsIt) {
  options_.kinds = {LoadKind::kDirect, LoadKind::kCached, LoadKind::kMapped, LoadKind::kOpen};
  auto load = MixedLoad::Start(options_);
  for (int i = 0; i < 40; i++) {
    std::fstream file(dir_.path() + "/folder/deep/warm" + std::to_string(i), std::ios::in | std::ios::out);
    file.seekp(77);
    file.put('#');
  }
  Wait(300);
  std::map<LoadKind, int> corrupt = Count(load->Stop(), LoadResult::kCorrupt);
  for (LoadKind kind : options_.kinds) EXPECT_GT(corrupt[kind], 0) << LoadKindName(kind);
}

TEST_F(LoadTest, ANameThatAppearsInAHeldFolderMakesItsListingCorrupt) {
  options_.kinds = {LoadKind::kList};
  auto load = MixedLoad::Start(options_);
  Put("folder/deep/new", "x");
  Wait(300);
  EXPECT_GT(Count(load->Stop(), LoadResult::kCorrupt)[LoadKind::kList], 0);
}

TEST_F(LoadTest, AShortFileIsAFailureAndAMappingBeyondItsEndNoCrash) {
  options_.kinds = {LoadKind::kDirect, LoadKind::kMapped};
  auto load = MixedLoad::Start(options_);
  for (int i = 0; i < 40; i++)
    ASSERT_EQ(truncate((dir_.path() + "/folder/deep/warm" + std::to_string(i)).c_str(), 0), 0);
  Wait(300);
  std::map<LoadKind, int> failed = Count(load->Stop(), LoadResult::kFailed);
  EXPECT_GT(failed[LoadKind::kDirect], 0);
  EXPECT_GT(failed[LoadKind::kMapped], 0);
}

TEST_F(LoadTest, AProgramThatFailsIsAFailure) {
  Put("program", "#!/bin/false\n");
  options_.kinds = {LoadKind::kExec};
  auto load = MixedLoad::Start(options_);
  Wait(200);
  EXPECT_GT(Count(load->Stop(), LoadResult::kFailed)[LoadKind::kExec], 0);
}

TEST_F(LoadTest, ATreeThatCannotBeReadAtTheStartIsAnError) {
  ASSERT_EQ(unlink((dir_.path() + "/folder/deep/warm7").c_str()), 0);
  EXPECT_THROW(MixedLoad::Start(options_), std::runtime_error);
}

}  // namespace
}  // namespace holdfast::reader
