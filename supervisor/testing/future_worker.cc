// A worker of a build to come, for one test: everything it says carries fields, capabilities and methods that
// today's supervisor does not know (schema/testing/future.capnp). It serves nothing. "ok", or what went
// wrong, ends in <state>/future-report.
#include <capnp/rpc-twoparty.h>
#include <fcntl.h>
#include <kj/async-io.h>
#include <unistd.h>

#include <memory>
#include <string>

#include "common/io.h"
#include "schema/handover.capnp.h"
#include "schema/testing/future.capnp.h"

#pragma GCC diagnostic ignored "-Wnon-virtual-dtor"  // generated server bases

namespace holdfast::supervisor::testing {
namespace {

constexpr uint16_t kRegister = 0, kMount = 1, kOfTheFuture = 900;  // Supervisor
constexpr uint16_t kTakeMetadata = 2, kRetire = 6, kPing = 8;      // Worker
constexpr uint64_t kKnown = schema::CAP_SERVE_READS | schema::CAP_METADATA_HANDOVER | schema::CAP_PREPARE |
                            schema::CAP_TRIAL | schema::CAP_HEALTH | schema::CAP_REATTACH;

using AnyRequest = capnp::Request<capnp::AnyPointer, capnp::AnyPointer>;

void FillMore(future::More::Builder more) {
  more.setText("what today's build has never heard of");
  more.initNumbers(100);
}

// Answers every call, with more than today's supervisor expects.
class FutureWorker final : public capnp::Capability::Server {
 public:
  explicit FutureWorker(kj::Own<kj::PromiseFulfiller<void>> owner) : owner_(kj::mv(owner)) {}

  DispatchCallResult dispatchCall(uint64_t, uint16_t method,
                                  capnp::CallContext<capnp::AnyPointer, capnp::AnyPointer> context) override {
    if (method == kRetire) _exit(0);
    if (method == kPing) {
      auto results = context.getResults().initAs<future::PingResults>();
      results.setFutureNumber(1);
      FillMore(results.initFutureMore());
    } else {
      auto results = context.getResults().initAs<future::Nothing>();
      results.setFutureNumber(1);
      FillMore(results.initFutureMore());
    }
    if (method == kTakeMetadata) owner_->fulfill();
    return {kj::READY_NOW, false};
  }

 private:
  kj::Own<kj::PromiseFulfiller<void>> owner_;
};

// That the other side says "unimplemented", and nothing worse.
void ExpectUnimplemented(capnp::Capability::Client& supervisor, uint64_t interface, kj::WaitScope& wait) {
  auto request = supervisor.typelessRequest(interface, kOfTheFuture, nullptr);
  request.initAs<future::Nothing>().setFutureNumber(1);
  auto error = kj::runCatchingExceptions([&] { request.send().wait(wait); });
  KJ_IF_MAYBE (exception, error) {
    KJ_REQUIRE(exception->getType() == kj::Exception::Type::UNIMPLEMENTED,
               "an unknown method is answered with", *exception);
    return;
  }
  KJ_FAIL_REQUIRE("an unknown method is carried out");
}

void Converse(kj::AsyncIoContext& io, std::string* state_dir) {
  auto stream = io.lowLevelProvider->wrapUnixSocketFd(3, kj::LowLevelAsyncIoProvider::TAKE_OWNERSHIP);
  capnp::TwoPartyClient rpc(*stream, 253);
  capnp::Capability::Client any = rpc.bootstrap();
  constexpr uint64_t kInterface = capnp::typeId<schema::Supervisor>();

  auto owner = kj::newPromiseAndFulfiller<void>();
  AnyRequest request = any.typelessRequest(kInterface, kRegister, nullptr);
  auto params = request.initAs<future::RegisterParams>();
  auto hello = params.initHello();
  hello.setCapabilities(~uint64_t{0});  // the one that is never supported, too
  hello.setBuild("of the future");
  const kj::StringPtr token = getenv("HOLDFAST_TOKEN");
  hello.setToken(token.asBytes());
  hello.setPid(static_cast<uint32_t>(getpid()));
  hello.setFutureFlag(true);
  hello.setFutureNumber(~uint64_t{0});
  FillMore(hello.initFutureMore());
  FillMore(params.initFutureMore());
  params.setWorker(kj::heap<FutureWorker>(kj::mv(owner.fulfiller)));
  params.setAdmin(kj::heap<FutureWorker>(kj::newPromiseAndFulfiller<void>().fulfiller));
  auto registered = request.send().wait(io.waitScope);
  auto welcome = registered.getAs<future::RegisterResults>().getWelcome();
  *state_dir = welcome.getStateDir().cStr();
  KJ_REQUIRE((welcome.getCapabilities() & ~kKnown) == 0, "unknown capabilities are agreed on",
             welcome.getCapabilities());
  KJ_REQUIRE((welcome.getCapabilities() & schema::CAP_SERVE_READS) != 0);
  KJ_REQUIRE(welcome.getFutureNumber() == 0 && !welcome.hasFutureMore(),
             "today's build sends fields of the future");
  owner.promise.wait(io.waitScope);

  AnyRequest mount = any.typelessRequest(kInterface, kMount, nullptr);
  auto wanted = mount.initAs<future::MountParams>();
  const std::string path = *state_dir + "/mounts/future";
  KJ_REQUIRE(MakeDirs(path).ok());
  wanted.setPath(path.c_str());
  wanted.setBlob(kj::StringPtr("blob").asBytes());
  wanted.setFutureNumber(2);
  wanted.initOptions().setFutureNumber(3);
  FillMore(wanted.getOptions().initFutureMore());
  FillMore(wanted.initFutureMore());
  mount.send().wait(io.waitScope);

  ExpectUnimplemented(any, kInterface, io.waitScope);
  ExpectUnimplemented(any, 0xfee1deadfee1dead, io.waitScope);

  auto supervisor = any.castAs<schema::Supervisor>();
  auto list = supervisor.mountsRequest();
  list.setLimit(10);
  auto entries = list.send().wait(io.waitScope);
  KJ_REQUIRE(entries.getEntries().size() == 1);
  KJ_REQUIRE(entries.getEntries()[0].getPath() == path.c_str());
  KJ_REQUIRE(entries.getEntries()[0].getBlob() == kj::StringPtr("blob").asBytes());
  KJ_REQUIRE(WriteFileAtomic(*state_dir + "/future-report", "ok").ok());
  kj::Promise<void>(kj::NEVER_DONE).wait(io.waitScope);
}

int Main() {
  std::string state_dir;
  kj::AsyncIoContext io = kj::setupAsyncIo();
  auto error = kj::runCatchingExceptions([&] { Converse(io, &state_dir); });
  KJ_IF_MAYBE (exception, error) {
    const std::string text = exception->getDescription().cStr();
    if (!state_dir.empty()) WriteFileAtomic(state_dir + "/future-report", text).IgnoreError();
    fprintf(stderr, "future worker: %s\n", text.c_str());
  }
  return 1;
}

}  // namespace
}  // namespace holdfast::supervisor::testing

int main() { return holdfast::supervisor::testing::Main(); }
