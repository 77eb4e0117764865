#include "worker/toc/testing/estargz_writer.h"

#include <glog/logging.h>
#include <openssl/evp.h>
#include <zlib.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <nlohmann/json.hpp>

#include "absl/strings/escaping.h"
#include "worker/toc/digest.h"

namespace holdfast::toc::testing {
namespace {

constexpr size_t kBlock = 512;

std::string DigestText(const std::string& bytes) {
  Digest digest;
  CHECK_EQ(EVP_Digest(bytes.data(), bytes.size(), digest.data(), nullptr, EVP_sha256(), nullptr), 1);
  return "sha256:" + DigestHex(digest);
}

std::string Padding(uint64_t size) { return std::string((kBlock - size % kBlock) % kBlock, '\0'); }

char TarType(Type type) {
  switch (type) {
    case Type::kDirectory:
      return '5';
    case Type::kRegular:
      return '0';
    case Type::kSymlink:
      return '2';
    case Type::kHardlink:
      return '1';
    case Type::kCharDevice:
      return '3';
    case Type::kBlockDevice:
      return '4';
    case Type::kFifo:
      return '6';
  }
  return '0';
}

const char* TocType(Type type) {
  switch (type) {
    case Type::kDirectory:
      return "dir";
    case Type::kRegular:
      return "reg";
    case Type::kSymlink:
      return "symlink";
    case Type::kHardlink:
      return "hardlink";
    case Type::kCharDevice:
      return "char";
    case Type::kBlockDevice:
      return "block";
    case Type::kFifo:
      return "fifo";
  }
  return "reg";
}

std::string TarName(const WriterEntry& entry) {
  bool slash = entry.type == Type::kDirectory && !entry.name.ends_with('/');
  return slash ? entry.name + "/" : entry.name;
}

void PutOctal(std::string* block, size_t at, size_t width, uint64_t value) {
  for (size_t i = width - 1; i > 0; i--, value >>= 3)
    (*block)[at + i - 1] = static_cast<char>('0' + (value & 7));
}

void PutText(std::string* block, size_t at, size_t width, std::string_view text) {
  std::memcpy(block->data() + at, text.data(), std::min(width, text.size()));
}

std::string UstarBlock(const std::string& name, const WriterEntry& entry, char type, uint64_t size) {
  std::string block(kBlock, '\0');
  PutText(&block, 0, 100, name);
  PutOctal(&block, 100, 8, entry.mode);
  PutOctal(&block, 108, 8, entry.uid & 07777777);
  PutOctal(&block, 116, 8, entry.gid & 07777777);
  PutOctal(&block, 124, 12, size);
  PutOctal(&block, 136, 12, static_cast<uint64_t>(std::max<int64_t>(entry.mtime, 0)));
  PutText(&block, 148, 8, "        ");
  block[156] = type;
  PutText(&block, 157, 100, entry.link_target);
  PutText(&block, 257, 8,
          std::string_view("ustar\0"
                           "00",
                           8));
  PutOctal(&block, 329, 8, entry.dev_major);
  PutOctal(&block, 337, 8, entry.dev_minor);
  uint64_t sum = 0;
  for (char c : block) sum += static_cast<uint8_t>(c);
  PutOctal(&block, 148, 7, sum);
  block[154] = '\0';
  block[155] = ' ';
  return block;
}

// "<length> key=value\n", where length counts itself.
std::string PaxRecord(const std::string& key, const std::string& value) {
  std::string body = " " + key + "=" + value + "\n";
  size_t length = body.size() + 1;
  while (std::to_string(length).size() + body.size() != length)
    length = std::to_string(length).size() + body.size();
  return std::to_string(length) + body;
}

std::string ModTime(int64_t seconds) {
  time_t time = seconds;
  std::tm utc{};
  gmtime_r(&time, &utc);
  char text[32];
  size_t n = std::strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%SZ", &utc);
  return std::string(text, n);
}

// Collects uncompressed bytes and cuts them into gzip members.
class BlobBuilder {
 public:
  explicit BlobBuilder(int level) : level_(level) {}
  void Append(const std::string& bytes) {
    member_ += bytes;
    tar_ += bytes;
  }
  void CutMember() {
    if (!member_.empty()) blob_ += GzipMember(member_, level_);
    member_.clear();
    member_start_ = blob_.size();
  }
  uint64_t member_start() const { return member_start_; }
  uint64_t member_bytes() const { return member_.size(); }
  std::string& blob() { return blob_; }
  const std::string& tar() const { return tar_; }

 private:
  const int level_;
  std::string blob_, member_, tar_;
  uint64_t member_start_ = 0;
};

using Json = nlohmann::ordered_json;

Json TocEntry(const WriterEntry& entry) {
  Json json;
  json["name"] = TarName(entry);
  json["type"] = TocType(entry.type);
  if (entry.type == Type::kRegular && !entry.content.empty()) json["size"] = entry.content.size();
  if (entry.mtime != 0) json["modtime"] = ModTime(entry.mtime);
  if (!entry.link_target.empty()) json["linkName"] = entry.link_target;
  if (entry.mode != 0) json["mode"] = entry.mode;
  if (entry.uid != 0) json["uid"] = entry.uid;
  if (entry.gid != 0) json["gid"] = entry.gid;
  if (entry.dev_major != 0) json["devMajor"] = entry.dev_major;
  if (entry.dev_minor != 0) json["devMinor"] = entry.dev_minor;
  for (const auto& [name, value] : entry.xattrs) json["xattrs"][name] = absl::Base64Escape(ToAbsl(value));
  if (entry.type == Type::kRegular) json["digest"] = DigestText(entry.content);
  return json;
}

bool IsLandmark(const std::string& name) {
  return name == kPrefetchLandmarkName || name == kNoPrefetchLandmarkName;
}

void WritePayload(const WriterEntry& entry, const WriterOptions& options, Json first, BlobBuilder* builder,
                  Json* toc) {
  Json json = std::move(first);
  for (uint64_t at = 0; at < entry.content.size(); at += options.chunk_size) {
    std::string chunk = entry.content.substr(at, options.chunk_size);
    if (IsLandmark(entry.name) || builder->member_bytes() >= options.min_chunk_size) builder->CutMember();
    if (builder->member_start() != 0) json["offset"] = builder->member_start();
    if (builder->member_bytes() != 0) json["innerOffset"] = builder->member_bytes();
    if (at != 0) json["chunkOffset"] = at;
    if (chunk.size() == options.chunk_size && chunk.size() != entry.content.size())
      json["chunkSize"] = chunk.size();
    json["chunkDigest"] = DigestText(chunk);
    builder->Append(chunk);
    toc->push_back(json);
    json = Json{{"name", TarName(entry)}, {"type", "chunk"}};
  }
  builder->Append(Padding(entry.content.size()));
}

std::string Footer(const std::string& extra) {
  std::string footer("\x1f\x8b\x08\x04\x00\x00\x00\x00\x00\xff", 10);
  footer += static_cast<char>(extra.size());
  footer += '\0';
  footer += extra;
  footer += std::string("\x01\x00\x00\xff\xff", 5);
  footer += std::string(8, '\0');
  return footer;
}

std::string HexOffset(uint64_t offset) {
  char text[17];
  std::snprintf(text, sizeof(text), "%016llx", static_cast<unsigned long long>(offset));
  return text;
}

}  // namespace

WriterEntry Dir(std::string name, uint32_t mode) {
  WriterEntry entry;
  entry.name = std::move(name);
  entry.type = Type::kDirectory;
  entry.mode = mode;
  return entry;
}

WriterEntry File(std::string name, std::string content, uint32_t mode) {
  WriterEntry entry;
  entry.name = std::move(name);
  entry.content = std::move(content);
  entry.mode = mode;
  return entry;
}

WriterEntry Symlink(std::string name, std::string target) {
  WriterEntry entry;
  entry.name = std::move(name);
  entry.type = Type::kSymlink;
  entry.mode = 0777;
  entry.link_target = std::move(target);
  return entry;
}

WriterEntry Hardlink(std::string name, std::string target) {
  WriterEntry entry;
  entry.name = std::move(name);
  entry.type = Type::kHardlink;
  entry.link_target = std::move(target);
  return entry;
}

WriterEntry Landmark(std::string name) { return File(std::move(name), "\x0f"); }

std::string GzipMember(const std::string& bytes, int level) {
  z_stream stream{};
  CHECK_EQ(deflateInit2(&stream, level, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY), Z_OK);
  std::string out(deflateBound(&stream, bytes.size()), '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(bytes.data()));
  stream.avail_in = static_cast<uInt>(bytes.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  CHECK_EQ(deflate(&stream, Z_FINISH), Z_STREAM_END);
  out.resize(stream.total_out);
  deflateEnd(&stream);
  return out;
}

std::string TarHeader(const WriterEntry& entry) {
  std::string name = TarName(entry), pax;
  if (name.size() > 100) pax += PaxRecord("path", name);
  if (entry.link_target.size() > 100) pax += PaxRecord("linkpath", entry.link_target);
  if (entry.uid > 07777777) pax += PaxRecord("uid", std::to_string(entry.uid));
  if (entry.gid > 07777777) pax += PaxRecord("gid", std::to_string(entry.gid));
  if (entry.mtime < 0) pax += PaxRecord("mtime", std::to_string(entry.mtime));
  for (const auto& [key, value] : entry.xattrs) pax += PaxRecord("SCHILY.xattr." + key, value);
  std::string out;
  if (!pax.empty()) {
    WriterEntry plain;
    out = UstarBlock("PaxHeaders.0/entry", plain, 'x', pax.size()) + pax + Padding(pax.size());
  }
  uint64_t size = entry.type == Type::kRegular ? entry.content.size() : 0;
  return out + UstarBlock(name, entry, TarType(entry.type), size);
}

std::string EstargzFooter(uint64_t toc_offset) {
  return Footer(std::string("SG\x16\x00", 4) + HexOffset(toc_offset) + "STARGZ");
}

std::string LegacyFooter(uint64_t toc_offset) { return Footer(HexOffset(toc_offset) + "STARGZ"); }

std::string ExternalTocFooter() { return Footer(std::string("SG\x11\x00", 4) + "STARGZEXTERNALTOC"); }

namespace {

std::string TocTar(const std::string& toc_json) {
  return TarHeader(File("stargz.index.json", toc_json)) + toc_json + Padding(toc_json.size()) +
         std::string(2 * kBlock, '\0');
}

}  // namespace

std::string TocMember(const std::string& toc_json) { return GzipMember(TocTar(toc_json)); }

EstargzLayer WriteEstargz(const std::vector<WriterEntry>& entries, const WriterOptions& options) {
  BlobBuilder builder(options.gzip_level);
  Json toc = Json::array();
  for (const WriterEntry& entry : entries) {
    builder.Append(TarHeader(entry));
    Json json = TocEntry(entry);
    if (entry.type == Type::kRegular && !entry.content.empty()) {
      WritePayload(entry, options, std::move(json), &builder, &toc);
    } else {
      toc.push_back(std::move(json));
    }
  }
  EstargzLayer layer;
  builder.CutMember();
  layer.toc_offset = builder.blob().size();
  layer.toc_json = Json{{"version", 1}, {"entries", std::move(toc)}}.dump(1, '\t');
  builder.Append(TocTar(layer.toc_json));
  builder.CutMember();
  builder.blob() += options.legacy_footer ? LegacyFooter(layer.toc_offset) : EstargzFooter(layer.toc_offset);
  layer.blob = std::move(builder.blob());
  layer.layer_digest = DigestText(layer.blob);
  layer.toc_digest = DigestText(layer.toc_json);
  layer.diff_id = DigestText(builder.tar());
  return layer;
}

}  // namespace holdfast::toc::testing
