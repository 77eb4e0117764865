// Verifier processes, the real program, between stand-ins of two workers.
#include "supervisor/verifiers.h"
#include "common/testing/time_limit.h"

#include <linux/fuse.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <unistd.h>

#include <chrono>
#include <fstream>
#include <functional>
#include <list>
#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "common/fuse_mount.h"
#include "common/sha256.h"
#include "common/testing/processes.h"
#include "gtest/gtest.h"
#include "schema/rpc.h"

#pragma GCC diagnostic ignored "-Wnon-virtual-dtor"

namespace holdfast::supervisor {
namespace {

// Names one sample, which lies in mount 1.
class Owner final : public schema::Worker::Server {
 public:
  kj::Promise<void> samples(SamplesContext context) override {
    auto file = context.getResults().initFiles(1)[0];
    file.setMountId(1);
    file.setKind(schema::SampleKind::FOLDER);
    Sha256 empty;
    file.setDigest(Bytes(digest_ = absl::HexStringToBytes(empty.FinishHex())));
    return kj::READY_NOW;
  }

 private:
  std::string digest_;
};

// Takes the canary and answers nothing. It does not let go of the capability that brought the device.
class Candidate final : public schema::Worker::Server {
 public:
  explicit Candidate(UniqueFd* device) : device_(*device) {}
  kj::Promise<void> replay(ReplayContext) override { return kj::READY_NOW; }
  kj::Promise<void> mountsGone(MountsGoneContext) override { return kj::READY_NOW; }
  kj::Promise<void> addMounts(AddMountsContext context) override {
    kept_ = context.getParams().getEntries()[0].getDevice();
    return KJ_ASSERT_NONNULL(kept_).getFd().then(
        [this](kj::Maybe<int> number) { device_ = DupFd(number.orDefault(-1)).value_or(UniqueFd()); });
  }

 private:
  UniqueFd& device_;
  kj::Maybe<schema::Descriptor::Client> kept_;
};

class Mounts final : public schema::MountView::Server {
 public:
  Mounts(std::string init_reply, uint64_t* last) : init_reply_(std::move(init_reply)), last_(*last) {}
  kj::Promise<void> live(LiveContext context) override {
    auto entry = context.getResults().initEntries(1)[0];
    entry.setMountId(1);
    entry.setInitReply(Bytes(init_reply_));
    return kj::READY_NOW;
  }
  kj::Promise<void> newMountId(NewMountIdContext context) override {
    context.getResults().setMountId(++last_);
    return kj::READY_NOW;
  }

 private:
  const std::string init_reply_;
  uint64_t& last_;
};

class VerifiersTest : public ::testing::Test {
 protected:
  VerifiersTest()
      : io_(kj::setupAsyncIo()), verifiers_(&io_, Bin("holdfast-verifier"), [this] { ++gone_; }) {}
  ~VerifiersTest() noexcept override {
    RemoveStaleMounts(dir_.path()).status().IgnoreError();
    devices_.clear();
  }
  bool Eventually(const std::function<bool()>& condition) {
    auto end = std::chrono::steady_clock::now() + kTimeFactor * std::chrono::seconds(10);
    while (!condition()) {
      if (std::chrono::steady_clock::now() > end) return false;
      io_.provider->getTimer().afterDelay(2 * kj::MILLISECONDS).wait(io_.waitScope);
    }
    return true;
  }
  // A verifier that waits for a request which the candidate has taken: from now on the kernel lets no signal
  // end it. Its task is over.
  void LeaveOneHanging() {
    UniqueFd& device = devices_.emplace_back();
    auto task = verifiers_.Begin();
    auto request = task->client().rehearseRequest();
    request.setOwner(kj::heap<Owner>());
    request.setCandidate(kj::heap<Candidate>(&device));
    request.setMounts(kj::heap<Mounts>(std::string(80, '\0'), &last_id_));
    request.setCanaryFolder(dir_.path().c_str());
    auto rehearsed = request.send();
    char buffer[FUSE_MIN_READ_BUFFER];
    ASSERT_TRUE(Eventually([&] { return device.valid() && read(device.get(), buffer, sizeof(buffer)) > 0; }))
        << "the canary is looked at";
  }

  TempDir dir_;
  std::list<UniqueFd> devices_;
  uint64_t last_id_ = 100;
  int gone_ = 0;
  kj::AsyncIoContext io_;
  Verifiers verifiers_;
};

TEST_F(VerifiersTest, OneIsStartedForATaskAndIsGoneAfterIt) {
  {
    auto task = verifiers_.Begin();
    auto probed = task->client().probeLiveRequest().send().then(
        [](auto&&) { return std::string("probed"); },
        [](kj::Exception&& exception) { return Describe(exception); });
    EXPECT_NE(probed.wait(io_.waitScope).find("nothing was rehearsed"), std::string::npos);
    EXPECT_EQ(Children().size(), 1u);
  }
  EXPECT_TRUE(Eventually([&] { return Children().empty(); }));
  EXPECT_EQ(gone_, 1);
}

TEST_F(VerifiersTest, ThoseThatCannotDieBlockNothingUntilTheyAreThreeAndAreReapedWhenTheyCan) {
  LeaveOneHanging();
  LeaveOneHanging();
  EXPECT_EQ(Children().size(), 2u);
  EXPECT_NO_THROW(verifiers_.Begin()) << "another task is taken";
  LeaveOneHanging();
  io_.provider->getTimer().afterDelay((kHangingMillis + 50) * kj::MILLISECONDS).wait(io_.waitScope);
  try {
    verifiers_.Begin();
    ADD_FAILURE() << "a fourth";
  } catch (const kj::Exception& exception) {
    EXPECT_EQ(Describe(exception), "3 verifiers of earlier tasks still hang in a mount");
  }
  ASSERT_TRUE(RemoveStaleMounts(dir_.path()).ok());
  EXPECT_EQ(Children().size(), 3u) << "still there, in state D";
  devices_.clear();  // the candidates die
  EXPECT_TRUE(Eventually([&] { return Children().empty(); }));
  EXPECT_NO_THROW(verifiers_.Begin());
}

}  // namespace
}  // namespace holdfast::supervisor
