#include "worker/layer/layer_index.h"

#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <zlib.h>

#include <cstdlib>

#include "common/io.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "worker/layer/digest.h"
#include "worker/layer/index_test_support.h"
#include "worker/toc/testing/estargz_writer.h"

namespace holdfast::layer {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using toc::Type;
using Pair = std::pair<std::string_view, std::string_view>;

std::string Message(const absl::Status& status) { return std::string(FromAbsl(status.message())); }

TEST(LayerIndexBuildTest, NodesAreNumberedByFirstAppearanceWithImpliedFoldersJustBefore) {
  auto index = Build({MakeFolder("z"), MakeFile("a/b/c"), MakeFile("m"), MakeFolder("a"), MakeFile("z/1")});
  EXPECT_EQ(index->node_count(), 7u);
  EXPECT_EQ(index->LookupPath(""), 1u);
  EXPECT_EQ(index->LookupPath("z"), 2u);
  EXPECT_EQ(index->LookupPath("a"), 3u);
  EXPECT_EQ(index->LookupPath("a/b"), 4u);
  EXPECT_EQ(index->LookupPath("a/b/c"), 5u);
  EXPECT_EQ(index->LookupPath("m"), 6u);
  EXPECT_EQ(index->LookupPath("z/1"), 7u);
  EXPECT_THAT(Names(*index, ""), ElementsAre("a", "m", "z"));
  EXPECT_EQ(index->numbering_version(), 1u);
}

TEST(LayerIndexBuildTest, AFileNamedAgainTakesALaterNumberAndItsContentWins) {
  auto index = Build({MakeFolder(""), MakeFile("f", 10, 0, 1), MakeFile("g"), MakeFile("f", 20, 100, 2)});
  EXPECT_EQ(index->node_count(), 3u);
  EXPECT_EQ(index->LookupPath("g"), 2u);
  EXPECT_EQ(index->LookupPath("f"), 3u);
  EXPECT_EQ(NodeAt(*index, "f").uid, 2u);
  EXPECT_EQ(NodeAt(*index, "f").size, 20u);
  EXPECT_EQ(index->chunk_count(), 1u);
}

TEST(LayerIndexBuildTest, AFolderNamedAgainKeepsItsChildrenAndItsPlace) {
  auto index = Build({MakeFolder("d", 1), MakeFile("d/f"), MakeFolder("d", 2)});
  EXPECT_EQ(index->LookupPath("d"), 2u);
  EXPECT_EQ(NodeAt(*index, "d").uid, 2u);
  EXPECT_THAT(Names(*index, "d"), ElementsAre("f"));
}

TEST(LayerIndexBuildTest, AFileThatReplacesAFolderDropsWhatLayBelowIt) {
  auto index = Build({MakeFolder("d"), MakeFolder("d/e"), MakeFile("d/e/f", 5), MakeFile("d", 7, 100)});
  EXPECT_EQ(index->node_count(), 2u);
  EXPECT_TRUE(S_ISREG(NodeAt(*index, "d").mode));
  EXPECT_EQ(index->chunk_count(), 1u);
  EXPECT_EQ(NodeAt(*index, "").nlink, 2u);

  index = Build({MakeFolder("d"), MakeFile("d/old"), MakeFile("d"), MakeFolder("d"), MakeFile("d/new")});
  EXPECT_THAT(Names(*index, "d"), ElementsAre("new"));
}

TEST(LayerIndexBuildTest, AFolderReplacesAFile) {
  auto index = Build({MakeFile("d", 5), MakeFolder("d", 3), MakeFile("d/f")});
  EXPECT_EQ(NodeAt(*index, "d").uid, 3u);
  EXPECT_EQ(index->chunk_count(), 0u);
  EXPECT_NE(index->LookupPath("d/f"), 0u);
}

TEST(LayerIndexBuildTest, APathThroughSomethingElseThanAFolderIsAnError) {
  for (const toc::Entry& first :
       {MakeFile("a"), MakeLink("a", Type::kSymlink, "/etc"), MakeEntry("a", Type::kFifo)}) {
    auto built = TryBuild({first, MakeFile("a/b")});
    EXPECT_EQ(built.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(Message(built.status()), HasSubstr("a/b"));
  }
  EXPECT_FALSE(TryBuild({MakeFile("")}).ok());
}

TEST(LayerIndexBuildTest, AWhiteoutBecomesADeviceUnlessTheNameExists) {
  auto index = Build({MakeFile("d/.wh.gone"), MakeFile("d/.wh.stays"), MakeFile("d/stays"),
                      MakeFile("d/first"), MakeFile("d/.wh.first"), MakeFile("d/.wh.gone")});
  EXPECT_THAT(Names(*index, "d"), ElementsAre("first", "gone", "stays"));
  const NodeRecord& gone = NodeAt(*index, "d/gone");
  EXPECT_EQ(gone.mode, uint32_t{S_IFCHR});
  EXPECT_EQ(gone.rdev, 0u);
  EXPECT_EQ(gone.nlink, 1u);
  EXPECT_TRUE(S_ISREG(NodeAt(*index, "d/stays").mode));
  EXPECT_TRUE(S_ISREG(NodeAt(*index, "d/first").mode));
}

TEST(LayerIndexBuildTest, TheOpaqueMarkIsAFlagOfItsFolder) {
  auto index = Build({MakeFile("d/.wh..wh..opq"), MakeFolder("d"), MakeFolder("e")});
  EXPECT_TRUE(NodeAt(*index, "d").flags & kNodeOpaque);
  EXPECT_FALSE(NodeAt(*index, "e").flags & kNodeOpaque);
  EXPECT_TRUE(Names(*index, "d").empty());
  EXPECT_TRUE(index->has_xattrs());
  EXPECT_TRUE(index->xattrs(NodeAt(*index, "d")).empty());
  EXPECT_TRUE(NodeAt(*Build({MakeFile(".wh..wh..opq")}), "").flags & kNodeOpaque);
}

TEST(LayerIndexBuildTest, OtherNamesOfAufsAreHiddenWithWhatLiesBelowThem) {
  auto index = Build({MakeFolder(".wh..wh.plnk"), MakeFile(".wh..wh.plnk/1.2"), MakeFolder("d"),
                      MakeFile("d/.wh..wh.aufs"), MakeFile("e/.wh.gone/f"), MakeFile("f")});
  EXPECT_THAT(Names(*index, ""), ElementsAre("d", "f"));
  EXPECT_TRUE(Names(*index, "d").empty());
  for (const char* name : {".wh.", ".wh..", ".wh..."}) EXPECT_FALSE(TryBuild({MakeFile(name)}).ok()) << name;
}

TEST(LayerIndexBuildTest, HardLinksShareOneNodeWhateverTheirOrder) {
  auto index = Build({MakeLink("early", Type::kHardlink, "d/f"), MakeFile("d/f", 5, 0, 9),
                      MakeLink("late", Type::kHardlink, "d/f"), MakeLink("chain", Type::kHardlink, "late")});
  uint64_t id = index->LookupPath("d/f");
  for (const char* name : {"early", "late", "chain"}) EXPECT_EQ(index->LookupPath(name), id) << name;
  EXPECT_EQ(index->node(id)->nlink, 4u);
  EXPECT_EQ(index->node(id)->uid, 9u);
  EXPECT_EQ(index->node(id)->parent, index->LookupPath("d"));
  EXPECT_EQ(index->node_count(), 3u);
  EXPECT_EQ(index->regular_files(), 1u);
}

TEST(LayerIndexBuildTest, HardLinksFollowReplacements) {
  // The latest of both names counts, and a replaced link is no name any more.
  auto index = Build({MakeFile("f", 5, 0, 1), MakeLink("l", Type::kHardlink, "f"), MakeFile("f", 6, 100, 2)});
  EXPECT_EQ(NodeAt(*index, "l").uid, 2u);
  EXPECT_EQ(NodeAt(*index, "l").nlink, 2u);
  index = Build({MakeFile("f", 5), MakeLink("l", Type::kHardlink, "f"), MakeFile("l", 6, 100, 2)});
  EXPECT_EQ(NodeAt(*index, "f").nlink, 1u);
}

TEST(LayerIndexBuildTest, HardLinksToSymlinksAndDevicesWork) {
  auto index = Build({MakeLink("s", Type::kSymlink, "there"), MakeLink("l", Type::kHardlink, "s")});
  EXPECT_EQ(index->LookupPath("l"), index->LookupPath("s"));
  EXPECT_EQ(NodeAt(*index, "l").nlink, 2u);
}

TEST(LayerIndexBuildTest, BrokenHardLinksAreErrors) {
  auto link = [](const char* name, const char* target) { return MakeLink(name, Type::kHardlink, target); };
  EXPECT_THAT(Message(TryBuild({link("l", "missing")}).status()), HasSubstr("not in this layer"));
  EXPECT_THAT(Message(TryBuild({MakeFolder("d"), link("l", "d")}).status()), HasSubstr("folder"));
  EXPECT_THAT(Message(TryBuild({link("l", "l")}).status()), HasSubstr("circle"));
  EXPECT_THAT(Message(TryBuild({link("a", "b"), link("b", "c"), link("c", "a")}).status()),
              HasSubstr("circle"));
  EXPECT_THAT(Message(TryBuild({link("x", "a"), link("a", "b"), link("b", "a")}).status()),
              HasSubstr("circle"));
  // Through a symlink, to something replaced, to a whiteout.
  EXPECT_FALSE(TryBuild({MakeFile("d/f"), MakeLink("s", Type::kSymlink, "d"), link("l", "s/f")}).ok());
  EXPECT_FALSE(TryBuild({MakeFile("d/f"), MakeFile("d"), link("l", "d/f")}).ok());
  EXPECT_FALSE(TryBuild({MakeFile(".wh.f"), link("l", "f")}).ok());
}

TEST(LayerIndexBuildTest, LongChainsOfHardLinksResolveQuickly) {
  std::vector<toc::Entry> entries;
  const int count = 50'000;
  for (int i = 0; i < count; i++) {
    entries.push_back(MakeLink("l" + std::to_string(i), Type::kHardlink, "l" + std::to_string(i + 1)));
  }
  entries.push_back(MakeFile("l" + std::to_string(count)));
  auto index = Build(entries);
  EXPECT_EQ(NodeAt(*index, "l0").nlink, count + 1u);
  EXPECT_EQ(index->node_count(), 2u);
}

TEST(LayerIndexBuildTest, FoldersCountTheirSubfoldersAsLinks) {
  auto index = Build({MakeFolder("a"), MakeFolder("b"), MakeFile("f"), MakeFolder("a/x")});
  EXPECT_EQ(NodeAt(*index, "").nlink, 4u);
  EXPECT_EQ(NodeAt(*index, "a").nlink, 3u);
  EXPECT_EQ(NodeAt(*index, "b").nlink, 2u);
}

TEST(LayerIndexBuildTest, AttributesAreStoredAsTheKernelWantsThem) {
  toc::Entry device = MakeEntry("dev", Type::kBlockDevice);
  device.dev_major = 259;
  device.dev_minor = 70'000;
  toc::Entry file = MakeFile("f", 3);
  file.mode = 06751;
  file.gid = 4'000'000'000;
  file.mtime_seconds = 1'700'000'000;
  file.mtime_nanos = 5;
  file.xattrs = {{"user.b", "2"}, {"security.capability", std::string("\1\0\0", 3)}, {"user.a", ""}};
  auto index =
      Build({device, file, MakeLink("s", Type::kSymlink, "../over/there"), MakeEntry("p", Type::kFifo)});
  EXPECT_EQ(NodeAt(*index, "dev").mode, S_IFBLK | 0644u);
  EXPECT_EQ(NodeAt(*index, "dev").rdev, (70'000u & 0xff) | (259u << 8) | ((70'000u & ~0xffu) << 12));
  const NodeRecord& f = NodeAt(*index, "f");
  EXPECT_EQ(f.mode, S_IFREG | 06751u);
  EXPECT_EQ(f.gid, 4'000'000'000u);
  EXPECT_EQ(f.mtime_seconds, 1'700'000'000);
  EXPECT_EQ(f.mtime_nanos, 5u);
  EXPECT_THAT(index->xattrs(f), ElementsAre(Pair("security.capability", std::string_view("\1\0\0", 3)),
                                            Pair("user.a", ""), Pair("user.b", "2")));
  EXPECT_EQ(index->link_target(NodeAt(*index, "s")), "../over/there");
  EXPECT_EQ(NodeAt(*index, "s").size, 13u);
  EXPECT_EQ(index->link_target(f), "");
  EXPECT_TRUE(S_ISFIFO(NodeAt(*index, "p").mode));
  EXPECT_TRUE(index->has_xattrs());
  EXPECT_FALSE(Build({MakeFile("f")})->has_xattrs());
}

TEST(LayerIndexBuildTest, ChunksLieInBlobOrderAndLargeFilesOnPages) {
  toc::Entry two = MakeFile("two", 5000, 300);
  two.chunks[0].size = 4000;
  two.chunks.push_back({.file_offset = 4000, .size = 1000, .blob_offset = 400, .blob_end = 500});
  auto index = Build({MakeFile("late", 10, 900), two, MakeFile("empty"), MakeFile("early", 20, 0),
                      MakeFile("page", 4096, 200), MakeFile("small", 4095, 100)});
  std::vector<uint64_t> offsets, stores;
  for (const ChunkRecord& chunk : index->chunks()) {
    offsets.push_back(chunk.blob_offset);
    stores.push_back(chunk.store_offset);
  }
  EXPECT_THAT(offsets, ElementsAre(0, 100, 200, 300, 400, 900));
  EXPECT_THAT(stores, ElementsAre(0, 20, 8192, 12288, 16288, 17288));
  EXPECT_EQ(index->content_bytes(), 17298u);
  const NodeRecord& node = NodeAt(*index, "two");
  EXPECT_EQ(node.first, 3u);
  EXPECT_EQ(node.count, 2u);
  EXPECT_EQ(index->ChunkAt(node, 0), 3u);
  EXPECT_EQ(index->ChunkAt(node, 3999), 3u);
  EXPECT_EQ(index->ChunkAt(node, 4000), 4u);
  EXPECT_EQ(index->ChunkAt(node, 4999), 4u);
  EXPECT_EQ(NodeAt(*index, "empty").count, 0u);
  EXPECT_EQ(index->regular_files(), 6u);
}

TEST(LayerIndexBuildTest, ImpliedFoldersTakeTheirAttributesFromBelow) {
  std::vector<std::string> asked;
  ParentAttributes below = [&](const std::string& path) -> std::optional<Attributes> {
    asked.push_back(path);
    if (path != "a/b") return std::nullopt;
    Attributes found;
    found.mode = 01700;
    found.uid = 5;
    found.gid = 6;
    found.mtime_seconds = 1234;
    found.mtime_nanos = 5678;
    found.xattrs = {{"user.z", "1"}, {"trusted.x", "no"}, {"user.y", "2"}};
    return found;
  };
  auto index = Build({MakeFile("a/b/f"), MakeFolder("own")}, below);
  EXPECT_THAT(asked, ElementsAre("", "a", "a/b"));
  const NodeRecord& b = NodeAt(*index, "a/b");
  EXPECT_EQ(b.mode, S_IFDIR | 01700u);
  EXPECT_EQ(b.uid, 5u);
  EXPECT_EQ(b.gid, 6u);
  EXPECT_EQ(b.mtime_seconds, 1234);
  EXPECT_EQ(b.mtime_nanos, 5678u);
  EXPECT_THAT(index->xattrs(b), ElementsAre(Pair("user.y", "2"), Pair("user.z", "1")));
  EXPECT_TRUE(b.flags & kNodeImplied);
  const NodeRecord& a = NodeAt(*index, "a");
  EXPECT_EQ(a.mode, S_IFDIR | 0755u);
  EXPECT_EQ(a.uid, 0u);
  EXPECT_EQ(a.mtime_seconds, 0);
  EXPECT_FALSE(NodeAt(*index, "own").flags & kNodeImplied);
  EXPECT_TRUE(index->has_implied_folders());
  EXPECT_FALSE(Build({MakeFolder(""), MakeFolder("own")})->has_implied_folders());
}

TEST(LayerIndexBuildTest, BindingGivesTheSameBytesAsBuildingWithTheParents) {
  ParentAttributes below = [](const std::string& path) {
    Attributes found;
    found.uid = static_cast<uint32_t>(path.size()) + 1;
    found.xattrs = {{"user.path", path}};
    return std::optional<Attributes>(found);
  };
  toc::Entry file = MakeFile("x/y/f", 5000, 10);
  file.xattrs = {{"user.f", "f"}};
  std::vector<toc::Entry> entries = {file, MakeLink("x/l", Type::kHardlink, "x/y/f"),
                                     MakeLink("q/s", Type::kSymlink, "t"), MakeFile("x/.wh.w"),
                                     MakeFile("q/.wh..wh..opq")};
  auto base = Build(entries);
  auto direct = TryBuild(entries, below);
  auto bound = BindImpliedFolders(*base, below);
  ASSERT_TRUE(direct.ok() && bound.ok());
  EXPECT_EQ(bound->sha256, direct->sha256);
  EXPECT_TRUE(bound->bytes == direct->bytes);
  // Bound again, to nothing: the layer's own index.
  auto derived = LayerIndex::FromBytes(bound->bytes);
  ASSERT_TRUE(derived.ok());
  auto unbound = BindImpliedFolders(**derived, {});
  ASSERT_TRUE(unbound.ok());
  EXPECT_EQ(unbound->sha256, TryBuild(entries)->sha256);
}

TEST(LayerIndexBuildTest, WhatMakesNoLayerIsRefused) {
  toc::Entry gap = MakeFile("f", 10);
  gap.chunks[0].size = 9;
  EXPECT_FALSE(TryBuild({gap}).ok());
  toc::Entry none = MakeFile("f", 10);
  none.chunks.clear();
  EXPECT_FALSE(TryBuild({none}).ok());
  toc::Entry outside = MakeFile("f", 10, kTestBlobSize);
  EXPECT_FALSE(TryBuild({outside}).ok());
}

TEST(LayerIndexTest, LookupsOutOfRangeFindNothing) {
  auto index = Build({MakeFile("f"), MakeFolder("d")});
  EXPECT_EQ(index->node(0), nullptr);
  EXPECT_EQ(index->node(index->node_count() + 1), nullptr);
  EXPECT_EQ(index->node(UINT64_MAX), nullptr);
  EXPECT_EQ(index->Lookup(0, "f"), 0u);
  EXPECT_EQ(index->Lookup(99, "f"), 0u);
  EXPECT_EQ(index->Lookup(index->LookupPath("f"), "x"), 0u);
  EXPECT_EQ(index->Lookup(kRootNode, ""), 0u);
  EXPECT_EQ(index->Lookup(kRootNode, "ff"), 0u);
  EXPECT_EQ(index->LookupPath("f/x"), 0u);
  EXPECT_EQ(index->LookupPath("nothing/x"), 0u);
  EXPECT_TRUE(index->children(index->LookupPath("f")).empty());
}

TEST(LayerIndexTest, AWrittenIndexOpensUnderItsDigestOnly) {
  TempDir folder;
  auto built = TryBuild({MakeFile("a/f", 5)});
  ASSERT_TRUE(built.ok());
  EXPECT_EQ(built->sha256, Sha256Hex(built->bytes));
  ASSERT_TRUE(WriteIndexFile(folder.path(), *built).ok());
  ASSERT_TRUE(WriteIndexFile(folder.path(), *built).ok());
  const std::string path = folder.path() + "/" + built->sha256 + ".idx";
  for (const std::string& expected : {std::string(), built->sha256}) {
    auto index = LayerIndex::Open(path, expected);
    ASSERT_TRUE(index.ok()) << index.status();
    EXPECT_NE((*index)->LookupPath("a/f"), 0u);
    EXPECT_EQ((*index)->info().layer_digest, "sha256:" + std::string(64, 'a'));
    EXPECT_EQ((*index)->info().toc_digest, "sha256:" + std::string(64, 'b'));
    EXPECT_EQ((*index)->info().blob_size, kTestBlobSize);
    EXPECT_EQ((*index)->info().prefetch_end, 77u);
  }
  EXPECT_EQ(LayerIndex::Open(path, std::string(64, '0')).status().code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(LayerIndex::Open(folder.path() + "/none.idx", "").status().code(), absl::StatusCode::kNotFound);
  ASSERT_TRUE(WriteFileAtomic(folder.path() + "/empty.idx", "").ok());
  EXPECT_EQ(LayerIndex::Open(folder.path() + "/empty.idx", "").status().code(), absl::StatusCode::kDataLoss);
}

TEST(LayerIndexTest, AnOpenIndexOutlivesItsFile) {
  TempDir folder;
  auto built = TryBuild({MakeFile("a/f", 5)});
  ASSERT_TRUE(built.ok() && WriteIndexFile(folder.path(), *built).ok());
  const std::string path = folder.path() + "/" + built->sha256 + ".idx";
  auto index = LayerIndex::Open(path, "");
  ASSERT_TRUE(index.ok());
  ASSERT_EQ(unlink(path.c_str()), 0);
  EXPECT_NE((*index)->LookupPath("a/f"), 0u);
}

TEST(LayerIndexTest, AHalfWrittenFileUnderTheRightNameIsReplaced) {
  TempDir folder;
  auto built = TryBuild({MakeFile("a/f", 5)});
  ASSERT_TRUE(built.ok());
  const std::string path = folder.path() + "/" + built->sha256 + ".idx";
  ASSERT_TRUE(WriteFileAtomic(path, built->bytes.substr(0, 100)).ok());
  ASSERT_TRUE(WriteIndexFile(folder.path(), *built).ok());
  EXPECT_TRUE(LayerIndex::Open(path, built->sha256).ok());
}

// `length` bytes at `skip` of the gzip member at `offset`, as a reader of chunks gets them: from the span
// alone.
std::string InflateSpan(std::string_view span, uint64_t skip, uint64_t length) {
  z_stream stream{};
  EXPECT_EQ(inflateInit2(&stream, 15 + 16), Z_OK);
  std::string out(skip + length, '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(span.data()));
  stream.avail_in = static_cast<uInt>(span.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  inflate(&stream, Z_SYNC_FLUSH);
  EXPECT_EQ(stream.avail_out, 0u);
  inflateEnd(&stream);
  return out.substr(skip);
}

TEST(LayerIndexTest, EveryByteOfARealBlobIsFoundThroughItsIndex) {
  std::string big;
  for (int i = 0; i < 60'000; i++) big += static_cast<char>(i * 31 + i / 251);
  const std::map<std::string, std::string> files = {{"bin/big", big},
                                                    {"bin/tiny", "t"},
                                                    {"exact", std::string(8192, 'e')},
                                                    {"none", ""},
                                                    {"z/last", "the end"}};
  std::vector<toc::testing::WriterEntry> entries = {toc::testing::Dir("bin")};
  for (const auto& [name, content] : files) entries.push_back(toc::testing::File(name, content));
  for (uint64_t min_chunk : {0u, 3000u, 100'000u}) {
    auto layer = toc::testing::WriteEstargz(entries, {.chunk_size = 4096, .min_chunk_size = min_chunk});
    auto toc = toc::ParseEstargzToc(layer.toc_json, layer.toc_offset, layer.blob.size(), {});
    ASSERT_TRUE(toc.ok()) << toc.status();
    auto built = BuildLayerIndex(
        *toc, {layer.layer_digest, layer.blob.size(), layer.toc_digest, toc->prefetch_end}, {});
    ASSERT_TRUE(built.ok()) << built.status();
    auto index = LayerIndex::FromBytes(built->bytes);
    ASSERT_TRUE(index.ok()) << index.status();
    for (const auto& [name, content] : files) {
      const NodeRecord& node = NodeAt(**index, name);
      std::string read;
      for (const ChunkRecord& chunk : (*index)->chunks().subspan(node.first, node.count)) {
        std::string_view span =
            std::string_view(layer.blob).substr(chunk.blob_offset, chunk.blob_end - chunk.blob_offset);
        std::string bytes = InflateSpan(span, chunk.inner_offset, chunk.size);
        EXPECT_EQ(Sha256Raw(bytes), std::to_array(chunk.digest));
        read += bytes;
      }
      EXPECT_TRUE(read == content) << name << " min_chunk " << min_chunk;
    }
  }
}

// The same TOC gives the same bytes in every build of numbering version 1, and today's code reads the bytes
// of the first.
TEST(LayerIndexGoldenTest, NumberingVersion1IsFrozen) {
  const char* source = std::getenv("HOLDFAST_SOURCE");
  ASSERT_NE(source, nullptr) << "run by ctest, or set HOLDFAST_SOURCE to the source folder";
  const std::string folder = std::string(source) + "/tests/golden/layer_index/";
  auto json = ReadFile(folder + "v1.toc.json");
  auto golden = ReadFile(folder + "v1.idx");
  ASSERT_TRUE(json.ok() && golden.ok());
  EXPECT_EQ(Sha256Hex(*golden), "47792558826ee9c7f4fba5327a2ecad97c7052015f3f9452c8ea429da0782fc4");
  auto toc = toc::ParseEstargzToc(*json, 1'000'000, 1'001'000, {});
  ASSERT_TRUE(toc.ok()) << toc.status();
  IndexInfo info{"sha256:" + std::string(64, '1'), 1'001'000, Sha256Name(*json), toc->prefetch_end};
  auto built = BuildLayerIndex(*toc, info, {});
  ASSERT_TRUE(built.ok()) << built.status();
  EXPECT_EQ(built->sha256, Sha256Hex(*golden));

  auto index = LayerIndex::FromBytes(*golden);
  ASSERT_TRUE(index.ok()) << index.status();
  EXPECT_EQ((*index)->node_count(), 17u);
  EXPECT_EQ((*index)->info().toc_digest, Sha256Name(*json));
  EXPECT_EQ((*index)->LookupPath("usr/bin/tool"), (*index)->LookupPath("usr/bin/alias"));
  EXPECT_EQ(NodeAt(**index, "etc/removed").mode, uint32_t{S_IFCHR});
}

}  // namespace
}  // namespace holdfast::layer
