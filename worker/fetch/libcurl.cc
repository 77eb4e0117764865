#include "worker/fetch/libcurl.h"

#include <dlfcn.h>

#include <string>

#include "common/mutex.h"

namespace holdfast::fetch {
namespace {

constexpr char kLibrary[] = "libcurl.so.4";  // of Debian's package libcurl4

template <typename Function>
absl::Status Find(void* library, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  return *function != nullptr ? absl::OkStatus() : FailedPrecondition(std::string(name) + " is missing");
}

}  // namespace

absl::StatusOr<Libcurl> LoadLibcurlFrom(const char* library) {
  // RTLD_NOW: a symbol that one of its libraries lacks is an error here, not the end of the process later.
  void* const handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  // glibc's text begins with the file's name.
  if (handle == nullptr) return FailedPrecondition(std::string("libcurl cannot be loaded: ") + dlerror());
  auto usable = [&]() -> absl::StatusOr<Libcurl> {
    Libcurl curl;
#define HF_CURL_FIND(name) \
  HF_RETURN_IF_ERROR(Annotate(Find(handle, #name, &curl.name), std::string("libcurl in ") + library));
    HF_CURL_FUNCTIONS(HF_CURL_FIND)
#undef HF_CURL_FIND
    const CURLcode code = curl.curl_global_init(CURL_GLOBAL_DEFAULT);
    if (code != CURLE_OK) return FailedPrecondition(std::string("libcurl: ") + curl.curl_easy_strerror(code));
    return curl;
  }();
  if (!usable.ok()) dlclose(handle);
  return usable;
}

absl::StatusOr<const Libcurl*> LoadLibcurl() {
  // Loading is the process's affair, as a linked library would be; so is the table. curl_global_init is
  // called under the lock, and OpenSSL, which gRPC may start at the same time, initializes itself once.
  static Mutex mutex;
  static const Libcurl* loaded = nullptr;
  MutexLock lock(&mutex);
  if (loaded == nullptr) {
    HF_ASSIGN_OR_RETURN(Libcurl curl, LoadLibcurlFrom(kLibrary));
    loaded = new Libcurl(curl);
  }
  return loaded;
}

}  // namespace holdfast::fetch
