#include "worker/toc/toc.h"
#include "common/testing/time_limit.h"

#include <algorithm>
#include <chrono>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "worker/toc/digest.h"
#include "worker/toc/testing/estargz_writer.h"

namespace holdfast::toc {
namespace {

using testing::Dir;
using testing::EstargzLayer;
using testing::File;
using testing::Hardlink;
using ::testing::HasSubstr;
using testing::Symlink;
using testing::WriteEstargz;
using testing::WriterEntry;
using testing::WriterOptions;

constexpr uint64_t kTocOffset = 1 << 30;
constexpr uint64_t kBlobSize = kTocOffset + 1000;
const char kSomeDigest[] = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

absl::StatusOr<Toc> ParseEntries(const std::string& entries, const Limits& limits = {}) {
  return ParseEstargzToc(R"({"version":1,"entries":[)" + entries + "]}", kTocOffset, kBlobSize, limits);
}

// A regular file; `more` are further members.
std::string Reg(const std::string& name, uint64_t size, const std::string& more) {
  return R"({"name":")" + name + R"(","type":"reg","size":)" + std::to_string(size) +
         (more.empty() ? "" : "," + more) + "}";
}
std::string Quoted(const char* key, const std::string& value) {
  return "\"" + std::string(key) + "\":\"" + value + "\"";
}
const std::string kChunkDigest = Quoted("chunkDigest", kSomeDigest);

std::string Message(const absl::Status& status) { return std::string(FromAbsl(status.message())); }

absl::StatusOr<Toc> ParseLayer(const EstargzLayer& layer) {
  std::string_view blob = layer.blob;
  HF_ASSIGN_OR_RETURN(Footer footer, ParseFooter(blob.substr(blob.size() - kFooterTailBytes), blob.size()));
  EXPECT_EQ(footer.toc_offset, layer.toc_offset);
  std::string_view member =
      blob.substr(footer.toc_offset, blob.size() - footer.footer_size - footer.toc_offset);
  HF_ASSIGN_OR_RETURN(std::string json, ExtractTocJson(member, Limits{}));
  EXPECT_EQ(json, layer.toc_json);
  return ParseEstargzToc(json, footer.toc_offset, blob.size(), Limits{});
}

TEST(FooterTest, CurrentAndLegacyFootersNameTheTocOffset) {
  for (bool legacy : {false, true}) {
    std::string footer = legacy ? testing::LegacyFooter(0x123456) : testing::EstargzFooter(0x123456);
    std::string blob(0x200000, 'x');
    blob += footer;
    auto parsed = ParseFooter(std::string_view(blob).substr(blob.size() - kFooterTailBytes), blob.size());
    ASSERT_TRUE(parsed.ok()) << parsed.status();
    EXPECT_EQ(parsed->toc_offset, 0x123456u);
    EXPECT_EQ(parsed->legacy, legacy);
    EXPECT_EQ(parsed->footer_size, footer.size());
    EXPECT_EQ(footer.size(), legacy ? 47u : 51u);
  }
}

TEST(FooterTest, AnExternalTocIsNamedInTheError) {
  std::string tail = std::string(5, 'x') + testing::ExternalTocFooter();
  auto parsed = ParseFooter(tail, tail.size());
  EXPECT_EQ(parsed.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(Message(parsed.status()), HasSubstr("external TOC"));
}

TEST(FooterTest, WhatIsNoFooterIsRefused) {
  EXPECT_THAT(Message(ParseFooter("", 0).status()), HasSubstr("only 0 bytes"));
  EXPECT_THAT(Message(ParseFooter("abc", 3).status()), HasSubstr("only 3 bytes"));
  EXPECT_THAT(Message(ParseFooter("abc", 300).status()), HasSubstr("caller"));
  EXPECT_THAT(Message(ParseFooter(std::string(51, 'x'), 51).status()), HasSubstr("not an eStargz layer"));
  // The TOC cannot begin at or behind the footer.
  EXPECT_THAT(Message(ParseFooter(testing::EstargzFooter(0), 51).status()), HasSubstr("outside"));
  EXPECT_THAT(Message(ParseFooter(testing::EstargzFooter(UINT64_MAX), 1000).status()), HasSubstr("outside"));
  EXPECT_TRUE(ParseFooter(testing::EstargzFooter(948), 1000).ok());
  EXPECT_FALSE(ParseFooter(testing::EstargzFooter(949), 1000).ok());
}

TEST(FooterTest, EveryChangedByteIsNoticed) {
  const std::string good = testing::EstargzFooter(77);
  for (size_t i = 0; i < good.size(); i++) {
    std::string bad = good;
    bad[i] = static_cast<char>(bad[i] ^ 0x40);
    EXPECT_FALSE(ParseFooter(bad, 1'000'000).ok()) << "byte " << i;
  }
}

TEST(TocBlobTest, TheJsonComesOutOfTheMember) {
  auto json = ExtractTocJson(testing::TocMember("{\"hello\":1}"), Limits{});
  ASSERT_TRUE(json.ok()) << json.status();
  EXPECT_EQ(*json, "{\"hello\":1}");
}

TEST(TocBlobTest, BrokenMembersAreRefused) {
  const std::string good = testing::TocMember(std::string(5000, 'j') + std::to_string(1));
  for (size_t cut : {size_t{0}, size_t{1}, size_t{10}, size_t{20}, good.size() / 2}) {
    EXPECT_FALSE(ExtractTocJson(good.substr(0, cut), Limits{}).ok()) << cut;
  }
  EXPECT_FALSE(ExtractTocJson("not gzip at all", Limits{}).ok());
  EXPECT_THAT(Message(ExtractTocJson(testing::GzipMember(std::string(512, '\0')), Limits{}).status()),
              HasSubstr("checksum"));
  EXPECT_THAT(
      Message(ExtractTocJson(testing::GzipMember(testing::TarHeader(File("other", "x"))), Limits{}).status()),
      HasSubstr("not named"));
  EXPECT_THAT(
      Message(
          ExtractTocJson(testing::GzipMember(testing::TarHeader(Symlink("stargz.index.json", "x"))), Limits{})
              .status()),
      HasSubstr("not a regular file"));
  // A header that promises more than comes.
  std::string header = testing::TarHeader(File("stargz.index.json", std::string(1 << 20, 'x')));
  EXPECT_THAT(Message(ExtractTocJson(testing::GzipMember(header), Limits{}).status()),
              HasSubstr("ends before"));
}

TEST(TocBlobTest, ABombIsStoppedAtTheLimit) {
  Limits limits;
  limits.max_toc_bytes = 1 << 20;
  std::string bomb = testing::TocMember(std::string(32 << 20, ' '));
  ASSERT_LT(bomb.size(), 1u << 20);
  auto json = ExtractTocJson(bomb, limits);
  EXPECT_EQ(json.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(Message(json.status()), HasSubstr("max_toc_bytes"));
}

TEST(EstargzTest, AWholeBlobIsReadBack) {
  std::vector<WriterEntry> entries = {Dir("./"),
                                      Dir("bin"),
                                      File("bin/sh", "shell", 04755),
                                      Symlink("bin/bash", "sh"),
                                      Hardlink("bin/ash", "./bin/sh"),
                                      File("empty", "")};
  entries[2].uid = 3'000'000;
  entries[2].gid = 7;
  entries[2].mtime = 1'234'567'890;
  entries[2].xattrs = {{"user.a", std::string("\0\xff", 2)}, {"trusted.overlay.opaque", "y"}};
  WriterEntry device;
  device.name = "null";
  device.type = Type::kCharDevice;
  device.mode = 0666;
  device.dev_major = 1;
  device.dev_minor = 3;
  entries.push_back(device);
  for (bool legacy : {false, true}) {
    auto toc = ParseLayer(WriteEstargz(entries, {.legacy_footer = legacy}));
    ASSERT_TRUE(toc.ok()) << toc.status();
    ASSERT_EQ(toc->entries.size(), entries.size());
    EXPECT_EQ(toc->entries[0].name, "");
    EXPECT_EQ(toc->entries[1].name, "bin");
    const Entry& sh = toc->entries[2];
    EXPECT_EQ(sh.mode, 04755u);
    EXPECT_EQ(sh.uid, 3'000'000u);
    EXPECT_EQ(sh.gid, 7u);
    EXPECT_EQ(sh.mtime_seconds, 1'234'567'890);
    EXPECT_EQ(sh.xattrs, (std::map<std::string, std::string>{{"user.a", std::string("\0\xff", 2)}}));
    ASSERT_EQ(sh.chunks.size(), 1u);
    EXPECT_EQ(sh.chunks[0].size, 5u);
    EXPECT_EQ(toc->entries[3].link_target, "sh");
    EXPECT_EQ(toc->entries[4].link_target, "bin/sh");
    EXPECT_TRUE(toc->entries[5].chunks.empty());
    EXPECT_EQ(toc->entries[6].type, Type::kCharDevice);
    EXPECT_EQ(toc->entries[6].dev_major, 1u);
    EXPECT_EQ(toc->entries[6].dev_minor, 3u);
  }
}

TEST(EstargzTest, ChunksSpanUpToTheNextMember) {
  std::string big(10'000, 'b');
  EstargzLayer layer =
      WriteEstargz({File("a", big), File("b", "tiny"), File("c", "last")}, {.chunk_size = 4096});
  auto toc = ParseLayer(layer);
  ASSERT_TRUE(toc.ok()) << toc.status();
  std::vector<Chunk> chunks;
  for (const Entry& entry : toc->entries)
    chunks.insert(chunks.end(), entry.chunks.begin(), entry.chunks.end());
  ASSERT_EQ(chunks.size(), 5u);
  for (size_t i = 0; i < chunks.size(); i++) {
    EXPECT_EQ(chunks[i].blob_end, i + 1 < chunks.size() ? chunks[i + 1].blob_offset : layer.toc_offset);
    EXPECT_EQ(chunks[i].inner_offset, 0u);
  }
  EXPECT_EQ(chunks[2].file_offset, 8192u);
  EXPECT_EQ(chunks[2].size, 10'000u - 8192u);
}

TEST(EstargzTest, PayloadsThatShareAMemberHaveInnerOffsetsAndOneSpan) {
  EstargzLayer layer =
      WriteEstargz({File("a", "one"), File("b", "two"), File("c", std::string(20'000, 'c')), File("d", "4")},
                   {.min_chunk_size = 4096});
  auto toc = ParseLayer(layer);
  ASSERT_TRUE(toc.ok()) << toc.status();
  const Chunk& a = toc->entries[0].chunks[0];
  const Chunk& b = toc->entries[1].chunks[0];
  const Chunk& d = toc->entries[3].chunks[0];
  EXPECT_EQ(a.blob_offset, 0u);
  EXPECT_EQ(a.inner_offset, 512u);  // behind its own tar header
  EXPECT_EQ(b.inner_offset, 512u * 3);
  EXPECT_EQ(a.blob_end, b.blob_end);
  EXPECT_EQ(a.blob_end, d.blob_offset);
  EXPECT_EQ(d.inner_offset, 0u);
  EXPECT_EQ(d.blob_end, layer.toc_offset);
}

TEST(EstargzTest, LandmarksAndTheTocItselfAreLeftOut) {
  EstargzLayer layer = WriteEstargz({File("hot", "hot"), testing::Landmark(), File("cold", "cold")});
  auto toc = ParseLayer(layer);
  ASSERT_TRUE(toc.ok()) << toc.status();
  ASSERT_EQ(toc->entries.size(), 2u);
  EXPECT_GT(toc->prefetch_end, toc->entries[0].chunks[0].blob_offset);
  EXPECT_EQ(toc->prefetch_end, toc->entries[0].chunks[0].blob_end);
  EXPECT_FALSE(toc->has_no_prefetch_landmark);

  toc = ParseLayer(WriteEstargz({testing::Landmark(testing::kNoPrefetchLandmarkName), File("a", "b")}));
  ASSERT_TRUE(toc.ok());
  EXPECT_TRUE(toc->has_no_prefetch_landmark);
  EXPECT_EQ(toc->prefetch_end, 0u);
  EXPECT_EQ(toc->entries.size(), 1u);

  toc = ParseEntries(Reg("stargz.index.json", 5, kChunkDigest) + "," + Reg("sub/.prefetch.landmark", 0, ""));
  ASSERT_TRUE(toc.ok()) << toc.status();
  ASSERT_EQ(toc->entries.size(), 1u);  // a landmark counts only in the root
  EXPECT_EQ(toc->prefetch_end, 0u);
}

TEST(TocJsonTest, NamesAreNormalised) {
  for (const char* name : {"usr/bin", "./usr/bin", "/usr/bin/", "//usr/./bin//"}) {
    auto toc = ParseEntries(R"({"name":")" + std::string(name) + R"(","type":"dir"})");
    ASSERT_TRUE(toc.ok()) << toc.status();
    EXPECT_EQ(toc->entries[0].name, "usr/bin");
  }
  for (const char* name : {"", ".", "./", "/"}) {
    auto toc = ParseEntries(R"({"name":")" + std::string(name) + R"(","type":"dir"})");
    ASSERT_TRUE(toc.ok()) << toc.status();
    EXPECT_EQ(toc->entries[0].name, "");
  }
}

TEST(TocJsonTest, UnknownMembersAreIgnoredAtAnyPlace) {
  auto toc = ParseEstargzToc(
      R"({"extra":{"entries":[{"name":1}]},"version":1,"list":[[{"a":null}],true,1.5],"entries":[
    {"name":"a","NumLink":0,"type":"dir","userName":"root","deep":{"name":"b","xattrs":{"c":["d"]}},"list":[{"type":"x"}],"f":1.5,"n":null}]})",
      kTocOffset, kBlobSize, Limits{});
  ASSERT_TRUE(toc.ok()) << toc.status();
  ASSERT_EQ(toc->entries.size(), 1u);
  EXPECT_EQ(toc->entries[0].name, "a");
  EXPECT_TRUE(toc->entries[0].xattrs.empty());
}

TEST(TocJsonTest, AnEmptyTocIsAnEmptyLayer) {
  EXPECT_TRUE(ParseEntries("").ok());
  EXPECT_TRUE(ParseEstargzToc(R"({"version":1,"entries":null})", kTocOffset, kBlobSize, Limits{}).ok());
  EXPECT_FALSE(ParseEstargzToc(R"({"version":1})", kTocOffset, kBlobSize, Limits{}).ok());
}

TEST(TocJsonTest, TimesFollowRfc3339) {
  const std::vector<std::tuple<std::string, int64_t, uint32_t>> good = {
      {"1970-01-01T00:00:00Z", 0, 0},
      {"2000-02-29T23:59:59Z", 951'868'799, 0},
      {"2026-11-22T18:00:00.123456789Z", 1'795'370'400, 123'456'789},
      {"2026-11-22T18:00:00.5Z", 1'795'370'400, 500'000'000},
      {"2026-11-22T18:00:00.1234567899999Z", 1'795'370'400, 123'456'789},
      {"2026-11-22T20:30:00+02:30", 1'795'370'400, 0},
      {"1969-12-31T23:59:59.9Z", 0, 0},
      {"0001-01-01T00:00:00Z", 0, 0},
      {"2262-04-11T23:47:16Z", 9'223'372'036, 0},
      {"2262-04-11T23:47:17Z", 0, 0},
      {"9999-12-31T23:59:59Z", 0, 0}};
  for (const auto& [text, seconds, nanos] : good) {
    auto toc = ParseEntries(R"({"name":"a","type":"dir","modtime":")" + text + "\"}");
    ASSERT_TRUE(toc.ok()) << text << toc.status();
    EXPECT_EQ(toc->entries[0].mtime_seconds, seconds) << text;
    EXPECT_EQ(toc->entries[0].mtime_nanos, nanos) << text;
  }
  for (const char* text :
       {"yesterday", "2026-11-22", "2026-13-01T00:00:00Z", "2026-02-29T00:00:00Z", "2026-11-22T24:00:00Z",
        "2026-11-22T18:00:60Z", "2026-11-22T18:00:00", "2026-11-22T18:00:00.Z", "2026-11-22T18:00:00+2:30",
        "2026-11-22t18:00:00Z", "+026-11-22T18:00:00Z", "2026-11-22T18:00:00ZZ"}) {
    EXPECT_FALSE(ParseEntries(R"({"name":"a","type":"dir","modtime":")" + std::string(text) + "\"}").ok())
        << text;
  }
}

TEST(TocJsonTest, ChunkSizeZeroMeansToTheEndOfTheFile) {
  auto toc = ParseEntries(Reg("a", 100, kChunkDigest + R"(,"offset":5,"chunkSize":60)") +
                          R"(,{"name":"whatever","type":"chunk","offset":70,"chunkOffset":60,)" +
                          kChunkDigest + "}");
  ASSERT_TRUE(toc.ok()) << toc.status();
  ASSERT_EQ(toc->entries[0].chunks.size(), 2u);
  EXPECT_EQ(toc->entries[0].chunks[1].size, 40u);
  EXPECT_EQ(toc->entries[0].chunks[0].blob_end, 70u);
}

TEST(TocJsonTest, AFileOfOneChunkMayUseItsOwnDigest) {
  auto toc = ParseEntries(Reg("a", 100, Quoted("digest", kSomeDigest)));
  ASSERT_TRUE(toc.ok()) << toc.status();
  EXPECT_EQ("sha256:" + DigestHex(toc->entries[0].chunks[0].digest), kSomeDigest);
  // Of two chunks, the file's digest is not the chunk's.
  EXPECT_FALSE(ParseEntries(Reg("a", 100, Quoted("digest", kSomeDigest) + R"(,"chunkSize":60)") +
                            R"(,{"name":"a","type":"chunk","offset":70,"chunkOffset":60,)" + kChunkDigest +
                            "}")
                   .ok());
}

struct Hostile {
  const char* what;
  std::string entries;
  const char* says;  // part of the message
};

TEST(TocJsonTest, HostileEntriesAreRefusedWithTheirPositionAndName) {
  const std::string chunk = R"({"name":"f","type":"chunk",)" + kChunkDigest + ",";
  const std::vector<Hostile> table = {
      {"traversal", R"({"name":"../etc","type":"dir"})", ".."},
      {"traversal inside", R"({"name":"a/../../b","type":"dir"})", ".."},
      {"NUL", R"({"name":"a\u0000b","type":"dir"})", "NUL"},
      {"long name", R"({"name":")" + std::string(256, 'n') + R"(","type":"dir"})", "max_name_bytes"},
      {"deep",
       R"({"name":")" +
           [] {
             std::string s;
             for (int i = 0; i < 1025; i++) s += "d/";
             return s;
           }() +
           R"(","type":"dir"})",
       "max_depth"},
      {"long path",
       R"({"name":")" +
           [] {
             std::string s;
             for (int i = 0; i < 20; i++) s += std::string(250, 'p') + "/";
             return s;
           }() +
           R"(","type":"dir"})",
       "max_path_bytes"},
      {"no name", R"({"type":"dir"})", "no name"},
      {"no type", R"({"name":"a"})", "unknown type"},
      {"unknown type", R"({"name":"a","type":"door"})", "door"},
      {"root file", R"({"name":"/","type":"reg"})", "root"},
      {"type of a member", R"({"name":7,"type":"dir"})", "number"},
      {"size as text", R"({"name":"f","type":"reg","size":"5"})", "string"},
      {"negative size", R"({"name":"f","type":"reg","size":-1})", "negative"},
      {"fraction", R"({"name":"f","type":"reg","size":1.5})", "fraction"},
      {"over 63 bit", R"({"name":"f","type":"reg","size":9223372036854775808})", "out of range"},
      {"over 64 bit", R"({"name":"f","type":"reg","size":99999999999999999999})", "out of range"},
      {"absurd size", Reg("f", 1ull << 47, kChunkDigest), "max_file_bytes"},
      {"absurd chunk", Reg("f", 1ull << 30, kChunkDigest), "max_chunk_bytes"},
      {"absurd inner offset", Reg("f", 5, kChunkDigest + R"(,"innerOffset":99999999999)"), "max_chunk_bytes"},
      {"negative uid", R"({"name":"f","type":"dir","uid":-1})", "negative"},
      {"uid over 32 bit", R"({"name":"f","type":"dir","uid":4294967296})", "owner"},
      {"gid -1", R"({"name":"f","type":"dir","gid":4294967295})", "owner"},
      {"device number", R"({"name":"f","type":"char","devMajor":4096})", "device"},
      {"offset behind the TOC", Reg("f", 5, kChunkDigest + R"(,"offset":1073741824)"), "not before the TOC"},
      {"no digest", Reg("f", 5, ""), "no digest"},
      {"bad digest", Reg("f", 5, R"("chunkDigest":"sha256:abc")"), "64 digits"},
      {"other digest", Reg("f", 5, R"("chunkDigest":"md5:abc")"), "sha256"},
      {"chunk before any file", chunk + R"("chunkSize":1})", "does not follow"},
      {"chunk of a folder", R"({"name":"f","type":"dir"},)" + chunk + R"("chunkSize":1})", "does not follow"},
      {"chunk of an empty file", Reg("f", 0, "") + "," + chunk + R"("chunkSize":1})", "does not follow"},
      {"chunk too large", Reg("f", 5, kChunkDigest + R"(,"chunkSize":6)"), "beyond"},
      {"chunk too many", Reg("f", 5, kChunkDigest) + "," + chunk + R"("chunkOffset":5})", "overlaps"},
      {"overlap", Reg("f", 50, kChunkDigest + R"(,"chunkSize":20)") + "," + chunk + R"("chunkOffset":10})",
       "overlaps"},
      {"gap", Reg("f", 50, kChunkDigest + R"(,"chunkSize":20)") + "," + chunk + R"("chunkOffset":30})",
       "overlaps"},
      {"first chunk not at 0", Reg("f", 50, kChunkDigest + R"(,"chunkOffset":1)"), "overlaps"},
      {"chunk that ends early",
       Reg("f", 50, kChunkDigest + R"(,"chunkSize":20)") + "," + chunk +
           R"("chunkOffset":20,"chunkSize":20})",
       "cover 40 of 50"},
      {"more than can come out", Reg("f", 50'000, kChunkDigest + R"(,"offset":1073741820)"),
       "cannot come out"},
      {"empty symlink", R"({"name":"f","type":"symlink"})", "link target"},
      {"symlink with NUL", R"({"name":"f","type":"symlink","linkName":"a\u0000"})", "link target"},
      {"long symlink", R"({"name":"f","type":"symlink","linkName":")" + std::string(4096, 'l') + "\"}",
       "max_path_bytes"},
      {"hard link out of the layer", R"({"name":"f","type":"hardlink","linkName":"../x"})", ".."},
      {"hard link to the root", R"({"name":"f","type":"hardlink"})", "root"},
      {"xattr not base64", R"({"name":"f","type":"dir","xattrs":{"user.a":"%%%"}})", "base64"},
      {"xattr not text", R"({"name":"f","type":"dir","xattrs":{"user.a":1}})", "number"},
      {"xattrs not an object", R"({"name":"f","type":"dir","xattrs":[]})", "array"},
      {"xattr without name", R"({"name":"f","type":"dir","xattrs":{"":"YQ=="}})", "name of an xattr"},
      {"xattr in an xattr", R"({"name":"f","type":"dir","xattrs":{"user.a":{}}})", "object"},
      {"an array as entry", R"([])", "array"},
      {"a number as entry", R"(5)", "number"},
      {"null as entry", R"(null)", "null"},
  };
  for (const Hostile& hostile : table) {
    // Behind a good entry, so that the position is not 0.
    auto toc = ParseEntries(R"({"name":"good","type":"dir"},)" + hostile.entries);
    ASSERT_FALSE(toc.ok()) << hostile.what;
    EXPECT_THAT(Message(toc.status()), HasSubstr(hostile.says)) << hostile.what;
    EXPECT_THAT(Message(toc.status()), HasSubstr("entry")) << hostile.what;
    EXPECT_TRUE(toc.status().code() == absl::StatusCode::kInvalidArgument ||
                toc.status().code() == absl::StatusCode::kResourceExhausted)
        << hostile.what;
    EXPECT_LT(Message(toc.status()).size(), 1000u) << hostile.what;
  }
  auto toc = ParseEntries(R"({"name":"good","type":"dir"},{"name":"bad","type":"door"})");
  EXPECT_THAT(Message(toc.status()), HasSubstr("entry 1 (bad)"));
}

TEST(TocJsonTest, WhatIsNoTocIsRefused) {
  const std::vector<std::pair<std::string, const char*>> table = {
      {"", "byte"},
      {"{", "byte"},
      {"[]", "array"},
      {"1", "number"},
      {"null", "null"},
      {R"({"version":1,"entries":[]} x)", "byte"},
      {R"({"version":2,"entries":[]})", "version 2"},
      {R"({"version":"1","entries":[]})", "string"},
      {R"({"version":1,"entries":{}})", "object"},
      {R"({"version":1,"entries":[],"entries":[]})", "twice"},
      {"{\"version\":1,\"entries\":[{\"name\":\"\xff\"}]}", "byte"},
      {R"({"version":1,"entries":[{"name":"\ud800"}]})", "byte"},
      {R"({"version":1,"x":)" + std::string(100'000, '[') + std::string(100'000, ']') + "}", "too deeply"},
      {R"({"version":1,"entries":)" + std::string(100'000, '['), "array"},
  };
  for (const auto& [json, says] : table) {
    auto toc = ParseEstargzToc(json, kTocOffset, kBlobSize, Limits{});
    EXPECT_EQ(toc.status().code(), absl::StatusCode::kInvalidArgument) << json.substr(0, 60);
    EXPECT_THAT(Message(toc.status()), HasSubstr(says)) << json.substr(0, 60);
  }
  EXPECT_FALSE(ParseEstargzToc(R"({"version":1,"entries":[]})", 100, 100, Limits{}).ok());
}

TEST(TocJsonTest, TenMillionEntriesAreRefusedAtOnce) {
  std::string json = R"({"version":1,"entries":[)";
  const std::string entry = R"({"name":"a","type":"dir"},)";
  json.reserve(json.size() + entry.size() * 10'000'000 + 100);
  for (int i = 0; i < 10'000'000; i++) json += entry;
  json += R"({"name":"a","type":"dir"}]})";
  auto begin = std::chrono::steady_clock::now();
  auto toc = ParseEstargzToc(json, kTocOffset, kBlobSize, Limits{});
  EXPECT_EQ(toc.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(Message(toc.status()), HasSubstr("max_entries = 4000000"));
  EXPECT_LT(std::chrono::steady_clock::now() - begin, kTimeFactor * std::chrono::seconds(20));
}

TEST(TocJsonTest, LimitsHoldForChunksAndXattrsToo) {
  Limits limits;
  limits.max_entries = 3;
  std::string entries = Reg("a", 4, kChunkDigest + R"(,"chunkSize":1)");
  for (int i = 1; i < 4; i++) {
    entries += R"(,{"name":"a","type":"chunk","chunkSize":1,"chunkOffset":)" + std::to_string(i) + "," +
               kChunkDigest + "}";
  }
  EXPECT_EQ(ParseEntries(entries, limits).status().code(), absl::StatusCode::kResourceExhausted);
  limits.max_entries = 4;
  EXPECT_TRUE(ParseEntries(entries, limits).ok());

  const std::string two = R"({"name":"f","type":"dir","xattrs":{"user.a":"YWE=","user.b":"YmI="}})";
  limits.max_xattrs_per_entry = 1;
  EXPECT_THAT(Message(ParseEntries(two, limits).status()), HasSubstr("max_xattrs_per_entry"));
  limits.max_xattrs_per_entry = 2;
  limits.max_xattr_bytes = 1;
  EXPECT_THAT(Message(ParseEntries(two, limits).status()), HasSubstr("max_xattr_bytes"));
  limits.max_xattr_bytes = 2;
  EXPECT_TRUE(ParseEntries(two, limits).ok());
  limits.max_toc_bytes = 10;
  EXPECT_THAT(Message(ParseEntries(two, limits).status()), HasSubstr("max_toc_bytes"));
}

TEST(DigestTest, OnlyLowerCaseSha256IsADigest) {
  auto digest = ParseDigest(kSomeDigest);
  ASSERT_TRUE(digest.ok());
  EXPECT_EQ("sha256:" + DigestHex(*digest), kSomeDigest);
  std::string upper = kSomeDigest;
  std::transform(upper.begin() + 7, upper.end(), upper.begin() + 7,
                 [](char c) { return static_cast<char>(toupper(c)); });
  for (const std::string& bad :
       {upper, std::string("sha256:"), std::string(kSomeDigest) + "0", std::string(kSomeDigest).substr(7),
        "sha512:" + std::string(kSomeDigest).substr(7),
        std::string("sha256:") + std::string(63, '0') + "/"}) {
    EXPECT_FALSE(ParseDigest(bad).ok()) << bad;
  }
}

}  // namespace
}  // namespace holdfast::toc
