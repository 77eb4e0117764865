#include "worker/layer/digest.h"

#include <glog/logging.h>
#include <openssl/evp.h>

#include "worker/toc/digest.h"

namespace holdfast::layer {

struct DigestStream::State {
  EVP_MD_CTX* context = EVP_MD_CTX_new();
  State() = default;
  State(const State&) = delete;
  State& operator=(const State&) = delete;
  ~State() { EVP_MD_CTX_free(context); }
};

namespace {

// OpenSSL's SHA-256 fails only without memory or in a broken installation: nothing could be verified any
// more.
void Must(int result) { CHECK_EQ(result, 1) << "OpenSSL SHA-256 failed"; }

}  // namespace

toc::Digest Sha256Raw(std::string_view bytes) {
  toc::Digest digest;
  Must(EVP_Digest(bytes.data(), bytes.size(), digest.data(), nullptr, EVP_sha256(), nullptr));
  return digest;
}

std::string Sha256Hex(std::string_view bytes) { return DigestHex(Sha256Raw(bytes)); }
std::string Sha256Name(std::string_view bytes) { return DigestName(Sha256Raw(bytes)); }
std::string DigestHex(const toc::Digest& digest) { return toc::DigestHex(digest); }
std::string DigestName(const toc::Digest& digest) { return "sha256:" + DigestHex(digest); }
bool IsSha256Digest(std::string_view text) { return toc::ParseDigest(text).ok(); }
absl::StatusOr<toc::Digest> ParseSha256(std::string_view text) { return toc::ParseDigest(text); }

DigestStream::DigestStream() : state_(std::make_unique<State>()) {
  Must(EVP_DigestInit_ex(state_->context, EVP_sha256(), nullptr));
}
DigestStream::~DigestStream() = default;
DigestStream::DigestStream(DigestStream&&) noexcept = default;
DigestStream& DigestStream::operator=(DigestStream&&) noexcept = default;

void DigestStream::Update(std::string_view bytes) { Update(bytes.data(), bytes.size()); }

void DigestStream::Update(const void* data, size_t size) {
  Must(EVP_DigestUpdate(state_->context, data, size));
}

toc::Digest DigestStream::Finish() {
  toc::Digest digest;
  Must(EVP_DigestFinal_ex(state_->context, digest.data(), nullptr));
  Must(EVP_DigestInit_ex(state_->context, EVP_sha256(), nullptr));
  return digest;
}

std::string DigestStream::FinishHex() { return DigestHex(Finish()); }

}  // namespace holdfast::layer
