// containerd's API over a real unix socket, with the generated client, and the hand-over between two
// services.
#include "worker/api/snapshot_service.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <thread>

#include "common/mutex.h"
#include "gtest/gtest.h"
#include "schema/containerd/snapshots.grpc.pb.h"
#include "worker/api/convert.h"
#include "worker/api/limits.h"
#include "worker/snapshot/labels.h"
#include "worker/snapshot/snapshotter_fixture.h"

namespace holdfast::api {
namespace {

using google::protobuf::Empty;
using snapshot::Labels;
using std::chrono::milliseconds;
using std::chrono::seconds;
using std::chrono::steady_clock;

const std::string kBlob = "sha256:" + std::string(64, '1');

UniqueFd Listen(const std::string& path) {
  UniqueFd fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, sizeof address.sun_path - 1);
  EXPECT_EQ(bind(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  EXPECT_EQ(listen(fd.get(), 128), 0);
  return fd;
}

// containerd's side: fails fast, reconnects by itself. Without the probe of limits.h, by which this client,
// not containerd's (Go), loses answers.
class Client {
 public:
  explicit Client(const std::string& path) {
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    arguments.SetMaxReceiveMessageSize(16 << 20);
    arguments.SetInt(kBandwidthProbe, 0);
    stub_ = pb::Snapshots::NewStub(
        grpc::CreateCustomChannel("unix:" + path, grpc::InsecureChannelCredentials(), arguments));
  }
  grpc::Status Prepare(const std::string& key, const std::string& parent, const Labels& labels,
                       pb::PrepareSnapshotResponse* out = nullptr) {
    pb::PrepareSnapshotRequest request;
    request.set_key(key);
    request.set_parent(parent);
    request.mutable_labels()->insert(labels.begin(), labels.end());
    pb::PrepareSnapshotResponse response;
    return Call(&pb::Snapshots::Stub::Prepare, request, out != nullptr ? out : &response);
  }
  grpc::Status Remove(const std::string& key) {
    pb::RemoveSnapshotRequest request;
    request.set_key(key);
    Empty response;
    return Call(&pb::Snapshots::Stub::Remove, request, &response);
  }
  grpc::Status Commit(const std::string& name, const std::string& key) {
    pb::CommitSnapshotRequest request;
    request.set_name(name);
    request.set_key(key);
    Empty response;
    return Call(&pb::Snapshots::Stub::Commit, request, &response);
  }
  grpc::Status Stat(const std::string& key, pb::StatSnapshotResponse* out = nullptr) {
    pb::StatSnapshotRequest request;
    request.set_key(key);
    pb::StatSnapshotResponse response;
    return Call(&pb::Snapshots::Stub::Stat, request, out != nullptr ? out : &response);
  }
  // The sizes of the blocks.
  grpc::Status List(const std::vector<std::string>& filters, std::vector<int>* blocks) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + seconds(60));
    pb::ListSnapshotsRequest request;
    for (const std::string& filter : filters) request.add_filters(filter);
    auto reader = stub_->List(&context, request);
    pb::ListSnapshotsResponse block;
    while (reader->Read(&block)) blocks->push_back(block.info_size());
    return reader->Finish();
  }
  template <typename Request, typename Response>
  grpc::Status Call(grpc::Status (pb::Snapshots::Stub::*method)(grpc::ClientContext*, const Request&,
                                                                Response*),
                    const Request& request, Response* response, milliseconds limit = seconds(60)) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + limit);
    return (stub_.get()->*method)(&context, request, response);
  }

 private:
  std::unique_ptr<pb::Snapshots::Stub> stub_;
};

Labels LazyTarget() {
  return {{snapshot::kTargetLabel, "sha256:chain"},
          {"containerd.io/snapshot/cri.image-ref", "localhost/app:1"},
          {"containerd.io/snapshot/cri.layer-digest", kBlob}};
}

class SnapshotServiceTest : public snapshot::SnapshotterFixture {
 protected:
  std::unique_ptr<SnapshotService> NewService(ServiceOptions options = {}) {
    auto service = SnapshotService::Create(DupFd(listener_.get()).value(), options);
    EXPECT_TRUE(service.ok()) << service.status();
    return std::move(*service);
  }
  std::unique_ptr<SnapshotService> Serving() {
    auto service = NewService();
    service->Attach(snapshotter_);
    service->StartAccepting();
    return service;
  }

  const std::string socket_ = dir_.path() + "/api.sock";
  UniqueFd listener_ = Listen(socket_);
};

TEST_F(SnapshotServiceTest, AllTenCallsWork) {
  auto service = Serving();
  Client client(socket_);
  pb::PrepareSnapshotResponse prepared;
  ASSERT_TRUE(client.Prepare("a1", "", {{"containerd.io/snapshot/l", "1"}}, &prepared).ok());
  ASSERT_EQ(prepared.mounts_size(), 1);
  EXPECT_EQ(prepared.mounts(0).type(), "bind");
  EXPECT_EQ(prepared.mounts(0).options(0), "rw");
  pb::MountsRequest mounts;
  mounts.set_key("a1");
  pb::MountsResponse mounted;
  ASSERT_TRUE(client.Call(&pb::Snapshots::Stub::Mounts, mounts, &mounted).ok());
  EXPECT_EQ(mounted.mounts(0).source(), prepared.mounts(0).source());
  pb::UpdateSnapshotRequest update;
  update.mutable_info()->set_name("a1");
  (*update.mutable_info()->mutable_labels())["containerd.io/snapshot/l"] = "2";
  update.mutable_update_mask()->add_paths("labels.containerd.io/snapshot/l");
  pb::UpdateSnapshotResponse updated;
  ASSERT_TRUE(client.Call(&pb::Snapshots::Stub::Update, update, &updated).ok());
  EXPECT_EQ(updated.info().labels().at("containerd.io/snapshot/l"), "2");
  pb::StatSnapshotResponse stat;
  ASSERT_TRUE(client.Stat("a1", &stat).ok());
  EXPECT_EQ(stat.info().kind(), pb::ACTIVE);
  EXPECT_GT(stat.info().created_at().seconds(), 1'600'000'000);
  pb::UsageRequest usage;
  usage.set_key("a1");
  pb::UsageResponse used;
  ASSERT_TRUE(client.Call(&pb::Snapshots::Stub::Usage, usage, &used).ok());
  EXPECT_EQ(used.inodes(), 1);
  ASSERT_TRUE(client.Commit("c1", "a1").ok());
  pb::ViewSnapshotRequest view;
  view.set_key("v1");
  view.set_parent("c1");
  pb::ViewSnapshotResponse viewed;
  ASSERT_TRUE(client.Call(&pb::Snapshots::Stub::View, view, &viewed).ok());
  EXPECT_EQ(viewed.mounts(0).options(0), "ro");
  std::vector<int> blocks;
  ASSERT_TRUE(client.List({"kind==view"}, &blocks).ok());
  EXPECT_EQ(blocks, std::vector<int>{1});
  ASSERT_TRUE(client.Remove("v1").ok());
  Empty empty;
  ASSERT_TRUE(client.Call(&pb::Snapshots::Stub::Cleanup, pb::CleanupRequest(), &empty).ok());
  EXPECT_EQ(FolderIds(), std::vector<uint64_t>{IdOf("c1")});
}

TEST_F(SnapshotServiceTest, ErrorsArriveAsContainerdExpectsThem) {
  auto service = Serving();
  Client client(socket_);
  ASSERT_TRUE(client.Prepare("a1", "", {}).ok());
  grpc::Status exists = client.Prepare("a1", "", {});
  EXPECT_EQ(exists.error_code(), grpc::StatusCode::ALREADY_EXISTS);
  EXPECT_EQ(exists.error_message(), "snapshot a1: already exists");
  EXPECT_TRUE(exists.error_details().empty());
  grpc::Status missing = client.Stat("nothing");
  EXPECT_EQ(missing.error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(missing.error_message(), "snapshot nothing: not found");
  EXPECT_EQ(client.Prepare("x", "a1", {}).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  ASSERT_TRUE(client.Commit("c1", "a1").ok());
  ASSERT_TRUE(client.Prepare("a2", "c1", {}).ok());
  grpc::Status child = client.Remove("c1");
  EXPECT_EQ(child.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_EQ(child.error_message(), "cannot remove snapshot with child: failed precondition");
  std::vector<int> blocks;
  EXPECT_EQ(client.List({"=="}, &blocks).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_TRUE(client.Remove("nothing").ok());
  EXPECT_EQ(client.Prepare("lazy", "", LazyTarget()).error_code(), grpc::StatusCode::ALREADY_EXISTS);
}

TEST_F(SnapshotServiceTest, ListComesInBlocksOfAHundred) {
  metadata::Batch batch;
  for (uint64_t i = 1; i <= 250; i++) {
    metadata::SnapshotRow row;
    row.key = "k" + std::to_string(i);
    row.id = 1000 + i;
    batch.put.push_back(row);
  }
  ASSERT_TRUE(backend_->store->Apply(batch).ok());
  auto service = Serving();
  Client client(socket_);
  std::vector<int> blocks;
  ASSERT_TRUE(client.List({}, &blocks).ok());
  EXPECT_EQ(blocks, (std::vector<int>{100, 100, 50}));
  blocks.clear();
  ASSERT_TRUE(client.List({"name==none"}, &blocks).ok());
  EXPECT_TRUE(blocks.empty());
}

TEST_F(SnapshotServiceTest, CallsBeforeAttachWaitForIt) {
  auto service = NewService();
  service->StartAccepting();
  std::thread caller([this] { EXPECT_TRUE(Client(socket_).Prepare("a1", "", {}).ok()); });
  auto deadline = steady_clock::now() + seconds(20);
  while (service->OpenCalls() == 0 && steady_clock::now() < deadline) std::this_thread::yield();
  EXPECT_EQ(service->OpenCalls(), 1);
  service->Attach(snapshotter_);
  caller.join();
}

TEST_F(SnapshotServiceTest, WithoutAnOwnerACallIsUnavailableInTheEnd) {
  ServiceOptions options;
  options.owner_wait = milliseconds(50);
  auto service = NewService(options);
  service->StartAccepting();
  grpc::Status status = Client(socket_).Prepare("a1", "", {});
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_NE(status.error_message().find("no owner"), std::string::npos) << status.error_message();
}

TEST_F(SnapshotServiceTest, CallsThatWaitForTheNetworkDoNotStarveOthers) {
  auto service = Serving();
  mounter_.Hang(true);
  std::vector<std::thread> slow;
  for (int i = 0; i < 80; i++) {
    slow.emplace_back([this, i] {
      Labels labels = LazyTarget();
      labels[snapshot::kTargetLabel] = "sha256:chain" + std::to_string(i);
      EXPECT_EQ(Client(socket_).Prepare("k" + std::to_string(i), "", labels).error_code(),
                grpc::StatusCode::ALREADY_EXISTS);
    });
  }
  EXPECT_TRUE(mounter_.WaitForRequests(80));
  Client client(socket_);
  auto start = steady_clock::now();
  for (int i = 0; i < 50; i++) EXPECT_EQ(client.Stat("nothing").error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_LT(steady_clock::now() - start, seconds(10));
  mounter_.Hang(false);
  for (std::thread& thread : slow) thread.join();
}

// Two generations in one process: each has its own store object, one folder, one socket.
class HandoverTest : public SnapshotServiceTest {
 protected:
  static ServiceOptions ShortLived() {
    ServiceOptions options;
    options.max_connection_age = milliseconds(400);
    return options;
  }

  // What worker/app does in a planned swap; the old backend is closed, a new one opened on the same folder.
  std::unique_ptr<SnapshotService> Swap(SnapshotService* old_service,
                                        std::unique_ptr<snapshot::Backend>* old_backend) {
    auto successor = NewService(ShortLived());
    auto start = steady_clock::now();
    old_service->DetachAndForward(socket_);
    successor->StartAccepting();  // its calls wait
    *old_backend = std::move(backend_);
    (*old_backend)->store.reset();
    Start();
    successor->Attach(snapshotter_);
    slowest_swap_ = std::max(slowest_swap_, steady_clock::now() - start);
    return successor;
  }

  steady_clock::duration slowest_swap_{0};
};

TEST_F(HandoverTest, NoCallFailsUnderLoad) {
  auto service = NewService(ShortLived());
  service->Attach(snapshotter_);
  service->StartAccepting();
  std::atomic<bool> stop{false};
  std::atomic<int> calls{0}, failed{0};
  std::atomic<int64_t> slowest_ms{0};
  std::vector<std::thread> load;
  auto check = [&](const grpc::Status& status, steady_clock::time_point start) {
    calls++;
    int64_t took = std::chrono::duration_cast<milliseconds>(steady_clock::now() - start).count();
    for (int64_t seen = slowest_ms; took > seen && !slowest_ms.compare_exchange_weak(seen, took);) continue;
    if (status.ok()) return;
    failed++;
    ADD_FAILURE() << status.error_code() << " " << status.error_message();
  };
  for (int t = 0; t < 4; t++) {
    load.emplace_back([&, t] {
      Client client(socket_);
      for (int i = 0; !stop; i++) {
        std::string key = std::to_string(t) + "/" + std::to_string(i);
        check(client.Prepare(key, "", {}), steady_clock::now());
        auto start = steady_clock::now();
        check(client.Stat(key), start);
        start = steady_clock::now();
        check(client.Remove(key), start);
      }
    });
  }
  for (int swap = 0; swap < 5; swap++) {
    int target = calls + 200;
    auto give_up = steady_clock::now() + seconds(30);
    while (calls < target && steady_clock::now() < give_up) std::this_thread::sleep_for(milliseconds(5));
    std::unique_ptr<snapshot::Backend> old_backend;
    auto successor = Swap(service.get(), &old_backend);
    EXPECT_TRUE(service->WaitDrained(seconds(30))) << "swap " << swap;
    service = std::move(successor);
  }
  stop = true;
  for (std::thread& thread : load) thread.join();
  EXPECT_EQ(failed, 0);
  EXPECT_GT(calls, 500);
  EXPECT_TRUE(snapshotter_->List({})->empty());
  RecordProperty("calls", calls);
  RecordProperty("slowest_call_ms", static_cast<int>(slowest_ms));
  RecordProperty(
      "slowest_swap_us",
      static_cast<int>(std::chrono::duration_cast<std::chrono::microseconds>(slowest_swap_).count()));
}

TEST_F(HandoverTest, APrepareThatWaitsForTheNetworkIsFinishedByTheSuccessor) {
  auto service = NewService(ShortLived());
  service->Attach(snapshotter_);
  service->StartAccepting();
  mounter_.Hang(true);
  grpc::Status lazy, plain;
  std::thread slow([&] { lazy = Client(socket_).Prepare("default/1/x", "", LazyTarget()); });
  ASSERT_TRUE(mounter_.WaitForRequests(1));
  std::unique_ptr<snapshot::Backend> old_backend;
  auto start = steady_clock::now();
  auto successor = Swap(service.get(), &old_backend);
  EXPECT_LT(steady_clock::now() - start, seconds(5)) << "nobody waits for the registry";
  ASSERT_TRUE(mounter_.WaitForRequests(2)) << "the successor asks again";
  // Longer than the connection's age: the call must survive it.
  std::this_thread::sleep_for(milliseconds(1500));
  EXPECT_EQ(service->OpenCalls(), 1);
  mounter_.Hang(false);
  slow.join();
  EXPECT_EQ(lazy.error_code(), grpc::StatusCode::ALREADY_EXISTS) << lazy.error_message();
  EXPECT_EQ(snapshotter_->List({})->size(), 1u);
  EXPECT_TRUE(service->WaitDrained(seconds(30)));
}

TEST_F(HandoverTest, ACallOnAnOldConnectionReachesTheSuccessor) {
  ServiceOptions long_lived;
  auto service = NewService(long_lived);
  service->Attach(snapshotter_);
  service->StartAccepting();
  Client client(socket_);
  ASSERT_TRUE(client.Prepare("before", "", {}).ok());
  std::unique_ptr<snapshot::Backend> old_backend;
  auto successor = Swap(service.get(), &old_backend);
  EXPECT_EQ(service->OpenConnections(), 1);
  EXPECT_TRUE(client.Stat("before").ok());
  EXPECT_EQ(client.Prepare("before", "", {}).error_message(), "snapshot before: already exists");
  std::vector<int> blocks;
  EXPECT_TRUE(client.List({}, &blocks).ok());
  EXPECT_EQ(blocks, std::vector<int>{1});
  EXPECT_EQ(service->OpenConnections(), 1) << "the client still uses the old connection";
  EXPECT_FALSE(service->WaitDrained(milliseconds(10)));
}

TEST_F(HandoverTest, ThePathOfAClosedListenerIsFreeWhileConnectionsStay) {
  auto service = Serving();
  Client client(socket_);
  ASSERT_TRUE(client.Prepare("before", "", {}).ok());
  listener_.Reset();
  service->CloseListener();
  service->StartAccepting();  // nothing to accept from
  UniqueFd probe(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  socket_.copy(address.sun_path, sizeof address.sun_path - 1);
  EXPECT_EQ(connect(probe.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), -1);
  EXPECT_EQ(errno, ECONNREFUSED);
  EXPECT_TRUE(client.Stat("before").ok());
}

TEST_F(HandoverTest, WhenTheSuccessorFailsTheOldWorkerTakesOverAgain) {
  auto service = Serving();
  Client client(socket_);
  ASSERT_TRUE(client.Prepare("a1", "", {}).ok());
  service->DetachAndForward(socket_);
  std::thread caller([&] { EXPECT_TRUE(client.Stat("a1").ok()); });
  Restart();
  service->Attach(snapshotter_);
  service->StartAccepting();
  caller.join();
  EXPECT_TRUE(client.Stat("a1").ok());
}

}  // namespace
}  // namespace holdfast::api
