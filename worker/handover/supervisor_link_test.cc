// SupervisorLink against a supervisor made of the same schema, at the other end of a socket pair.
#include "worker/handover/supervisor_link.h"

#include <capnp/rpc-twoparty.h>
#include <fcntl.h>
#include <kj/async-io.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <future>
#include <thread>

#include "gtest/gtest.h"
#include "schema/admin.capnp.h"
#include "schema/handover.capnp.h"

namespace holdfast::handover {
namespace {

class FdServer final : public schema::Descriptor::Server {
 public:
  explicit FdServer(int fd) : fd_(fd) {}
  kj::Maybe<int> getFd() override { return fd_; }

 private:
  const int fd_;
};

// What the fake supervisor saw, and what it is to answer.
struct Script {
  int device = -1;
  uint64_t mounts = 0;
  bool refuse_token = false;
  std::atomic<uint64_t> drained{0};
  std::promise<void> registered;
  kj::Maybe<schema::Worker::Client> worker;
  kj::Maybe<schema::WorkerAdmin::Client> admin;
};

class FakeSupervisor final : public schema::Supervisor::Server {
 public:
  explicit FakeSupervisor(Script* script) : script_(*script) {}

  kj::Promise<void> register_(RegisterContext context) override {
    auto hello = context.getParams().getHello();
    KJ_REQUIRE(!script_.refuse_token, "wrong token");
    KJ_REQUIRE(hello.getToken().asChars() == kj::StringPtr("secret").asArray(), "wrong token");
    script_.worker = context.getParams().getWorker();
    script_.admin = context.getParams().getAdmin().castAs<schema::WorkerAdmin>();
    auto welcome = context.getResults().initWelcome();
    welcome.setGeneration(7);
    const kj::byte id[] = {0xab, 0x01};
    welcome.setVaultId(kj::arrayPtr(id, 2));
    welcome.setStateDir("/state");
    welcome.setLedger(kj::heap<FdServer>(script_.device));
    auto pipes = welcome.initRequestPipes(2);
    for (auto pair : pipes) {
      pair.setReadEnd(kj::heap<FdServer>(script_.device));
      pair.setWriteEnd(kj::heap<FdServer>(script_.device));
    }
    script_.registered.set_value();
    return kj::READY_NOW;
  }

  kj::Promise<void> mounts(MountsContext context) override {
    const uint64_t after = context.getParams().getAfter();
    const uint64_t count = std::min<uint64_t>(context.getParams().getLimit(), script_.mounts - after);
    auto entries = context.getResults().initEntries(static_cast<unsigned>(count));
    for (unsigned i = 0; i < count; ++i) {
      entries[i].setMountId(after + i + 1);
      entries[i].setState(schema::MountState::LIVE);
      entries[i].setDevice(kj::heap<FdServer>(script_.device));
    }
    context.getResults().setMore(after + count < script_.mounts);
    return kj::READY_NOW;
  }

  kj::Promise<void> mount(MountContext context) override {
    KJ_REQUIRE(context.getParams().getPath() == "/good", "no such folder");
    auto entry = context.getResults().initEntry();
    entry.setMountId(1);
    entry.setState(schema::MountState::LIVE);
    entry.setPath(context.getParams().getPath());
    entry.setBlob(context.getParams().getBlob());
    entry.setDevice(kj::heap<FdServer>(script_.device));
    return kj::READY_NOW;
  }

  kj::Promise<void> drained(DrainedContext context) override {
    script_.drained = context.getParams().getGeneration();
    return kj::READY_NOW;
  }

 private:
  Script& script_;
};

// Runs the fake on a thread of its own until the destructor; `call` runs something there against the worker.
class FakeEnd {
 public:
  FakeEnd(UniqueFd socket, Script* script)
      : thread_([this, fd = socket.Release(), script] {
          kj::AsyncIoContext io = kj::setupAsyncIo();
          auto stream =
              io.lowLevelProvider->wrapUnixSocketFd(fd, kj::LowLevelAsyncIoProvider::TAKE_OWNERSHIP);
          capnp::TwoPartyClient rpc(*stream, 253,
                                    schema::Supervisor::Client(kj::heap<FakeSupervisor>(script)),
                                    capnp::rpc::twoparty::Side::SERVER);
          auto quit = kj::newPromiseAndCrossThreadFulfiller<void>();
          quit_ = kj::mv(quit.fulfiller);
          executor_ = kj::getCurrentThreadExecutor().addRef();
          ready_.set_value();
          quit.promise.wait(io.waitScope);
          script->worker = nullptr;
          script->admin = nullptr;
        }) {
    ready_.get_future().wait();
  }
  ~FakeEnd() { End(); }
  void End() {
    if (!thread_.joinable()) return;
    quit_->fulfill();
    thread_.join();
  }
  template <typename Function>
  auto Call(Function function) {
    return executor_->executeSync(function);
  }

 private:
  std::promise<void> ready_;
  kj::Own<kj::CrossThreadPromiseFulfiller<void>> quit_;
  kj::Own<const kj::Executor> executor_;
  std::thread thread_;
};

class RecordingWorker final : public WorkerActions, public AdminActions {
 public:
  absl::Status Serve() override {
    serving = true;
    release.get_future().wait();  // an action may take long
    return absl::OkStatus();
  }
  absl::Status OwnerExited(uint64_t generation) override {
    exited = generation;
    return absl::OkStatus();
  }
  absl::Status TakeMetadata() override { return Unavailable("the store is locked"); }
  absl::Status Park() override { return absl::OkStatus(); }
  absl::Status Resume() override { return absl::OkStatus(); }
  absl::Status YieldMetadata() override { return absl::OkStatus(); }
  absl::Status Retire() override { return absl::OkStatus(); }
  void MountsGone(const std::vector<uint64_t>& ids) override { gone = ids; }
  void SupervisorLost() override { lost.set_value(); }
  uint64_t PingLoopAgeNanos() override { return 42; }
  std::vector<LayerInfo> Layers() override {
    LayerInfo layer;
    layer.digest = "sha256:aa";
    layer.files = 3;
    return {layer};
  }
  std::vector<SnapshotInfo> Snapshots() override { return {}; }
  WorkerStats Stats() override { return {}; }
  std::vector<TraceEvent> Trace(uint32_t) override { return {}; }

  std::atomic<bool> serving{false};
  std::atomic<uint64_t> exited{0};
  std::vector<uint64_t> gone;
  std::promise<void> release, lost;
};

class SupervisorLinkTest : public ::testing::Test {
 protected:
  SupervisorLinkTest() {
    int pair[2];
    EXPECT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
    ours_ = UniqueFd(pair[0]);
    device_ = std::move(*OpenFile("/dev/null", O_RDWR));
    script_.device = device_.get();
    end_ = std::make_unique<FakeEnd>(UniqueFd(pair[1]), &script_);
  }
  ~SupervisorLinkTest() noexcept override = default;

  void Connect() {
    auto link = SupervisorLink::Connect(std::move(ours_), "secret", "test");
    ASSERT_TRUE(link.ok()) << link.status();
    link_ = std::move(*link);
  }

  UniqueFd ours_, device_;
  Script script_;
  std::unique_ptr<FakeEnd> end_;
  RecordingWorker worker_;
  std::unique_ptr<SupervisorLink> link_;
};

TEST_F(SupervisorLinkTest, RegisteringBringsTheWelcomeWithItsDescriptors) {
  Connect();
  EXPECT_EQ(link_->welcome()->generation, 7u);
  EXPECT_EQ(link_->welcome()->vault_id, "ab01");
  EXPECT_EQ(link_->welcome()->state_dir, "/state");
  ASSERT_EQ(link_->welcome()->request_pipes.size(), 2u);
  EXPECT_NE(fcntl(link_->welcome()->ledger.get(), F_GETFD), -1);
  EXPECT_NE(fcntl(link_->welcome()->request_pipes[1].write_end.get(), F_GETFD), -1);
}

TEST_F(SupervisorLinkTest, ARefusedRegistrationSaysWhy) {
  script_.refuse_token = true;
  auto link = SupervisorLink::Connect(std::move(ours_), "secret", "test");
  ASSERT_FALSE(link.ok());
  EXPECT_NE(std::string(FromAbsl(link.status().message())).find("wrong token"), std::string::npos)
      << link.status();
}

TEST_F(SupervisorLinkTest, AThousandMountsArriveInPagesEachWithItsDescriptor) {
  script_.mounts = 1000;
  Connect();
  auto mounts = link_->ListMounts();
  ASSERT_TRUE(mounts.ok()) << mounts.status();
  ASSERT_EQ(mounts->size(), 1000u);
  for (const MountEntry& entry : *mounts) ASSERT_NE(fcntl(entry.device.get(), F_GETFD), -1) << entry.mount_id;
  EXPECT_EQ(mounts->back().mount_id, 1000u);
}

TEST_F(SupervisorLinkTest, AMountComesBackWithItsBlobAndAFailedOneWithItsReason) {
  Connect();
  auto mount = link_->Mount("/good", {}, "blob");
  ASSERT_TRUE(mount.ok()) << mount.status();
  EXPECT_EQ(mount->blob, "blob");
  EXPECT_TRUE(mount->device.valid());
  auto failed = link_->Mount("/bad", {}, "blob");
  EXPECT_NE(std::string(FromAbsl(failed.status().message())).find("no such folder"), std::string::npos)
      << failed.status();
}

TEST_F(SupervisorLinkTest, PingAndTheWorkersOwnCallsAreAnsweredWhileAnActionTakesLong) {
  Connect();
  link_->Start(&worker_, &worker_);
  auto serve = std::async(std::launch::async, [&] {
    end_->Call([&] { return KJ_ASSERT_NONNULL(script_.worker).serveRequest().send().ignoreResult(); });
  });
  while (!worker_.serving) std::this_thread::yield();
  uint64_t age = end_->Call([&] {
    return KJ_ASSERT_NONNULL(script_.worker).pingRequest().send().then([](auto&& r) {
      return r.getLoopAgeNanos();
    });
  });
  EXPECT_EQ(age, 42u);
  EXPECT_TRUE(link_->Drained(3).ok());
  EXPECT_EQ(script_.drained, 3u);
  uint64_t layers = end_->Call([&] {
    return KJ_ASSERT_NONNULL(script_.admin).layersRequest().send().then([](auto&& r) -> uint64_t {
      return r.getLayers().size() == 1 ? r.getLayers()[0].getFiles() : 0;
    });
  });
  EXPECT_EQ(layers, 3u);
  worker_.release.set_value();
  serve.get();
}

TEST_F(SupervisorLinkTest, AFailedActionTravelsWithItsMessage) {
  Connect();
  link_->Start(&worker_, &worker_);
  std::string error;
  try {
    end_->Call([&] { return KJ_ASSERT_NONNULL(script_.worker).takeMetadataRequest().send().ignoreResult(); });
  } catch (const kj::Exception& exception) {
    error = exception.getDescription().cStr();
  }
  EXPECT_NE(error.find("the store is locked"), std::string::npos) << error;
}

TEST_F(SupervisorLinkTest, CallsBeforeStartWaitForIt) {
  Connect();
  auto exited = std::async(std::launch::async, [&] {
    end_->Call([&] {
      auto request = KJ_ASSERT_NONNULL(script_.worker).ownerExitedRequest();
      request.setGeneration(5);
      return request.send().ignoreResult();
    });
  });
  EXPECT_EQ(exited.wait_for(std::chrono::milliseconds(20)), std::future_status::timeout);
  EXPECT_EQ(worker_.exited, 0u);
  link_->Start(&worker_, &worker_);
  exited.get();
  EXPECT_EQ(worker_.exited, 5u);
}

TEST_F(SupervisorLinkTest, TheSupervisorsEndIsToldOnceAndCallsAreUnavailable) {
  Connect();
  link_->Start(&worker_, &worker_);
  EXPECT_FALSE(link_->lost());
  end_->End();
  ASSERT_EQ(worker_.lost.get_future().wait_for(std::chrono::seconds(10)), std::future_status::ready);
  EXPECT_TRUE(link_->lost());
  EXPECT_EQ(link_->ListMounts().status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(link_->Unmount(1).status().code(), absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace holdfast::handover
