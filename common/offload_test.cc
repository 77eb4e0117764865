#include "common/offload.h"

#include <kj/async-io.h>
#include <pthread.h>

#include <thread>

#include "gtest/gtest.h"

namespace holdfast {
namespace {

// While it lives no thread can be made: its stack would not fit into any address space.
class NoThreads {
 public:
  NoThreads() {
    pthread_attr_init(&huge_);
    pthread_getattr_default_np(&usual_);
    if (pthread_attr_setstacksize(&huge_, size_t{1} << 48) == 0) pthread_setattr_default_np(&huge_);
  }
  ~NoThreads() {
    pthread_setattr_default_np(&usual_);
    pthread_attr_destroy(&huge_);
  }

 private:
  pthread_attr_t huge_, usual_;
};

TEST(OffloadTest, AJobRunsOnAThreadOfItsOwnAndOnTheCallersWhereNoneCanBeMade) {
  auto io = kj::setupAsyncIo();
  auto where = [] { return std::this_thread::get_id(); };
  EXPECT_NE(*Offload<std::thread::id>(where).wait(io.waitScope), std::this_thread::get_id());
  NoThreads none;
  EXPECT_THROW(std::thread([] {}).detach(), std::system_error);
  EXPECT_EQ(*Offload<std::thread::id>(where).wait(io.waitScope), std::this_thread::get_id());
}

}  // namespace
}  // namespace holdfast
