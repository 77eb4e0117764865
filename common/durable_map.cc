#include "common/durable_map.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "common/crc32c.h"
#include "common/sealed_memory.h"

namespace holdfast {
namespace {

constexpr uint64_t kMagic = 0x3150414d44'4648;  // "HFDMAP1"
constexpr uint64_t kHeadSlots[2] = {0, 512};
constexpr uint64_t kFirstArea = 4096;
constexpr uint64_t kAreaBytes = uint64_t{256} << 20;  // sparse
constexpr uint64_t kFileBytes = kFirstArea + 2 * kAreaBytes;
constexpr uint64_t kSlack = 64 << 10;  // of dead records, before a log is worth copying
constexpr uint32_t kErased = ~uint32_t{0};
constexpr uint64_t kMaxRecord = 256 << 10;
constexpr uint64_t kWindow = 4 * kMaxRecord;

struct Head {
  uint64_t magic;
  uint64_t number;
  uint64_t end;  // length of the log
  uint32_t area;
  uint32_t crc;  // of what is before it
};
static_assert(sizeof(Head) == 32);

struct RecordHead {
  uint32_t crc;  // of what comes after it, key and value included
  uint32_t key_size;
  uint32_t value_size;  // kErased: there is no value
  uint32_t reserved;
};
static_assert(sizeof(RecordHead) == 16);

uint32_t HeadCrc(const Head& head) { return Crc32c(&head, offsetof(Head, crc)); }

uint64_t RecordBytes(std::string_view key, std::string_view value) {
  return sizeof(RecordHead) + key.size() + value.size();
}

std::string EncodeRecord(std::string_view key, std::string_view value, bool erase) {
  RecordHead head{0, static_cast<uint32_t>(key.size()), erase ? kErased : static_cast<uint32_t>(value.size()),
                  0};
  std::string record(reinterpret_cast<const char*>(&head), sizeof(head));
  record.append(key).append(value);
  head.crc = Crc32c(record.data() + sizeof(head.crc), record.size() - sizeof(head.crc));
  memcpy(record.data(), &head.crc, sizeof(head.crc));
  return record;
}

absl::StatusOr<UniqueFd> Reopen(int file, int mode) {
  return OpenFile("/proc/self/fd/" + std::to_string(file), mode);
}

}  // namespace

absl::StatusOr<DurableMap> DurableMap::Create(const std::string& name) {
  HF_ASSIGN_OR_RETURN(UniqueFd file, MakeSealedMemory(name, static_cast<uint64_t>(kFileBytes)));
  DurableMap map(std::move(file));
  HF_RETURN_IF_ERROR(map.WriteHead(0, 0));
  return map;
}

absl::StatusOr<DurableMap> DurableMap::Open(int file) {
  HF_ASSIGN_OR_RETURN(UniqueFd own, Reopen(file, O_RDWR));
  DurableMap map(std::move(own));
  HF_RETURN_IF_ERROR(map.ReadHead());
  HF_RETURN_IF_ERROR(map.ReadLog());
  map.Discard(1 - map.area_);  // left by a death while copying
  return map;
}

absl::StatusOr<UniqueFd> DurableMap::OpenReadOnly() const { return Reopen(file_.get(), O_RDONLY); }

uint64_t DurableMap::AreaOffset(uint32_t area) const { return kFirstArea + area * kAreaBytes; }

absl::Status DurableMap::ReadHead() {
  std::optional<Head> best;
  for (uint64_t offset : kHeadSlots) {
    Head head{};
    if (!PreadFull(file_.get(), &head, sizeof(head), offset).ok()) continue;
    if (head.magic != kMagic || head.crc != HeadCrc(head)) continue;
    if (head.area > 1 || head.end > kAreaBytes) continue;
    if (!best || head.number > best->number) best = head;
  }
  if (!best) return DataLoss("it is no saved state, or its head is damaged");
  number_ = best->number;
  area_ = best->area;
  end_ = best->end;
  return absl::OkStatus();
}

absl::Status DurableMap::ReadLog() {
  const absl::Status damaged = DataLoss("a record of the saved state is damaged");
  std::string window;  // what was read last, from window_at on: a head that lies costs no memory
  uint64_t window_at = 0;
  for (uint64_t at = 0; at < end_;) {
    if (at + std::min(kMaxRecord, end_ - at) > window_at + window.size()) {
      window_at = at;
      window.resize(std::min(kWindow, end_ - at));
      if (!PreadFull(file_.get(), window.data(), window.size(), AreaOffset(area_) + at).ok()) return damaged;
    }
    std::string_view rest = std::string_view(window).substr(at - window_at);
    RecordHead head;
    if (rest.size() < sizeof(head)) return damaged;
    memcpy(&head, rest.data(), sizeof(head));
    uint64_t value_size = head.value_size == kErased ? 0 : head.value_size;
    uint64_t size = sizeof(head) + uint64_t{head.key_size} + value_size;
    if (size > rest.size() || size > kMaxRecord) return damaged;
    if (Crc32c(rest.data() + sizeof(head.crc), size - sizeof(head.crc)) != head.crc) return damaged;
    Note(rest.substr(sizeof(head), head.key_size), rest.substr(sizeof(head) + head.key_size, value_size),
         head.value_size == kErased);
    at += size;
  }
  return absl::OkStatus();
}

void DurableMap::Note(std::string_view key, std::string_view value, bool erase) {
  auto it = entries_.find(key);
  if (it != entries_.end()) live_bytes_ -= RecordBytes(key, it->second);
  if (!erase) live_bytes_ += RecordBytes(key, value);
  if (!erase && it != entries_.end()) {
    it->second = value;
  } else if (!erase) {
    entries_.emplace(key, value);
  } else if (it != entries_.end()) {
    entries_.erase(it);
  }
}

absl::Status DurableMap::WriteHead(uint32_t area, uint64_t end) {
  Head head{kMagic, number_ + 1, end, area, 0};
  head.crc = HeadCrc(head);
  HF_RETURN_IF_ERROR(PwriteFull(file_.get(), &head, sizeof(head), kHeadSlots[head.number % 2]));
  number_ = head.number;
  area_ = area;
  end_ = end;
  return absl::OkStatus();
}

absl::Status DurableMap::Append(std::string_view key, std::string_view value, bool erase) {
  if (RecordBytes(key, value) > kMaxRecord) return InvalidArgument("too long for the saved state");
  if (end_ > 2 * live_bytes_ + kSlack) HF_RETURN_IF_ERROR(Compact());
  std::string record = EncodeRecord(key, value, erase);
  if (record.size() > kAreaBytes - end_) return ResourceExhausted("the saved state is full");
  HF_RETURN_IF_ERROR(PwriteFull(file_.get(), record.data(), record.size(), AreaOffset(area_) + end_));
  HF_RETURN_IF_ERROR(WriteHead(area_, end_ + record.size()));
  Note(key, value, erase);
  return absl::OkStatus();
}

absl::Status DurableMap::Put(std::string_view key, std::string_view value) {
  auto it = entries_.find(key);
  if (it != entries_.end() && it->second == value) return absl::OkStatus();
  return Append(key, value, false);
}

absl::Status DurableMap::Erase(std::string_view key) {
  return entries_.find(key) == entries_.end() ? absl::OkStatus() : Append(key, "", true);
}

absl::Status DurableMap::Compact() {
  const uint32_t target = 1 - area_;
  Discard(target);
  std::string chunk;
  uint64_t written = 0;
  auto flush = [&]() -> absl::Status {
    HF_RETURN_IF_ERROR(PwriteFull(file_.get(), chunk.data(), chunk.size(), AreaOffset(target) + written));
    written += chunk.size();
    chunk.clear();
    return absl::OkStatus();
  };
  for (const auto& [key, value] : entries_) {
    chunk += EncodeRecord(key, value, false);
    if (chunk.size() >= kMaxRecord) HF_RETURN_IF_ERROR(flush());
  }
  HF_RETURN_IF_ERROR(flush());
  const uint32_t old = area_;
  HF_RETURN_IF_ERROR(WriteHead(target, written));
  Discard(old);
  return absl::OkStatus();
}

// Only memory is at stake: an area that is not in use is overwritten, not read.
void DurableMap::Discard(uint32_t area) {
  fallocate(file_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(AreaOffset(area)),
            static_cast<off_t>(kAreaBytes));
}

}  // namespace holdfast
