// The remote-snapshot flow: what a Prepare with a target does.
#include <sys/stat.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "worker/snapshot/labels.h"
#include "worker/snapshot/snapshotter_fixture.h"

namespace holdfast::snapshot {
namespace {

using metadata::Kind;
using std::chrono::steady_clock;

const std::string kBlob = "sha256:" + std::string(64, '1');
const std::string kOtherBlob = "sha256:" + std::string(64, '2');
const std::string kChain = "sha256:" + std::string(64, 'c');
constexpr char kKey[] = "default/1/extract-1 sha256:c";

Labels Target(const std::string& chain = kChain, const std::string& blob = kBlob) {
  return {{kTargetLabel, chain},
          {"containerd.io/snapshot/cri.image-ref", "localhost/app:1"},
          {"containerd.io/snapshot/cri.layer-digest", blob}};
}

class RemotePrepareTest : public SnapshotterFixture {
 protected:
  absl::Status PrepareCode(const std::string& key, const std::string& parent, const Labels& labels) {
    return snapshotter_->Prepare(key, parent, labels).status();
  }
  // What containerd asks after AlreadyExists.
  std::vector<Info> Lookup(const std::string& chain, const std::string& parent) {
    return snapshotter_
        ->List({"labels.\"containerd.io/snapshot.ref\"==" + chain + ",parent==\"" + parent + "\""})
        .value();
  }
};

TEST_F(RemotePrepareTest, TheTargetIsCommittedAndServed) {
  EXPECT_TRUE(absl::IsAlreadyExists(PrepareCode(kKey, "", Target())));
  std::vector<Info> found = Lookup(kChain, "");
  ASSERT_EQ(found.size(), 1u);
  EXPECT_EQ(found[0].kind, Kind::kCommitted);
  EXPECT_EQ(found[0].labels[kRemoteLabel], kRemoteLabelValue);
  EXPECT_FALSE(snapshotter_->Stat(kKey).ok()) << "no active row may remain";
  EXPECT_EQ(mounter_.mounted(), 1u);
  metadata::SnapshotRow row = *backend_->store->Get(found[0].name);
  EXPECT_EQ(row.lazy_digest, kBlob);
  EXPECT_EQ(row.lazy_image, "localhost/app:1");
  EXPECT_EQ(row.lazy_index, "index-of-" + kBlob);
  EXPECT_EQ(row.lazy_blob_size, 4711u);
  EXPECT_EQ(row.lazy_tenant, "default");
  EXPECT_EQ(snapshotter_->GetUsage(row.key)->bytes, 1234);
}

TEST_F(RemotePrepareTest, AContainerOnLazyLayersGetsThemAsLowerFolders) {
  ASSERT_TRUE(absl::IsAlreadyExists(PrepareCode(kKey, "", Target())));
  std::string lower = Lookup(kChain, "")[0].name;
  ASSERT_TRUE(
      absl::IsAlreadyExists(PrepareCode("default/2/extract-2 x", lower, Target("sha256:top", kOtherBlob))));
  ASSERT_EQ(mounter_.parents().size(), 1u);
  EXPECT_EQ(mounter_.parents()[0].lazy_index, "index-of-" + kBlob);
  std::string top = Lookup("sha256:top", lower)[0].name;
  auto mounts = snapshotter_->Prepare("default/3/container", top, {}).value();
  EXPECT_EQ(mounts[0].options.back(), "lowerdir=" + root() + "/snapshots/" + std::to_string(IdOf(top)) +
                                          "/fs:" + root() + "/snapshots/" + std::to_string(IdOf(lower)) +
                                          "/fs");
  struct stat st;
  ASSERT_EQ(
      lstat((root() + "/snapshots/" + std::to_string(IdOf("default/3/container")) + "/fs").c_str(), &st), 0);
  EXPECT_EQ(st.st_uid, 12u) << "the owner of the root folder comes from the layer below";
  EXPECT_EQ(st.st_gid, 34u);
}

TEST_F(RemotePrepareTest, ASecondNamespaceSharesTheSnapshotWhereTheParentIsEqual) {
  ASSERT_TRUE(absl::IsAlreadyExists(PrepareCode(kKey, "", Target())));
  EXPECT_TRUE(absl::IsAlreadyExists(PrepareCode("other/1/extract-1 x", "", Target())));
  EXPECT_EQ(mounter_.requests().size(), 1u);
  EXPECT_EQ(Lookup(kChain, "").size(), 1u);

  Active("base");
  Commit("base", "default/9/base");
  EXPECT_TRUE(absl::IsAlreadyExists(PrepareCode("other/2/extract-1 x", "default/9/base", Target())));
  EXPECT_EQ(Lookup(kChain, "default/9/base").size(), 1u) << "another parent is another snapshot";
}

TEST_F(RemotePrepareTest, AnUnpackedLayerIsSharedToo) {
  Labels labels = Target();
  mounter_.FailImage("localhost/app:1", FailedPrecondition("no TOC"));
  ASSERT_TRUE(snapshotter_->Prepare(kKey, "", labels).ok());
  ASSERT_TRUE(snapshotter_->Commit("default/2/" + kChain, kKey, labels, "").ok());
  EXPECT_TRUE(absl::IsAlreadyExists(PrepareCode("other/1/x", "", labels)));
}

TEST_F(RemotePrepareTest, ATargetMadeFromAnotherBlobIsNotTrusted) {
  ASSERT_TRUE(absl::IsAlreadyExists(PrepareCode(kKey, "", Target(kChain, kBlob))));
  EXPECT_TRUE(PrepareCode("other/1/x", "", Target(kChain, kOtherBlob)).ok()) << "an ordinary snapshot";
  EXPECT_TRUE(PrepareCode("other/2/x", "", {{kTargetLabel, kChain}}).ok());
  EXPECT_EQ(mounter_.requests().size(), 1u);
}

TEST_F(RemotePrepareTest, ATargetVerifiedAgainstAnotherTocIsNotTrusted) {
  auto with_toc = [](char digit) {
    Labels labels = Target();
    labels[kTocDigestLabel] = "sha256:" + std::string(64, digit);
    return labels;
  };
  ASSERT_TRUE(absl::IsAlreadyExists(PrepareCode(kKey, "", with_toc('a'))));
  EXPECT_TRUE(PrepareCode("other/1/x", "", with_toc('b')).ok()) << "an ordinary snapshot";
  EXPECT_TRUE(PrepareCode("other/2/x", "", Target()).ok());
  EXPECT_TRUE(absl::IsAlreadyExists(PrepareCode("other/3/x", "", with_toc('a'))));
  EXPECT_EQ(mounter_.requests().size(), 1u);
}

TEST_F(RemotePrepareTest, FallsBackToAnOrdinarySnapshotAndLeavesNothing) {
  mounter_.FailImage("localhost/app:1", Unavailable("503"));
  ASSERT_TRUE(snapshotter_->Prepare(kKey, "", Target()).ok());
  EXPECT_EQ(snapshotter_->Stat(kKey)->kind, Kind::kActive);
  EXPECT_TRUE(snapshotter_->Stat(kKey)->labels.count(kTargetLabel) != 0);
  ASSERT_TRUE(snapshotter_->Cleanup().ok());
  EXPECT_EQ(FolderIds(), std::vector<uint64_t>{IdOf(kKey)});
  EXPECT_EQ(mounter_.mounted(), 0u);
}

TEST_F(RemotePrepareTest, TheSecondSourceIsTriedWhenTheFirstFails) {
  Labels labels = Target();
  labels["containerd.io/snapshot/remote/stargz.reference"] = "localhost/mirror:1";
  labels["containerd.io/snapshot/remote/stargz.digest"] = kBlob;
  mounter_.FailImage("localhost/app:1", Unavailable("down"));
  EXPECT_TRUE(absl::IsAlreadyExists(PrepareCode(kKey, "", labels)));
  EXPECT_EQ(backend_->store->Get(Lookup(kChain, "")[0].name)->lazy_image, "localhost/mirror:1");
}

TEST_F(RemotePrepareTest, HostileLabelsGiveAnOrdinarySnapshot) {
  Labels labels = Target();
  labels["containerd.io/snapshot/cri.image-ref"] = "../../../etc";
  EXPECT_TRUE(PrepareCode(kKey, "", labels).ok());
  EXPECT_TRUE(mounter_.requests().empty());
}

TEST_F(RemotePrepareTest, ParallelUnpackIsNotServedLazilyBecauseItsParentIsUnknown) {
  Labels labels = Target();
  labels[kParentChainLabel] = kChain;
  EXPECT_TRUE(PrepareCode(kKey, "", labels).ok());
  EXPECT_TRUE(mounter_.requests().empty());
}

TEST_F(RemotePrepareTest, MissingParentAndExistingKeyAreErrorsBeforeTheNetworkIsAsked) {
  Active("k");
  EXPECT_TRUE(absl::IsNotFound(PrepareCode(kKey, "nothing", Target())));
  EXPECT_TRUE(absl::IsAlreadyExists(PrepareCode("k", "", Target())));
  EXPECT_TRUE(mounter_.requests().empty());
}

TEST_F(RemotePrepareTest, TwoPreparesOfOneTargetMountItOnce) {
  mounter_.Hang(true);
  std::vector<std::thread> threads;
  std::atomic<int> exists{0};
  for (int i = 0; i < 4; i++) {
    threads.emplace_back([&, i] {
      exists += absl::IsAlreadyExists(PrepareCode("ns" + std::to_string(i) + "/1/x", "", Target())) ? 1 : 0;
    });
  }
  ASSERT_TRUE(mounter_.WaitForRequests(1));
  mounter_.Hang(false);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(exists, 4);
  EXPECT_EQ(mounter_.requests().size(), 1u);
  EXPECT_EQ(snapshotter_->List({})->size(), 1u);
}

TEST_F(RemotePrepareTest, AHangingMounterIsLeftBehindAtTheDeadline) {
  Stop();
  Start(200'000'000);
  mounter_.Hang(true);
  auto start = steady_clock::now();
  EXPECT_TRUE(PrepareCode(kKey, "", Target()).ok());
  EXPECT_GE(steady_clock::now() - start, std::chrono::milliseconds(200));
  EXPECT_LT(steady_clock::now() - start, std::chrono::seconds(5));
  ASSERT_TRUE(snapshotter_->Cleanup().ok());
  EXPECT_EQ(FolderIds().size(), 2u) << "its folder is still in use";
  mounter_.Hang(false);
  ASSERT_TRUE(mounter_.WaitForUnmounts(1)) << "the late mount is undone";
  Restart();  // waits for what was left behind
  ASSERT_TRUE(snapshotter_->Cleanup().ok());
  EXPECT_EQ(FolderIds(), std::vector<uint64_t>{IdOf(kKey)});
  EXPECT_EQ(mounter_.mounted(), 0u);
}

TEST_F(RemotePrepareTest, OtherCallsDoNotWaitForTheNetwork) {
  Active("base");
  Commit("base", "c1");
  Active("other");
  mounter_.Hang(true);
  std::thread slow([&] { EXPECT_TRUE(absl::IsNotFound(PrepareCode(kKey, "c1", Target()))); });
  ASSERT_TRUE(mounter_.WaitForRequests(1));
  EXPECT_TRUE(snapshotter_->Stat("c1").ok());
  EXPECT_EQ(snapshotter_->List({})->size(), 2u);
  EXPECT_TRUE(snapshotter_->Commit("c2", "other", {}, "").ok());
  EXPECT_TRUE(snapshotter_->Prepare("plain", "c1", {}).ok());
  EXPECT_TRUE(snapshotter_->Remove("plain").ok());
  EXPECT_TRUE(snapshotter_->Remove("c1").ok()) << "even of the parent";
  mounter_.Hang(false);
  slow.join();
  ASSERT_TRUE(snapshotter_->Cleanup().ok());
  EXPECT_EQ(mounter_.mounted(), 0u);
}

TEST_F(RemotePrepareTest, AbortEndsWaitingPreparesAndTheStoreMayBeClosed) {
  mounter_.Hang(true);
  std::vector<absl::Status> results(2);
  std::vector<std::thread> waiting;
  for (size_t i = 0; i < 2; i++) {
    waiting.emplace_back([&, i] { results[i] = PrepareCode("k" + std::to_string(i), "", Target()); });
  }
  ASSERT_TRUE(mounter_.WaitForRequests(1));
  snapshotter_->Abort();
  for (std::thread& thread : waiting) thread.join();
  EXPECT_TRUE(absl::IsAborted(results[0])) << results[0];
  EXPECT_TRUE(absl::IsAborted(results[1])) << results[1];
  EXPECT_TRUE(absl::IsAborted(PrepareCode("later", "", Target())));
  EXPECT_TRUE(snapshotter_->List({})->empty());
  backend_->store.reset();
  mounter_.Hang(false);
  Restart();
  ASSERT_TRUE(snapshotter_->Cleanup().ok());
  EXPECT_TRUE(FolderIds().empty());
  EXPECT_EQ(mounter_.mounted(), 0u);
}

TEST_F(RemotePrepareTest, AfterAStartLazyLayersAreMountedAgain) {
  ASSERT_TRUE(absl::IsAlreadyExists(PrepareCode(kKey, "", Target())));
  std::string lower = Lookup(kChain, "")[0].name;
  ASSERT_TRUE(absl::IsAlreadyExists(PrepareCode("default/2/x", lower, Target("sha256:top", kOtherBlob))));
  std::string top = Lookup("sha256:top", lower)[0].name;
  Active("container", top);
  mounter_.LoseAll();
  Restart();
  snapshotter_->Restore();
  EXPECT_EQ(mounter_.mounted(), 2u);
  snapshotter_->Restore();
  EXPECT_EQ(mounter_.remounts(), 2) << "what is mounted is left alone";

  mounter_.LoseAll();
  mounter_.FailRemounts(DataLoss("index is gone"));
  snapshotter_->Restore();
  absl::Status status = snapshotter_->Mounts("container").status();
  EXPECT_TRUE(absl::IsUnavailable(status));
  EXPECT_NE(FromAbsl(status.message()).find("sha256:"), std::string_view::npos);
  EXPECT_NE(FromAbsl(status.message()).find("unavailable: index is gone"), std::string_view::npos) << status;
  EXPECT_TRUE(absl::IsUnavailable(PrepareCode("another", top, {})));
  mounter_.FailRemounts(absl::OkStatus());
  EXPECT_TRUE(snapshotter_->Mounts("container").ok());
  EXPECT_EQ(mounter_.mounted(), 2u);
}

TEST_F(RemotePrepareTest, AHandOverDoesNotWaitUntilAllLayersAreMountedAgain) {
  ASSERT_TRUE(absl::IsAlreadyExists(PrepareCode(kKey, "", Target())));
  std::string lower = Lookup(kChain, "")[0].name;
  Active("container", lower);
  mounter_.LoseAll();
  Restart();
  snapshotter_->Abort();
  snapshotter_->Restore();
  EXPECT_TRUE(absl::IsAborted(snapshotter_->Mounts("container").status()))
      << "the successor is asked instead";
  EXPECT_EQ(mounter_.remounts(), 0);
}

TEST_F(RemotePrepareTest, RemovedLayersAreUnmountedAndABusyOneIsRetried) {
  ASSERT_TRUE(absl::IsAlreadyExists(PrepareCode(kKey, "", Target())));
  std::string name = Lookup(kChain, "")[0].name;
  mounter_.FailUnmounts(1);
  EXPECT_TRUE(snapshotter_->Remove(name).ok()) << "EBUSY never reaches containerd";
  ASSERT_TRUE(mounter_.WaitForUnmounts(1));
  EXPECT_TRUE(snapshotter_->Cleanup().ok());
  EXPECT_EQ(mounter_.mounted(), 0u);
  EXPECT_TRUE(FolderIds().empty());
}

}  // namespace
}  // namespace holdfast::snapshot
