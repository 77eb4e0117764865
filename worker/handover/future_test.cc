// Today's worker under a supervisor of a build to come: everything that one says carries fields, enumerants
// and methods that this build does not know (schema/testing/future.capnp).
#include <capnp/rpc-twoparty.h>
#include <fcntl.h>
#include <kj/async-io.h>
#include <sys/socket.h>

#include <atomic>
#include <future>
#include <string>
#include <thread>

#include "gtest/gtest.h"
#include "schema/handover.capnp.h"
#include "schema/rpc.h"
#include "schema/testing/future.capnp.h"
#include "worker/handover/supervisor_link.h"

namespace holdfast::handover {
namespace {

constexpr uint16_t kRegister = 0, kMounts = 4, kOldLedgers = 5;  // Supervisor
constexpr uint16_t kPing = 8, kOfTheFuture = 900;                // Worker

void FillMore(future::More::Builder more) {
  more.setText("what today's build has never heard of");
  more.initNumbers(100);
}

capnp::Capability::Client Fd(int fd) { return MakeDescriptor(DupFd(fd).value_or(UniqueFd())); }

struct Seen {
  std::string token, build;
  uint64_t capabilities = 0;
  bool more = false;
  kj::Maybe<capnp::Capability::Client> worker;  // of the thread of the FutureEnd
  std::atomic<bool> registered{false};          // the above is written
};

class FutureSupervisor final : public capnp::Capability::Server {
 public:
  FutureSupervisor(int device, Seen* seen) : device_(device), seen_(*seen) {}

  DispatchCallResult dispatchCall(uint64_t interface, uint16_t method,
                                  capnp::CallContext<capnp::AnyPointer, capnp::AnyPointer> context) override {
    KJ_REQUIRE(interface == capnp::typeId<schema::Supervisor>());
    if (method == kRegister) {
      Register(context);
    } else if (method == kMounts) {
      Mounts(context);
    } else if (method == kOldLedgers) {
      OldLedgers(context);
    } else {
      return internalUnimplemented("Supervisor", interface, method);
    }
    return {kj::READY_NOW, false};
  }

 private:
  using Context = capnp::CallContext<capnp::AnyPointer, capnp::AnyPointer>;

  void Register(Context& context) {
    auto params = context.getParams().getAs<future::RegisterParams>();
    auto token = params.getHello().getToken().asChars();
    seen_.token = std::string(token.begin(), token.size());
    seen_.build = params.getHello().getBuild().cStr();
    seen_.capabilities = params.getHello().getCapabilities();
    seen_.more = params.hasFutureMore() || params.getHello().hasFutureMore();
    seen_.worker = params.getWorker();
    seen_.registered = true;
    auto results = context.getResults().initAs<future::RegisterResults>();
    auto welcome = results.initWelcome();
    welcome.setCapabilities(~uint64_t{0});
    welcome.setGeneration(7);
    welcome.setVaultId(kj::StringPtr("0123456789abcdef").asBytes());
    welcome.setLedger(Fd(device_));
    FillPipes(welcome.initRequestPipes(2));
    welcome.setStateDir("/state");
    welcome.setRuntimeDir("/run");
    welcome.setFutureNumber(9);
    welcome.setFutureObject(Fd(device_));
    FillMore(welcome.initFutureMore());
    FillMore(results.initFutureMore());
  }

  void Mounts(Context& context) {
    auto results = context.getResults().initAs<future::MountsResults>();
    auto entries = results.initEntries(2);
    for (unsigned i = 0; i < entries.size(); ++i) {
      entries[i].setMountId(i + 1);
      entries[i].setState(i == 0 ? future::MountState::LIVE : future::MountState::FROZEN);
      entries[i].setPath(i == 0 ? "/state/mounts/1" : "/state/mounts/2");
      entries[i].setDevice(Fd(device_));
      entries[i].setFutureObject(Fd(device_));
      entries[i].setBlob(kj::StringPtr("blob").asBytes());
      entries[i].setFutureNumber(9);
      FillMore(entries[i].initFutureMore());
    }
    FillMore(results.initFutureMore());
  }

  void OldLedgers(Context& context) {
    auto results = context.getResults().initAs<future::OldLedgersResults>();
    auto ledger = results.initLedgers(1)[0];
    ledger.setGeneration(6);
    ledger.setOwnerExited(true);
    ledger.setLedger(Fd(device_));
    FillPipes(ledger.initRequestPipes(1));
    ledger.setFutureFlag(true);
    FillMore(ledger.initFutureMore());
    FillMore(results.initFutureMore());
  }

  void FillPipes(capnp::List<future::PipePair>::Builder pipes) {
    for (auto pair : pipes) {
      pair.setReadEnd(Fd(device_));
      pair.setWriteEnd(Fd(device_));
      pair.setFutureEnd(Fd(device_));
      pair.setFutureSize(65536);
    }
  }

  const int device_;
  Seen& seen_;
};

// The other end of `socket`, on a thread of its own; Call runs something there.
class FutureEnd {
 public:
  FutureEnd(UniqueFd socket, int device, Seen* seen)
      : thread_([this, fd = socket.Release(), device, seen] {
          kj::AsyncIoContext io = kj::setupAsyncIo();
          auto stream =
              io.lowLevelProvider->wrapUnixSocketFd(fd, kj::LowLevelAsyncIoProvider::TAKE_OWNERSHIP);
          capnp::TwoPartyClient rpc(*stream, 253,
                                    capnp::Capability::Client(kj::heap<FutureSupervisor>(device, seen)),
                                    capnp::rpc::twoparty::Side::SERVER);
          auto quit = kj::newPromiseAndCrossThreadFulfiller<void>();
          quit_ = kj::mv(quit.fulfiller);
          executor_ = kj::getCurrentThreadExecutor().addRef();
          ready_.set_value();
          quit.promise.wait(io.waitScope);
          seen->worker = nullptr;
        }) {
    ready_.get_future().wait();
  }
  ~FutureEnd() {
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

TEST(FutureSupervisorTest, TodaysWorkerTakesWhatItKnowsAndIgnoresTheRest) {
  int ends[2];
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
  UniqueFd ours(ends[0]), theirs(ends[1]);
  auto device = OpenFile("/dev/null", O_RDWR);
  ASSERT_TRUE(device.ok());
  Seen seen;
  FutureEnd supervisor(std::move(theirs), device->get(), &seen);
  auto connected = SupervisorLink::Connect(std::move(ours), {"secret", "today"});
  ASSERT_TRUE(connected.ok()) << connected.status();
  SupervisorLink& link = **connected;

  ASSERT_TRUE(seen.registered);
  EXPECT_EQ(seen.token, "secret");
  EXPECT_EQ(seen.build, "today");
  EXPECT_FALSE(seen.more) << "today's build sends fields of the future";
  EXPECT_EQ(seen.capabilities & schema::CAP_NEVER_SUPPORTED, 0u) << "the reserved capability is announced";
  EXPECT_EQ(link.welcome()->generation, 7u);
  EXPECT_EQ(link.welcome()->state_dir, "/state");
  EXPECT_EQ(link.welcome()->request_pipes.size(), 2u);
  EXPECT_TRUE(link.welcome()->ledger.valid());

  auto mounts = link.ListMounts(0);
  ASSERT_TRUE(mounts.ok()) << mounts.status();
  ASSERT_EQ(mounts->size(), 2u) << "a mount of an unknown state must not be lost";
  EXPECT_EQ((*mounts)[0].state, MountState::kLive);
  EXPECT_EQ((*mounts)[1].mount_id, 2u);
  EXPECT_EQ((*mounts)[1].path, "/state/mounts/2");
  EXPECT_EQ((*mounts)[1].blob, "blob");
  EXPECT_TRUE((*mounts)[1].device.valid());
  auto ledgers = link.OldLedgers();
  ASSERT_TRUE(ledgers.ok()) << ledgers.status();
  ASSERT_EQ(ledgers->size(), 1u);
  EXPECT_EQ((*ledgers)[0].generation, 6u);
  EXPECT_TRUE((*ledgers)[0].owner_exited);
  EXPECT_EQ((*ledgers)[0].pipes.size(), 1u);

  auto call = [&seen](uint64_t interface, uint16_t method) {
    auto request = KJ_ASSERT_NONNULL(seen.worker).typelessRequest(interface, method, nullptr);
    auto params = request.initAs<future::Nothing>();
    params.setFutureNumber(1);
    FillMore(params.initFutureMore());
    return request.send().then(
        [](auto&&) { return std::string("done"); },
        [](kj::Exception&& exception) {
          const bool known = exception.getType() != kj::Exception::Type::UNIMPLEMENTED;
          return std::string(known ? exception.getDescription().cStr() : "unimplemented");
        });
  };
  constexpr uint64_t kInterface = capnp::typeId<schema::Worker>();
  EXPECT_EQ(supervisor.Call([&] { return call(kInterface, kOfTheFuture); }), "unimplemented");
  EXPECT_EQ(supervisor.Call([&] { return call(0xfee1deadfee1dead, 0); }), "unimplemented");
  EXPECT_EQ(supervisor.Call([&] { return call(kInterface, kPing); }), "done");
  EXPECT_FALSE(link.lost());
}

}  // namespace
}  // namespace holdfast::handover
