#include "worker/fetch/answer_check.h"

#include <algorithm>

namespace holdfast::fetch {
namespace {

AnswerPlan Bad(std::string why) {
  AnswerPlan plan;
  plan.outcome.failure = Failure::kBadAnswer;
  plan.why = std::move(why);
  return plan;
}

AnswerPlan Final(absl::StatusCode code, std::string why) {
  AnswerPlan plan;
  plan.kind = AnswerPlan::Kind::kFinal;
  plan.final_code = code;
  plan.why = std::move(why);
  return plan;
}

AnswerPlan Take(uint64_t skip, uint64_t take, std::optional<uint64_t> blob_size) {
  AnswerPlan plan;
  plan.kind = AnswerPlan::Kind::kTake;
  plan.skip = skip;
  plan.take = take;
  plan.blob_size = blob_size;
  return plan;
}

AnswerPlan NoSuffix() {
  AnswerPlan plan;
  plan.kind = AnswerPlan::Kind::kNoSuffix;
  return plan;
}

std::string Span(uint64_t offset, uint64_t length) {
  return "bytes " + std::to_string(offset) + "-" + std::to_string(offset + length - 1);
}

AnswerPlan CheckWhole(const WantedRange& wanted, const HttpHeaders& headers) {
  const std::optional<uint64_t> size = headers.content_length;
  if (wanted.suffix) {
    if (!size || *size > kMaxWastedBytes) return NoSuffix();
    AnswerPlan plan;
    plan.kind = AnswerPlan::Kind::kTakeAll;
    plan.take = *size;
    plan.blob_size = size;
    return plan;
  }
  if (size && *size < wanted.offset + wanted.length) {
    return Final(absl::StatusCode::kDataLoss, "the blob ends at byte " + std::to_string(*size) +
                                                  ", before the end of " +
                                                  Span(wanted.offset, wanted.length));
  }
  if (wanted.offset > kMaxWastedBytes) {
    return Final(absl::StatusCode::kFailedPrecondition,
                 "the server does not serve ranges: it answered 200 with the whole blob (" +
                     (size ? std::to_string(*size) + " bytes" : std::string("of unknown size")) + ")");
  }
  return Take(wanted.offset, wanted.length, size);
}

}  // namespace

std::string WantedRange::HeaderValue() const {
  if (suffix) return "bytes=-" + std::to_string(length);
  return "bytes=" + std::to_string(offset) + "-" + std::to_string(offset + length - 1);
}

AnswerPlan CheckAnswer(const WantedRange& wanted, const HttpHeaders& headers,
                       std::optional<uint64_t> known_size) {
  if (headers.status != 200 && headers.status != 206) return NoSuffix();
  if (headers.status == 200) {
    if (known_size && headers.content_length && *headers.content_length != *known_size) {
      return Bad("the blob has " + std::to_string(*headers.content_length) + " bytes now, " +
                 std::to_string(*known_size) + " before");
    }
    return CheckWhole(wanted, headers);
  }
  const std::optional<ContentRange> range = ParseContentRange(headers.content_range);
  if (!range || !range->satisfied) return Bad("206 without a valid Content-Range");
  if (known_size && range->total && *range->total != *known_size) {
    return Bad("Content-Range says a blob of " + std::to_string(*range->total) + " bytes, it was " +
               std::to_string(*known_size) + " before");
  }
  uint64_t first = wanted.offset, length = wanted.length;
  if (wanted.suffix) {
    if (!range->total) return NoSuffix();
    length = std::min(wanted.length, *range->total);
    first = *range->total - length;
  } else if (range->total && *range->total < wanted.offset + wanted.length) {
    return Final(absl::StatusCode::kDataLoss, "the blob ends at byte " + std::to_string(*range->total) +
                                                  ", before the end of " +
                                                  Span(wanted.offset, wanted.length));
  }
  if (range->first != first || range->last != first + length - 1) {
    return Bad("Content-Range is " + Span(range->first, range->last - range->first + 1) + ", asked was " +
               Span(first, length));
  }
  return Take(0, length, range->total);
}

}  // namespace holdfast::fetch
