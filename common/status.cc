#include "common/status.h"

#include <cerrno>
#include <cstring>
#include <optional>

#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"

namespace holdfast {
namespace {

constexpr char kErrnoPayload[] = "holdfast/errno";

absl::StatusCode CodeForErrno(int error) {
  switch (error) {
    case ENOENT:
      return absl::StatusCode::kNotFound;
    case EEXIST:
      return absl::StatusCode::kAlreadyExists;
    case EINVAL:
    case ENAMETOOLONG:
      return absl::StatusCode::kInvalidArgument;
    case EACCES:
    case EPERM:
      return absl::StatusCode::kPermissionDenied;
    case ENOSPC:
    case EDQUOT:
    case EMFILE:
    case ENFILE:
    case ENOMEM:
      return absl::StatusCode::kResourceExhausted;
    case EBUSY:
    case ENOTEMPTY:
      return absl::StatusCode::kFailedPrecondition;
    case EAGAIN:
    case ECONNREFUSED:
    case ECONNRESET:
    case ENOTCONN:
      return absl::StatusCode::kUnavailable;
    case ETIMEDOUT:
      return absl::StatusCode::kDeadlineExceeded;
    case EINTR:
    case ECANCELED:
      return absl::StatusCode::kCancelled;
    case ENOSYS:
    case EOPNOTSUPP:
      return absl::StatusCode::kUnimplemented;
    default:
      return absl::StatusCode::kInternal;
  }
}

absl::Status Make(absl::StatusCode code, std::string_view message) {
  return absl::Status(code, ToAbsl(message));
}

}  // namespace

absl::Status ErrnoStatus(int error, std::string_view what) {
  char buffer[128];
  std::string message(what);
  message += ": ";
  message += strerror_r(error, buffer, sizeof buffer);
  absl::Status status(CodeForErrno(error), message);
  status.SetPayload(kErrnoPayload, absl::Cord(std::to_string(error)));
  return status;
}

int StatusErrno(const absl::Status& status) {
  if (status.ok()) return 0;
  if (auto payload = status.GetPayload(kErrnoPayload)) {
    int error = 0;
    if (absl::SimpleAtoi(std::string(*payload), &error)) return error;
  }
  switch (status.code()) {
    case absl::StatusCode::kNotFound:
      return ENOENT;
    case absl::StatusCode::kAlreadyExists:
      return EEXIST;
    case absl::StatusCode::kInvalidArgument:
      return EINVAL;
    case absl::StatusCode::kPermissionDenied:
      return EACCES;
    case absl::StatusCode::kUnimplemented:
      return ENOSYS;
    case absl::StatusCode::kCancelled:
      return EINTR;
    default:
      return EIO;
  }
}

absl::Status Annotate(const absl::Status& status, std::string_view context) {
  if (status.ok()) return status;
  absl::Status result(status.code(), std::string(context) + ": " + std::string(FromAbsl(status.message())));
  status.ForEachPayload(
      [&](absl::string_view url, const absl::Cord& value) { result.SetPayload(url, value); });
  return result;
}

absl::Status InvalidArgument(std::string_view m) { return Make(absl::StatusCode::kInvalidArgument, m); }
absl::Status NotFound(std::string_view m) { return Make(absl::StatusCode::kNotFound, m); }
absl::Status AlreadyExists(std::string_view m) { return Make(absl::StatusCode::kAlreadyExists, m); }
absl::Status FailedPrecondition(std::string_view m) { return Make(absl::StatusCode::kFailedPrecondition, m); }
absl::Status Unavailable(std::string_view m) { return Make(absl::StatusCode::kUnavailable, m); }
absl::Status DataLoss(std::string_view m) { return Make(absl::StatusCode::kDataLoss, m); }
absl::Status Internal(std::string_view m) { return Make(absl::StatusCode::kInternal, m); }
absl::Status DeadlineExceeded(std::string_view m) { return Make(absl::StatusCode::kDeadlineExceeded, m); }
absl::Status PermissionDenied(std::string_view m) { return Make(absl::StatusCode::kPermissionDenied, m); }
absl::Status ResourceExhausted(std::string_view m) { return Make(absl::StatusCode::kResourceExhausted, m); }
absl::Status Unimplemented(std::string_view m) { return Make(absl::StatusCode::kUnimplemented, m); }
absl::Status Cancelled(std::string_view m) { return Make(absl::StatusCode::kCancelled, m); }

}  // namespace holdfast
