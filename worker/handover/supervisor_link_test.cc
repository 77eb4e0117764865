// SupervisorLink against a supervisor made of the same schema, at the other end of a socket pair.
#include "worker/handover/supervisor_link.h"

#include <capnp/rpc-twoparty.h>
#include <fcntl.h>
#include <kj/async-io.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <future>
#include <mutex>
#include <thread>

#include "common/urgency.h"
#include "gtest/gtest.h"
#include "schema/admin.capnp.h"
#include "schema/control.capnp.h"
#include "schema/handover.capnp.h"
#include "schema/rpc.h"

namespace holdfast::handover {
namespace {

// A copy of it.
schema::Descriptor::Client Fd(int fd) { return MakeDescriptor(DupFd(fd).value_or(UniqueFd())); }

// What one thread notes and another reads.
template <typename T>
class Noted {
 public:
  Noted& operator=(T value) {
    std::lock_guard lock(mutex_);
    value_ = std::move(value);
    return *this;
  }
  // Until the next note.
  const T& Get() const {
    std::lock_guard lock(mutex_);
    return value_;
  }

 private:
  mutable std::mutex mutex_;
  T value_;
};

// What the fake supervisor saw, and what it is to answer.
struct Script {
  int device = -1;
  std::atomic<uint64_t> mounts{0};
  std::atomic<bool> refuse_token{false};
  std::atomic<uint64_t> drained{0};
  std::promise<void> registered;
  Noted<std::string> control_socket;      // of the welcome
  std::atomic<uint64_t> capabilities{3};  // of the welcome
  std::atomic<uint64_t> announced{0}, mounts_asked_after{0};
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
    script_.announced = hello.getCapabilities();
    auto welcome = context.getResults().initWelcome();
    welcome.setCapabilities(script_.capabilities & hello.getCapabilities());
    welcome.setControlSocket(script_.control_socket.Get().c_str());
    if (!script_.control_socket.Get().empty()) welcome.setState(Fd(script_.device));
    welcome.setGeneration(7);
    const kj::byte id[] = {0xab, 0x01};
    welcome.setVaultId(kj::arrayPtr(id, 2));
    welcome.setStateDir("/state");
    welcome.setLedger(Fd(script_.device));
    auto pipes = welcome.initRequestPipes(2);
    for (auto pair : pipes) {
      pair.setReadEnd(Fd(script_.device));
      pair.setWriteEnd(Fd(script_.device));
    }
    script_.registered.set_value();
    return kj::READY_NOW;
  }

  kj::Promise<void> mounts(MountsContext context) override {
    const uint64_t after = context.getParams().getAfter();
    script_.mounts_asked_after = after;
    const uint64_t count = std::min<uint64_t>(context.getParams().getLimit(), script_.mounts - after);
    auto entries = context.getResults().initEntries(static_cast<unsigned>(count));
    for (unsigned i = 0; i < count; ++i) {
      entries[i].setMountId(after + i + 1);
      entries[i].setState(schema::MountState::LIVE);
      entries[i].setDevice(Fd(script_.device));
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
    entry.setDevice(Fd(script_.device));
    return kj::READY_NOW;
  }

  kj::Promise<void> drained(DrainedContext context) override {
    script_.drained = context.getParams().getGeneration();
    return kj::READY_NOW;
  }

 private:
  Script& script_;
};

// The next supervisor's control socket, at which a worker that lost its supervisor introduces itself.
class FakeControl final : public schema::Control::Server {
 public:
  struct Seen {
    std::string token;
    uint64_t generation = 0;
    bool holds_metadata = false;
    std::atomic<ino_t> state_inode{0};  // the last to be written
  };
  FakeControl(Script* script, Seen* seen, kj::Maybe<kj::Exception> refusal)
      : script_(*script), seen_(*seen), refusal_(kj::mv(refusal)) {}

  kj::Promise<void> reattach(ReattachContext context) override {
    KJ_IF_MAYBE (refusal, refusal_) kj::throwFatalException(kj::cp(*refusal));
    auto params = context.getParams();
    auto token = params.getHello().getToken().asChars();
    seen_.token = std::string(token.begin(), token.size());
    seen_.generation = params.getGeneration();
    seen_.holds_metadata = params.getHoldsMetadata();
    script_.worker = params.getWorker();
    script_.admin = params.getAdmin().castAs<schema::WorkerAdmin>();
    auto promise = params.getState().getFd();
    return promise.then([this, context, keep = params.getState()](kj::Maybe<int> fd) mutable {
      struct stat st {};
      if (fstat(KJ_ASSERT_NONNULL(fd), &st) == 0) seen_.state_inode = st.st_ino;
      context.getResults().setSupervisor(kj::heap<FakeSupervisor>(&script_));
      const kj::byte id[] = {0xcd, 0x02};
      context.getResults().setVaultId(kj::arrayPtr(id, 2));
    });
  }

 private:
  Script& script_;
  Seen& seen_;
  kj::Maybe<kj::Exception> refusal_;
};

// Runs a fake (by default a supervisor, after register) on a thread of its own until the destructor; `call`
// runs something there against the worker.
class FakeEnd {
 public:
  FakeEnd(UniqueFd socket, Script* script)
      : FakeEnd(std::move(socket), script, [script]() -> capnp::Capability::Client {
          return schema::Supervisor::Client(kj::heap<FakeSupervisor>(script));
        }) {}
  FakeEnd(UniqueFd socket, Script* script, std::function<capnp::Capability::Client()> bootstrap)
      : thread_([this, fd = socket.Release(), script, bootstrap] {
          kj::AsyncIoContext io = kj::setupAsyncIo();
          auto stream =
              io.lowLevelProvider->wrapUnixSocketFd(fd, kj::LowLevelAsyncIoProvider::TAKE_OWNERSHIP);
          capnp::TwoPartyClient rpc(*stream, 253, bootstrap(), capnp::rpc::twoparty::Side::SERVER);
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

ino_t InodeOf(int fd) {
  struct stat st {};
  EXPECT_EQ(fstat(fd, &st), 0);
  return st.st_ino;
}

class RecordingWorker final : public WorkerActions, public AdminActions {
 public:
  absl::Status Serve(ServeOrder serve) override {
    served_urgently = IsUrgent();
    serving = true;
    order = std::move(serve);
    release.get_future().wait();  // an action may take long
    return absl::OkStatus();
  }
  absl::Status OwnerExited(uint64_t generation) override {
    exited = generation;
    return absl::OkStatus();
  }
  absl::Status TakeMetadata() override { return Unavailable("the store is locked"); }
  absl::Status Park() override { return absl::OkStatus(); }
  absl::Status Resume() override {
    resumed.set_value();
    return absl::OkStatus();
  }
  absl::Status YieldMetadata() override { return absl::OkStatus(); }
  absl::Status Retire() override { return absl::OkStatus(); }
  void MountsGone(const std::vector<uint64_t>& ids) override { gone = ids; }
  absl::Status Prepare() override {
    prepared++;
    return absl::OkStatus();
  }
  absl::StatusOr<SampleSet> Samples(uint32_t limit) override {
    SampleSet set;
    set.requests.push_back({limit, std::string("a\0b", 3), "digest"});
    set.files.push_back({9, SampleKind::kAbsent, "\xff/x", 4096, 7, "sha"});
    return set;
  }
  absl::StatusOr<ReplayResult> Replay(const std::vector<SampleRequest>& requests) override {
    replayed = requests;
    return ReplayResult{{1, 4}, 2};
  }
  absl::Status AddMounts(std::vector<MountEntry> entries) override {
    added = std::move(entries);
    return absl::OkStatus();
  }
  absl::Status EndTrial() override {
    ended_urgently = IsUrgent();
    trial_ended = true;
    return absl::OkStatus();
  }
  absl::Status Distrust(uint64_t generation, UniqueFd touched, const std::string& vault_id) override {
    distrusted = generation;
    new_vault_id = vault_id;
    if (touched.valid()) touched_inode = InodeOf(touched.get());
    if (distrust_waits) distrust_release.get_future().wait();
    return absl::OkStatus();
  }
  absl::StatusOr<Page<HeldMount>> HeldMounts(uint64_t after) override {
    Page<HeldMount> page;
    for (uint64_t id = after + 1; id <= after + 2; ++id) page.elements.push_back({id, Null()});
    page.more = after < 2;
    return page;
  }
  absl::StatusOr<Page<OldLedger>> HeldLedgers(uint64_t) override {
    Page<OldLedger> page;
    OldLedger ledger;
    ledger.generation = 5;
    ledger.owner_hung = true;
    ledger.memory = Null();
    ledger.pipes.resize(2);
    for (PipePair& pair : ledger.pipes) pair = {Null(), Null()};
    page.elements.push_back(std::move(ledger));
    return page;
  }
  absl::StatusOr<UniqueFd> HeldListener() override { return Null(); }
  AfterLoss SupervisorLost() override {
    losses++;
    if (!reattach) {
      lost.set_value();
      return AfterLoss::kServeOn;
    }
    return AfterLoss::kReattach;
  }
  absl::StatusOr<bool> Reattaching() override {
    if (attempts++ == 0) return Unavailable("not now");
    return true;
  }
  void Reattached(const std::string& vault_id) override { reattached.set_value(vault_id); }
  void ReattachRefused(const absl::Status& why) override { refused.set_value(why); }
  Health Ping() override { return {42, "fetch", {3, 8}}; }
  void SwapAhead(bool over) override { swaps_ahead += over ? -1 : 1; }
  std::vector<LayerInfo> Layers() override {
    LayerInfo layer;
    layer.digest = "sha256:aa";
    layer.files = 3;
    return {layer};
  }
  std::vector<SnapshotInfo> Snapshots() override { return {}; }
  WorkerStats Stats() override { return {}; }
  std::vector<TraceEvent> Trace(uint32_t) override { return {}; }
  absl::StatusOr<std::string> MountPrivate(const std::string& name, const std::string& blob) override {
    if (name.empty()) return InvalidArgument("no name");
    return name + " of " + blob;
  }

  static UniqueFd Null() { return std::move(*OpenFile("/dev/null", O_RDWR)); }

  std::atomic<bool> serving{false}, trial_ended{false}, reattach{false}, distrust_waits{false};
  std::atomic<bool> served_urgently{false}, ended_urgently{false};
  std::atomic<int> swaps_ahead{0};
  Noted<ServeOrder> order;
  std::atomic<uint64_t> exited{0}, distrusted{0};
  std::atomic<int> prepared{0}, attempts{0}, losses{0};
  std::atomic<ino_t> touched_inode{0};
  Noted<std::vector<uint64_t>> gone;
  Noted<std::vector<SampleRequest>> replayed;
  Noted<std::vector<MountEntry>> added;
  Noted<std::string> new_vault_id;
  std::promise<void> release, lost, resumed, distrust_release;
  std::promise<std::string> reattached;
  std::promise<absl::Status> refused;
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
    auto link = SupervisorLink::Connect(std::move(ours_), {"secret", "test", 63});
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
  auto link = SupervisorLink::Connect(std::move(ours_), {"secret", "test"});
  ASSERT_FALSE(link.ok());
  EXPECT_NE(std::string(FromAbsl(link.status().message())).find("wrong token"), std::string::npos)
      << link.status();
}

TEST_F(SupervisorLinkTest, AThousandMountsArriveInPagesEachWithItsDescriptor) {
  script_.mounts = 1000;
  Connect();
  auto mounts = link_->ListMounts(0);
  ASSERT_TRUE(mounts.ok()) << mounts.status();
  ASSERT_EQ(mounts->size(), 1000u);
  for (const MountEntry& entry : *mounts) ASSERT_NE(fcntl(entry.device.get(), F_GETFD), -1) << entry.mount_id;
  EXPECT_EQ(mounts->back().mount_id, 1000u);
  auto later = link_->ListMounts(998);
  ASSERT_TRUE(later.ok()) << later.status();
  ASSERT_EQ(later->size(), 2u);
  EXPECT_EQ(later->front().mount_id, 999u);
  EXPECT_EQ(script_.mounts_asked_after, 998u);
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
      EXPECT_STREQ(r.getLoop().cStr(), "fetch");
      EXPECT_EQ(r.getHeldBack().size(), 2u);
      EXPECT_EQ(r.getHeldBack()[1], 8u);
      return r.getLoopAgeNanos();
    });
  });
  EXPECT_EQ(age, 42u);
  end_->Call([&] { return KJ_ASSERT_NONNULL(script_.worker).swapAheadRequest().send().ignoreResult(); });
  EXPECT_EQ(worker_.swaps_ahead, 1);
  end_->Call([&] {
    auto request = KJ_ASSERT_NONNULL(script_.worker).swapAheadRequest();
    request.setOver(true);
    return request.send().ignoreResult();
  });
  EXPECT_EQ(worker_.swaps_ahead, 0);
  EXPECT_TRUE(link_->Drained(3).ok());
  EXPECT_EQ(script_.drained, 3u);
  uint64_t layers = end_->Call([&] {
    return KJ_ASSERT_NONNULL(script_.admin).layersRequest().send().then([](auto&& r) -> uint64_t {
      return r.getLayers().size() == 1 ? r.getLayers()[0].getFiles() : 0;
    });
  });
  EXPECT_EQ(layers, 3u);
  auto mount_private = [&](const char* name) {
    return end_->Call([&] {
      auto request = KJ_ASSERT_NONNULL(script_.admin).mountPrivateRequest();
      request.setName(name);
      request.setBlob(kj::StringPtr("blob").asBytes());
      return request.send().then([](auto&& r) { return std::string(r.getPath().cStr()); },
                                 [](kj::Exception&& e) { return std::string(e.getDescription().cStr()); });
    });
  };
  EXPECT_EQ(mount_private("7"), "7 of blob");
  EXPECT_NE(mount_private("").find("no name"), std::string::npos);
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
  EXPECT_EQ(link_->ListMounts(0).status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(link_->Unmount(1).status().code(), absl::StatusCode::kUnavailable);
}

TEST_F(SupervisorLinkTest, WhatTheSupervisorDoesNotKnowIsNotAgreedOn) {
  Connect();
  EXPECT_EQ(script_.announced, 63u);
  EXPECT_EQ(link_->welcome()->capabilities, kCapServeReads | kCapMetadataHandover);
  EXPECT_EQ(link_->welcome()->control_socket, "");
  EXPECT_FALSE(link_->welcome()->state.valid());
}

TEST_F(SupervisorLinkTest, ATrialBringsItsLogAndEndsWhenTold) {
  Connect();
  link_->Start(&worker_, &worker_);
  worker_.release.set_value();
  end_->Call([&] {
    auto request = KJ_ASSERT_NONNULL(script_.worker).serveRequest();
    request.setTrial(true);
    request.setTouched(Fd(script_.device));
    return request.send().ignoreResult();
  });
  EXPECT_TRUE(worker_.order.Get().trial);
  EXPECT_EQ(InodeOf(worker_.order.Get().touched.get()), InodeOf(device_.get()));
  end_->Call([&] { return KJ_ASSERT_NONNULL(script_.worker).endTrialRequest().send().ignoreResult(); });
  EXPECT_TRUE(worker_.trial_ended);
}

TEST_F(SupervisorLinkTest, WhatReadsWaitForIsDoneUrgentlyAndNothingElse) {
  // Before there are threads that could inherit anything.
  const bool permitted = std::async(std::launch::async, [] { return BecomeUrgent().ok(); }).get();
  Connect();
  link_->Start(&worker_, &worker_);
  worker_.release.set_value();
  end_->Call([&] { return KJ_ASSERT_NONNULL(script_.worker).serveRequest().send().ignoreResult(); });
  EXPECT_EQ(worker_.served_urgently, permitted);
  worker_.ended_urgently = true;
  end_->Call([&] { return KJ_ASSERT_NONNULL(script_.worker).endTrialRequest().send().ignoreResult(); });
  EXPECT_FALSE(worker_.ended_urgently);
}

TEST_F(SupervisorLinkTest, ACallToServeBringsTheLedgersUnlessThereAreMore) {
  Connect();
  link_->Start(&worker_, &worker_);
  auto serve = [&](bool more) {
    worker_.release = {};
    worker_.release.set_value();
    end_->Call([&] {
      auto request = KJ_ASSERT_NONNULL(script_.worker).serveRequest();
      auto takeover = request.initTakeover();
      takeover.setLastMount(70);
      takeover.setMoreLedgers(more);
      auto ledgers = takeover.initLedgers(2);
      for (unsigned i = 0; i < 2; ++i) {
        ledgers[i].setGeneration(5 + i);
        ledgers[i].setLedger(Fd(script_.device));
        ledgers[i].setOwnerExited(i == 1);
        auto pipes = ledgers[i].initRequestPipes(1);
        pipes[0].setReadEnd(Fd(script_.device));
        pipes[0].setWriteEnd(Fd(script_.device));
      }
      return request.send().ignoreResult();
    });
  };
  serve(false);
  ASSERT_TRUE(worker_.order.Get().takeover.has_value());
  const Takeover& takeover = *worker_.order.Get().takeover;
  EXPECT_EQ(takeover.last_mount, 70u);
  ASSERT_EQ(takeover.ledgers.size(), 2u);
  EXPECT_EQ(takeover.ledgers[1].generation, 6u);
  EXPECT_TRUE(takeover.ledgers[1].owner_exited);
  EXPECT_FALSE(takeover.ledgers[0].owner_exited);
  EXPECT_EQ(InodeOf(takeover.ledgers[0].memory.get()), InodeOf(device_.get()));
  ASSERT_EQ(takeover.ledgers[0].pipes.size(), 1u);
  EXPECT_TRUE(takeover.ledgers[0].pipes[0].write_end.valid());
  serve(true);
  EXPECT_FALSE(worker_.order.Get().takeover.has_value());
}

TEST_F(SupervisorLinkTest, PrepareSamplesReplayAndPrivateMountsTravelWhole) {
  Connect();
  link_->Start(&worker_, &worker_);
  auto& worker = script_.worker;
  end_->Call([&] { return KJ_ASSERT_NONNULL(worker).prepareRequest().send().ignoreResult(); });
  EXPECT_EQ(worker_.prepared, 1);
  end_->Call([&] {
    auto request = KJ_ASSERT_NONNULL(worker).samplesRequest();
    request.setLimit(17);
    return request.send().then([](auto&& r) {
      ASSERT_EQ(r.getRequests().size(), 1u);
      EXPECT_EQ(r.getRequests()[0].getMountId(), 17u);
      EXPECT_EQ(r.getRequests()[0].getRequest().size(), 3u);
      EXPECT_EQ(r.getRequests()[0].getReplyDigest().size(), 6u);
      ASSERT_EQ(r.getFiles().size(), 1u);
      auto file = r.getFiles()[0];
      EXPECT_EQ(file.getMountId(), 9u);
      EXPECT_EQ(file.getKind(), schema::SampleKind::ABSENT);
      EXPECT_EQ(file.getPath()[0], 0xff);
      EXPECT_EQ(file.getOffset(), 4096u);
      EXPECT_EQ(file.getLength(), 7u);
      EXPECT_EQ(file.getDigest().size(), 3u);
    });
  });
  end_->Call([&] {
    auto request = KJ_ASSERT_NONNULL(worker).replayRequest();
    auto list = request.initRequests(1);
    list[0].setMountId(4);
    list[0].setRequest(kj::StringPtr("abc").asBytes());
    return request.send().then([](auto&& r) {
      EXPECT_EQ(r.getSkipped(), 2u);
      ASSERT_EQ(r.getDifferent().size(), 2u);
      EXPECT_EQ(r.getDifferent()[1], 4u);
    });
  });
  ASSERT_EQ(worker_.replayed.Get().size(), 1u);
  EXPECT_EQ(worker_.replayed.Get()[0].request, "abc");
  end_->Call([&] {
    auto request = KJ_ASSERT_NONNULL(worker).addMountsRequest();
    auto list = request.initEntries(2);
    for (unsigned i = 0; i < 2; ++i) {
      list[i].setMountId(100 + i);
      list[i].setDevice(Fd(script_.device));
      list[i].setBlob(kj::StringPtr("blob").asBytes());
    }
    return request.send().ignoreResult();
  });
  ASSERT_EQ(worker_.added.Get().size(), 2u);
  EXPECT_EQ(worker_.added.Get()[1].mount_id, 101u);
  EXPECT_EQ(worker_.added.Get()[1].blob, "blob");
  EXPECT_EQ(InodeOf(worker_.added.Get()[1].device.get()), InodeOf(device_.get()));
}

TEST_F(SupervisorLinkTest, DistrustMayTakeLongWithoutHoldingUpTheOtherCalls) {
  Connect();
  link_->Start(&worker_, &worker_);
  worker_.distrust_waits = true;
  auto distrust = std::async(std::launch::async, [&] {
    end_->Call([&] {
      auto request = KJ_ASSERT_NONNULL(script_.worker).distrustRequest();
      request.setGeneration(12);
      const kj::byte id[] = {0x0f, 0xf0};
      request.setVaultId(kj::arrayPtr(id, 2));
      return request.send().ignoreResult();
    });
  });
  while (worker_.distrusted == 0) std::this_thread::yield();
  end_->Call([&] {
    auto request = KJ_ASSERT_NONNULL(script_.worker).ownerExitedRequest();
    request.setGeneration(12);
    return request.send().ignoreResult();
  });
  EXPECT_EQ(worker_.exited, 12u);
  EXPECT_EQ(distrust.wait_for(std::chrono::seconds(0)), std::future_status::timeout);
  worker_.distrust_release.set_value();
  distrust.get();
  EXPECT_EQ(worker_.new_vault_id.Get(), "0ff0");
  EXPECT_EQ(worker_.touched_inode, 0u) << "there was no log";
}

TEST_F(SupervisorLinkTest, WhatTheWorkerHoldsIsHandedBackInPages) {
  Connect();
  link_->Start(&worker_, &worker_);
  auto& worker = script_.worker;
  end_->Call([&] {
    auto request = KJ_ASSERT_NONNULL(worker).heldMountsRequest();
    request.setAfter(1);
    return request.send().then([](auto&& r) {
      EXPECT_TRUE(r.getMore());
      EXPECT_EQ(r.getMounts().size(), 2u);
      EXPECT_EQ(r.getMounts()[0].getMountId(), 2u);
      auto fd = r.getMounts()[0].getDevice().getFd();
      return fd.then([r = kj::mv(r)](kj::Maybe<int> number) mutable { EXPECT_NE(number, nullptr); });
    });
  });
  end_->Call([&] {
    return KJ_ASSERT_NONNULL(worker).heldLedgersRequest().send().then([](auto&& r) {
      EXPECT_EQ(r.getLedgers().size(), 1u);
      auto ledger = r.getLedgers()[0];
      EXPECT_EQ(ledger.getGeneration(), 5u);
      EXPECT_TRUE(ledger.getOwnerHung());
      EXPECT_EQ(ledger.getRequestPipes().size(), 2u);
      auto fd = ledger.getRequestPipes()[1].getWriteEnd().getFd();
      return fd.then([r = kj::mv(r)](kj::Maybe<int> number) mutable { EXPECT_NE(number, nullptr); });
    });
  });
  end_->Call([&] {
    return KJ_ASSERT_NONNULL(worker).heldListenerRequest().send().then([](auto&& r) {
      auto fd = r.getSnapshotListener().getFd();
      return fd.then([r = kj::mv(r)](kj::Maybe<int> number) mutable { EXPECT_NE(number, nullptr); });
    });
  });
}

// A worker whose supervisor went away, and the socket at which it looks for the next one.
class ReattachTest : public SupervisorLinkTest {
 protected:
  ReattachTest() {
    script_.control_socket = dir_.path() + "/control.sock";
    script_.capabilities = 63;
    worker_.reattach = true;
  }
  ~ReattachTest() noexcept override = default;

  // Waits for the worker's connection and answers it.
  std::unique_ptr<FakeEnd> NextSupervisor(kj::Maybe<kj::Exception> refusal = nullptr) {
    if (!listener_.valid()) {
      listener_ = UniqueFd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
      sockaddr_un address{};
      address.sun_family = AF_UNIX;
      strncpy(address.sun_path, script_.control_socket.Get().c_str(), sizeof address.sun_path - 1);
      EXPECT_EQ(bind(listener_.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
      EXPECT_EQ(listen(listener_.get(), 4), 0);
    }
    UniqueFd accepted(accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
    EXPECT_TRUE(accepted.valid());
    auto shared = std::make_shared<kj::Maybe<kj::Exception>>(kj::mv(refusal));
    return std::make_unique<FakeEnd>(
        std::move(accepted), &script_, [this, shared]() -> capnp::Capability::Client {
          return schema::Control::Client(kj::heap<FakeControl>(&script_, &seen_, kj::mv(*shared)));
        });
  }
  template <typename T>
  static T Get(std::promise<T>& promise) {
    std::future<T> future = promise.get_future();
    EXPECT_EQ(future.wait_for(std::chrono::seconds(20)), std::future_status::ready);
    return future.get();
  }

  TempDir dir_;
  UniqueFd listener_;
  FakeControl::Seen seen_;
};

TEST_F(ReattachTest, AWorkerThatLostItsSupervisorFindsTheNextAndGoesOnAsIfItWereTheFirst) {
  script_.mounts = 3;
  Connect();
  link_->Start(&worker_, &worker_);
  end_->End();
  while (worker_.attempts < 2) std::this_thread::yield();  // "not now", and no socket there yet
  EXPECT_EQ(link_->ListMounts(0).status().code(), absl::StatusCode::kUnavailable);
  std::unique_ptr<FakeEnd> next = NextSupervisor();
  EXPECT_EQ(Get(worker_.reattached), "cd02");
  EXPECT_EQ(seen_.state_inode, InodeOf(device_.get()));
  EXPECT_EQ(seen_.token, "secret");
  EXPECT_EQ(seen_.generation, 7u);
  EXPECT_TRUE(seen_.holds_metadata);
  EXPECT_FALSE(link_->lost());
  auto mounts = link_->ListMounts(0);
  ASSERT_TRUE(mounts.ok()) << mounts.status();
  EXPECT_EQ(mounts->size(), 3u);
  EXPECT_TRUE(link_->Mount("/good", {}, "blob").ok());
  next->Call([&] { return KJ_ASSERT_NONNULL(script_.worker).resumeRequest().send().ignoreResult(); });
  Get(worker_.resumed);
  // And the one after that.
  worker_.reattached = std::promise<std::string>();
  next->End();
  next = NextSupervisor();
  Get(worker_.reattached);
  EXPECT_EQ(worker_.losses, 2);
  EXPECT_TRUE(link_->ListMounts(0).ok());
}

// By its end kernels before 6.9 tell of a death (docs/adr/0006).
TEST_F(ReattachTest, TheSocketToTheNextSupervisorHasAHighNumberToo) {
  rlimit limit{};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &limit), 0);
  const int high = static_cast<int>(std::min<rlim_t>(limit.rlim_cur, 16'384)) - 1;
  auto peer = [high] {
    ucred credentials{};
    socklen_t size = sizeof credentials;
    return getsockopt(high, SOL_SOCKET, SO_PEERCRED, &credentials, &size) == 0 ? credentials.pid : -1;
  };
  Connect();
  EXPECT_EQ(peer(), getpid());
  link_->Start(&worker_, &worker_);
  end_->End();
  for (int supervisor = 2; supervisor <= 3; supervisor++) {
    std::unique_ptr<FakeEnd> next = NextSupervisor();
    Get(worker_.reattached);
    worker_.reattached = std::promise<std::string>();
    EXPECT_EQ(peer(), getpid()) << supervisor;
    next->End();
  }
}

TEST_F(ReattachTest, ASupervisorThatDiesOrAsksForPatienceIsTriedAgain) {
  Connect();
  link_->Start(&worker_, &worker_);
  end_->End();
  {
    auto busy = NextSupervisor(
        kj::Exception(kj::Exception::Type::OVERLOADED, __FILE__, __LINE__, kj::heapString("still starting")));
    const int before = worker_.attempts;
    while (worker_.attempts == before) std::this_thread::yield();
  }
  std::unique_ptr<FakeEnd> next = NextSupervisor();
  EXPECT_EQ(Get(worker_.reattached), "cd02");
}

TEST_F(ReattachTest, ARefusalIsToldWithItsReasonAndFinal) {
  Connect();
  link_->Start(&worker_, &worker_);
  end_->End();
  auto next = NextSupervisor(
      kj::Exception(kj::Exception::Type::FAILED, __FILE__, __LINE__, kj::heapString("unknown token")));
  absl::Status why = Get(worker_.refused);
  EXPECT_NE(std::string(FromAbsl(why.message())).find("unknown token"), std::string::npos) << why;
  EXPECT_TRUE(link_->lost());
}

TEST_F(ReattachTest, AnOlderSupervisorThatKnowsNoReattachIsARefusal) {
  Connect();
  link_->Start(&worker_, &worker_);
  end_->End();
  auto next = NextSupervisor(kj::Exception(kj::Exception::Type::UNIMPLEMENTED, __FILE__, __LINE__,
                                           kj::heapString("no such method")));
  EXPECT_EQ(Get(worker_.refused).code(), absl::StatusCode::kUnimplemented);
}

TEST_F(ReattachTest, AWorkerThatEndsWhileItLooksForItsSupervisorEndsAtOnce) {
  Connect();
  link_->Start(&worker_, &worker_);
  end_->End();
  while (worker_.attempts < 3) std::this_thread::yield();
  const auto begin = std::chrono::steady_clock::now();
  link_.reset();
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(5));
}

}  // namespace
}  // namespace holdfast::handover
