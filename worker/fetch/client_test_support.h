// A test registry, a client with short time limits, and calls that wait for their callback.
#pragma once

#include <condition_variable>
#include <fstream>
#include <future>
#include <memory>
#include <string>
#include <utility>

#include "common/io.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/registry_server.h"
#include "worker/fetch/registry_client.h"

namespace holdfast::fetch {

using cache::Priority;
using test::RegistryAuth;
using test::RegistryFault;
using test::RegistryLogEntry;
using test::RegistryOptions;
using test::RegistryServer;

constexpr uint64_t kMilli = 1'000'000;
constexpr uint64_t kSecond = 1'000'000'000;

inline uint64_t In(uint64_t nanos) { return Clock::Real()->BootNanos() + nanos; }

// Every byte tells its place.
inline std::string Pattern(size_t size) {
  std::string bytes(size, '\0');
  for (size_t i = 0; i < size; i++) bytes[i] = static_cast<char>((i * 2654435761u) >> 13);
  return bytes;
}

// One future a call; a callback that never comes fails the test after 30 s.
template <typename T>
class Waiter {
 public:
  auto Callback() {
    return [promise = promise_](absl::StatusOr<T> value) { promise->set_value(std::move(value)); };
  }
  absl::StatusOr<T> Get() {
    std::future<absl::StatusOr<T>> future = promise_->get_future();
    if (future.wait_for(std::chrono::seconds(30)) != std::future_status::ready)
      return Internal("no callback");
    return future.get();
  }

 private:
  std::shared_ptr<std::promise<absl::StatusOr<T>>> promise_ =
      std::make_shared<std::promise<absl::StatusOr<T>>>();
};

class ClientTest : public ::testing::Test {
 protected:
  explicit ClientTest(const RegistryOptions& options = {}) : registry_(options) {
    options_.docker_config = folder_.path() + "/config.json";
    options_.connect_timeout_nanos = 2 * kSecond;
    options_.stall_timeout_nanos = 2 * kSecond;
    options_.first_backoff_nanos = 2 * kMilli;
    options_.max_backoff_nanos = 20 * kMilli;
  }

  RegistryClient& client() {
    if (client_ == nullptr) client_ = RegistryClient::Create(options_);
    return *client_;
  }
  BlobRef Blob(const std::string& bytes, const std::string& repository = "demo/app") {
    return {{registry_.host(), repository, "latest"}, registry_.AddBlob(bytes), "default"};
  }
  absl::StatusOr<std::string> Fetch(const BlobRef& blob, uint64_t offset, uint64_t length,
                                    uint64_t limit = 20 * kSecond) {
    Waiter<std::string> waiter;
    client().FetchRange(blob, offset, length, Priority::kDemand, In(limit), waiter.Callback());
    return waiter.Get();
  }
  absl::StatusOr<RegistryClient::Tail> FetchTail(const BlobRef& blob, uint64_t length) {
    Waiter<RegistryClient::Tail> waiter;
    client().FetchTail(blob, length, In(20 * kSecond), waiter.Callback());
    return waiter.Get();
  }
  void WriteDockerConfig(const std::string& json) {
    ASSERT_TRUE(WriteFileAtomic(options_.docker_config, json).ok());
  }

  const TempDir folder_;
  RegistryServer registry_;
  ClientOptions options_;
  std::unique_ptr<RegistryClient> client_;
};

inline RegistryFault Status(int status) {
  RegistryFault fault;
  fault.status = status;
  return fault;
}

// Matches a StatusOr or Status by code and part of the message.
MATCHER_P2(FailsWith, code, part, "") {
  *result_listener << arg.status().ToString();
  return arg.status().code() == code &&
         std::string(FromAbsl(arg.status().message())).find(part) != std::string::npos;
}

}  // namespace holdfast::fetch
