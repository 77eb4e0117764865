#include "worker/cache/presence_file.h"

#include "absl/strings/escaping.h"
#include "worker/cache/store_test_util.h"

namespace holdfast::cache {
namespace {

TEST(PresenceFile, AnAccessHourThatIsNotItsOwnComplementIsUnknown) {
  EXPECT_EQ(UnpackAccessHour(PackAccessHour(472222)), 472222u);
  EXPECT_EQ(UnpackAccessHour(0), 0u);
  EXPECT_EQ(UnpackAccessHour(PackAccessHour(5) ^ 1), 0u);
}

class GarbageHeader : public StoreTest, public testing::WithParamInterface<size_t> {};

TEST_P(GarbageHeader, IsSetAsideAndTheLayerStartsAfresh) {
  {
    auto store = OpenStore(options_);
    auto content = OpenLayer(store.get(), 1, 4);
    ASSERT_TRUE(PutChunk(content.get(), 2).ok());
  }
  std::string path = FolderOf(1) + "/presence.1";
  auto bytes = ReadFile(path);
  ASSERT_TRUE(bytes.ok());
  std::string broken = *bytes;
  broken[GetParam()] = static_cast<char>(broken[GetParam()] ^ 0x40);
  ASSERT_TRUE(WriteFileAtomic(path, broken).ok());

  auto store = OpenStore(options_);
  auto content = OpenLayer(store.get(), 1, 4);
  ASSERT_NE(content, nullptr);
  EXPECT_EQ(content->StateOf(*content->files(), 2), ChunkState::kAbsent);
  EXPECT_EQ(store->stats().damaged_layers, 1u);
  EXPECT_TRUE(PathExists(FolderOf(1) + "/presence.damaged"));
  EXPECT_TRUE(PutChunk(content.get(), 2).ok());
  EXPECT_EQ(ReadChunk(*content->files(), 2), ChunkContent(2));
}

// Every field up to the checksum: magic, version, header size, layer, counts, generation, ids, the checksum
// itself.
INSTANTIATE_TEST_SUITE_P(EachField, GarbageHeader,
                         testing::Values(0, 8, 12, 16, 79, 80, 88, 96, 104, 136, 172));

// The header that the first release writes: it may never stop being readable.
constexpr char kGoldenHeader[] =
    "48465052455300000100000000100000616161616161616161616161616161616161616161616161616161616161"
    "61616161616161616161616161616161616161616161616161616161616161613031040000000000000000100000"
    "0000000007000000000000003131313131313131313131313131313131313131313131313131313131313131626f"
    "6f742d31000000000000000000000000000000000000000000000000000000000000449d901e9e34070061cbf8ff";

TEST(PresenceFile, TheBytesOfTheFirstReleaseAreReadAndWrittenUnchanged) {
  const PresenceIdentity identity{std::string(62, 'a') + "01", 4, 4096, std::string(32, '1'), "boot-1"};
  const std::string golden(absl::HexStringToBytes(kGoldenHeader));
  ASSERT_EQ(golden.size(), sizeof(PresenceHeader));
  TempDir made, given;
  ASSERT_TRUE(CreateGeneration(made.path(), 7, identity, 472222).ok());
  EXPECT_EQ(ReadFile(made.path() + "/presence.7")->substr(0, golden.size()), golden);

  std::string file = golden;
  file.resize(kPresenceHeaderBytes, '\0');
  file += std::string("\0\1\2\x7f", 4);  // absent, verified, unverified, and a mark from the future
  ASSERT_TRUE(WriteFileAtomic(given.path() + "/presence.7", file).ok());
  ASSERT_TRUE(WriteFileAtomic(given.path() + "/content.7", std::string(4096, 'x')).ok());
  auto files = OpenGeneration(given.path(), 7, identity, /*may_renew=*/true);
  ASSERT_TRUE(files.ok()) << files.status();
  EXPECT_EQ(UnpackAccessHour(HeaderOf(**files)->last_access), 472222u);
  EXPECT_EQ((*files)->marks[0].load(), kMarkAbsent);
  EXPECT_EQ((*files)->marks[1].load(), kMarkVerified);
  EXPECT_EQ((*files)->marks[2].load(), kMarkUnverified);
}

}  // namespace
}  // namespace holdfast::cache
