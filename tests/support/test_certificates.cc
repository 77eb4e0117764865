#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>

#include <cstdio>
#include <memory>

#include "tests/support/registry_server.h"

namespace holdfast::test {
namespace {

template <auto Free>
struct Freer {
  template <typename T>
  void operator()(T* object) const {
    Free(object);
  }
};
using Key = std::unique_ptr<EVP_PKEY, Freer<EVP_PKEY_free>>;
using Certificate = std::unique_ptr<X509, Freer<X509_free>>;

void SetName(X509_NAME* name, const char* common_name) {
  X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC, reinterpret_cast<const unsigned char*>(common_name),
                             -1, -1, 0);
}

void AddExtension(X509* certificate, X509* issuer, int nid, const char* value) {
  X509V3_CTX context;
  X509V3_set_ctx_nodb(&context);
  X509V3_set_ctx(&context, issuer, certificate, nullptr, nullptr, 0);
  if (X509_EXTENSION* extension = X509V3_EXT_conf_nid(nullptr, &context, nid, value)) {
    X509_add_ext(certificate, extension, -1);
    X509_EXTENSION_free(extension);
  }
}

Certificate MakeCertificate(const char* name, EVP_PKEY* key, X509* issuer, EVP_PKEY* issuer_key) {
  Certificate certificate(X509_new());
  X509_set_version(certificate.get(), 2);
  ASN1_INTEGER_set(X509_get_serialNumber(certificate.get()), issuer == nullptr ? 1 : 2);
  X509_gmtime_adj(X509_getm_notBefore(certificate.get()), -3600);
  X509_gmtime_adj(X509_getm_notAfter(certificate.get()), 86400);
  X509_set_pubkey(certificate.get(), key);
  SetName(X509_get_subject_name(certificate.get()), name);
  X509* const signer = issuer == nullptr ? certificate.get() : issuer;
  X509_set_issuer_name(certificate.get(), X509_get_subject_name(signer));
  if (issuer == nullptr) {
    AddExtension(certificate.get(), signer, NID_basic_constraints, "critical,CA:TRUE");
  } else {
    AddExtension(certificate.get(), signer, NID_subject_alt_name, "IP:127.0.0.1,DNS:localhost");
  }
  X509_sign(certificate.get(), issuer_key, EVP_sha256());
  return certificate;
}

absl::Status WriteWith(const std::string& path, const std::function<bool(FILE*)>& write) {
  std::unique_ptr<FILE, Freer<fclose>> file(std::fopen(path.c_str(), "we"));
  if (file == nullptr || !write(file.get())) return Internal("cannot write " + path);
  return absl::OkStatus();
}

}  // namespace

absl::Status MakeTestCertificates(const std::string& folder) {
  const Key ca_key(EVP_EC_gen("P-256"));
  const Key server_key(EVP_EC_gen("P-256"));
  if (ca_key == nullptr || server_key == nullptr) return Internal("cannot make keys");
  const Certificate ca = MakeCertificate("holdfast test authority", ca_key.get(), nullptr, ca_key.get());
  const Certificate server = MakeCertificate("127.0.0.1", server_key.get(), ca.get(), ca_key.get());
  HF_RETURN_IF_ERROR(
      WriteWith(folder + "/ca.pem", [&](FILE* file) { return PEM_write_X509(file, ca.get()) == 1; }));
  HF_RETURN_IF_ERROR(
      WriteWith(folder + "/server.pem", [&](FILE* file) { return PEM_write_X509(file, server.get()) == 1; }));
  return WriteWith(folder + "/server.key", [&](FILE* file) {
    return PEM_write_PrivateKey(file, server_key.get(), nullptr, nullptr, 0, nullptr, nullptr) == 1;
  });
}

}  // namespace holdfast::test
