#include "worker/fuse/fake_layer.h"

#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>

#include "common/clock.h"
#include "common/io.h"
#include "glog/logging.h"

namespace holdfast::fuse {

using layer::ChildRecord;
using layer::NodeRecord;
using layer::ReadResult;

namespace {
constexpr uint64_t kOddOffset =
    1234;  // where a file's content begins in its content file: unaligned, as when packed
}  // namespace

char ContentByte(uint64_t nodeid, uint64_t offset) {
  uint64_t x = (nodeid << 40) ^ (offset / 8);
  x *= 0x9e3779b97f4a7c15u;
  x ^= x >> 29;
  return static_cast<char>(x >> (8 * (offset % 8)));
}

std::string ContentBytes(uint64_t nodeid, uint64_t offset, uint64_t size) {
  std::string bytes(size, '\0');
  for (uint64_t i = 0; i < size; i++) bytes[i] = ContentByte(nodeid, offset + i);
  return bytes;
}

FakeIndex::FakeIndex() { NewNode(layer::kRootNode, S_IFDIR | 0755, 0); }

uint64_t FakeIndex::NewNode(uint64_t folder, uint32_t mode, uint64_t size) {
  NodeRecord node{};
  node.mode = mode;
  node.nlink = 1;
  node.size = size;
  node.mtime_seconds = 1'600'000'000;
  node.mtime_nanos = 123;
  node.parent = folder;
  nodes_.push_back(node);
  return nodes_.size();
}

uint64_t FakeIndex::Keep(const std::string& text) {
  strings_.push_back(text);
  return strings_.size() - 1;
}

void FakeIndex::AddChild(uint64_t folder, const std::string& name, uint64_t nodeid) {
  children_[folder].push_back({Keep(name), static_cast<uint32_t>(name.size()), 0, nodeid});
  names_[folder][name] = nodeid;
}

uint64_t FakeIndex::Add(uint64_t folder, const std::string& name, uint32_t mode, uint64_t size) {
  uint64_t nodeid = NewNode(folder, mode, size);
  AddChild(folder, name, nodeid);
  return nodeid;
}

uint64_t FakeIndex::AddSymlink(uint64_t folder, const std::string& name, const std::string& target) {
  uint64_t nodeid = Add(folder, name, S_IFLNK | 0777);
  mutable_node(nodeid).link_offset = Keep(target);
  mutable_node(nodeid).link_length = static_cast<uint32_t>(target.size());
  return nodeid;
}

void FakeIndex::AddHardLink(uint64_t folder, const std::string& name, uint64_t nodeid) {
  AddChild(folder, name, nodeid);
  mutable_node(nodeid).nlink++;
}

void FakeIndex::SetXattr(uint64_t nodeid, const std::string& name, const std::string& value) {
  xattrs_[nodeid][name] = value;
  mutable_node(nodeid).first_xattr = nodeid;
  mutable_node(nodeid).xattr_count++;
}

const NodeRecord* FakeIndex::node(uint64_t nodeid) const {
  return nodeid == 0 || nodeid > nodes_.size() ? nullptr : &nodes_[nodeid - 1];
}

uint64_t FakeIndex::Lookup(uint64_t folder, std::string_view name) const {
  auto it = names_.find(folder);
  if (it == names_.end()) return 0;
  auto child = it->second.find(std::string(name));
  return child == it->second.end() ? 0 : child->second;
}

std::span<const ChildRecord> FakeIndex::children(uint64_t folder) const {
  auto it = children_.find(folder);
  if (it == children_.end()) return {};
  return it->second;
}

std::string_view FakeIndex::name(const ChildRecord& child) const { return strings_[child.name_offset]; }

std::string_view FakeIndex::link_target(const NodeRecord& node) const { return strings_[node.link_offset]; }

std::vector<std::pair<std::string_view, std::string_view>> FakeIndex::xattrs(const NodeRecord& node) const {
  std::vector<std::pair<std::string_view, std::string_view>> result;
  auto it = xattrs_.find(node.first_xattr);
  if (node.xattr_count > 0 && it != xattrs_.end()) result.assign(it->second.begin(), it->second.end());
  return result;
}

FakeLayer::FakeLayer(std::shared_ptr<FakeIndex> index)
    : index_(std::move(index)), thread_([this] { Run(); }) {}

FakeLayer::~FakeLayer() {
  {
    MutexLock lock(&mutex_);
    stop_ = true;
    changed_.SignalAll();
  }
  thread_.join();
}

void FakeLayer::Store(uint64_t nodeid, Stored how) {
  MutexLock lock(&mutex_);
  stored_[nodeid] = how;
}

void FakeLayer::Hold(bool hold) {
  MutexLock lock(&mutex_);
  hold_ = hold;
}

void FakeLayer::Release(const absl::Status& status) {
  MutexLock lock(&mutex_);
  for (Fetch& fetch : waiting_) {
    fetch.status = status;
    ready_.push_back(std::move(fetch));
  }
  waiting_.clear();
  changed_.SignalAll();
}

size_t FakeLayer::waiting() const {
  MutexLock lock(&mutex_);
  return waiting_.size();
}

uint64_t FakeLayer::fetches() const {
  MutexLock lock(&mutex_);
  return fetches_;
}

bool FakeLayer::Next(Fetch* fetch) {
  MutexLock lock(&mutex_);
  while (!stop_ && ready_.empty()) changed_.Wait(&mutex_);
  if (stop_) return false;
  *fetch = std::move(ready_.front());
  ready_.pop_front();
  return true;
}

void FakeLayer::Run() {
  for (Fetch fetch; Next(&fetch); fetch = {}) {
    if (!fetch.status.ok()) {
      fetch.done(fetch.status);
      continue;
    }
    ReadResult result;
    auto bytes = std::make_shared<std::string>(ContentBytes(fetch.nodeid, fetch.offset, fetch.size));
    result.segments.push_back({nullptr, 0, bytes, 0, fetch.size});
    result.length = fetch.size;
    fetch.done(std::move(result));
  }
}

std::shared_ptr<const cache::LayerContent::Files> FakeLayer::FileFor(uint64_t nodeid) {
  auto it = files_.find(nodeid);
  if (it != files_.end()) return it->second;
  auto files = std::make_shared<cache::LayerContent::Files>();
  files->data.Reset(memfd_create("content", MFD_CLOEXEC));
  uint64_t size = index_->node(nodeid)->size;
  if (stored_[nodeid] == Stored::kTruncated) size /= 2;
  std::string bytes = ContentBytes(nodeid, 0, size);
  absl::Status written = PwriteFull(files->data.get(), bytes.data(), bytes.size(), kOddOffset);
  CHECK(written.ok()) << written;
  files_[nodeid] = files;
  return files;
}

std::optional<ReadResult> FakeLayer::ReadNow(uint64_t nodeid, uint64_t offset, uint64_t size) {
  MutexLock lock(&mutex_);
  auto it = stored_.find(nodeid);
  ReadResult result;
  result.length = size;
  switch (it == stored_.end() ? Stored::kMissing : it->second) {
    case Stored::kMissing:
      return std::nullopt;
    case Stored::kZeros:
      result.segments.push_back({nullptr, 0, nullptr, 0, size});
      return result;
    case Stored::kMemory: {
      // In two pieces, the second from the middle of its string.
      uint64_t half = size / 2;
      auto first = std::make_shared<std::string>(ContentBytes(nodeid, offset, half));
      auto second = std::make_shared<std::string>("xyz" + ContentBytes(nodeid, offset + half, size - half));
      result.segments.push_back({nullptr, 0, first, 0, half});
      result.segments.push_back({nullptr, 0, second, 3, size - half});
      return result;
    }
    case Stored::kFile:
    case Stored::kTruncated:
      result.segments.push_back({FileFor(nodeid), kOddOffset + offset, nullptr, 0, size});
      return result;
  }
  return std::nullopt;
}

void FakeLayer::ReadAsync(uint64_t nodeid, uint64_t offset, uint64_t size, uint64_t deadline, Done done) {
  MutexLock lock(&mutex_);
  fetches_++;
  Fetch fetch{nodeid, offset, size, std::move(done), absl::OkStatus()};
  const bool late = deadline < Clock::Real()->BootNanos();
  if (late) fetch.status = DeadlineExceeded("it is late already");
  if (hold_ && !late) {
    waiting_.push_back(std::move(fetch));
  } else {
    ready_.push_back(std::move(fetch));
    changed_.SignalAll();
  }
}

}  // namespace holdfast::fuse
