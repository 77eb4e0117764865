// The one error channel: absl::Status and absl::StatusOr. Exceptions are contained where they arise (KJ, in
// the supervisor's and the worker's RPC edges; JSON and TOML parsers, in their adapters).
#pragma once

#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace holdfast {

// Debian's abseil has its own string_view without conversions to std's (cmake/HoldfastDependencies.cmake).
inline absl::string_view ToAbsl(std::string_view s) { return {s.data(), s.size()}; }
inline std::string_view FromAbsl(absl::string_view s) { return {s.data(), s.size()}; }

// A status whose code follows the errno (ENOENT -> NotFound, ENOSPC -> ResourceExhausted, ...) and whose
// message is
// "<what>: <strerror>". The errno itself travels along: see StatusErrno.
absl::Status ErrnoStatus(int error, std::string_view what);

// The errno for a status: the one given to ErrnoStatus, else one chosen from the code (DataLoss -> EIO, ...).
// The only place that turns a status into an errno.
int StatusErrno(const absl::Status& status);

// The same status with "<context>: " before its message; OK stays OK.
absl::Status Annotate(const absl::Status& status, std::string_view context);

// Constructors that take std::string, so call sites need no conversion.
absl::Status InvalidArgument(std::string_view message);
absl::Status NotFound(std::string_view message);
absl::Status AlreadyExists(std::string_view message);
absl::Status FailedPrecondition(std::string_view message);
absl::Status Unavailable(std::string_view message);
absl::Status DataLoss(std::string_view message);
absl::Status Internal(std::string_view message);
absl::Status DeadlineExceeded(std::string_view message);
absl::Status PermissionDenied(std::string_view message);
absl::Status ResourceExhausted(std::string_view message);
absl::Status Unimplemented(std::string_view message);
absl::Status Cancelled(std::string_view message);

}  // namespace holdfast

#define HF_CONCAT_INNER(a, b) a##b
#define HF_CONCAT(a, b) HF_CONCAT_INNER(a, b)

// Returns from the enclosing function when the expression is not OK.
#define HF_RETURN_IF_ERROR(expr)                      \
  do {                                                \
    if (auto hf_status_ = (expr); !hf_status_.ok()) { \
      return hf_status_;                              \
    }                                                 \
  } while (false)

// HF_ASSIGN_OR_RETURN(auto x, Function()): binds the value or returns the status.
#define HF_ASSIGN_OR_RETURN(lhs, expr) HF_ASSIGN_OR_RETURN_IMPL(HF_CONCAT(hf_statusor_, __LINE__), lhs, expr)
#define HF_ASSIGN_OR_RETURN_IMPL(var, lhs, expr) \
  auto var = (expr);                             \
  if (!var.ok()) {                               \
    return var.status();                         \
  }                                              \
  lhs = std::move(*var)
