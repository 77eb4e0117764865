#include "common/status.h"

#include <cerrno>

#include "gtest/gtest.h"

namespace holdfast {
namespace {

TEST(StatusTest, ErrnoSurvivesTheTripThroughAStatusAndAnAnnotation) {
  absl::Status status = Annotate(ErrnoStatus(ENOSPC, "write /x"), "caching sha256:ab");
  EXPECT_EQ(StatusErrno(status), ENOSPC);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(status.message(), "caching sha256:ab: write /x: No space left on device");
}

TEST(StatusTest, AStatusWithoutErrnoGetsOneFromItsCode) {
  EXPECT_EQ(StatusErrno(absl::OkStatus()), 0);
  EXPECT_EQ(StatusErrno(NotFound("x")), ENOENT);
  EXPECT_EQ(StatusErrno(DataLoss("x")), EIO);
  EXPECT_EQ(StatusErrno(Unavailable("x")), EIO);
}

absl::StatusOr<int> Half(int n) {
  if (n % 2 != 0) return InvalidArgument("odd");
  return n / 2;
}

absl::StatusOr<int> Quarter(int n) {
  HF_ASSIGN_OR_RETURN(int half, Half(n));
  HF_ASSIGN_OR_RETURN(int quarter, Half(half));
  return quarter;
}

TEST(StatusTest, AssignOrReturnBindsValuesAndPassesErrorsOn) {
  EXPECT_EQ(*Quarter(12), 3);
  EXPECT_EQ(Quarter(6).status().message(), "odd");
}

}  // namespace
}  // namespace holdfast
