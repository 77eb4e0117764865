// The contract of containerd's snapshots package (ordinary snapshots).
#include "worker/snapshot/snapshotter.h"

#include <fcntl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <thread>

#include "worker/snapshot/snapshotter_fixture.h"

namespace holdfast::snapshot {
namespace {

using metadata::Kind;

Info InfoNamed(const std::string& name) {
  Info info;
  info.name = name;
  return info;
}

class SnapshotterTest : public SnapshotterFixture {};

TEST_F(SnapshotterTest, MountsHaveTheShapesOfOverlayfs) {
  auto base = snapshotter_->Prepare("a1", "", {}).value();
  ASSERT_EQ(base.size(), 1u);
  EXPECT_EQ(base[0].type, "bind");
  EXPECT_EQ(base[0].options, (std::vector<std::string>{"rw", "rbind"}));
  EXPECT_EQ(base[0].source, root() + "/snapshots/1/fs");
  auto empty_view = snapshotter_->View("v0", "", {}).value();
  EXPECT_EQ(empty_view[0].options, (std::vector<std::string>{"ro", "rbind"}));

  ASSERT_TRUE(snapshotter_->Commit("c1", "a1", {}, "").ok());
  auto view = snapshotter_->View("v1", "c1", {}).value();
  EXPECT_EQ(view[0].type, "bind");
  EXPECT_EQ(view[0].source, root() + "/snapshots/1/fs");
  auto active = snapshotter_->Prepare("a2", "c1", {}).value();
  EXPECT_EQ(active[0].type, "overlay");
  std::string own = root() + "/snapshots/" + std::to_string(IdOf("a2"));
  std::vector<std::string> options = active[0].options;
  if (access("/sys/module/overlay/parameters/index", F_OK) == 0) {
    ASSERT_EQ(options[0], "index=off");
    options.erase(options.begin());
  }
  EXPECT_EQ(options, (std::vector<std::string>{"workdir=" + own + "/work", "upperdir=" + own + "/fs",
                                               "lowerdir=" + root() + "/snapshots/1/fs"}));
  EXPECT_EQ(snapshotter_->Mounts("a2").value()[0].options, active[0].options);

  ASSERT_TRUE(snapshotter_->Commit("c2", "a2", {}, "").ok());
  auto view2 = snapshotter_->View("v2", "c2", {}).value();
  EXPECT_EQ(view2[0].options.back(), "lowerdir=" + own + "/fs:" + root() + "/snapshots/1/fs");
}

TEST_F(SnapshotterTest, MountsReallyMount) {
  auto base = snapshotter_->Prepare("a1", "", {}).value();
  WriteText(base[0].source + "/file", "lower");
  ASSERT_EQ(chown(base[0].source.c_str(), 71, 72), 0);
  ASSERT_TRUE(snapshotter_->Commit("c1", "a1", {}, "").ok());
  auto mounts = snapshotter_->Prepare("a2", "c1", {}).value();
  std::string options;
  for (const std::string& option : mounts[0].options) options += (options.empty() ? "" : ",") + option;
  std::string target = dir_.path() + "/target";
  ASSERT_TRUE(MakeDirs(target).ok());
  ASSERT_EQ(mount("overlay", target.c_str(), "overlay", 0, options.c_str()), 0) << strerror(errno) << options;
  EXPECT_EQ(ReadFile(target + "/file").value(), "lower");
  struct stat st;
  EXPECT_EQ(stat(target.c_str(), &st), 0);
  umount2(target.c_str(), MNT_DETACH);
  EXPECT_EQ(st.st_uid, 71u);
  EXPECT_EQ(st.st_gid, 72u);
  EXPECT_EQ(st.st_mode & 07777, 0755u);
}

TEST_F(SnapshotterTest, ErrorsHaveTheCodesOfTheContract) {
  Active("a1");
  Commit("a1", "c1");
  Active("a2", "c1");
  ASSERT_TRUE(snapshotter_->View("v1", "c1", {}).ok());
  using absl::StatusCode;
  EXPECT_EQ(snapshotter_->Prepare("a2", "", {}).status().code(), StatusCode::kAlreadyExists);
  EXPECT_EQ(snapshotter_->Prepare("c1", "", {}).status().code(), StatusCode::kAlreadyExists);
  EXPECT_EQ(snapshotter_->View("a2", "", {}).status().code(), StatusCode::kAlreadyExists);
  EXPECT_EQ(snapshotter_->View("v1", "", {}).status().code(), StatusCode::kAlreadyExists);
  EXPECT_EQ(snapshotter_->Prepare("x", "nothing", {}).status().code(), StatusCode::kNotFound);
  EXPECT_EQ(snapshotter_->Prepare("x", "a2", {}).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(snapshotter_->View("x", "v1", {}).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(snapshotter_->Prepare("", "", {}).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(snapshotter_->Mounts("nothing").status().code(), StatusCode::kNotFound);
  EXPECT_EQ(snapshotter_->Mounts("c1").status().code(), StatusCode::kFailedPrecondition);
  EXPECT_EQ(snapshotter_->Commit("c1", "a2", {}, "").code(), StatusCode::kAlreadyExists);
  EXPECT_EQ(snapshotter_->Commit("c9", "nothing", {}, "").code(), StatusCode::kNotFound);
  EXPECT_EQ(snapshotter_->Commit("c9", "v1", {}, "").code(), StatusCode::kFailedPrecondition);
  EXPECT_EQ(snapshotter_->Commit("c9", "c1", {}, "").code(), StatusCode::kFailedPrecondition);
  EXPECT_EQ(snapshotter_->Stat("nothing").status().code(), StatusCode::kNotFound);
  EXPECT_EQ(snapshotter_->GetUsage("nothing").status().code(), StatusCode::kNotFound);
  EXPECT_EQ(snapshotter_->Update(InfoNamed("nothing"), {}).status().code(), StatusCode::kNotFound);
  EXPECT_EQ(snapshotter_->Update(InfoNamed("a2"), {"parent"}).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(snapshotter_->List({"=="}).status().code(), StatusCode::kInvalidArgument);
  absl::Status child = snapshotter_->Remove("c1");
  EXPECT_EQ(child.code(), StatusCode::kFailedPrecondition);
  EXPECT_NE(FromAbsl(child.message()).find("remove"), std::string_view::npos);
  EXPECT_TRUE(snapshotter_->Remove("nothing").ok()) << "an error would end containerd's garbage collection";
}

TEST_F(SnapshotterTest, CommitMakesANewSnapshotOfTheActive) {
  Active("a1", "", {{"containerd.io/snapshot/old", "1"}});
  WriteText(root() + "/snapshots/1/fs/file", std::string(10'000, 'x'));
  ASSERT_TRUE(
      snapshotter_->Commit("c1", "a1", {{"containerd.io/snapshot/new", "2"}, {"empty", ""}}, "").ok());
  EXPECT_EQ(snapshotter_->Stat("a1").status().code(), absl::StatusCode::kNotFound);
  Info info = snapshotter_->Stat("c1").value();
  EXPECT_EQ(info.kind, Kind::kCommitted);
  EXPECT_EQ(info.labels, (Labels{{"containerd.io/snapshot/new", "2"}}));
  EXPECT_EQ(info.created_wall_nanos, info.updated_wall_nanos);
  Usage usage = snapshotter_->GetUsage("c1").value();
  EXPECT_EQ(usage.inodes, 2);
  EXPECT_GE(usage.bytes, 10'000);
  EXPECT_NE(ReadFile(root() + "/snapshots/1/snapshot.json").value().find("\"committed\""), std::string::npos);
}

TEST_F(SnapshotterTest, CommitCanGiveAParent) {
  Active("a1");
  Commit("a1", "c1");
  Active("a2");
  EXPECT_EQ(snapshotter_->Commit("c2", "a2", {}, "nothing").code(), absl::StatusCode::kNotFound);
  Active("other");
  EXPECT_EQ(snapshotter_->Commit("c2", "a2", {}, "other").code(), absl::StatusCode::kFailedPrecondition);
  ASSERT_TRUE(snapshotter_->Commit("c2", "a2", {}, "c1").ok());
  EXPECT_EQ(snapshotter_->Stat("c2")->parent, "c1");
  Active("a3", "c2");
  EXPECT_EQ(snapshotter_->Commit("c3", "a3", {}, "c1").code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(snapshotter_->Commit("c3", "a3", {}, "c2").ok());
  EXPECT_FALSE(snapshotter_->Remove("c1").ok()) << "it has a child now";
}

TEST_F(SnapshotterTest, UpdateChangesOnlyLabelsAndTheTime) {
  Active("a1", "", {{"l1", "1"}, {"l2", "2"}, {"a.b", "3"}});
  Info before = snapshotter_->Stat("a1").value();
  Info wanted{"a1", "doesnotexist", Kind::kView, 5, 5, {{"l1", "new"}, {"l4", "4"}, {"a.b", "5"}}};
  Info masked = snapshotter_->Update(wanted, {"labels.l1", "labels.l2", "labels.a.b"}).value();
  EXPECT_EQ(masked.labels, (Labels{{"l1", "new"}, {"a.b", "5"}}));
  EXPECT_EQ(masked.parent, "");
  EXPECT_EQ(masked.kind, Kind::kActive);
  EXPECT_EQ(masked.created_wall_nanos, before.created_wall_nanos);
  EXPECT_GT(masked.updated_wall_nanos, before.updated_wall_nanos);
  EXPECT_EQ(snapshotter_->Update(wanted, {}).value().labels, wanted.labels);
  EXPECT_EQ(
      snapshotter_->Update({"a1", "", Kind::kActive, 0, 0, {{"x", "1"}, {"e", ""}}}, {"labels"})->labels,
      (Labels{{"x", "1"}}));
  EXPECT_EQ(snapshotter_->Stat("a1")->labels, (Labels{{"x", "1"}}));
}

TEST_F(SnapshotterTest, ListFiltersAndSaysTheSameAsStat) {
  Active("a1");
  Commit("a1", "c1");
  Active("a2", "c1", {{"l", "2"}});
  ASSERT_TRUE(snapshotter_->View("v1", "c1", {}).ok());
  EXPECT_EQ(snapshotter_->List({})->size(), 3u);
  auto found = snapshotter_->List({"kind==view", "labels.l==2"}).value();
  ASSERT_EQ(found.size(), 2u);
  Info stat = snapshotter_->Stat("a2").value();
  EXPECT_EQ(found[0].name, stat.name);
  EXPECT_EQ(found[0].labels, stat.labels);
  EXPECT_EQ(found[0].updated_wall_nanos, stat.updated_wall_nanos);
}

TEST_F(SnapshotterTest, AKeyIsReusableAtOnceAfterRemove) {
  for (int i = 0; i < 3; i++) {
    Active("k");
    ASSERT_TRUE(snapshotter_->Remove("k").ok());
    ASSERT_TRUE(snapshotter_->View("k", "", {}).ok());
    ASSERT_TRUE(snapshotter_->Remove("k").ok());
  }
  ASSERT_TRUE(snapshotter_->Cleanup().ok());
  EXPECT_TRUE(FolderIds().empty());
}

TEST_F(SnapshotterTest, KeysMayBeAnything) {
  for (const std::string& key :
       {std::string("/tmp/a path/b"), std::string("default/1/extract-1 sha256:x"), std::string(5000, 'k')}) {
    EXPECT_TRUE(snapshotter_->Prepare(key, "", {}).ok());
    EXPECT_TRUE(snapshotter_->Stat(key).ok());
  }
  EXPECT_EQ(snapshotter_->Prepare("\xff", "", {}).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(SnapshotterTest, EverythingIsThereAfterARestart) {
  Active("a1");
  Commit("a1", "c1");
  auto mounts = snapshotter_->Prepare("a2", "c1", {}).value();
  Restart();
  EXPECT_EQ(snapshotter_->Mounts("a2").value()[0].options, mounts[0].options);
  EXPECT_EQ(snapshotter_->List({})->size(), 2u);
}

TEST_F(SnapshotterTest, AFullDiskChangesNothingAndLeavesNoFolder) {
  faults_.FailAt("metadata.write.before", ErrnoStatus(ENOSPC, "injected"), 2);  // the first reserves ids
  EXPECT_EQ(snapshotter_->Prepare("a1", "", {}).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(faults_.fired("metadata.write.before"), 1);
  ASSERT_TRUE(snapshotter_->Cleanup().ok());
  EXPECT_TRUE(FolderIds().empty());
  EXPECT_TRUE(snapshotter_->Prepare("a1", "", {}).ok());
}

TEST_F(SnapshotterTest, ALostStoreDoesNotStopNewSnapshots) {
  Active("a1");
  Active("a2");
  Stop();
  ASSERT_TRUE(RemoveTree(root() + "/metadata").ok());
  Start();
  Active("b1");
  EXPECT_EQ(IdOf("b1"), 3u) << "folders 1 and 2 are not touched";
  ASSERT_TRUE(snapshotter_->Cleanup().ok());
  EXPECT_EQ(FolderIds(), std::vector<uint64_t>{3});
}

TEST_F(SnapshotterTest, ParentAndChildRaceWithoutLeavingAnOrphan) {
  for (int round = 0; round < 20; round++) {
    Active("a");
    Commit("a", "base");
    absl::Status removed, prepared;
    std::thread remover([&] { removed = snapshotter_->Remove("base"); });
    std::thread preparer([&] { prepared = snapshotter_->Prepare("child", "base", {}).status(); });
    remover.join();
    preparer.join();
    EXPECT_NE(removed.ok(), prepared.ok()) << removed << prepared;
    ASSERT_TRUE(snapshotter_->Remove("child").ok());
    ASSERT_TRUE(snapshotter_->Remove("base").ok());
  }
}

TEST_F(SnapshotterTest, ManyThreadsAtOnceKeepTheContract) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; t++) {
    threads.emplace_back([this, t] {
      for (int i = 0; i < 20; i++) {
        std::string key = std::to_string(t) + "/" + std::to_string(i);
        EXPECT_TRUE(snapshotter_->Prepare(key, "", {}).ok());
        EXPECT_TRUE(snapshotter_->Commit("c" + key, key, {}, "").ok());
        EXPECT_TRUE(snapshotter_->List({"kind==committed"}).ok());
        EXPECT_TRUE(snapshotter_->Remove("c" + key).ok());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  ASSERT_TRUE(snapshotter_->Cleanup().ok());
  EXPECT_TRUE(snapshotter_->List({})->empty());
  EXPECT_TRUE(FolderIds().empty());
}

}  // namespace
}  // namespace holdfast::snapshot
