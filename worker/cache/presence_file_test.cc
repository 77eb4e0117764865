#include "worker/cache/presence_file.h"

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

}  // namespace
}  // namespace holdfast::cache
