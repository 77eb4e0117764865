#include "worker/cache/layer_content.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "glog/logging.h"
#include "worker/cache/layer_folder.h"

namespace holdfast::cache {
namespace {

constexpr int64_t kHourNanos = 3'600'000'000'000;
constexpr uint64_t kSecondNanos = 1'000'000'000;

uint64_t BlockBytes(const struct stat& st) { return static_cast<uint64_t>(st.st_blocks) * 512; }

}  // namespace

uint32_t StoreShared::CurrentHour() const {
  return static_cast<uint32_t>(options.clock->WallNanos() / kHourNanos);
}

LayerContentImpl::LayerContentImpl(std::shared_ptr<StoreShared> shared, std::shared_ptr<LayerAccount> account,
                                   PresenceIdentity identity)
    : shared_(std::move(shared)), account_(std::move(account)), identity_(std::move(identity)) {}

absl::StatusOr<std::shared_ptr<LayerContentImpl>> LayerContentImpl::Open(
    std::shared_ptr<StoreShared> shared, std::shared_ptr<LayerAccount> account, PresenceIdentity identity,
    bool create) {
  std::shared_ptr<LayerContentImpl> content(
      new LayerContentImpl(std::move(shared), std::move(account), std::move(identity)));
  MutexLock lock(&content->reopen_mutex_);
  HF_RETURN_IF_ERROR(content->OpenFolder(create));
  return content;
}

LayerContentImpl::~LayerContentImpl() {
  // None when opening failed.
  if (auto files = current(); files != nullptr) WriteAccessHour(*files);
}

absl::Status LayerContentImpl::OpenFolder(bool create) {
  // Of a layer that was there before, the presence file knows better: opening is not reading.
  uint32_t known = account_->access_hour, hour = known != 0 ? known : shared_->CurrentHour();
  const StoreShared::Vault vault = shared_->vault();
  auto opened = [&]() -> absl::StatusOr<LayerFolder::Opened> {
    HF_ASSIGN_OR_RETURN(LayerFolder locked, LayerFolder::Lock(folder(), create));
    return create ? locked.OpenCurrent(identity(vault), hour) : locked.FindCurrent(identity(vault));
  }();
  vault_epoch_ = vault.epoch;
  if (opened.ok()) {
    if (opened->damaged) shared_->damaged_layers++;
    const FolderUsage& usage = opened->usage;
    struct stat st {};
    if (fstat(opened->files->data.get(), &st) != 0) return ErrnoStatus(errno, "fstat of a content file");
    other_bytes_ = usage.bytes - std::min(usage.bytes, BlockBytes(st));
    shared_->SetBytes(account_.get(), usage.bytes);
    if (usage.access_hour > account_->access_hour) account_->access_hour = usage.access_hour;
    SetFiles(std::move(opened->files));
    return absl::OkStatus();
  }
  if (!create || opened.status().code() != absl::StatusCode::kResourceExhausted) return opened.status();
  if (known == 0) account_->access_hour = hour;
  LOG(WARNING) << "cache.not_storing content=" << identity_.layer_hex << " reason=\""
               << opened.status().message() << "\"";
  HF_ASSIGN_OR_RETURN(auto none, UnstoredGeneration(identity_.chunk_count));
  retry_boot_nanos_ = shared_->options.clock->BootNanos() + kSecondNanos;
  SetFiles(std::move(none));
  return absl::OkStatus();
}

std::shared_ptr<LayerContent::Files> LayerContentImpl::current() const {
  MutexLock lock(&files_mutex_);
  return files_;
}

std::shared_ptr<const LayerContent::Files> LayerContentImpl::files() const { return current(); }

void LayerContentImpl::SetFiles(std::shared_ptr<Files> files) {
  {
    MutexLock lock(&files_mutex_);
    files_.swap(files);
  }
  // The old files close here, outside the lock that readers take.
}

ChunkState LayerContentImpl::StateOf(const Files& files, uint64_t chunk) const {
  if (chunk >= identity_.chunk_count) return ChunkState::kAbsent;
  switch (files.marks[chunk].load(std::memory_order_acquire)) {
    case kMarkAbsent:
      return ChunkState::kAbsent;
    case kMarkVerified:
      return ChunkState::kPresent;
    default:
      return ChunkState::kUnverified;
  }
}

absl::Status LayerContentImpl::Put(uint64_t chunk, uint64_t store_offset, std::string_view bytes) {
  absl::Status status = Store(chunk, store_offset, bytes);
  if (!status.ok()) shared_->unstored_bytes += bytes.size();
  return status;
}

absl::Status LayerContentImpl::Store(uint64_t chunk, uint64_t store_offset, std::string_view bytes) {
  if (chunk >= identity_.chunk_count || store_offset > identity_.content_bytes ||
      bytes.size() > identity_.content_bytes - store_offset) {
    return InvalidArgument("chunk outside the layer's content");
  }
  StoreShared::WritePass pass(shared_.get());
  const ContentStore::Writing writing = pass.writing();
  if (writing == ContentStore::Writing::kNone) return absl::OkStatus();
  HF_RETURN_IF_ERROR(shared_->MakeRoom(bytes.size()));
  HF_ASSIGN_OR_RETURN(std::shared_ptr<Files> files, WritableFiles());
  if (StateOf(*files, chunk) == ChunkState::kPresent) return absl::OkStatus();
  HF_RETURN_IF_ERROR(PassFault(shared_->options.faults, "cache.before_data"));
  absl::Status written = PwriteFull(files->data.get(), bytes.data(), bytes.size(), store_offset);
  if (written.ok()) {
    HF_RETURN_IF_ERROR(PassFault(shared_->options.faults, "cache.before_mark"));
    const bool trusted = writing == ContentStore::Writing::kTrusted;
    files->marks[chunk].store(trusted ? kMarkVerified : kMarkUnverified, std::memory_order_release);
    dirty_ = true;
  }
  CountBytes(*files);
  return written;
}

absl::StatusOr<std::shared_ptr<LayerContent::Files>> LayerContentImpl::WritableFiles() {
  std::shared_ptr<Files> files = current();
  struct stat st {};
  if (files->data.valid()) {
    if (fstat(files->data.get(), &st) != 0) return ErrnoStatus(errno, "fstat of a content file");
    if (st.st_nlink > 0) {
      RepairIfShort(*files);
      return files;
    }
  }
  return Reopen(files);
}

bool LayerContentImpl::unlinked() const {
  std::shared_ptr<Files> files = current();
  struct stat st {};
  return files->data.valid() && fstat(files->data.get(), &st) == 0 && st.st_nlink == 0;
}

absl::StatusOr<std::shared_ptr<LayerContent::Files>> LayerContentImpl::Reopen(
    const std::shared_ptr<Files>& stale) {
  MutexLock lock(&reopen_mutex_);
  if (current() == stale) {
    if (shared_->options.clock->BootNanos() >= retry_boot_nanos_)
      HF_RETURN_IF_ERROR(OpenFolder(/*create=*/true));
  }
  std::shared_ptr<Files> files = current();
  if (!files->data.valid()) return ResourceExhausted("no room for the layer's cache files");
  return files;
}

void LayerContentImpl::RepairIfShort(const Files& files) {
  struct stat st {};
  if (!files.data.valid() || fstat(files.data.get(), &st) != 0) return;
  if (static_cast<uint64_t>(st.st_size) >= identity_.content_bytes) return;
  // Marks first: once the file has its length back, what was cut off reads as zeros.
  DistrustMarks(files, identity_.chunk_count);
  shared_->damaged_layers++;
  LOG(WARNING) << "cache.truncated content=" << identity_.layer_hex << " bytes=" << st.st_size
               << " expected=" << identity_.content_bytes;
  if (ftruncate(files.data.get(), static_cast<off_t>(identity_.content_bytes)) != 0) {
    PLOG(WARNING) << "cache.repair_failed content=" << identity_.layer_hex;
  }
}

void LayerContentImpl::CountBytes(const Files& files) {
  struct stat st {};
  if (fstat(files.data.get(), &st) != 0 || st.st_nlink == 0) return;
  shared_->SetBytes(account_.get(), BlockBytes(st) + other_bytes_);
}

void LayerContentImpl::MarkVerified(const Files& files, uint64_t chunk) {
  if (chunk >= identity_.chunk_count || shared_->writing() != ContentStore::Writing::kTrusted) return;
  uint8_t mark = files.marks[chunk].load();
  // Not a plain store: a chunk that another thread dropped meanwhile stays dropped.
  if (mark != kMarkAbsent) files.marks[chunk].compare_exchange_strong(mark, kMarkVerified);
}

void LayerContentImpl::Drop(const Files& files, uint64_t chunk, uint64_t size) {
  if (chunk >= identity_.chunk_count) return;
  if (files.marks[chunk].exchange(kMarkAbsent) != kMarkAbsent) {
    shared_->damaged_chunks++;
    LOG(WARNING) << "cache.dropped content=" << identity_.layer_hex << " chunk=" << chunk
                 << " bytes=" << size;
  }
  RepairIfShort(files);
}

void LayerContentImpl::Touch() {
  uint64_t now = shared_->options.clock->BootNanos();
  // Once a second is enough, and keeps readers from fighting for the cache line.
  uint64_t last = account_->active_boot_nanos.load(std::memory_order_relaxed);
  if (touched_.load(std::memory_order_relaxed) && now - last < kSecondNanos) return;
  touched_.store(true, std::memory_order_relaxed);
  account_->active_boot_nanos = now;
  account_->access_hour = shared_->CurrentHour();
}

int64_t LayerContentImpl::last_access_wall_nanos() const {
  return static_cast<int64_t>(account_->access_hour.load()) * kHourNanos;
}

void LayerContentImpl::WriteAccessHour(const Files& files) {
  std::atomic_ref<uint64_t> stored(HeaderOf(files)->last_access);
  uint32_t hour = account_->access_hour;
  if (hour > UnpackAccessHour(stored.load())) stored.store(PackAccessHour(hour));
}

PresenceIdentity LayerContentImpl::identity(StoreShared::Vault vault) const {
  PresenceIdentity current = identity_;
  current.vault_id = std::move(vault.id);
  return current;
}

absl::Status LayerContentImpl::RenewIdentity() {
  MutexLock lock(&reopen_mutex_);
  StoreShared::Vault vault = shared_->vault();
  if (vault_epoch_ == vault.epoch) return absl::OkStatus();
  std::shared_ptr<Files> files = current();
  DistrustMarks(*files, identity_.chunk_count);  // whatever becomes of the header
  vault_epoch_ = vault.epoch;
  if (!files->data.valid()) return absl::OkStatus();
  HF_ASSIGN_OR_RETURN(LayerFolder locked, LayerFolder::Lock(folder(), /*create=*/true));
  return cache::RenewIdentity(*files, identity(std::move(vault)));
}

void LayerContentImpl::Evict() {
  MutexLock lock(&reopen_mutex_);
  const StoreShared::Vault vault = shared_->vault();
  auto replaced = [&]() -> absl::StatusOr<std::shared_ptr<Files>> {
    HF_ASSIGN_OR_RETURN(LayerFolder locked, LayerFolder::Lock(folder(), /*create=*/true));
    return locked.Replace(identity(vault), std::max(account_->access_hour.load(), 1u));
  }();
  vault_epoch_ = vault.epoch;
  if (!replaced.ok()) {
    LOG(WARNING) << "cache.evict_failed content=" << identity_.layer_hex << " reason=\""
                 << replaced.status().message() << "\"";
    replaced = UnstoredGeneration(identity_.chunk_count);
    if (!replaced.ok()) return;
    retry_boot_nanos_ = shared_->options.clock->BootNanos() + kSecondNanos;
  }
  uint64_t bytes = UsageOf(folder()).bytes;
  other_bytes_ = bytes;
  shared_->SetBytes(account_.get(), bytes);
  SetFiles(std::move(*replaced));
}

void LayerContentImpl::Flush() {
  std::shared_ptr<Files> files = current();
  if (!files->data.valid()) return;
  RepairIfShort(*files);
  WriteAccessHour(*files);
  if (!dirty_.exchange(false)) return;
  if (fdatasync(files->data.get()) != 0 || fdatasync(files->presence.get()) != 0) {
    PLOG(WARNING) << "cache.sync_failed content=" << identity_.layer_hex;
  }
}

}  // namespace holdfast::cache
