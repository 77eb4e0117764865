#include "worker/toc/entry_builder.h"

#include <algorithm>

#include "absl/strings/escaping.h"
#include "worker/toc/digest.h"

namespace holdfast::toc {
namespace {

constexpr std::string_view kTocName = "stargz.index.json";
constexpr std::string_view kPrefetchLandmark = ".prefetch.landmark";
constexpr std::string_view kNoPrefetchLandmark = ".no.prefetch.landmark";

constexpr uint64_t kModeBits = 07777;
constexpr uint64_t kMaxId = UINT32_MAX - 1;  // (uid_t)-1 means "none" to the kernel
constexpr uint64_t kMaxMajor = 0xfff;        // what the kernel's 32-bit device numbers hold
constexpr uint64_t kMaxMinor = 0xfffff;
constexpr uint64_t kMaxXattrNameBytes = 255;

// Deflate makes at most 1032 bytes of one (258 bytes a 2-bit code); a little more for the gzip member's ends.
constexpr uint64_t kMaxInflateRatio = 1040;

std::string Printable(std::string_view name) {
  constexpr size_t kShown = 200;
  std::string text = absl::Utf8SafeCEscape(ToAbsl(name.substr(0, kShown)));
  return name.size() > kShown ? text + "..." : text;
}

}  // namespace

void RawEntry::Clear() {
  for (std::string& text : texts) text.clear();
  numbers.fill(0);
  xattrs.clear();
  has_name = false;
}

std::string EntryBuilder::Where() const {
  return "TOC: entry " + std::to_string(index_) + " (" + Printable(current_) + "): ";
}

absl::Status EntryBuilder::Error(std::string_view message) const {
  return InvalidArgument(Where() + std::string(message));
}

absl::Status EntryBuilder::Limit(std::string_view message) const {
  return ResourceExhausted(Where() + std::string(message));
}

absl::Status EntryBuilder::Add(const RawEntry& raw) {
  if (index_ >= limits_.max_entries) {
    return ResourceExhausted("TOC: over the limit max_entries = " + std::to_string(limits_.max_entries));
  }
  current_ = raw.text(TextField::kName);
  absl::Status status;
  if (raw.text(TextField::kType) == "chunk") {
    status = AddChunkEntry(raw);
  } else {
    status = ClosePending();
    if (status.ok()) {
      Entry entry;
      HF_RETURN_IF_ERROR(Classify(raw, &entry));
      HF_RETURN_IF_ERROR(FillAttributes(raw, &entry));
      pending_ = std::move(entry);
      pending_index_ = index_;
      has_pending_ = true;
      pending_landmark_ = pending_.type == Type::kRegular &&
                          (pending_.name == kPrefetchLandmark || pending_.name == kNoPrefetchLandmark);
      pending_covered_ = 0;
      if (pending_.type == Type::kRegular && pending_.size > 0) status = AddChunk(raw);
      if (pending_landmark_) landmark_offset_ = raw.number(NumberField::kOffset);
    }
  }
  index_++;
  return status;
}

absl::Status EntryBuilder::Classify(const RawEntry& raw, Entry* entry) const {
  static constexpr std::pair<std::string_view, Type> kTypes[] = {
      {"dir", Type::kDirectory},     {"reg", Type::kRegular},     {"symlink", Type::kSymlink},
      {"hardlink", Type::kHardlink}, {"char", Type::kCharDevice}, {"block", Type::kBlockDevice},
      {"fifo", Type::kFifo}};
  if (!raw.has_name) return Error("it has no name");
  const auto* type = std::find_if(std::begin(kTypes), std::end(kTypes), [&](const auto& known) {
    return known.first == raw.text(TextField::kType);
  });
  if (type == std::end(kTypes))
    return Error("unknown type \"" + Printable(raw.text(TextField::kType)) + "\"");
  entry->type = type->second;
  absl::StatusOr<std::string> name = CleanName(raw.text(TextField::kName), limits_);
  if (!name.ok())
    return Annotate(name.status(), "TOC: entry " + std::to_string(index_) + " (" + Printable(current_) + ")");
  entry->name = *std::move(name);
  if (entry->name.empty() && entry->type != Type::kDirectory) return Error("the root must be a folder");

  const std::string& link = raw.text(TextField::kLinkName);
  if (entry->type == Type::kSymlink) {
    if (link.empty() || link.find('\0') != std::string::npos)
      return Error("its link target is empty or holds a NUL");
    if (link.size() > limits_.max_path_bytes) {
      return Limit("its link target is over the limit max_path_bytes = " +
                   std::to_string(limits_.max_path_bytes));
    }
    entry->link_target = link;
  } else if (entry->type == Type::kHardlink) {
    absl::StatusOr<std::string> target = CleanName(link, limits_);
    if (!target.ok()) return Annotate(target.status(), Where() + "link target");
    if (target->empty()) return Error("a hard link needs a target other than the root");
    entry->link_target = *std::move(target);
  }
  return absl::OkStatus();
}

absl::Status EntryBuilder::FillAttributes(const RawEntry& raw, Entry* entry) const {
  entry->mode = static_cast<uint32_t>(raw.number(NumberField::kMode) & kModeBits);
  uint64_t uid = raw.number(NumberField::kUid), gid = raw.number(NumberField::kGid);
  if (uid > kMaxId || gid > kMaxId) return Error("its owner does not fit into 32 bits");
  entry->uid = static_cast<uint32_t>(uid);
  entry->gid = static_cast<uint32_t>(gid);
  const std::string& time = raw.text(TextField::kModTime);
  if (!time.empty()) {
    absl::Status status = ParseTime(time, &entry->mtime_seconds, &entry->mtime_nanos);
    if (!status.ok()) return Error(FromAbsl(status.message()));
  }
  if (entry->type == Type::kCharDevice || entry->type == Type::kBlockDevice) {
    uint64_t major = raw.number(NumberField::kDevMajor), minor = raw.number(NumberField::kDevMinor);
    if (major > kMaxMajor || minor > kMaxMinor)
      return Error("its device number does not fit into 12 and 20 bits");
    entry->dev_major = static_cast<uint32_t>(major);
    entry->dev_minor = static_cast<uint32_t>(minor);
  }
  if (entry->type == Type::kRegular) {
    entry->size = raw.number(NumberField::kSize);
    if (entry->size > limits_.max_file_bytes) {
      return Limit("its size is over the limit max_file_bytes = " + std::to_string(limits_.max_file_bytes));
    }
  }
  return FillXattrs(raw, entry);
}

absl::Status EntryBuilder::FillXattrs(const RawEntry& raw, Entry* entry) const {
  if (raw.xattrs.size() > limits_.max_xattrs_per_entry) {
    return Limit("over the limit max_xattrs_per_entry = " + std::to_string(limits_.max_xattrs_per_entry));
  }
  for (const auto& [name, encoded] : raw.xattrs) {
    if (name.empty() || name.size() > kMaxXattrNameBytes || name.find('\0') != std::string::npos) {
      return Error("the name of an xattr is empty, longer than 255 bytes, or holds a NUL");
    }
    std::string value;
    if (!absl::Base64Unescape(ToAbsl(encoded), &value)) {
      return Error("xattr " + Printable(name) + " is not valid base64");
    }
    if (value.size() > limits_.max_xattr_bytes) {
      return Limit("xattr " + Printable(name) +
                   " is over the limit max_xattr_bytes = " + std::to_string(limits_.max_xattr_bytes));
    }
    if (!name.starts_with("trusted.")) entry->xattrs[name] = std::move(value);
  }
  return absl::OkStatus();
}

absl::Status EntryBuilder::AddChunkEntry(const RawEntry& raw) {
  if (!has_pending_ || pending_.type != Type::kRegular || pending_.size == 0) {
    return Error("a chunk that does not follow a file with content");
  }
  // A chunk belongs to the entry before it, whatever name it carries.
  return AddChunk(raw);
}

// `raw` is the file's own entry (its first chunk) or a chunk entry.
absl::Status EntryBuilder::AddChunk(const RawEntry& raw) {
  Chunk chunk;
  chunk.file_offset = raw.number(NumberField::kChunkOffset);
  chunk.blob_offset = raw.number(NumberField::kOffset);
  chunk.inner_offset = raw.number(NumberField::kInnerOffset);
  if (chunk.file_offset != pending_covered_ || chunk.file_offset >= pending_.size) {
    return Error("its chunk at " + std::to_string(chunk.file_offset) + " overlaps or leaves a gap (" +
                 std::to_string(pending_covered_) + " of " + std::to_string(pending_.size) +
                 " bytes covered so far)");
  }
  chunk.size = raw.number(NumberField::kChunkSize);
  if (chunk.size == 0) chunk.size = pending_.size - chunk.file_offset;
  if (chunk.size > pending_.size - chunk.file_offset)
    return Error("its chunk reaches beyond the end of the file");
  if (chunk.size > limits_.max_chunk_bytes || chunk.inner_offset > limits_.max_chunk_bytes) {
    return Limit("a chunk is over the limit max_chunk_bytes = " + std::to_string(limits_.max_chunk_bytes));
  }
  if (chunk.blob_offset >= toc_offset_) {
    return Error("its offset " + std::to_string(chunk.blob_offset) + " is not before the TOC at " +
                 std::to_string(toc_offset_));
  }
  // A file of one chunk may leave its chunk's digest out: the file's own says the same.
  std::string_view digest = raw.text(TextField::kChunkDigest);
  bool whole = chunk.file_offset == 0 && chunk.size == pending_.size;
  if (digest.empty() && whole) digest = raw.text(TextField::kDigest);
  if (digest.empty()) return Error("its chunk at " + std::to_string(chunk.file_offset) + " has no digest");
  absl::StatusOr<Digest> parsed = ParseDigest(digest);
  if (!parsed.ok()) return Error(FromAbsl(parsed.status().message()));
  chunk.digest = *parsed;
  if (chunk.inner_offset == 0) member_starts_.push_back(chunk.blob_offset);
  pending_covered_ += chunk.size;
  if (whole) pending_.chunks.reserve(1);
  pending_.chunks.push_back(chunk);
  return absl::OkStatus();
}

absl::Status EntryBuilder::ClosePending() {
  if (!has_pending_) return absl::OkStatus();
  has_pending_ = false;
  if (pending_covered_ != pending_.size) {
    return InvalidArgument("TOC: entry " + std::to_string(pending_index_) + " (" + Printable(pending_.name) +
                           "): its chunks cover " + std::to_string(pending_covered_) + " of " +
                           std::to_string(pending_.size) + " bytes");
  }
  if (pending_landmark_) {
    if (pending_.name == kNoPrefetchLandmark) toc_.has_no_prefetch_landmark = true;
    if (pending_.name == kPrefetchLandmark) toc_.prefetch_end = std::min(landmark_offset_, toc_offset_);
    return absl::OkStatus();
  }
  if (pending_.name == kTocName) return absl::OkStatus();
  toc_.entries.push_back(std::move(pending_));
  return absl::OkStatus();
}

absl::Status EntryBuilder::FillBlobEnds() {
  std::sort(member_starts_.begin(), member_starts_.end());
  member_starts_.erase(std::unique(member_starts_.begin(), member_starts_.end()), member_starts_.end());
  for (Entry& entry : toc_.entries) {
    for (Chunk& chunk : entry.chunks) {
      auto next = std::upper_bound(member_starts_.begin(), member_starts_.end(), chunk.blob_offset);
      chunk.blob_end = next == member_starts_.end() ? toc_offset_ : *next;
      // Also what keeps the sum of all sizes in proportion to the blob.
      if (chunk.inner_offset + chunk.size > (chunk.blob_end - chunk.blob_offset) * kMaxInflateRatio) {
        current_ = entry.name;
        return InvalidArgument("TOC: entry \"" + Printable(entry.name) + "\": a chunk of " +
                               std::to_string(chunk.size) + " bytes at " +
                               std::to_string(chunk.inner_offset) + " cannot come out of " +
                               std::to_string(chunk.blob_end - chunk.blob_offset) + " compressed bytes");
      }
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<Toc> EntryBuilder::Finish() {
  HF_RETURN_IF_ERROR(ClosePending());
  HF_RETURN_IF_ERROR(FillBlobEnds());
  if (toc_.has_no_prefetch_landmark) toc_.prefetch_end = 0;
  return std::move(toc_);
}

}  // namespace holdfast::toc
