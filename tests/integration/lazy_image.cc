#include "tests/integration/lazy_image.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <utility>

#include "common/io.h"
#include "worker/layer/digest.h"

namespace holdfast::test {
namespace {

using toc::testing::Dir;
using toc::testing::EstargzLayer;
using toc::testing::File;
using toc::testing::Hardlink;
using toc::testing::Symlink;
using toc::testing::WriteEstargz;
using toc::testing::WriterEntry;

std::string RandomBytes(uint64_t seed, size_t size) {
  std::mt19937_64 random(seed);
  std::string bytes(size, '\0');
  for (char& byte : bytes) byte = static_cast<char>(random());
  return bytes;
}

// Returns the name of the committed snapshot.
absl::StatusOr<std::string> PrepareLazy(SnapshotsClient* snapshots, const std::string& host,
                                        const EstargzLayer& layer, const std::string& parent,
                                        const std::string& image, const std::string& layers) {
  const std::string chain = layer::Sha256Name(parent + layer.diff_id + image);
  const Labels labels = {{"containerd.io/snapshot.ref", chain},
                         {"containerd.io/snapshot/cri.image-ref", host + "/test/" + image + ":latest"},
                         {"containerd.io/snapshot/cri.layer-digest", layer.layer_digest},
                         {"containerd.io/snapshot/cri.image-layers", layers},
                         {"containerd.io/snapshot/stargz/toc.digest", layer.toc_digest}};
  auto prepared = snapshots->Prepare("default/1/extract-1 " + chain, parent, labels);
  if (prepared.ok()) return FailedPrecondition("the layer " + layer.layer_digest + " was not mounted lazily");
  if (prepared.status().code() != absl::StatusCode::kAlreadyExists) return prepared.status();
  HF_ASSIGN_OR_RETURN(auto found, snapshots->List("labels.\"containerd.io/snapshot.ref\"==" + chain +
                                                  ",parent==\"" + parent + "\""));
  if (found.size() != 1) return NotFound("the committed snapshot of " + chain + " is not listed");
  return found.front();
}

}  // namespace

Image MakeImage(uint64_t seed, const ImageShape& shape) {
  Image image;
  toc::testing::WriterOptions options;
  options.chunk_size = 256 * 1024;
  std::vector<WriterEntry> lower = {Dir("etc"), Dir("data")};
  WriterEntry secret = Dir("private", 0700);
  secret.uid = 1;
  secret.gid = 2;
  lower.push_back(secret);
  auto add = [&image](std::vector<WriterEntry>* layer, const std::string& name, const std::string& content) {
    layer->push_back(File(name, content));
    image.files[name] = content;
  };
  for (int i = 0; i < shape.small_files; ++i) {
    const uint64_t own = seed * 1000 + static_cast<uint64_t>(i);
    add(&lower, "data/f" + std::to_string(i), RandomBytes(own, 1000 + own % 20000));
  }
  add(&lower, "data/large", RandomBytes(seed, shape.large_bytes));
  add(&lower, "etc/kept", "kept");
  add(&lower, "etc/empty", "");
  lower.push_back(File("etc/deleted", "deleted"));
  lower.push_back(File("etc/replaced", "old"));
  lower.push_back(Symlink("etc/link", "kept"));
  lower.push_back(Hardlink("etc/hard", "etc/kept"));
  image.files["etc/hard"] = "kept";
  image.lower = WriteEstargz(lower, options);

  std::vector<WriterEntry> upper;
  add(&upper, "private/file", "in a folder that this layer only implies");
  upper.push_back(Dir("etc"));
  upper.push_back(File("etc/.wh.deleted", ""));
  add(&upper, "etc/replaced", "new");
  image.upper = WriteEstargz(upper, options);
  return image;
}

absl::StatusOr<std::string> PullLazily(SnapshotsClient* snapshots, RegistryServer* registry,
                                       const Image& image, const std::string& name) {
  const std::string first = registry->AddBlob(image.lower.blob);
  const std::string second = registry->AddBlob(image.upper.blob);
  HF_ASSIGN_OR_RETURN(std::string parent,
                      PrepareLazy(snapshots, registry->host(), image.lower, "", name, first + "," + second));
  return PrepareLazy(snapshots, registry->host(), image.upper, parent, name, second);
}

std::string ReadWhole(const std::string& path, size_t step, int flags) {
  auto fd = OpenFile(path, O_RDONLY | flags);
  if (!fd.ok()) return "error: " + fd.status().ToString();
  std::string content;
  std::unique_ptr<char, decltype(&free)> buffer(static_cast<char*>(aligned_alloc(4096, step)), &free);
  while (true) {
    ssize_t n = read(fd->get(), buffer.get(), step);
    if (n < 0) return "error: " + std::string(strerror(errno));
    if (n == 0) return content;
    content.append(buffer.get(), static_cast<size_t>(n));
  }
}

Readers::Readers(const Image& image, std::string root, int threads, Until until)
    : image_(image), root_(std::move(root)), until_(until), running_(threads) {
  for (const auto& [name, content] : image_.files) names_.push_back(name);
  for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { Run(); });
}

Readers::~Readers() { Stop(); }

void Readers::Stop() {
  stopping_ = true;
  Wait();
}

void Readers::Wait() {
  for (std::thread& thread : threads_) {
    if (thread.joinable()) thread.join();
  }
}

std::string Readers::first_error() const {
  MutexLock lock(&mutex_);
  return first_error_;
}

void Readers::Run() {
  const bool once = until_ == Until::kAllRead;
  for (size_t at = next_++; !stopping_ && (!once || at < names_.size()); at = next_++) {
    const std::string& name = names_[at % names_.size()];
    const std::string content = ReadWhole(root_ + "/" + name, 65536, once ? 0 : O_DIRECT);
    read_++;
    if (content == image_.files.at(name)) continue;
    wrong_++;
    MutexLock lock(&mutex_);
    if (first_error_.empty()) {
      first_error_ = name + ": " + (content.rfind("error: ", 0) == 0 ? content : "other bytes");
    }
  }
  running_--;
}

}  // namespace holdfast::test
