// Bytes of a build to come, with fields and enumerants that today's build does not know, and today's bytes
// read by it: neither loses what both know. That real processes take such messages is shown in supervisor/
// and worker/handover/.
#include <capnp/message.h>
#include <capnp/serialize.h>

#include "gtest/gtest.h"
#include "schema/handover.capnp.h"
#include "schema/mount_blob.capnp.h"
#include "schema/testing/future.capnp.h"

namespace holdfast {
namespace {

// A message with one root struct, as it travels.
template <typename Struct>
class Message {
 public:
  Message() : root_(builder_.initRoot<Struct>()) {}
  typename Struct::Builder* operator->() { return &root_; }
  // The same bytes as another build's struct.
  template <typename Other>
  typename Other::Reader As() {
    words_ = capnp::messageToFlatArray(builder_);
    reader_ = kj::heap<capnp::FlatArrayMessageReader>(words_);
    return reader_->getRoot<Other>();
  }

 private:
  capnp::MallocMessageBuilder builder_;
  typename Struct::Builder root_;
  kj::Array<capnp::word> words_;
  kj::Own<capnp::FlatArrayMessageReader> reader_;
};

template <typename Builder>
void FillMore(Builder more) {
  more.setText("what today's build has never heard of");
  auto numbers = more.initNumbers(1000);
  for (unsigned i = 0; i < numbers.size(); ++i) numbers.set(i, ~uint64_t{i});
}

kj::ArrayPtr<const kj::byte> Bytes(const char* text) { return kj::StringPtr(text).asBytes(); }

TEST(FutureTest, AHelloWithUnknownCapabilitiesAndFieldsKeepsWhatIsKnown) {
  Message<future::Hello> message;
  message->setCapabilities(~uint64_t{0});
  message->setBuild("9.0");
  message->setToken(Bytes("secret"));
  message->setPid(77);
  message->setFutureFlag(true);
  message->setFutureNumber(~uint64_t{0});
  FillMore(message->initFutureMore());
  auto today = message.As<schema::Hello>();
  EXPECT_EQ(today.getCapabilities(), ~uint64_t{0});
  EXPECT_STREQ(today.getBuild().cStr(), "9.0");
  EXPECT_EQ(today.getToken(), Bytes("secret"));
  EXPECT_EQ(today.getPid(), 77u);
}

TEST(FutureTest, NoBuildKnowsTheReservedCapability) {
  constexpr uint64_t kAll = schema::CAP_SERVE_READS | schema::CAP_METADATA_HANDOVER | schema::CAP_PREPARE |
                            schema::CAP_TRIAL | schema::CAP_HEALTH | schema::CAP_REATTACH;
  EXPECT_EQ(kAll & schema::CAP_NEVER_SUPPORTED, 0u);
}

TEST(FutureTest, AMountOfAnUnknownStateKeepsItsOtherFields) {
  Message<future::MountsResults> message;
  auto entry = message->initEntries(1)[0];
  entry.setMountId(5);
  entry.setState(future::MountState::FROZEN);
  entry.setPath("/state/mounts/5");
  entry.setInitRequest(Bytes("request"));
  entry.setInitReply(Bytes("reply"));
  entry.setBlob(Bytes("blob"));
  entry.setFutureNumber(9);
  FillMore(entry.initFutureMore());
  message->setMore(true);
  auto today = message.As<schema::Supervisor::MountsResults>();
  EXPECT_TRUE(today.getMore());
  ASSERT_EQ(today.getEntries().size(), 1u);
  auto read = today.getEntries()[0];
  EXPECT_EQ(read.getMountId(), 5u);
  EXPECT_EQ(static_cast<uint16_t>(read.getState()), static_cast<uint16_t>(future::MountState::FROZEN));
  EXPECT_STREQ(read.getPath().cStr(), "/state/mounts/5");
  EXPECT_EQ(read.getInitRequest(), Bytes("request"));
  EXPECT_EQ(read.getInitReply(), Bytes("reply"));
  EXPECT_EQ(read.getBlob(), Bytes("blob"));
}

TEST(FutureTest, ALedgerOfTheFutureKeepsItsFlags) {
  Message<future::OldLedger> message;
  message->setGeneration(3);
  message->initRequestPipes(2);
  message->setOwnerExited(true);
  message->setFutureFlag(true);
  auto today = message.As<schema::OldLedger>();
  EXPECT_EQ(today.getGeneration(), 3u);
  EXPECT_EQ(today.getRequestPipes().size(), 2u);
  EXPECT_TRUE(today.getOwnerExited());
  EXPECT_FALSE(today.getOwnerHung());
}

TEST(FutureTest, ABlobWrittenByABuildToComeServesTodaysAfterARollback) {
  Message<future::MountBlob> message;
  message->setLayerDigest("sha256:aa");
  message->setIndexDigest("bb");
  message->setNumberingVersion(1);
  message->setImageRef("registry/image:1");
  message->setSnapshotId(4);
  message->setBlobSize(1 << 20);
  message->setNoXattrs(true);
  message->setOverlayOpaqueUser(true);
  message->setFutureFlag(true);
  message->setFutureNumber(1);
  FillMore(message->initFutureMore());
  auto today = message.As<schema::MountBlob>();
  EXPECT_STREQ(today.getLayerDigest().cStr(), "sha256:aa");
  EXPECT_STREQ(today.getIndexDigest().cStr(), "bb");
  EXPECT_EQ(today.getNumberingVersion(), 1u);
  EXPECT_STREQ(today.getImageRef().cStr(), "registry/image:1");
  EXPECT_EQ(today.getSnapshotId(), 4u);
  EXPECT_EQ(today.getBlobSize(), 1u << 20);
  EXPECT_TRUE(today.getNoXattrs());
  EXPECT_FALSE(today.getZeroOpen());
  EXPECT_TRUE(today.getOverlayOpaqueUser());
}

TEST(FutureTest, TodaysBytesMeanTheOldBehaviourToABuildToCome) {
  Message<schema::Welcome> welcome;
  welcome->setGeneration(6);
  welcome->setControlSocket("/run/holdfast/supervisor.sock");
  auto later = welcome.As<future::Welcome>();
  EXPECT_EQ(later.getGeneration(), 6u);
  EXPECT_STREQ(later.getControlSocket().cStr(), "/run/holdfast/supervisor.sock");
  EXPECT_EQ(later.getFutureNumber(), 0u);
  EXPECT_FALSE(later.hasFutureMore());

  Message<schema::InitOptions> options;
  options->setFlags(7);
  auto read = options.As<future::InitOptions>();
  EXPECT_EQ(read.getFlags(), 7u);
  EXPECT_EQ(read.getMaxBackground(), 64u);
  EXPECT_EQ(read.getCongestionThreshold(), 48u);
  EXPECT_EQ(read.getMaxPages(), 256u);
  EXPECT_EQ(read.getFutureNumber(), 0u);
}

}  // namespace
}  // namespace holdfast
