#include "common/fuse_mount.h"

#include <linux/fuse.h>
#include <string.h>

#include "gtest/gtest.h"

namespace holdfast {
namespace {

std::string InitRequest(uint32_t flags, uint32_t flags2) {
  fuse_in_header header{};
  fuse_init_in init{};
  header.opcode = FUSE_INIT;
  header.unique = 2;
  header.len = sizeof(header) + sizeof(init);
  init.major = 7;
  init.minor = 31;
  init.max_readahead = 131'072;
  init.flags = flags;
  init.flags2 = flags2;
  std::string out(header.len, '\0');
  memcpy(out.data(), &header, sizeof(header));
  memcpy(out.data() + sizeof(header), &init, sizeof(init));
  return out;
}

TEST(InitReplyTest, OnlyOfferedFlagsAreAnsweredAndTheUpperHalfOnlyWhenItIsValid) {
  InitOptions options;
  options.flags = (uint64_t{0x101} << 32) | 0x5;
  options.max_readahead = 65'536;
  fuse_init_out out;
  auto reply = BuildInitReply(InitRequest(0x1u | (1u << 30), 0x100), options);
  ASSERT_TRUE(reply.ok());
  memcpy(&out, reply->data() + sizeof(fuse_out_header), sizeof(out));
  EXPECT_EQ(out.flags, 0x1u | (1u << 30));
  EXPECT_EQ(out.flags2, 0x100u);
  EXPECT_EQ(out.minor, 31u);
  EXPECT_EQ(out.max_readahead, 65'536u);
  EXPECT_EQ(out.max_pages, 0) << "not agreed on";
  reply = BuildInitReply(InitRequest(0x5, 0x101), options);
  ASSERT_TRUE(reply.ok());
  memcpy(&out, reply->data() + sizeof(fuse_out_header), sizeof(out));
  EXPECT_EQ(out.flags, 0x5u);
  EXPECT_EQ(out.flags2, 0u) << "the kernel did not say that flags2 is valid";
}

TEST(InitReplyTest, AnythingElseIsRefused) {
  std::string request = InitRequest(1, 0);
  EXPECT_FALSE(BuildInitReply("short", InitOptions()).ok());
  EXPECT_FALSE(BuildInitReply(request.substr(0, 44), InitOptions()).ok());
  request[4] = 1;  // LOOKUP
  EXPECT_FALSE(BuildInitReply(request, InitOptions()).ok());
}

}  // namespace
}  // namespace holdfast
