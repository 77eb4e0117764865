// Whether an answer's headers are an acceptable answer to a range request, and which part of its body to
// take. Pure.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "worker/fetch/http_headers.h"
#include "worker/fetch/retry_policy.h"

namespace holdfast::fetch {

// How many unwanted bytes may be read to get at a range that the server would not cut out for us.
constexpr uint64_t kMaxWastedBytes = 16 << 20;

struct WantedRange {
  uint64_t offset = 0, length = 0;
  bool suffix = false;  // the last `length` bytes; `offset` is unused
  // bytes=... for the Range header.
  std::string HeaderValue() const;
};

struct AnswerPlan {
  enum class Kind : uint8_t {
    kTake,      // skip `skip` body bytes, then take `take`
    kTakeAll,   // (suffix only) the whole body, of which the end is wanted
    kNoSuffix,  // (suffix only) ask for the size first, then for a normal range
    kFailed,    // as `outcome` says; not for HTTP statuses of 3xx and above, which the caller judges
    kFinal,     // an error that stays: `final_code`
  };
  Kind kind = Kind::kFailed;
  uint64_t skip = 0, take = 0;
  std::optional<uint64_t> blob_size;  // if the answer told
  AttemptOutcome outcome;
  absl::StatusCode final_code = absl::StatusCode::kDataLoss;
  std::string why;
};

// `known_size` = the blob's size from an earlier answer. For statuses 200 and 206; 416 and 400 to a suffix
// range.
AnswerPlan CheckAnswer(const WantedRange& wanted, const HttpHeaders& headers,
                       std::optional<uint64_t> known_size);

}  // namespace holdfast::fetch
