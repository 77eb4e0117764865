#include "worker/cache/presence_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>

#include "common/crc32c.h"

namespace holdfast::cache {
namespace {

constexpr char kMagic[8] = {'H', 'F', 'P', 'R', 'E', 'S', 0, 0};

static_assert(std::atomic<uint8_t>::is_always_lock_free && sizeof(std::atomic<uint8_t>) == 1);

std::string ContentPath(const std::string& folder, uint64_t generation) {
  return folder + "/content." + std::to_string(generation);
}
std::string PresencePath(const std::string& folder, uint64_t generation) {
  return folder + "/presence." + std::to_string(generation);
}

void CopyText(char* out, size_t size, const std::string& text) {
  std::memset(out, 0, size);
  std::memcpy(out, text.data(), std::min(size, text.size()));
}

bool TextIs(const char* stored, size_t size, const std::string& text) {
  return text.size() <= size && std::string(stored, strnlen(stored, size)) == text;
}

void Seal(PresenceHeader* header) { header->crc = Crc32c(header, offsetof(PresenceHeader, crc)); }

PresenceHeader MakeHeader(const PresenceIdentity& identity, uint64_t generation, uint32_t access_hour) {
  PresenceHeader header{};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  header.version = kPresenceVersion;
  header.header_bytes = kPresenceHeaderBytes;
  CopyText(header.layer, sizeof header.layer, identity.layer_hex);
  header.chunk_count = identity.chunk_count;
  header.content_bytes = identity.content_bytes;
  header.generation = generation;
  CopyText(header.vault_id, sizeof header.vault_id, identity.vault_id);
  CopyText(header.boot_id, sizeof header.boot_id, identity.boot_id);
  header.last_access = PackAccessHour(access_hour);
  Seal(&header);
  return header;
}

absl::Status Map(LayerContent::Files* files, int fd, uint64_t bytes) {
  int flags = fd >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
  if (base == MAP_FAILED) return ErrnoStatus(errno, "mmap of a presence file");
  files->marks = reinterpret_cast<std::atomic<uint8_t>*>(static_cast<uint8_t*>(base) + kPresenceHeaderBytes);
  files->mapped_bytes = bytes;
  return absl::OkStatus();
}

absl::Status CheckHeader(const PresenceHeader& header, uint64_t generation,
                         const PresenceIdentity& identity) {
  if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0) return DataLoss("presence file: wrong magic");
  if (header.version != kPresenceVersion || header.header_bytes != kPresenceHeaderBytes) {
    return DataLoss("presence file: unknown version");
  }
  if (header.crc != Crc32c(&header, offsetof(PresenceHeader, crc)))
    return DataLoss("presence file: wrong checksum");
  if (!TextIs(header.layer, sizeof header.layer, identity.layer_hex) || header.generation != generation ||
      header.chunk_count != identity.chunk_count || header.content_bytes != identity.content_bytes) {
    return DataLoss("presence file: describes other content");
  }
  return absl::OkStatus();
}

absl::StatusOr<uint64_t> SizeOf(int fd) {
  struct stat st {};
  if (fstat(fd, &st) != 0) return ErrnoStatus(errno, "fstat in the cache");
  return static_cast<uint64_t>(st.st_size);
}

}  // namespace

uint64_t PackAccessHour(uint32_t hour) { return (static_cast<uint64_t>(~hour) << 32) | hour; }

uint32_t UnpackAccessHour(uint64_t packed) {
  uint32_t hour = static_cast<uint32_t>(packed);
  return static_cast<uint32_t>(packed >> 32) == ~hour ? hour : 0;
}

PresenceHeader* HeaderOf(const LayerContent::Files& files) {
  return reinterpret_cast<PresenceHeader*>(reinterpret_cast<uint8_t*>(files.marks) - kPresenceHeaderBytes);
}

absl::StatusOr<std::shared_ptr<LayerContent::Files>> CreateGeneration(const std::string& folder,
                                                                      uint64_t generation,
                                                                      const PresenceIdentity& identity,
                                                                      uint32_t access_hour) {
  auto files = std::make_shared<LayerContent::Files>();
  files->generation = generation;
  HF_ASSIGN_OR_RETURN(files->data, OpenFile(ContentPath(folder, generation), O_RDWR | O_CREAT | O_TRUNC));
  if (ftruncate(files->data.get(), static_cast<off_t>(identity.content_bytes)) != 0) {
    return ErrnoStatus(errno, "ftruncate of a content file");
  }
  std::string temporary = folder + "/presence.tmp";
  HF_ASSIGN_OR_RETURN(files->presence, OpenFile(temporary, O_RDWR | O_CREAT | O_TRUNC));
  uint64_t bytes = kPresenceHeaderBytes + identity.chunk_count;
  if (int error = posix_fallocate(files->presence.get(), 0, static_cast<off_t>(bytes)); error != 0) {
    return ErrnoStatus(error, "posix_fallocate of a presence file");
  }
  PresenceHeader header = MakeHeader(identity, generation, access_hour);
  HF_RETURN_IF_ERROR(PwriteFull(files->presence.get(), &header, sizeof header, 0));
  HF_RETURN_IF_ERROR(Map(files.get(), files->presence.get(), bytes));
  if (rename(temporary.c_str(), PresencePath(folder, generation).c_str()) != 0) {
    return ErrnoStatus(errno, "rename of a presence file");
  }
  return files;
}

absl::StatusOr<std::shared_ptr<LayerContent::Files>> OpenGeneration(const std::string& folder,
                                                                    uint64_t generation,
                                                                    const PresenceIdentity& identity,
                                                                    bool may_renew) {
  auto files = std::make_shared<LayerContent::Files>();
  files->generation = generation;
  HF_ASSIGN_OR_RETURN(files->data, OpenFile(ContentPath(folder, generation), O_RDWR | O_NOFOLLOW));
  HF_ASSIGN_OR_RETURN(files->presence, OpenFile(PresencePath(folder, generation), O_RDWR | O_NOFOLLOW));
  HF_ASSIGN_OR_RETURN(uint64_t content_size, SizeOf(files->data.get()));
  HF_ASSIGN_OR_RETURN(uint64_t presence_size, SizeOf(files->presence.get()));
  if (presence_size != kPresenceHeaderBytes + identity.chunk_count)
    return DataLoss("presence file: wrong size");
  if (content_size != identity.content_bytes) return DataLoss("content file: wrong size");
  HF_RETURN_IF_ERROR(Map(files.get(), files->presence.get(), presence_size));
  PresenceHeader* header = HeaderOf(*files);
  HF_RETURN_IF_ERROR(CheckHeader(*header, generation, identity));
  if (!TextIs(header->vault_id, sizeof header->vault_id, identity.vault_id) ||
      !TextIs(header->boot_id, sizeof header->boot_id, identity.boot_id)) {
    if (!may_renew) return FailedPrecondition("presence file: of another vault or boot");
    HF_RETURN_IF_ERROR(RenewIdentity(*files, identity));
  }
  return files;
}

absl::StatusOr<std::shared_ptr<LayerContent::Files>> UnstoredGeneration(uint64_t chunk_count) {
  auto files = std::make_shared<LayerContent::Files>();
  HF_RETURN_IF_ERROR(Map(files.get(), -1, kPresenceHeaderBytes + chunk_count));
  return files;
}

absl::Status RenewIdentity(const LayerContent::Files& files, const PresenceIdentity& identity) {
  // Marks first: killed in between, the old header makes the next open do it again. The header in one write,
  // which a kill does not cut in two.
  DistrustMarks(files, identity.chunk_count);
  PresenceHeader renewed = *HeaderOf(files);
  CopyText(renewed.vault_id, sizeof renewed.vault_id, identity.vault_id);
  CopyText(renewed.boot_id, sizeof renewed.boot_id, identity.boot_id);
  Seal(&renewed);
  return PwriteFull(files.presence.get(), &renewed, offsetof(PresenceHeader, last_access), 0);
}

void DistrustMarks(const LayerContent::Files& files, uint64_t chunk_count) {
  for (uint64_t chunk = 0; chunk < chunk_count; chunk++) {
    if (files.marks[chunk].load(std::memory_order_relaxed) == kMarkAbsent) continue;
    // Compare-and-swap: a chunk that is dropped at this moment must stay dropped.
    uint8_t expected = kMarkVerified;
    files.marks[chunk].compare_exchange_strong(expected, kMarkUnverified);
  }
}

LayerContent::Files::~Files() {
  if (marks != nullptr) munmap(reinterpret_cast<uint8_t*>(marks) - kPresenceHeaderBytes, mapped_bytes);
}

}  // namespace holdfast::cache
