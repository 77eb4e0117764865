#include "worker/snapshot/labels.h"

#include "gtest/gtest.h"

namespace holdfast::snapshot {
namespace {

const std::string kDigest = "sha256:" + std::string(64, 'a');
const std::string kOther = "sha256:" + std::string(64, 'b');

Labels CriLabels() {
  return {{"containerd.io/snapshot/cri.image-ref", "localhost:5000/demo/app:1"},
          {"containerd.io/snapshot/cri.layer-digest", kDigest},
          {"containerd.io/snapshot/cri.image-layers", kDigest + "," + kOther + "," + kOther + ",nonsense"},
          {"containerd.io/snapshot/stargz/toc.digest", kOther}};
}

TEST(LayerLabels, CriLabelsNameTheLayerAndItsNeighbours) {
  auto requests = LayerRequestsFrom(CriLabels(), "k8s.io/57/extract-1 sha256:x");
  ASSERT_TRUE(requests.ok()) << requests.status();
  ASSERT_EQ(requests->size(), 1u);
  const LayerRequest& request = (*requests)[0];
  EXPECT_EQ(request.image_ref, "localhost:5000/demo/app:1");
  EXPECT_EQ(request.layer_digest, kDigest);
  EXPECT_EQ(request.toc_digest, kOther);
  EXPECT_EQ(request.neighbours, std::vector<std::string>{kOther});
  EXPECT_EQ(request.tenant, "k8s.io");
}

TEST(LayerLabels, CriComesBeforeCtrRemote) {
  Labels labels = CriLabels();
  labels["containerd.io/snapshot/remote/stargz.reference"] = "localhost/other:2";
  labels["containerd.io/snapshot/remote/stargz.digest"] = kOther;
  auto requests = LayerRequestsFrom(labels, "");
  ASSERT_TRUE(requests.ok()) << requests.status();
  ASSERT_EQ(requests->size(), 2u);
  EXPECT_EQ((*requests)[0].layer_digest, kDigest);
  EXPECT_EQ((*requests)[1].image_ref, "localhost/other:2");
}

TEST(LayerLabels, HostileValuesAreRefused) {
  for (const char* reference : {"", "../../etc/passwd", "host/../x", "host//x", "/host/x", "host/x y",
                                "host/x\n", "http://host/x?y", "host/\xc3\xbc"}) {
    Labels labels = CriLabels();
    labels["containerd.io/snapshot/cri.image-ref"] = reference;
    EXPECT_EQ(LayerRequestsFrom(labels, "").status().code(), absl::StatusCode::kFailedPrecondition)
        << reference;
  }
  EXPECT_FALSE(IsReference(std::string(1025, 'a')));
  for (const std::string& digest :
       {std::string(), std::string("sha256:"), "sha256:" + std::string(64, 'A'),
        "sha512:" + std::string(64, 'a'), kDigest + "a", "sha256:" + std::string(64, '/')}) {
    Labels labels = CriLabels();
    labels["containerd.io/snapshot/cri.layer-digest"] = digest;
    EXPECT_EQ(LayerRequestsFrom(labels, "").status().code(), absl::StatusCode::kFailedPrecondition) << digest;
  }
  Labels labels = CriLabels();
  labels["containerd.io/snapshot/stargz/toc.digest"] = "x";
  EXPECT_FALSE(LayerRequestsFrom(labels, "").ok());
  EXPECT_FALSE(LayerRequestsFrom({}, "").ok());
}

TEST(LayerLabels, AnImageCannotSwitchVerificationOffOrNameTooManyNeighbours) {
  Labels labels = CriLabels();
  labels["containerd.io/snapshot/remote/stargz.skipverify"] = "true";
  labels["containerd.io/snapshot/with-control"] = "a\nb";
  std::string list;
  for (int i = 1000; i < 1400; i++) list += "sha256:" + std::string(60, 'c') + std::to_string(i) + ",";
  labels["containerd.io/snapshot/cri.image-layers"] = list;
  auto requests = LayerRequestsFrom(labels, "");
  ASSERT_TRUE(requests.ok()) << requests.status();
  EXPECT_EQ((*requests)[0].labels.count("containerd.io/snapshot/remote/stargz.skipverify"), 0u);
  EXPECT_EQ((*requests)[0].labels.count("containerd.io/snapshot/with-control"), 0u);
  EXPECT_EQ((*requests)[0].neighbours.size(), 256u);
}

TEST(LayerLabels, TheTenantIsTheNamespaceOfTheKey) {
  EXPECT_EQ(TenantOf("default/1/extract-8-Am sha256:b404"), "default");
  EXPECT_EQ(TenantOf("k8s.io/57/a/b"), "k8s.io");
  for (const char* key : {"", "/", "//", "key", "/tmp/a/b", "a/b", "a/b/c", "a//c", "/1/c"})
    EXPECT_EQ(TenantOf(key), "") << key;
}

}  // namespace
}  // namespace holdfast::snapshot
