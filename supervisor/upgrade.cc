// What people ask for: an upgrade, a rollback, and whether one would work; and how a candidate is judged,
// which is the verifier's affair (verifiers.h).
#include <unistd.h>

#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/executable_store.h"
#include "common/offload.h"
#include "common/unhurried.h"
#include "supervisor/rpc.h"
#include "supervisor/supervisor.h"

namespace holdfast::supervisor {
namespace {

constexpr char kCanaryFolder[] = "/supervisor/canary";  // in the state folder
constexpr uint64_t kSelfTestMillis = 5'500;             // above the verifier's own limit

}  // namespace

kj::Promise<bool> Supervisor::Upgrade(std::string path, bool force,
                                      kj::Maybe<schema::Progress::Client> progress) {
  ClaimSwap("upgrade", kj::mv(progress));
  auto free = kj::defer([this] { SwapAnswered(); });
  if (path.empty()) path = options_.worker;
  swap_.BeginStep("copy");
  swap_.TellProgress();
  using Copy = absl::StatusOr<std::shared_ptr<const Executable>>;
  std::vector<std::string> keep = {running_->sha256};
  for (const auto& executable : {previous_, last_good_}) {
    if (executable != nullptr) keep.push_back(executable->sha256);
  }
  auto copied = Offload<Copy>([path, keep, state_dir = options_.state_dir] {
    ExecutableStore copies = WorkerCopies(state_dir);
    copies.Keep(keep);
    Unhurried unhurried;
    return copies.Add(path, &unhurried);
  });
  auto swapped = copied.then([this, force, path](kj::Own<Copy>&& copy) -> kj::Promise<bool> {
    if (!copy->ok()) Throw(Annotate(copy->status(), "worker " + path));
    if ((**copy)->sha256 == running_->sha256 && !force) return false;
    return SwapTo(**copy);
  });
  return Keep(swapped.attach(kj::mv(free)));
}

kj::Promise<bool> Supervisor::Rollback(kj::Maybe<schema::Progress::Client> progress) {
  ClaimSwap("rollback", kj::mv(progress));
  auto free = kj::defer([this] { SwapAnswered(); });
  auto target = RollbackTarget();
  if (target == nullptr) Throw(FailedPrecondition("no other build is kept here to roll back to"));
  return Keep(SwapTo(std::move(target)).attach(kj::mv(free)));
}

void Supervisor::ClaimSwap(const std::string& kind, kj::Maybe<schema::Progress::Client> progress) {
  if (swap_.asked()) Throw(Unavailable("another swap is under way already"));
  if (takeover_ != nullptr)
    Throw(Unavailable("the supervisor is still taking over from the one before; try again in some seconds"));
  if (stopping_) Throw(Unavailable("the supervisor is shutting down"));
  TellSwapAhead(false);
  swap_.Ask(kind, kj::mv(progress));
}

void Supervisor::SwapAnswered() {
  swap_.Answered();
  TellSwapAhead(true);
}

void Supervisor::TellSwapAhead(bool over) {
  WorkerProcess* owner = Find(state_.owner);
  if (owner == nullptr) return;
  KJ_IF_MAYBE (client, owner->client) {
    auto request = client->swapAheadRequest();
    request.setOver(over);
    // Builds of before do not know it. Not by Ignore: an upgrade may end because its task is cancelled.
    request.send().ignoreResult().detach([](kj::Exception&&) {});
  }
}

kj::Promise<bool> Supervisor::SwapTo(std::shared_ptr<const Executable> executable) {
  candidate_ = std::move(executable);
  swap_.EndStep(true);
  auto pair = kj::newPromiseAndFulfiller<void>();
  upgrade_waiter_ = kj::mv(pair.fulfiller);
  bool rollback = swap_.is_rollback();
  // When last-good is what is left, the build gone back to takes its place at once.
  bool proven =
      last_good_ != nullptr && (candidate_->sha256 == last_good_->sha256 || (rollback && !RunsUnproven()));
  Dispatch({.type = EventType::kUpgrade, .proven = proven, .rollback = rollback});
  return pair.promise.then([] { return true; });
}

// Nobody shall roll back to a build that did not survive its probation, or that a rollback has left.
std::shared_ptr<const Executable> Supervisor::RollbackTarget() const {
  if (previous_ != nullptr) return previous_;
  return RunsUnproven() ? last_good_ : nullptr;
}

kj::Promise<RollbackReadiness> Supervisor::CheckRollback() {
  auto target = RollbackTarget();
  // With none, what matters is that the build which is started after a crash still starts.
  if (target == nullptr) target = running_;
  auto tested = kj::evalNow([&] {
    auto task = verifiers_.Begin();
    auto request = task->client().selfTestRequest();
    request.setExecutable(MakeDescriptor(OrThrow(DupFd(target->file.get()))));
    using Results = capnp::Response<schema::Verifier::SelfTestResults>;
    auto result = request.send().then([target](Results&& results) {
      return RollbackReadiness{results.getPassed(), target->sha256, results.getOutput().cStr()};
    });
    return timer_.timeoutAfter(kSelfTestMillis * kj::MILLISECONDS, result.attach(kj::mv(task)));
  });
  return tested.catch_([target](kj::Exception&& exception) {
    return RollbackReadiness{false, target->sha256, Describe(exception)};
  });
}

// A verifier's summary. The end of a worker is told as its death; that of the verifier is a failure.
template <typename Results>
kj::Promise<std::string> Supervisor::Judged(capnp::RemotePromise<Results> verdict) {
  auto summary = [](auto&& results) { return std::string(results.getSummary().cStr()); };
  return verdict.then(kj::mv(summary), [this](kj::Exception&& exception) -> std::string {
    auto lives = [this](Generation generation) {
      WorkerProcess* worker = Find(generation);
      return worker != nullptr && worker->dead_since_boot_nanos == 0;
    };
    bool disconnected = exception.getType() == kj::Exception::Type::DISCONNECTED;
    if (disconnected && lives(state_.successor) && (state_.owner == 0 || lives(state_.owner)))
      kj::throwFatalException(Failed("the verifier died: " + Describe(exception)));
    kj::throwFatalException(kj::mv(exception));
  });
}

kj::Promise<std::string> Supervisor::Rehearse(schema::Worker::Client candidate) {
  WorkerProcess* owner = Find(state_.owner);
  if (owner == nullptr || owner->client == nullptr) return Failed("the running worker is gone");
  verifier_ = verifiers_.Begin();
  auto request = KJ_ASSERT_NONNULL(verifier_)->client().rehearseRequest();
  // A rollback is for a build that may answer wrongly: it has no say in whether it is left.
  if (!swap_.is_rollback()) request.setOwner(KJ_ASSERT_NONNULL(owner->client));
  request.setCandidate(kj::mv(candidate));
  request.setMounts(MakeMountView(&vault_));
  request.setCanaryFolder((options_.state_dir + kCanaryFolder).c_str());
  return Judged(request.send());
}

kj::Promise<std::string> Supervisor::ProbeLive(Generation generation) {
  auto request = KJ_REQUIRE_NONNULL(verifier_, "nothing was rehearsed")->client().probeLiveRequest();
  request.setGeneration(generation);
  return Judged(request.send());
}

// What a verifier that is gone has left; those of the next swap are made long after this.
void Supervisor::RemoveCanaries() {
  if (verifier_ != nullptr) return;
  auto removed = Offload<int>([folder = options_.state_dir + kCanaryFolder] {
    RemoveStaleMounts(folder).status().IgnoreError();
    std::error_code none;
    for (const auto& entry : std::filesystem::directory_iterator(folder, none)) rmdir(entry.path().c_str());
    return 0;
  });
  tasks_.add(removed.ignoreResult());
}

}  // namespace holdfast::supervisor
