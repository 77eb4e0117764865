// libcurl, loaded when it is first needed and not with the program: it and what it brings are 30 of 36 shared
// libraries and half of the time from exec to main, and nothing that is cached needs them (docs/adr/0004).
// Everything in this folder calls it through this table. Thread-safe. It is never unloaded.
#pragma once

#include <curl/curl.h>

#include <memory>

#include "common/status.h"

namespace holdfast::fetch {

// The functions that are used, under their own names and with the types of curl.h.
#define HF_CURL_FUNCTIONS(use)                                                                               \
  use(curl_easy_cleanup) use(curl_easy_getinfo) use(curl_easy_init) use(curl_easy_setopt)                    \
      use(curl_easy_strerror) use(curl_free) use(curl_getdate) use(curl_global_init)                         \
          use(curl_multi_add_handle) use(curl_multi_cleanup) use(curl_multi_info_read) use(curl_multi_init)  \
              use(curl_multi_perform) use(curl_multi_poll) use(curl_multi_remove_handle)                     \
                  use(curl_multi_setopt) use(curl_multi_wakeup) use(curl_share_cleanup) use(curl_share_init) \
                      use(curl_share_setopt) use(curl_slist_append) use(curl_slist_free_all) use(curl_url)   \
                          use(curl_url_cleanup) use(curl_url_get) use(curl_url_set)

struct Libcurl {
#define HF_CURL_MEMBER(name) decltype(&::name) name = nullptr;
  HF_CURL_FUNCTIONS(HF_CURL_MEMBER)
#undef HF_CURL_MEMBER
};

// An owned handle: {what libcurl gave, {the table}}.
template <auto Free>
struct CurlFreer {
  const Libcurl* curl = nullptr;
  template <typename T>
  void operator()(T* handle) const {
    (curl->*Free)(handle);
  }
};
template <typename T, auto Free>
using CurlHandle = std::unique_ptr<T, CurlFreer<Free>>;

// Loads and initializes it the first time, which takes some milliseconds; whoever comes meanwhile waits.
// FailedPrecondition, naming what is missing, if it cannot be used; the next call tries again. The table
// lives as long as the process.
absl::StatusOr<const Libcurl*> LoadLibcurl();

// For tests: a table from any library.
absl::StatusOr<Libcurl> LoadLibcurlFrom(const char* library);

}  // namespace holdfast::fetch
