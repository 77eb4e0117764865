#include "worker/fetch/libcurl.h"

#include <thread>
#include <vector>

#include "gtest/gtest.h"

namespace holdfast::fetch {
namespace {

TEST(LibcurlTest, IsLoadedOnceWhoeverAsksAtTheSameTime) {
  std::vector<const Libcurl*> found(8);
  std::vector<std::thread> threads;
  for (const Libcurl*& one : found) threads.emplace_back([&one] { one = LoadLibcurl().value(); });
  for (std::thread& thread : threads) thread.join();
  for (const Libcurl* one : found) EXPECT_EQ(one, found[0]);
  CURL* easy = found[0]->curl_easy_init();
  EXPECT_NE(easy, nullptr);
  found[0]->curl_easy_cleanup(easy);
}

TEST(LibcurlTest, AMissingLibraryIsNamed) {
  const absl::Status status = LoadLibcurlFrom("libcurl-that-is-not.so.9").status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status));
  EXPECT_NE(status.message().find("libcurl-that-is-not.so.9"), absl::string_view::npos) << status;
}

TEST(LibcurlTest, AMissingFunctionIsNamed) {
  const absl::Status status = LoadLibcurlFrom("libc.so.6").status();  // a library, but another one
  EXPECT_TRUE(absl::IsFailedPrecondition(status));
  EXPECT_NE(status.message().find("curl_easy_cleanup is missing"), absl::string_view::npos) << status;
}

}  // namespace
}  // namespace holdfast::fetch
