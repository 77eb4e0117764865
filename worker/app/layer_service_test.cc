#include "worker/app/layer_service.h"

#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <fcntl.h>
#include <atomic>
#include <filesystem>
#include <future>
#include <thread>

#include "gtest/gtest.h"
#include "tests/support/registry_server.h"
#include "worker/app/samples.h"
#include "worker/layer/digest.h"
#include "worker/layer/layer_index.h"
#include "worker/toc/testing/estargz_writer.h"

namespace holdfast::app {
namespace {

using test::RegistryServer;
using toc::testing::Dir;
using toc::testing::EstargzLayer;
using toc::testing::File;
using toc::testing::WriteEstargz;
using toc::testing::WriterEntry;

class FakeVault final : public handover::MountVault {
 public:
  absl::StatusOr<handover::MountEntry> Mount(const std::string& path, const handover::InitOptions&,
                                             const std::string& blob) override {
    if (!fail.ok()) return fail;
    handover::MountEntry entry;
    entry.mount_id = ++last_id;
    entry.path = path;
    entry.blob = blob;
    HF_ASSIGN_OR_RETURN(entry.device, OpenFile("/dev/null", O_RDWR));
    blobs.push_back(blob);
    return entry;
  }
  absl::StatusOr<handover::MountState> Unmount(uint64_t id) override {
    unmounted.push_back(id);
    return next_state;
  }

  uint64_t last_id = 0;
  std::vector<std::string> blobs;
  std::vector<uint64_t> unmounted;
  handover::MountState next_state = handover::MountState::kGone;
  absl::Status fail;
};

class FakeFuseServer final : public fuse::FuseServer {
 public:
  absl::Status AddMount(fuse::MountSpec spec) override {
    if (!fail.ok()) return fail;
    uint64_t id = spec.mount_id;
    mounts[id] = std::move(spec);
    return absl::OkStatus();
  }
  void RemoveMount(uint64_t mount_id) override { mounts.erase(mount_id); }
  void OnMountEnded(std::function<void(uint64_t)>) override {}
  absl::StatusOr<uint64_t> AdoptLedger(uint64_t, fuse::LedgerHandle, bool, bool) override { return 0; }
  bool Drained(uint64_t) const override { return true; }
  void Start() override {}
  void Park() override {}
  void Resume() override {}
  void Hurry(uint64_t) override {}
  absl::Status BeginTrial(UniqueFd) override { return absl::OkStatus(); }
  void EndTrial() override {}
  absl::StatusOr<uint64_t> ForgetCached(UniqueFd) override { return 0; }
  std::vector<fuse::Sample> Samples(size_t, uint64_t) override { return {}; }
  absl::StatusOr<std::string> Replay(uint64_t, std::string_view) override { return std::string(); }
  std::vector<uint64_t> HeldBack() const override { return {}; }
  fuse::ServerStats stats() const override { return {}; }

  std::map<uint64_t, fuse::MountSpec> mounts;
  absl::Status fail;
};

class LayerServiceTest : public ::testing::Test {
 protected:
  LayerServiceTest() : files_(state_.path() + "/layers") { Build(ResolverOptions()); }

  void Build(const ResolverOptions& resolver_options) {
    service_.reset();
    resolver_.reset();
    client_ = fetch::RegistryClient::Create(fetch::ClientOptions());
    cache::StoreOptions store_options;
    store_options.root = state_.path() + "/content";
    store_options.vault_id = std::string(32, '0');
    ASSERT_TRUE(MakeDirs(store_options.root).ok());
    if (store_ == nullptr) store_ = std::move(*cache::ContentStore::Open(store_options));
    if (reader_ == nullptr) reader_ = layer::LayerReader::Create(layer::LayerReaderOptions());
    resolver_ = std::make_unique<LayerResolver>(resolver_options, &files_, client_.get());
    LayerServiceParts parts;
    parts.files = &files_;
    parts.resolver = resolver_.get();
    parts.vault = &vault_;
    parts.client = client_.get();
    parts.store = store_.get();
    parts.reader = reader_.get();
    parts.server = &server_;
    service_ = std::make_unique<LayerService>(parts);
  }

  EstargzLayer Push(const std::vector<WriterEntry>& entries) {
    EstargzLayer layer = WriteEstargz(entries);
    EXPECT_EQ(registry_.AddBlob(layer.blob), layer.layer_digest);
    return layer;
  }
  snapshot::LayerRequest Request(const EstargzLayer& layer) {
    snapshot::LayerRequest request;
    request.image_ref = registry_.host() + "/test/image:latest";
    request.layer_digest = layer.layer_digest;
    request.toc_digest = layer.toc_digest;
    request.tenant = "default";
    return request;
  }
  absl::StatusOr<snapshot::MountedLayer> Mount(const snapshot::LayerRequest& request, uint64_t snapshot_id,
                                               const std::vector<snapshot::ParentLayer>& parents = {}) {
    return service_->Mount(request, snapshot_id, state_.path() + "/fs", parents,
                           Clock::Real()->BootNanos() + 5'000'000'000);
  }
  // Content of a file of a mount, through the layer that the mount's first request would open.
  std::string Read(uint64_t mount_id, const std::string& path) {
    auto layer = server_.mounts.at(mount_id).open_layer();
    if (!layer.ok()) return layer.status().ToString();
    const uint64_t node = (*layer)->index().LookupPath(path);
    std::promise<absl::StatusOr<layer::ReadResult>> promise;
    auto future = promise.get_future();
    (*layer)->ReadAsync(
        node, 0, 1 << 20, Clock::Real()->BootNanos() + 5'000'000'000,
        [&](absl::StatusOr<layer::ReadResult> result) { promise.set_value(std::move(result)); });
    absl::StatusOr<layer::ReadResult> result = future.get();
    if (!result.ok()) return result.status().ToString();
    std::string content;
    for (const auto& segment : result->segments) {
      std::string bytes(segment.length, '\0');
      if (segment.file != nullptr) {
        EXPECT_TRUE(
            PreadFull(segment.file->data.get(), bytes.data(), bytes.size(), segment.file_offset).ok());
      } else if (segment.memory != nullptr) {
        bytes = segment.memory->substr(segment.memory_offset, segment.length);
      }
      content += bytes;
    }
    return content;
  }
  std::shared_ptr<const layer::LayerIndex> IndexOf(const EstargzLayer& layer, const std::string& sha256) {
    auto index = layer::LayerIndex::Open(files_.IndexPath(layer.layer_digest, sha256), sha256);
    EXPECT_TRUE(index.ok()) << index.status();
    return index.ok() ? *index : nullptr;
  }

  // Descriptors of content and presence files that this process has open.
  int OpenContentFiles(const std::string& kind = "") {
    int count = 0;
    for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
      std::error_code error;
      const std::string path = std::filesystem::read_symlink(entry.path(), error).string();
      const bool stored =
          path.starts_with(state_.path() + "/") &&
          (path.find("/content.") != std::string::npos || path.find("/presence.") != std::string::npos);
      if (stored && path.find(kind) != std::string::npos) count++;
    }
    return count;
  }
  // A thread that has just answered a read holds its layer for a moment.
  bool SoonOpen(int files) {
    const uint64_t deadline = Clock::Real()->BootNanos() + 10'000'000'000;
    while (OpenContentFiles() != files) {
      if (Clock::Real()->BootNanos() > deadline) return false;
      std::this_thread::yield();
    }
    return true;
  }
  int DeletedContentFiles() { return OpenContentFiles(" (deleted)"); }

  TempDir state_;
  RegistryServer registry_;
  FakeVault vault_;
  FakeFuseServer server_;
  LayerFiles files_;
  std::unique_ptr<fetch::RegistryClient> client_;
  std::unique_ptr<cache::ContentStore> store_;
  std::unique_ptr<layer::LayerReader> reader_;
  std::unique_ptr<LayerResolver> resolver_;
  std::unique_ptr<LayerService> service_;
};

TEST_F(LayerServiceTest, OneRequestMountsALayerAndItsFilesAreReadAfterwards) {
  EstargzLayer layer = Push({Dir("a"), File("a/f", "content")});
  auto mounted = Mount(Request(layer), 7);
  ASSERT_TRUE(mounted.ok()) << mounted.status();
  EXPECT_EQ(registry_.blob_requests(), 1u);
  EXPECT_EQ(mounted->blob_size, layer.blob.size());
  EXPECT_TRUE(service_->IsMounted(7));
  auto blob = handover::DecodeMountBlob(vault_.blobs.at(0));
  ASSERT_TRUE(blob.ok());
  EXPECT_EQ(blob->layer_digest, layer.layer_digest);
  EXPECT_EQ(blob->index_digest, mounted->index_sha256);
  EXPECT_EQ(blob->snapshot_id, 7u);
  EXPECT_TRUE(blob->no_xattrs);
  EXPECT_EQ(Read(1, "a/f"), "content");
}

TEST_F(LayerServiceTest, AKnownLayerIsMountedWithoutTheNetwork) {
  EstargzLayer layer = Push({File("f", "content")});
  ASSERT_TRUE(Mount(Request(layer), 1).ok());
  registry_.Stop();
  Build(ResolverOptions());
  auto again = Mount(Request(layer), 2);
  ASSERT_TRUE(again.ok()) << again.status();
}

TEST_F(LayerServiceTest, ATocThatReachesBeyondTheTailIsFetchedWithOneMoreRequest) {
  ResolverOptions options;
  options.tail_bytes = 200;
  Build(options);
  std::vector<WriterEntry> entries;
  for (int i = 0; i < 200; ++i)
    entries.push_back(File("f" + std::to_string(i), "content " + std::to_string(i)));
  EstargzLayer layer = Push(entries);
  ASSERT_TRUE(Mount(Request(layer), 1).ok());
  EXPECT_EQ(registry_.blob_requests(), 2u);
  EXPECT_EQ(Read(1, "f150"), "content 150");
}

TEST_F(LayerServiceTest, WithoutATocDigestALayerIsNotLazy) {
  snapshot::LayerRequest request = Request(Push({File("f", "x")}));
  request.toc_digest.clear();
  EXPECT_EQ(Mount(request, 1).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(vault_.blobs.empty());
}

TEST_F(LayerServiceTest, ATocOfAnotherDigestIsRefusedAlsoWhenTheLayerIsKnown) {
  EstargzLayer layer = Push({File("f", "x")});
  snapshot::LayerRequest request = Request(layer);
  request.toc_digest = layer::Sha256Name("another");
  EXPECT_EQ(Mount(request, 1).status().code(), absl::StatusCode::kFailedPrecondition);
  ASSERT_TRUE(Mount(Request(layer), 1).ok());
  EXPECT_EQ(Mount(request, 2).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(vault_.blobs.size(), 1u);
}

TEST_F(LayerServiceTest, ABlobThatIsNoEstargzLayerIsNotLazy) {
  snapshot::LayerRequest request = Request(Push({File("f", "x")}));
  request.layer_digest = registry_.AddBlob(std::string(100'000, 'x'));
  EXPECT_EQ(Mount(request, 1).status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(LayerServiceTest, ABlobTheRegistryDoesNotHaveIsNotFound) {
  snapshot::LayerRequest request = Request(Push({File("f", "x")}));
  request.layer_digest = layer::Sha256Name("absent");
  EXPECT_EQ(Mount(request, 1).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(LayerServiceTest, ManyMountsOfOneLayerAtOnceFetchItsTocOnce) {
  registry_.SetDelay(100'000'000);
  EstargzLayer layer = Push({File("f", "x")});
  std::atomic<int> failed{0};
  std::vector<std::thread> threads;
  for (uint64_t i = 1; i <= 4; ++i) {
    threads.emplace_back([&] {
      ResolveRequest request{registry_.host() + "/test/image:latest", layer.layer_digest, layer.toc_digest,
                             "default", Clock::Real()->BootNanos() + 5'000'000'000};
      if (!resolver_->Resolve(request).ok()) failed++;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failed, 0);
  EXPECT_EQ(registry_.blob_requests(), 1u);
}

TEST_F(LayerServiceTest, NeighboursAreResolvedAheadOfTheirTurn) {
  EstargzLayer first = Push({File("f", "x")});
  EstargzLayer second = Push({File("g", "y")});
  snapshot::LayerRequest request = Request(first);
  request.neighbours = {first.layer_digest, second.layer_digest};
  ASSERT_TRUE(Mount(request, 1).ok());
  ASSERT_TRUE(registry_.WaitFor([&] { return registry_.blob_requests() == 2; }))
      << "the neighbour was not asked for";
  ASSERT_TRUE(Mount(Request(second), 2).ok());
  EXPECT_EQ(registry_.blob_requests(), 2u) << "its turn cost another request";
}

TEST_F(LayerServiceTest, ADamagedIndexOnDiskIsBuiltAnew) {
  EstargzLayer layer = Push({File("f", "content")});
  auto mounted = Mount(Request(layer), 1);
  ASSERT_TRUE(mounted.ok());
  const std::string path = files_.IndexPath(layer.layer_digest, mounted->index_sha256);
  ASSERT_TRUE(WriteFileAtomic(path, "damaged").ok());
  auto again = Mount(Request(layer), 2);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->index_sha256, mounted->index_sha256);
  EXPECT_EQ(Read(2, "f"), "content");
}

TEST_F(LayerServiceTest, AnImpliedFolderTakesItsAttributesFromTheLazyLayerBelow) {
  WriterEntry folder = Dir("d", 0700);
  folder.uid = 5;
  EstargzLayer lower = Push({folder});
  EstargzLayer upper = Push({File("d/f", "x")});
  auto below = Mount(Request(lower), 1);
  ASSERT_TRUE(below.ok());
  auto bound = Mount(Request(upper), 2, {{1, state_.path() + "/fs", below->index_sha256}});
  ASSERT_TRUE(bound.ok()) << bound.status();
  auto index = IndexOf(upper, bound->index_sha256);
  const layer::NodeRecord* node = index->node(index->LookupPath("d"));
  EXPECT_EQ(node->mode & 07777u, 0700u);
  EXPECT_EQ(node->uid, 5u);
}

TEST_F(LayerServiceTest, AnImpliedFolderTakesItsAttributesFromAnOrdinaryFolderUnlessItWasDeleted) {
  const std::string plain = state_.path() + "/plain";
  ASSERT_TRUE(MakeDirs(plain + "/d").ok());
  ASSERT_EQ(chmod((plain + "/d").c_str(), 0711), 0);
  ASSERT_EQ(setxattr((plain + "/d").c_str(), "trusted.overlay.opaque", "y", 1, 0), 0);
  const std::string deleting = state_.path() + "/deleting";
  ASSERT_TRUE(MakeDirs(deleting).ok());
  ASSERT_EQ(mknod((deleting + "/d").c_str(), S_IFCHR, makedev(0, 0)), 0);

  auto seen = AttributesFrom({{nullptr, plain}})("d");
  ASSERT_TRUE(seen.has_value());
  EXPECT_EQ(seen->mode, 0711u);
  for (const auto& [name, value] : seen->xattrs) EXPECT_NE(name, "trusted.overlay.opaque");
  EXPECT_FALSE(AttributesFrom({{nullptr, deleting}, {nullptr, plain}})("d").has_value());
  EXPECT_FALSE(AttributesFrom({{nullptr, plain}})("d/e").has_value()) << "opaque: nothing below may be asked";
}

TEST_F(LayerServiceTest, AMountOfAPredecessorIsServedWithoutOpeningAnything) {
  EstargzLayer layer = Push({File("f", "content")});
  ASSERT_TRUE(Mount(Request(layer), 1).ok());
  handover::MountEntry entry;
  entry.mount_id = 50;
  entry.blob = vault_.blobs.at(0);
  entry.device = std::move(*OpenFile("/dev/null", O_RDWR));
  ASSERT_TRUE(service_->AdoptMount(std::move(entry)).ok());
  EXPECT_TRUE(service_->Serves(50));
  EXPECT_EQ(Read(50, "f"), "content");

  handover::MountEntry broken;
  broken.mount_id = 51;
  broken.blob = "no blob";
  broken.device = std::move(*OpenFile("/dev/null", O_RDWR));
  ASSERT_TRUE(service_->AdoptMount(std::move(broken)).ok());
  EXPECT_TRUE(service_->Serves(51));
  EXPECT_EQ(server_.mounts.at(51).open_layer().status().code(), absl::StatusCode::kDataLoss)
      << "its readers get errors; they must not hang";
  EXPECT_EQ(service_->Layers().size(), 1u);
}

TEST_F(LayerServiceTest, AMountThatIsFoundInTheVaultsListWhileItIsMadeIsServedOnce) {
  EstargzLayer layer = Push({File("f", "content")});
  ASSERT_TRUE(Mount(Request(layer), 1).ok());
  server_.fail = AlreadyExists("served");
  handover::MountEntry again;
  again.mount_id = 1;
  again.blob = vault_.blobs.at(0);
  again.device = std::move(*OpenFile("/dev/null", O_RDWR));
  EXPECT_TRUE(service_->AdoptMount(std::move(again)).ok());
  EXPECT_TRUE(service_->Serves(1));
  EXPECT_EQ(Read(1, "f"), "content");
}

TEST_F(LayerServiceTest, AnImageReadsFromItsOwnRegistryThoughAnotherOpenedTheLayerFirst) {
  EstargzLayer layer = Push({File("f", "content")});
  RegistryServer mirror;
  mirror.AddBlob(layer.blob);
  ASSERT_TRUE(Mount(Request(layer), 1).ok());
  auto first = server_.mounts.at(1).open_layer();
  ASSERT_TRUE(first.ok());
  snapshot::LayerRequest request = Request(layer);
  request.image_ref = mirror.host() + "/test/image:latest";
  ASSERT_TRUE(Mount(request, 2).ok());
  registry_.Stop();
  EXPECT_EQ(Read(2, "f"), "content");
  EXPECT_EQ(mirror.blob_requests(), 1u);
  EXPECT_EQ(Read(1, "f"), "content") << "what is on disk is shared";
}

TEST_F(LayerServiceTest, AMountInUseIsServedOnAfterUnmountUntilItIsGone) {
  ASSERT_TRUE(Mount(Request(Push({File("f", "x")})), 1).ok());
  vault_.next_state = handover::MountState::kDetached;
  bool still_used = false;
  ASSERT_TRUE(service_->Unmount(1, &still_used).ok());
  EXPECT_TRUE(still_used);
  EXPECT_FALSE(service_->IsMounted(1));
  EXPECT_EQ(server_.mounts.count(1), 1u);
  service_->ForgetMounts({1});
  EXPECT_TRUE(server_.mounts.empty());
}

TEST_F(LayerServiceTest, UnmountingWhatIsNotMountedIsFine) {
  bool still_used = true;
  EXPECT_TRUE(service_->Unmount(99, &still_used).ok());
  EXPECT_FALSE(still_used);
  EXPECT_TRUE(vault_.unmounted.empty());
}

TEST_F(LayerServiceTest, AMountThatCannotBeServedIsUndone) {
  server_.fail = Internal("no");
  EXPECT_FALSE(Mount(Request(Push({File("f", "x")})), 1).ok());
  EXPECT_EQ(vault_.unmounted.size(), 1u);
  EXPECT_FALSE(service_->IsMounted(1));
}

TEST_F(LayerServiceTest, ARemountNeedsTheIndexAndNoNetwork) {
  EstargzLayer layer = Push({File("f", "content")});
  auto mounted = Mount(Request(layer), 1);
  ASSERT_TRUE(mounted.ok());
  service_->ForgetMounts({1});
  registry_.Stop();
  const std::string image = registry_.host() + "/test/image:latest";
  EXPECT_FALSE(service_
                   ->Remount(layer.layer_digest, std::string(64, '0'), image, layer.blob.size(), 1,
                             state_.path() + "/fs")
                   .ok());
  absl::Status status = service_->Remount(layer.layer_digest, mounted->index_sha256, image, layer.blob.size(),
                                          1, state_.path() + "/fs");
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_TRUE(service_->IsMounted(1));
}

TEST_F(LayerServiceTest, LayersAndUsageShowWhatIsOnDisk) {
  EstargzLayer layer = Push({File("f", "content")});
  auto mounted = Mount(Request(layer), 1);
  ASSERT_TRUE(mounted.ok()) << mounted.status();
  EXPECT_EQ(Read(1, "f"), "content");
  std::vector<handover::LayerInfo> layers = service_->Layers();
  ASSERT_EQ(layers.size(), 1u);
  EXPECT_EQ(layers[0].digest, layer.layer_digest);
  EXPECT_EQ(layers[0].content_bytes, 7u);
  EXPECT_EQ(layers[0].files, 1u);
  EXPECT_EQ(layers[0].mounts, 1u);
  uint64_t bytes = 0, inodes = 0;
  service_->Usage(layer.layer_digest, mounted->index_sha256, &bytes, &inodes);
  EXPECT_GE(bytes, 7u) << "in blocks of the disk";
  EXPECT_EQ(layers[0].cached_bytes, 7u);
  EXPECT_EQ(inodes, 2u);
}

TEST_F(LayerServiceTest, ContentThatOneTocVouchedForNeverServesAnImageThatNamesAnother) {
  EstargzLayer honest = Push({File("f", "honest")});
  // Another registry serves other bytes, of the same shape, under the digest of the public layer.
  RegistryServer elsewhere;
  EstargzLayer forged = WriteEstargz({File("f", "forged")});
  elsewhere.AddBlobAs(honest.layer_digest, forged.blob);
  snapshot::LayerRequest request;
  request.image_ref = elsewhere.host() + "/other/image:latest";
  request.layer_digest = honest.layer_digest;
  request.toc_digest = forged.toc_digest;
  request.tenant = "other";
  ASSERT_NE(forged.toc_digest, honest.toc_digest);
  auto mounted = Mount(request, 1);
  ASSERT_TRUE(mounted.ok()) << mounted.status();
  EXPECT_EQ(Read(1, "f"), "forged") << "what that image's own TOC says";

  ASSERT_TRUE(Mount(Request(honest), 2).ok());
  EXPECT_EQ(Read(2, "f"), "honest");
  EXPECT_EQ(Read(1, "f"), "forged");
}

std::vector<handover::SampleFile> OfKind(const std::vector<handover::SampleFile>& samples,
                                         handover::SampleKind kind) {
  std::vector<handover::SampleFile> found;
  for (const auto& sample : samples) {
    if (sample.kind == kind) found.push_back(sample);
  }
  return found;
}

std::string RawSha256(const std::string& bytes) {
  const toc::Digest digest = layer::Sha256Raw(bytes);
  return std::string(digest.begin(), digest.end());
}

constexpr uint64_t kLater = 30'000'000'000;

TEST_F(LayerServiceTest, SamplesShowOnlyWhatLiesOnThisDiskAndAskNobody) {
  const std::string odd = "odd \n n\xc3\xa4me";  // a table of contents holds UTF-8 only
  const std::string content(5000, 'c');
  EstargzLayer layer =
      Push({Dir("d"), Dir("d/e"), File("d/e/cached", content), File("d/e/" + odd, content + "2"),
            File("d/e/missing", std::string(200'000, 'm')), File("d/.wh.deleted", ""), File("empty", "")});
  ASSERT_TRUE(Mount(Request(layer), 7).ok());
  std::vector<handover::SampleFile> before = service_->Samples(50, Clock::Real()->BootNanos() + kLater);
  EXPECT_TRUE(OfKind(before, handover::SampleKind::kFile).empty()) << "nothing was read yet";
  ASSERT_EQ(OfKind(before, handover::SampleKind::kFolder).size(), 1u);
  EXPECT_EQ(before.at(0).path, "") << "the root";

  EXPECT_EQ(Read(1, "d/e/cached"), content);
  EXPECT_EQ(Read(1, "d/e/" + odd), content + "2");
  const uint64_t asked = registry_.blob_requests();
  registry_.Stop();
  std::vector<handover::SampleFile> samples = service_->Samples(50, Clock::Real()->BootNanos() + kLater);
  std::map<std::string, std::string> files;
  for (const auto& sample : OfKind(samples, handover::SampleKind::kFile)) {
    EXPECT_EQ(sample.mount_id, 1u);
    EXPECT_EQ(sample.offset, 0u);
    files[sample.path] = sample.digest;
  }
  EXPECT_EQ(files.at("d/e/cached"), RawSha256(content));
  EXPECT_EQ(files.at("d/e/" + odd), RawSha256(content + "2")) << "a name of any bytes";
  EXPECT_EQ(files.count("empty"), 0u);
  auto folders = OfKind(samples, handover::SampleKind::kFolder);
  ASSERT_EQ(folders.size(), 1u);
  EXPECT_EQ(folders[0].path, "d/e") << "where a file was";
  const std::string names = std::string("cached") + '\0' + "missing" + '\0' + odd + '\0';
  EXPECT_EQ(folders[0].digest, RawSha256(names));
  auto absent = OfKind(samples, handover::SampleKind::kAbsent);
  ASSERT_EQ(absent.size(), 1u);
  EXPECT_NE(absent[0].path, OfKind(before, handover::SampleKind::kAbsent).at(0).path)
      << "the kernel may remember the absence of a name that was asked for";
  EXPECT_EQ(asked, registry_.blob_requests());
}

// After a rollback nothing that lies on this disk is believed unseen, and the next candidate is to be checked
// with it all the same.
TEST_F(LayerServiceTest, SamplesAreVerifiedFirstWhereTheStoreIsNotTrusted) {
  const std::string content(5000, 'c');
  EstargzLayer layer = Push({Dir("d"), File("d/good", content), File("d/bad", content + "2")});
  ASSERT_TRUE(Mount(Request(layer), 1).ok());
  EXPECT_EQ(Read(1, "d/good"), content);
  EXPECT_EQ(Read(1, "d/bad"), content + "2");
  auto opened = server_.mounts.at(1).open_layer();
  ASSERT_TRUE(opened.ok()) << opened.status();
  const layer::LayerIndex& index = (*opened)->index();
  const std::shared_ptr<cache::LayerContent> stored = (*opened)->content();
  auto state = [&](const std::string& path) {
    return stored->StateOf(*stored->files(), index.node(index.LookupPath(path))->first);
  };
  ASSERT_TRUE(store_->SetVaultId(std::string(32, '1')).ok());
  ASSERT_EQ(state("d/good"), cache::ChunkState::kUnverified);
  const uint64_t at = index.chunks()[index.node(index.LookupPath("d/bad"))->first].store_offset;
  ASSERT_TRUE(PwriteFull(stored->files()->data.get(), "x", 1, at).ok());
  registry_.Stop();

  EXPECT_TRUE(service_->Samples(50, 1).empty()) << "the time is over";
  EXPECT_EQ(state("d/good"), cache::ChunkState::kUnverified) << "nothing was read when the time was over";
  auto files =
      OfKind(service_->Samples(50, Clock::Real()->BootNanos() + kLater), handover::SampleKind::kFile);
  ASSERT_EQ(files.size(), 1u);
  EXPECT_EQ(files[0].path, "d/good");
  EXPECT_EQ(files[0].digest, RawSha256(content));
  EXPECT_EQ(state("d/good"), cache::ChunkState::kPresent);
  EXPECT_EQ(state("d/bad"), cache::ChunkState::kAbsent) << "what is damaged is dropped, as by a read";
}

TEST_F(LayerServiceTest, AWhiteoutIsListedUnderTheNameOfItsDevice) {
  EstargzLayer layer =
      Push({Dir("d"), File("d/.wh.gone", ""), File("d/.wh..wh..opq", ""), File("d/f", "content")});
  ASSERT_TRUE(Mount(Request(layer), 1).ok());
  EXPECT_EQ(Read(1, "d/f"), "content");
  auto folders =
      OfKind(service_->Samples(50, Clock::Real()->BootNanos() + kLater), handover::SampleKind::kFolder);
  ASSERT_EQ(folders.size(), 1u);
  EXPECT_EQ(folders[0].path, "d");
  EXPECT_EQ(folders[0].digest, RawSha256(std::string("f") + '\0' + "gone" + '\0'));
}

TEST_F(LayerServiceTest, SamplesAreSpreadOverMountsBoundedInNumberInLengthAndInTime) {
  std::string large(1'000'000, '\0');
  for (size_t i = 0; i < large.size(); ++i) large[i] = static_cast<char>(i * 2654435761u >> 13);
  for (uint64_t id = 1; id <= 4; ++id) {
    EstargzLayer layer = Push({File("large", large), File("f", "content " + std::to_string(id))});
    ASSERT_TRUE(Mount(Request(layer), id).ok());
    EXPECT_EQ(Read(id, "f"), "content " + std::to_string(id));
    EXPECT_EQ(Read(id, "large"), large);
  }
  auto samples = service_->Samples(12, Clock::Real()->BootNanos() + kLater);
  ASSERT_EQ(samples.size(), 12u);
  std::map<uint64_t, int> of_mount;
  for (const auto& sample : samples) of_mount[sample.mount_id]++;
  EXPECT_EQ(of_mount.size(), 4u);
  samples = service_->Samples(1000, Clock::Real()->BootNanos() + kLater);
  int large_ones = 0;
  for (const auto& sample : OfKind(samples, handover::SampleKind::kFile)) {
    EXPECT_LE(sample.length, kSampleBytes);
    if (sample.path != "large") continue;
    large_ones++;
    EXPECT_EQ(sample.digest, RawSha256(large.substr(sample.offset, sample.length)));
  }
  EXPECT_EQ(large_ones, 4);
  EXPECT_TRUE(service_->Samples(1000, 1).empty()) << "the time is over";
  EXPECT_TRUE(service_->Samples(0, Clock::Real()->BootNanos() + kLater).empty());
}

TEST_F(LayerServiceTest, WhatIsOpenedAheadServesTheFirstRequestAndNothingIsMadeForIt) {
  EstargzLayer layer = Push({File("f", "content")});
  auto mounted = Mount(Request(layer), 1);
  ASSERT_TRUE(mounted.ok());
  EXPECT_EQ(OpenContentFiles(), 0);
  service_->OpenAhead(kLater);
  EXPECT_TRUE(std::filesystem::is_empty(state_.path() + "/content")) << "nobody has read it so far";
  const std::string path = files_.IndexPath(layer.layer_digest, mounted->index_sha256);
  ASSERT_EQ(unlink(path.c_str()), 0);
  EXPECT_EQ(Read(1, "f"), "content") << "from the index that was open";
  EXPECT_TRUE(SoonOpen(0)) << "its layer is gone";
  service_->OpenAhead(kLater);
  EXPECT_EQ(OpenContentFiles(), 2);
  // Hidden from everybody who opens it now.
  ASSERT_EQ(rename((state_.path() + "/content").c_str(), (state_.path() + "/elsewhere").c_str()), 0);
  auto opened = server_.mounts.at(1).open_layer();
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_TRUE((*opened)->ReadNow((*opened)->index().LookupPath("f"), 0, 7).has_value());
  EXPECT_FALSE(PathExists(state_.path() + "/content"));
  opened = Unavailable("closed");
  service_->ForgetMounts({1});
  EXPECT_TRUE(SoonOpen(0));
}

TEST_F(LayerServiceTest, ContentOpenedAheadThatAnotherWorkerEvictsIsLetGoAndFoundAgain) {
  EstargzLayer layer = Push({File("f", "content")}), other = Push({File("g", "other")});
  ASSERT_TRUE(Mount(Request(layer), 1).ok());
  ASSERT_TRUE(Mount(Request(other), 2).ok());
  ASSERT_EQ(Read(1, "f"), "content");
  ASSERT_EQ(Read(2, "g"), "other");
  service_->OpenAhead(kLater);
  service_->LetGoOfEvicted();
  EXPECT_TRUE(SoonOpen(4)) << "nothing is evicted";
  // Another process: all that it has room for is one chunk.
  cache::StoreOptions options;
  options.root = state_.path() + "/content";
  options.vault_id = std::string(32, '0');
  options.limit_bytes = 20'000;
  auto owner = std::move(*cache::ContentStore::Open(options));
  owner->AllowEviction(true);
  auto fresh = owner->OpenLayer("sha256:" + std::string(64, 'e'), 1, 10'000);
  ASSERT_TRUE(fresh.ok()) << fresh.status();
  ASSERT_TRUE((*fresh)->Put(0, 0, std::string(10'000, 'x')).ok());
  ASSERT_GT(owner->stats().evicted_bytes, 0u) << "the eviction happened";
  EXPECT_EQ(DeletedContentFiles(), 4);
  service_->LetGoOfEvicted();
  EXPECT_EQ(DeletedContentFiles(), 0);
  service_->OpenAhead(kLater);
  EXPECT_EQ(OpenContentFiles(), 2) << "the other process's own; nothing is made anew";
  EXPECT_EQ(Read(1, "f"), "content") << "fetched again";
  service_->OpenAhead(kLater);
  EXPECT_TRUE(SoonOpen(4));
}

TEST_F(LayerServiceTest, TheDevicesOfMountsAreHandedOutInPages) {
  EstargzLayer layer = Push({File("f", "x")});
  for (uint64_t id = 1; id <= 3; ++id) ASSERT_TRUE(Mount(Request(layer), id).ok());
  auto first = service_->HeldMounts(0, 2);
  ASSERT_TRUE(first.ok()) << first.status();
  ASSERT_EQ(first->elements.size(), 2u);
  EXPECT_TRUE(first->more);
  auto second = service_->HeldMounts(2, 2);
  ASSERT_EQ(second->elements.size(), 1u);
  EXPECT_FALSE(second->more);
  struct stat null {
  }, dup{};
  EXPECT_EQ(stat("/dev/null", &null), 0);
  EXPECT_EQ(fstat(second->elements[0].device.get(), &dup), 0);
  EXPECT_EQ(dup.st_rdev, null.st_rdev);
}

TEST(LayerFilesTest, TheRecordOfTheFirstReleaseIsReadable) {
  LayerRecord record;
  record.layer_digest = "sha256:aa";
  record.toc_digest = "sha256:bb";
  record.blob_size = 10;
  record.index_sha256 = "cc";
  record.numbering_version = 1;
  record.images = {"host/a:1"};
  const std::string golden =
      "{\n \"v\": 1,\n \"layer_digest\": \"sha256:aa\",\n \"toc_digest\": \"sha256:bb\",\n \"blob_size\": "
      "10,\n"
      " \"index_sha256\": \"cc\",\n \"numbering_version\": 1,\n \"images\": [\n  \"host/a:1\"\n ]\n}\n";
  EXPECT_EQ(EncodeLayerRecord(record), golden);
  auto decoded = DecodeLayerRecord(golden);
  ASSERT_TRUE(decoded.ok());
  EXPECT_EQ(decoded->images, record.images);
  EXPECT_FALSE(DecodeLayerRecord("{\"v\": 1}").ok());
  EXPECT_FALSE(DecodeLayerRecord("not json").ok());
}

}  // namespace
}  // namespace holdfast::app
