#include "common/durable_map.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <vector>

#include "gtest/gtest.h"

namespace holdfast {
namespace {

using Content = std::map<std::string, std::string, std::less<>>;

constexpr uint64_t kAreas[] = {4096, 4096 + (uint64_t{256} << 20)};

DurableMap Make(const Content& content = {}) {
  DurableMap map = DurableMap::Create("test").value();
  for (const auto& [key, value] : content) EXPECT_TRUE(map.Put(key, value).ok());
  return map;
}

std::string Read(int file, uint64_t offset, size_t size) {
  std::string bytes(size, '\0');
  EXPECT_TRUE(PreadFull(file, bytes.data(), size, offset).ok());
  return bytes;
}

void Write(int file, uint64_t offset, const std::string& bytes) {
  ASSERT_TRUE(PwriteFull(file, bytes.data(), bytes.size(), offset).ok());
}

TEST(DurableMapTest, TheNextHolderOfTheFileFindsEverything) {
  DurableMap map = Make({{"a", "1"}, {"b", ""}, {"c", std::string(1000, '\0')}});
  ASSERT_TRUE(map.Put("a", "2").ok());
  ASSERT_TRUE(map.Erase("b").ok());
  ASSERT_TRUE(map.Erase("never there").ok());
  UniqueFd read_only = map.OpenReadOnly().value();
  DurableMap next = DurableMap::Open(read_only.get()).value();
  EXPECT_EQ(next.all(), (Content{{"a", "2"}, {"c", std::string(1000, '\0')}}));
  ASSERT_TRUE(next.Put("d", "4").ok());
  EXPECT_EQ(DurableMap::Open(read_only.get())->all().at("d"), "4") << "the file is the same one";
  EXPECT_EQ(DurableMap::Open(Make().file())->all(), Content());
}

TEST(DurableMapTest, WhatIsTooLongIsRefusedAndChangesNothing) {
  DurableMap map = Make({{"a", "1"}});
  EXPECT_FALSE(map.Put("a", std::string(300'000, 'x')).ok());
  EXPECT_EQ(map.all().at("a"), "1");
  EXPECT_EQ(DurableMap::Open(map.file())->all(), map.all());
}

// The two writes of a change, in order: the record, then the head.
TEST(DurableMapTest, AChangeTornAtAnyByteLeavesTheOldOrTheNewValue) {
  const Content before{{"key", "old value"}, {"other", "x"}};
  for (bool erase : {false, true}) {
    DurableMap map = Make(before);
    uint64_t end = map.log_bytes();
    std::string heads = Read(map.file(), 0, 1024);
    ASSERT_TRUE((erase ? map.Erase("key") : map.Put("key", "the new value")).ok());
    const Content after = map.all();
    std::string record = Read(map.file(), kAreas[0] + end, map.log_bytes() - end);
    std::string new_heads = Read(map.file(), 0, 1024);
    auto open = [&](size_t record_bytes, size_t head_bytes) {
      DurableMap torn = Make(before);
      Write(torn.file(), kAreas[0] + end, record.substr(0, record_bytes));
      Write(torn.file(), 0, new_heads.substr(0, head_bytes) + heads.substr(head_bytes));
      return DurableMap::Open(torn.file()).value().all();
    };
    for (size_t i = 0; i <= record.size(); ++i) EXPECT_EQ(open(i, 0), before) << i;
    int seen_new = 0;
    for (size_t i = 0; i <= heads.size(); ++i) {
      Content found = open(record.size(), i);
      EXPECT_TRUE(found == before || found == after) << i;
      seen_new += found == after ? 1 : 0;
    }
    EXPECT_GT(seen_new, 0);
  }
}

TEST(DurableMapTest, ADamagedRecordIsNoticedAndNotGuessedAt) {
  DurableMap map = Make({{"a", "1"}, {"b", "2"}, {"c", "3"}});
  for (uint64_t at = 0; at < map.log_bytes(); ++at) {
    std::string byte = Read(map.file(), kAreas[0] + at, 1);
    Write(map.file(), kAreas[0] + at, std::string(1, static_cast<char>(byte[0] ^ 0x40)));
    EXPECT_EQ(DurableMap::Open(map.file()).status().code(), absl::StatusCode::kDataLoss) << at;
    Write(map.file(), kAreas[0] + at, byte);
  }
  EXPECT_EQ(DurableMap::Open(map.file())->all(), map.all());
}

TEST(DurableMapTest, WhatIsNoSuchFileIsRefused) {
  UniqueFd empty(memfd_create("empty", MFD_CLOEXEC));
  EXPECT_EQ(DurableMap::Open(empty.get()).status().code(), absl::StatusCode::kDataLoss);
  EXPECT_FALSE(DurableMap::Open(-1).ok());
  int ends[2];
  ASSERT_EQ(pipe2(ends, O_CLOEXEC), 0);
  UniqueFd read_end(ends[0]), write_end(ends[1]);
  EXPECT_FALSE(DurableMap::Open(read_end.get()).ok());
}

TEST(DurableMapTest, ATruncatedFileIsAnErrorAndNoCrash) {
  DurableMap map = Make({{"a", std::string(10'000, 'x')}});
  std::string image = Read(map.file(), 0, 4096 + map.log_bytes());
  for (size_t size : {size_t{0}, size_t{31}, size_t{4096}, image.size() - 1}) {
    UniqueFd file(memfd_create("cut", MFD_CLOEXEC));
    Write(file.get(), 0, image.substr(0, size));
    EXPECT_EQ(DurableMap::Open(file.get()).status().code(), absl::StatusCode::kDataLoss) << size;
  }
}

TEST(DurableMapTest, NobodyElseCanTruncateIt) {
  DurableMap map = Make();
  EXPECT_NE(ftruncate(map.file(), 0), 0);
}

// Runs `change` in a child that is killed at its n-th system call, for n = 1, 2, ... until it ends by itself.
int KillAtEverySystemCall(const std::function<DurableMap()>& make,
                          const std::function<void(DurableMap*)>& change,
                          const std::function<void(const DurableMap&)>& check) {
  for (int n = 1;; ++n) {
    DurableMap map = make();
    pid_t pid = fork();
    if (pid == 0) {
      ptrace(PTRACE_TRACEME, 0, nullptr, nullptr);
      raise(SIGSTOP);
      change(&map);
      _exit(0);
    }
    int status = 0;
    EXPECT_EQ(waitpid(pid, &status, 0), pid);
    int seen = 0;
    while (WIFSTOPPED(status) && seen++ < n) {
      ptrace(PTRACE_SYSCALL, pid, nullptr, nullptr);
      EXPECT_EQ(waitpid(pid, &status, 0), pid);
    }
    if (!WIFSTOPPED(status)) {
      EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
      return n;
    }
    kill(pid, SIGKILL);
    EXPECT_EQ(waitpid(pid, &status, 0), pid);
    check(DurableMap::Open(map.file()).value());
  }
}

TEST(DurableMapTest, KilledAtAnySystemCallOfACompactionNothingIsLost) {
  const std::string value(1000, 'v');
  // 100 dead records of "a", so that the next change copies the log.
  auto make = [&] {
    DurableMap map = Make({{"b", value}});
    for (int i = 0; i < 100; ++i) {
      uint64_t before = map.log_bytes();
      EXPECT_TRUE(map.Put("a", value + std::to_string(i)).ok());
      EXPECT_GT(map.log_bytes(), before);
      if (map.log_bytes() > 70'000) break;
    }
    return map;
  };
  const std::string old_value = make().all().at("a");
  uint64_t large = make().log_bytes();
  int old_seen = 0, new_seen = 0, copied = 0;
  int calls = KillAtEverySystemCall(
      make, [](DurableMap* map) { map->Put("a", "new").IgnoreError(); },
      [&](const DurableMap& map) {
        EXPECT_EQ(map.all().at("b"), value);
        const std::string& found = map.all().at("a");
        EXPECT_TRUE(found == old_value || found == "new");
        (found == "new" ? new_seen : old_seen) += 1;
        copied += map.log_bytes() < large ? 1 : 0;
      });
  EXPECT_GE(calls, 12) << "punch, copy, head, punch, record, head; entry and exit of each";
  EXPECT_GT(old_seen, 0);
  EXPECT_GT(new_seen, 0);
  EXPECT_GT(copied, new_seen) << "also killed between the copy and the change";
}

TEST(DurableMapTest, ManyChangesKeepTheFileSmallAndATurnedAwayAreaEmpty) {
  DurableMap map = Make();
  for (int i = 0; i < 20'000; ++i) ASSERT_TRUE(map.Put(std::to_string(i % 10), std::to_string(i)).ok());
  EXPECT_LT(map.log_bytes(), 80'000u);
  EXPECT_EQ(DurableMap::Open(map.file())->all(), map.all());
  struct stat info;
  ASSERT_EQ(fstat(map.file(), &info), 0);
  EXPECT_LT(info.st_blocks * 512, 200'000);
}

TEST(DurableMapTest, TenThousandEntriesAreChangedInMicroseconds) {
  using Clock = std::chrono::steady_clock;
  constexpr int kEntries = 10'000;
  DurableMap map = Make();
  auto start = Clock::now();
  for (int i = 0; i < kEntries; ++i) {
    ASSERT_TRUE(map.Put("m/" + std::to_string(i), std::string(700, 'a')).ok());
  }
  std::vector<Clock::duration> each;
  for (int i = 0; i < 3 * kEntries; ++i) {
    auto before = Clock::now();
    ASSERT_TRUE(
        map.Put("m/" + std::to_string(i % kEntries), std::string(700, static_cast<char>('b' + i / kEntries)))
            .ok());
    each.push_back(Clock::now() - before);
  }
  auto mean = (Clock::now() - start) / (4 * kEntries);
  std::nth_element(each.begin(), each.begin() + static_cast<ptrdiff_t>(each.size() / 2), each.end());
  using Micros = std::chrono::duration<double, std::micro>;
  RecordProperty("median_us", std::to_string(Micros(each[each.size() / 2]).count()));
  RecordProperty("mean_us", std::to_string(Micros(mean).count()));
  printf("median %.1f us, mean with compactions %.1f us\n", Micros(each[each.size() / 2]).count(),
         Micros(mean).count());
#ifndef HOLDFAST_SANITIZED
  EXPECT_LT(each[each.size() / 2], std::chrono::microseconds(50));
  EXPECT_LT(mean, std::chrono::microseconds(100));
#endif
  EXPECT_EQ(DurableMap::Open(map.file())->all(), map.all());
}

}  // namespace
}  // namespace holdfast
