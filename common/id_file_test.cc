#include "common/id_file.h"

#include <stdio.h>

#include "common/io.h"
#include "gtest/gtest.h"

namespace holdfast {
namespace {

TEST(IdFileTest, NumbersAreNeverReusedAcrossRestarts) {
  TempDir dir;
  uint64_t last = 0;
  for (int restart = 0; restart < 3; ++restart) {
    auto ids = IdFile::Open(dir.path() + "/ids", 4);
    ASSERT_TRUE(ids.ok()) << ids.status();
    for (int i = 0; i < 6; ++i) {
      auto next = ids->Next();
      ASSERT_TRUE(next.ok());
      EXPECT_GT(*next, last);
      last = *next;
    }
  }
}

TEST(IdFileTest, NumbersUsedWhileTheFileCouldNotBeWrittenAreNotGivenOutLater) {
  TempDir dir;
  std::string folder = dir.path() + "/full";
  ASSERT_TRUE(MakeDirs(folder).ok());
  auto ids = IdFile::Open(folder + "/ids", 2);
  ASSERT_TRUE(ids.ok());
  EXPECT_EQ(ids->Next(0).value(), 1u);
  EXPECT_EQ(ids->Next(1).value(), 2u);
  ASSERT_EQ(rename(folder.c_str(), (folder + "-away").c_str()), 0);
  EXPECT_FALSE(ids->Next(2).ok());  // the caller helps itself: 3, 4, 5
  EXPECT_FALSE(ids->Next(5).ok());
  ASSERT_EQ(rename((folder + "-away").c_str(), folder.c_str()), 0);
  EXPECT_EQ(ids->Next(5).value(), 6u);
  EXPECT_EQ(ids->Next(0).value(), 7u);
  EXPECT_EQ(ids->Next(0).value(), 8u);
  EXPECT_GT(IdFile::Open(folder + "/ids", 2)->Next().value(), 8u);
}

TEST(IdFileTest, WhatIsReservedNeedsNoDisk) {
  TempDir dir;
  std::string folder = dir.path() + "/full";
  ASSERT_TRUE(MakeDirs(folder).ok());
  auto ids = IdFile::Open(folder + "/ids", 4);
  ASSERT_TRUE(ids.ok());
  ASSERT_TRUE(ids->Reserve().ok());
  EXPECT_EQ(ids->Next().value(), 1u);
  EXPECT_EQ(ids->Next().value(), 2u);
  EXPECT_EQ(ids->Next().value(), 3u);
  ASSERT_TRUE(ids->Reserve().ok()) << "one is left, so the next four are reserved";
  ASSERT_EQ(rename(folder.c_str(), (folder + "-away").c_str()), 0);
  for (uint64_t id = 4; id < 8; ++id) EXPECT_EQ(ids->Next().value(), id);
  EXPECT_FALSE(ids->Next().ok());
}

TEST(IdFileTest, ADamagedFileIsAnErrorNotAFreshStart) {
  TempDir dir;
  ASSERT_TRUE(WriteFileAtomic(dir.path() + "/ids", "12x\n").ok());
  EXPECT_FALSE(IdFile::Open(dir.path() + "/ids", 4).ok());
  ASSERT_TRUE(WriteFileAtomic(dir.path() + "/ids", "").ok());
  EXPECT_FALSE(IdFile::Open(dir.path() + "/ids", 4).ok());
}

}  // namespace
}  // namespace holdfast
