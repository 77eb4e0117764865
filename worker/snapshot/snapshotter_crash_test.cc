// What a worker killed in the middle of a call leaves behind. Forks, so no fixture with threads.
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <functional>

#include "worker/snapshot/labels.h"
#include "worker/snapshot/snapshotter_fixture.h"

namespace holdfast::snapshot {
namespace {

// Runs `calls` in a child that is to be killed at `point`; true when it was.
bool DiesAt(const char* point, const std::string& root, LayerMounter* mounter,
            const std::function<void(Snapshotter*)>& calls) {
  pid_t child = fork();
  if (child == 0) {
    FaultPoints faults;
    Backend backend(root, mounter, &faults);
    faults.KillAt(point);
    calls(backend.snapshotter.get());
    _exit(4);
  }
  int status = 0;
  return child > 0 && waitpid(child, &status, 0) == child && WIFSIGNALED(status) &&
         WTERMSIG(status) == SIGKILL;
}

TEST(SnapshotterCrash, AKillAtAnyPointLeavesNoGarbageAfterCleanup) {
  FakeMounter mounter;
  struct Case {
    const char* point;
    const char* call;
    size_t rows;
  };
  for (const Case& c :
       {Case{"snapshot.prepare.before_row", "prepare", 1}, Case{"snapshot.prepare.after_row", "prepare", 2},
        Case{"snapshot.commit.before_row", "commit", 1}, Case{"snapshot.commit.after_row", "commit", 1},
        Case{"snapshot.remove.before_row", "remove", 1}, Case{"snapshot.remove.after_row", "remove", 0},
        Case{"snapshot.cleanup.before_delete", "remove", 0}}) {
    SCOPED_TRACE(c.point);
    TempDir dir;
    {
      Backend backend(dir.path(), &mounter, nullptr);
      ASSERT_TRUE(backend.snapshotter->Prepare("first", "", {}).ok());
    }
    ASSERT_TRUE(DiesAt(c.point, dir.path(), &mounter, [&](Snapshotter* snapshotter) {
      std::string call = c.call;
      if (call == "prepare") static_cast<void>(snapshotter->Prepare("second", "", {}));
      if (call == "commit") static_cast<void>(snapshotter->Commit("done", "first", {}, ""));
      if (call == "remove") static_cast<void>(snapshotter->Remove("first"));
      static_cast<void>(snapshotter->Cleanup());
    }));
    Backend backend(dir.path(), &mounter, nullptr);
    ASSERT_TRUE(backend.snapshotter->Cleanup().ok());
    EXPECT_EQ(backend.store->All().size(), c.rows);
    EXPECT_EQ(Folders(dir.path()).Ids()->size(), c.rows);
    std::string key = std::string(c.point) == "snapshot.commit.after_row" ? "done" : "first";
    EXPECT_EQ(backend.snapshotter->Stat(key).ok(), c.rows > 0);
  }
}

TEST(SnapshotterCrash, AKillBeforeTheRowLeavesNothingAndAfterItTheSnapshot) {
  FakeMounter mounter;
  for (bool after : {false, true}) {
    TempDir dir;
    Labels labels = {{kTargetLabel, "sha256:chain"},
                     {"containerd.io/snapshot/cri.image-ref", "localhost/app:1"},
                     {"containerd.io/snapshot/cri.layer-digest", "sha256:" + std::string(64, '1')}};
    const char* point = after ? "snapshot.remote.after_row" : "snapshot.remote.before_row";
    ASSERT_TRUE(DiesAt(point, dir.path(), &mounter, [&](Snapshotter* snapshotter) {
      static_cast<void>(snapshotter->Prepare("default/1/extract-1 x", "", labels));
    }));
    umount2((dir.path() + "/snapshots/1/fs").c_str(), MNT_DETACH);  // what the dead process's fake mounted
    Backend backend(dir.path(), &mounter, nullptr);
    backend.snapshotter->Restore();
    ASSERT_TRUE(backend.snapshotter->Cleanup().ok());
    EXPECT_EQ(backend.snapshotter->List({})->size(), after ? 1u : 0u);
    EXPECT_EQ(Folders(dir.path()).Ids()->size(), after ? 1u : 0u);
    mounter.LoseAll();
  }
}

}  // namespace
}  // namespace holdfast::snapshot
