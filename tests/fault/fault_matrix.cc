// The fault matrix: at every step of a swap, every fault. Prints a table, one line a case, and the
// combinations that cannot exist with the reason. Arguments: words; only cases whose name contains one of
// them run.
#include <fcntl.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "common/clock.h"
#include "common/testing/time_limit.h"
#include "glog/logging.h"
#include "tests/fault/dying_thread.h"
#include "tests/fault/process.h"
#include "tests/fault/rig.h"
#include "tests/fault/workload.h"

namespace holdfast::test {
namespace {

enum class Fault {
  kOldDies,
  kNewDies,
  kSupervisorDies,
  kSupervisorDiesEntering,
  kOldHangsUp,
  kNewHangsUp,
  kOldSendsNoise,
  kNewSendsNoise,
  kNewSendsNonsense,
  kOldSilent,
  kNewSilent,
  kOldRefuses,
  kWrongBytes,
  kWrongEnoent,
  kWrongListing,
  kTrialWrongBytes,
  kTrialWrongEnoent,
  kTrialWrongListing,
  kTrialWrongRead,
  kWrongAndLeft,
  kNoMetadata,
  kMetadataLocked,
  kDiskFull,
  kOldDequeues,
  kNewDequeues,
  kVerifierDies,
};
struct FaultInfo {
  Fault fault;
  const char* name;
};
constexpr FaultInfo kFaults[] = {
    {Fault::kOldDies, "old worker dies"},
    {Fault::kNewDies, "new worker dies"},
    {Fault::kSupervisorDies, "supervisor dies"},
    {Fault::kSupervisorDiesEntering, "supervisor dies entering the step"},
    {Fault::kOldHangsUp, "old worker closes its socket"},
    {Fault::kNewHangsUp, "new worker closes its socket"},
    {Fault::kOldSendsNoise, "old worker sends garbage"},
    {Fault::kNewSendsNoise, "new worker sends garbage"},
    {Fault::kNewSendsNonsense, "new worker sends a malformed message"},
    {Fault::kOldSilent, "old worker never answers"},
    {Fault::kNewSilent, "new worker never answers"},
    {Fault::kOldRefuses, "old worker answers with an error"},
    {Fault::kWrongBytes, "new worker serves wrong bytes"},
    {Fault::kWrongEnoent, "new worker serves wrong ENOENT"},
    {Fault::kWrongListing, "new worker serves wrong listing"},
    {Fault::kTrialWrongBytes, "wrong bytes on trial only"},
    {Fault::kTrialWrongEnoent, "wrong ENOENT on trial only"},
    {Fault::kTrialWrongListing, "wrong listing on trial only"},
    {Fault::kTrialWrongRead, "wrong on trial, and read by applications"},
    {Fault::kWrongAndLeft, "wrong bytes when it runs, and rolled back"},
    {Fault::kNoMetadata, "new worker cannot open metadata"},
    {Fault::kMetadataLocked, "metadata locked by a stranger"},
    {Fault::kDiskFull, "disk full"},
    {Fault::kOldDequeues, "thread of the dying old worker dequeues"},
    {Fault::kNewDequeues, "thread of the dying new worker dequeues"},
    {Fault::kVerifierDies, "verifier dies"},
};
const char* FaultName(Fault fault) { return kFaults[static_cast<int>(fault)].name; }

bool IsSilent(Fault fault) { return fault == Fault::kOldSilent || fault == Fault::kNewSilent; }
constexpr double kHangMillis = 6'000;  // a reader waits: 5 s until it is noticed, then as after a crash

// Why there is no such case; null: there is.
const char* Impossible(Step step, Fault fault) {
  const bool parked = step >= Step::kServe && step <= Step::kCommit;
  switch (fault) {
    case Fault::kOldSilent:
      if (step == Step::kStart || step == Step::kPrepare)
        return "the old worker is asked nothing in this step";
      if (step == Step::kServe || step == Step::kProbe || step == Step::kCommit)
        return "the old worker is parked and asked nothing in this step";
      if (step == Step::kProbation)
        return "a retired worker has 10 minutes for its calls (SwapTest: killed then)";
      return nullptr;
    case Fault::kNewSilent:
      if (step == Step::kPark || step == Step::kYield) return "the new worker is asked nothing in this step";
      return nullptr;
    case Fault::kOldRefuses:
      return step == Step::kRehearse || step == Step::kPark || step == Step::kYield
                 ? nullptr
                 : "the old worker is asked nothing in this step";
    case Fault::kWrongBytes:
    case Fault::kWrongEnoent:
    case Fault::kWrongListing:
      return step == Step::kRehearse ? nullptr
                                     : "wrong from the start, so it does not come past the rehearsal";
    case Fault::kTrialWrongBytes:
    case Fault::kTrialWrongEnoent:
    case Fault::kTrialWrongListing:
      if (step < Step::kServe) return "not on trial yet";
      if (step == Step::kProbation)
        return "not on trial any more; last-good is for builds that die, not for those that lie";
      return step == Step::kProbe
                 ? nullptr
                 : "the probe is where it is found; what it answered is under the next fault";
    case Fault::kTrialWrongRead:
      return step == Step::kProbe ? nullptr
                                  : "one step of the trial stands for all: the answers are the same";
    case Fault::kWrongAndLeft:
      return step == Step::kProbation ? nullptr : "somebody has to find it out while it runs";
    case Fault::kNoMetadata:
    case Fault::kMetadataLocked:
      return step == Step::kCommit ? nullptr : "metadata is opened in the commit step only";
    case Fault::kOldDequeues:
      if (parked) return "a parked worker reads no device";
      if (step == Step::kProbation) return "a retired worker was parked and reads no device";
      return nullptr;
    case Fault::kNewDequeues:
      if (step < Step::kServe) return "the new worker reads no device yet";
      return nullptr;
    case Fault::kVerifierDies:
      return step == Step::kRehearse || step == Step::kProbe ? nullptr : "it is asked nothing in this step";
    default:
      return nullptr;
  }
}

struct Row {
  std::string happened;
  double longest_ms = 0, seconds = 0;
  uint64_t checked = 0;
  std::vector<std::string> problems;
};

// Ends what a case has left hanging: it kills the node's processes, so that reads fail instead of waiting.
class Watchdog {
 public:
  Watchdog(Rig* rig, int seconds)
      : thread_([this, rig, seconds] {
          std::unique_lock<std::mutex> lock(mutex_);
          if (ended_.wait_for(lock, kTimeFactor * std::chrono::seconds(seconds), [this] { return over_; }))
            return;
          barked_ = true;
          rig->Abandon();
        }) {}
  ~Watchdog() { Stop(); }
  bool Stop() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      over_ = true;
    }
    ended_.notify_all();
    if (thread_.joinable()) thread_.join();
    return barked_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable ended_;
  bool over_ = false, barked_ = false;
  std::thread thread_;
};

// On the connection to the supervisor: nothing but its end; bytes that are no message; a frame as Cap'n
// Proto's (one segment of eight words) whose content is no message.
const std::string kNothing, kNoise(256, '\xff');
const std::string kNonsense = std::string("\0\0\0\0\x8\0\0\0", 8) + std::string(64, '\xff');
constexpr std::chrono::milliseconds kPause{5};  // between two looks at something that takes its time

bool Contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// One case on a node.
class Trial {
 public:
  Trial(Rig* rig, Step step, Fault fault) : rig_(*rig), step_(step), fault_(fault) {}
  Row Run();

 private:
  enum class Ends { kGoesOn, kRollsBack, kEither };
  void Expect(bool right, const std::string& what) {
    if (!right) row_.problems.push_back(what);
  }
  void Act();
  void End(Ends ends, const std::string& reason);
  Ends EndOfOldGone() const { return step_ <= Step::kRehearse ? Ends::kRollsBack : Ends::kGoesOn; }
  std::string ReasonOfOldGone() const { return "the running worker died while the new one started"; }
  bool Hold(const std::string& more = "");
  void OldGone();
  void NewGone();
  void Disturb(pid_t pid, const std::string& bytes);
  void SupervisorDies();
  void SupervisorDiesEntering();
  void NextSupervisor();
  void OldSilent();
  void NewSilent();
  void OldRefuses();
  void WrongBuild(const std::string& faults, const char* reason);
  void WrongRead();
  void WrongAndLeft();
  void MetadataLocked();
  void DiskFull();
  void Dequeues(bool old);
  void VerifierDies();
  void CheckAfter(const ctl::SupervisorStatus& before);
  void ExpectDead(pid_t pid, const std::string& who);
  void ExpectCrash(uint64_t crashes) { crashes_ += crashes; }

  Rig& rig_;
  const Step step_;
  const Fault fault_;
  Row row_;
  Findings findings_;
  Held held_;
  std::string swap_error_;
  std::unique_ptr<SnapshotsClient> client_;
  uint64_t crashes_ = 0;  // more than before
  pid_t owner_ = 0;       // expected to be the owner afterwards; 0: another one than before
  std::string kind_ = "upgrade", result_ = "done";
};

bool Trial::Hold(const std::string& more) {
  const bool old =
      fault_ == Fault::kOldDies || fault_ == Fault::kOldHangsUp || fault_ == Fault::kOldSendsNoise;
  if (old && step_ == Step::kProbation) {
    // While there is a connection to it, the retired worker lives.
    client_ = SnapshotsClient::Connect(rig_.node()->root() + "/run/snapshotter.sock");
    Expect(absl::IsNotFound(client_->Stat("default/1/none")), "the snapshots service does not answer");
  }
  auto held = rig_.Reach(step_, more);
  Expect(held.has_value(), "the step was not reached");
  if (held) held_ = *held;
  return held.has_value();
}

// The swap under way ends like this.
void Trial::End(Ends ends, const std::string& reason) {
  swap_error_ = rig_.SwapResult();
  const bool done = swap_error_.empty();
  row_.happened = done ? "went on" : "rolled back";
  if (ends == Ends::kGoesOn) Expect(done, "it did not go on: " + swap_error_);
  if (ends == Ends::kRollsBack) {
    Expect(!done, "the swap succeeded");
    Expect(done || Contains(swap_error_, reason), "another reason: " + swap_error_);
  }
  result_ = done ? "done" : "failed: ";
  if (!done && !reason.empty()) result_ += swap_error_;
}

// It is gone, the supervisor has seen that, and what follows from it is over.
void Trial::ExpectDead(pid_t pid, const std::string& who) {
  const std::string word = " pid=" + std::to_string(pid) + " how=";
  bool seen = false;
  for (int i = 0; i < 2000 && !seen; ++i) {
    seen = Contains(rig_.Log(), word);
    if (!seen) std::this_thread::sleep_for(kPause);
  }
  Expect(seen, "no word of the end of the " + who);
  rig_.WaitSettled();
}

void Trial::OldGone() {
  rig_.LetGo();
  End(EndOfOldGone(), ReasonOfOldGone());
  client_.reset();
  if (step_ != Step::kProbation) ExpectCrash(1);
  ExpectDead(held_.old_pid, "old worker");
}

void Trial::NewGone() {
  rig_.LetGo();
  if (step_ == Step::kProbation) {
    End(Ends::kGoesOn, "");
    ExpectCrash(1);
    kind_ = "crash";
    row_.happened = "went on, then restarted";
  } else {
    End(Ends::kRollsBack, "the new worker died");
    owner_ = held_.old_pid;
  }
  ExpectDead(held_.new_pid, "new worker");
}

// Its end of the connection to the supervisor says something, or is shut down.
void Trial::Disturb(pid_t pid, const std::string& bytes) {
  // The worker has moved it to the highest number (docs/adr/0006).
  const std::vector<int> sockets = DescriptorsTo(pid, "socket:");
  auto socket = Borrow(pid, sockets.empty() ? -1 : *std::max_element(sockets.begin(), sockets.end()));
  Expect(socket.ok(), "its socket could not be borrowed: " + socket.status().ToString());
  if (!socket.ok()) return;
  if (bytes.empty()) {
    Expect(shutdown(socket->get(), SHUT_RDWR) == 0, "shutdown failed");
  } else {
    Expect(
        send(socket->get(), bytes.data(), bytes.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(bytes.size()),
        "garbage was not sent");
  }
}

void Trial::SupervisorDies() {
  rig_.node()->KillSupervisor();
  rig_.LetGo();
  const bool done = rig_.SwapResult().empty();
  Expect(done == (step_ == Step::kProbation), done ? "the upgrade's caller was told that it is done"
                                                   : "the upgrade's caller was not told that it is done");
  NextSupervisor();
}

// It has saved that it is in the phase, and has done nothing of it.
void Trial::SupervisorDiesEntering() {
  const pid_t before = rig_.node()->supervisor();
  auto now = rig_.WaitSettled();
  if (now) held_.old_pid = static_cast<pid_t>(now->workers.front().pid);
  rig_.BeginSwap(rig_.builds()->With("none=wrong"));
  Expect(!rig_.SwapResult().empty(), "the upgrade's caller was told that it is done");
  for (int i = 0; i < 2000 && StateOf(before) != 'Z'; ++i) std::this_thread::sleep_for(kPause);
  Expect(StateOf(before) == 'Z', "the supervisor did not die by itself");
  Expect(Contains(rig_.Log(), "fault.fired point=supervisor.phase."), "the fault did not fire");
  rig_.node()->KillSupervisor();
  NextSupervisor();
}

void Trial::NextSupervisor() {
  Expect(rig_.node()->StartAgain(), "the next supervisor does not come up");
  row_.happened = "recovered";
  auto status = rig_.WaitSettled();
  Expect(status && static_cast<pid_t>(status->pid) == rig_.node()->supervisor(), "no new supervisor");
  if (status) Expect(status->state_source == "worker", "state came from: " + status->state_source);
  if (status) Expect(status->supervisor_restarts > 0, "supervisor restarts are not counted");
  // Once the old worker has yielded, the new one is the only one that may hold the metadata.
  const bool new_one_goes_on = step_ >= Step::kCommit;
  owner_ = new_one_goes_on ? held_.new_pid : held_.old_pid;
  const bool told = step_ == Step::kProbation && fault_ == Fault::kSupervisorDies;
  if (told) kind_ = "none", result_ = "";  // by the one that is gone
  if (!new_one_goes_on) result_ = "failed: the supervisor ended in it";
}

void Trial::OldSilent() {
  if (step_ == Step::kRehearse) {
    // Before it is asked for samples.
    auto held = rig_.Reach(Step::kPrepare);
    Expect(held.has_value(), "the step was not reached");
    if (!held) return;
    held_ = *held;
    kill(held_.new_pid, SIGCONT);
    rig_.Stop(held_.old_pid);
    End(Ends::kRollsBack, "it took too long (phase rehearsing)");
    // It serves as before, but does not: the hang monitor's affair.
    row_.happened = "rolled back, then restarted";
    kind_ = "hang";
    result_ = "done";
  } else if (Hold()) {
    End(Ends::kGoesOn, "");
    owner_ = held_.new_pid;
  }
  ExpectCrash(1);
  ExpectDead(held_.old_pid, "old worker");
}

void Trial::NewSilent() {
  if (!Hold()) return;
  if (step_ == Step::kProbation) {
    End(Ends::kGoesOn, "");
    row_.happened = "went on, then replaced";
    ExpectCrash(1);
    kind_ = "hang";
  } else {
    static const std::map<Step, const char*> kReasons = {
        {Step::kStart, "too long (phase starting)"},      {Step::kPrepare, "too long (phase preparing)"},
        {Step::kRehearse, "too long (phase rehearsing)"}, {Step::kServe, "too long (phase serving)"},
        {Step::kProbe, "the new worker died: hung: "},    {Step::kCommit, "the new worker died: hung: "}};
    End(Ends::kRollsBack, kReasons.at(step_));
    owner_ = held_.old_pid;
  }
  ExpectDead(held_.new_pid, "new worker");
}

// The build that runs cannot do its part: no reason to keep a better one out.
void Trial::OldRefuses() {
  static const std::map<Step, std::string> kPoints = {{Step::kRehearse, "worker.samples"},
                                                      {Step::kPark, "worker.park"},
                                                      {Step::kYield, "worker.yield_metadata"}};
  const std::string& point = kPoints.at(step_);
  rig_.BeginSwap(rig_.builds()->With(point + "=eio"));
  Expect(rig_.SwapResult().empty(), "the build with the fault was not taken");
  auto settled = rig_.WaitSettled();
  if (!settled) return;
  const auto old = static_cast<pid_t>(settled->workers.front().pid);
  rig_.BeginSwap(rig_.builds()->clean());
  End(Ends::kGoesOn, "");
  Expect(Contains(rig_.Log(), "fault.fired point=" + point), "the fault did not fire");
  if (step_ != Step::kRehearse) ExpectCrash(1);
  if (auto status = rig_.Status(); step_ == Step::kRehearse && status) {
    const auto& steps = status->last_swap.steps;
    Expect(std::any_of(steps.begin(), steps.end(),
                       [](const ctl::SwapStep& step) { return Contains(step.detail, "nothing compared"); }),
           "it is not said that nothing was compared");
  }
  ExpectDead(old, "old worker");
}

void Trial::WrongBuild(const std::string& faults, const char* reason) {
  auto before = rig_.WaitSettled();
  if (before) owner_ = static_cast<pid_t>(before->workers.front().pid);
  rig_.BeginSwap(rig_.builds()->With(faults));
  End(Ends::kRollsBack, reason);
  Expect(Contains(rig_.Log(), "fault.fired point=" + faults.substr(0, faults.find('='))),
         "the fault did not fire");
}

// What it answers on trial goes to applications, until it is found out; then none of it may be left in the
// kernel's caches.
void Trial::WrongRead() {
  auto before = rig_.WaitSettled();
  if (!before) return;
  owner_ = static_cast<pid_t>(before->workers.front().pid);
  const uint64_t old_generation = before->workers.front().generation;
  const std::string root = rig_.root() + "/";
  const ColdFiles::File bytes = rig_.cold()->Next(), name = rig_.cold()->Next();
  // One thread of it stands at the probe's question; the others serve.
  rig_.BeginSwap(
      rig_.builds()->With("fuse.probe=block;fuse.trial_wrong_bytes=wrong@0;fuse.trial_wrong_enoent=wrong@2;"
                          "fuse.trial_wrong_listing=wrong"));
  auto probing = rig_.Wait([](const ctl::SupervisorStatus& status) { return status.phase == "probing"; });
  Expect(probing.has_value(), "the step was not reached");
  if (!probing) return;
  int wrong = 0;
  wrong += ReadWhole(root + bytes.name, 65536, bytes.flags) != rig_.image().files.at(bytes.name);
  struct stat st;
  wrong += lstat((root + name.name).c_str(), &st) != 0 && errno == ENOENT;
  Expect(wrong > 0, "nothing wrong was served");
  pid_t candidate = 0;
  for (const ctl::WorkerStatus& worker : probing->workers) {
    if (worker.generation > old_generation) candidate = static_cast<pid_t>(worker.pid);
  }
  kill(candidate, SIGKILL);
  End(Ends::kRollsBack, "the new worker died");
  for (const std::string& file : {bytes.name, name.name}) {
    findings_.Compared("taken back: " + file, ReadWhole(root + file) == rig_.image().files.at(file));
  }
  row_.happened = "rolled back, " + std::to_string(wrong) + " wrong answers taken back";
  ExpectDead(candidate, "new worker");
}

// Nothing is compared with a build that does not say what it answered, so the next one may lie. Whoever
// leaves it by a rollback gets rid of what it has told the kernel, too.
void Trial::WrongAndLeft() {
  for (const char* faults : {"worker.samples=eio", "worker.samples=eio;fuse.wrong_bytes=wrong@0"}) {
    rig_.BeginSwap(rig_.builds()->With(faults));
    Expect(rig_.SwapResult().empty(), "a build was not taken: " + rig_.SwapResult());
    if (!rig_.WaitSettled()) return Expect(false, "it does not come to rest");
  }
  const ColdFiles::File bytes = rig_.cold()->Next();
  const std::string path = rig_.root() + "/" + bytes.name, right = rig_.image().files.at(bytes.name);
  auto held = OpenFile(path, O_RDONLY);
  auto content = [&] {
    std::string text(right.size(), '\0');
    return held.ok() && PreadFull(held->get(), text.data(), text.size(), 0).ok() ? text : std::string();
  };
  Expect(content() != right, "nothing wrong was served");
  auto control = rig_.node()->Control();
  auto left = control == nullptr ? Unavailable("no supervisor") : control->Rollback(nullptr).status();
  Expect(left.ok(), "it was not left: " + left.ToString());
  findings_.Compared("taken back, by who holds it open: " + bytes.name, content() == right);
  findings_.Compared("taken back: " + bytes.name, ReadWhole(path) == right);
  // Another one goes on to what was there before, and not back to that build.
  if (control != nullptr) control->Rollback(nullptr).status().IgnoreError();
  findings_.Compared("after another rollback: " + bytes.name, content() == right);
  kind_ = "rollback";
  row_.happened = "left by a rollback";
}

void Trial::MetadataLocked() {
  if (!Hold()) return;
  auto file = OpenFile(rig_.state() + "/metadata/LOCK", O_RDWR);
  struct flock lock {};
  lock.l_type = F_WRLCK;
  Expect(file.ok() && fcntl(file->get(), F_SETLK, &lock) == 0,
         "LOCK was not free while nobody owned the metadata");
  rig_.LetGo();
  auto without =
      rig_.Wait([](const ctl::SupervisorStatus& status) { return status.phase == "no-metadata"; }, 30);
  Expect(without.has_value(), "the old worker got the metadata");
  if (without) {
    Expect(std::any_of(without->warnings.begin(), without->warnings.end(),
                       [](const std::string& w) { return Contains(w, "cannot open its metadata"); }),
           "status does not warn");
  }
  file->Reset();
  End(Ends::kRollsBack, "takeMetadata failed");
  owner_ = held_.old_pid;
}

void Trial::DiskFull() {
  if (!Hold()) return;
  const std::string path = rig_.state() + "/filler";
  struct statvfs left {};
  {
    auto filler = OpenFile(path, O_WRONLY | O_CREAT);
    Expect(filler.ok(), "no filler");
    const std::string block(1 << 20, 'x');
    for (size_t size = block.size(); filler.ok() && size >= 512; size /= 2) {
      while (write(filler->get(), block.data(), size) > 0) {
      }
    }
  }
  Expect(statvfs(rig_.state().c_str(), &left) == 0 && left.f_bavail == 0, "the disk is not full");
  rig_.LetGo();
  End(Ends::kEither, "");
  row_.happened += ", disk full";
  // What nobody has read is read while there is no room for it.
  for (int i = 0; i < 3; ++i) {
    const ColdFiles::File file = rig_.cold()->Next();
    findings_.Compared(
        "with a full disk " + file.name,
        ReadWhole(rig_.root() + "/" + file.name, 65536, file.flags) == rig_.image().files.at(file.name));
  }
  unlink(path.c_str());
  owner_ = swap_error_.empty() ? 0 : held_.old_pid;
}

void Trial::Dequeues(bool old) {
  if (!Hold()) return;
  auto mounts = [this]() -> absl::StatusOr<std::vector<ctl::MountInfo>> {
    auto control = rig_.node()->Control();  // at most one a thread
    return control != nullptr ? control->Mounts() : Unavailable("no supervisor");
  }();
  Expect(mounts.ok(), "no mounts");
  if (!mounts.ok()) return;
  const pid_t pid = old ? held_.old_pid : held_.new_pid;
  const uint64_t generation = old ? held_.old_generation : held_.new_generation;
  auto thread = DyingThread::Of(pid, generation, *mounts);
  Expect(thread.ok(), "its descriptors: " + thread.status().ToString());
  if (!thread.ok()) return;
  HeldExit exit(pid);
  Expect(exit.held(), "ptrace is not allowed here");
  Disturb(pid, kNothing);  // the first sign of its death; the supervisor kills it
  rig_.LetGo();
  Expect(exit.WaitAtExit(20), "it was not killed");
  // Somebody else serves, although the end of this one is not proven.
  const bool crash = old || step_ == Step::kProbation;
  auto serving = rig_.Wait([&](const ctl::SupervisorStatus& status) {
    if (crash) return status.phase == "awaiting-exit";
    return status.phase == "reclaim-wait" || status.phase == "running";
  });
  Expect(serving.has_value(), "nobody took over: D state delays reads");
  pid_t reader = 0;
  for (const ctl::WorkerStatus& worker : serving ? serving->workers : std::vector<ctl::WorkerStatus>()) {
    if (worker.generation != generation && worker.role != "retiring" && worker.role != "dying")
      reader = static_cast<pid_t>(worker.pid);
  }
  Expect(reader != 0, "nobody took over");
  std::jthread asking;  // ends when it is answered
  if (reader != 0) {
    rig_.Stop(reader);
    // The readers that run may all wait for the one that is stopped: then there is nothing else to take.
    asking = std::jthread([name = rig_.root() + "/none-" + std::to_string(generation)] {
      struct stat st;
      lstat(name.c_str(), &st);
    });
    absl::Status taken = thread->TakeOne(10);
    Expect(taken.ok(), "no request was taken: " + taken.ToString());
    rig_.LetGo();
    Expect(thread->Unanswered(), "the request was answered before the exit was proven");
  }
  exit.LetGo();
  if (step_ == Step::kProbation) {
    End(Ends::kGoesOn, "");
    kind_ = "crash";
    ExpectCrash(1);
  } else if (old) {
    End(EndOfOldGone(), ReasonOfOldGone());
    ExpectCrash(1);
  } else {
    End(Ends::kRollsBack, "the new worker died");
    owner_ = held_.old_pid;
  }
  ExpectDead(pid, "dying worker");
  Expect(!thread->Unanswered(), "its last request was forgotten");
  row_.happened += ", " + thread->what() + " answered";
}

void Trial::VerifierDies() {
  if (!Hold()) return;
  int killed = 0;
  for (const Child& child : ChildrenOf(rig_.node()->supervisor())) {
    if (child.name == "holdfast-verifi" && kill(child.pid, SIGKILL) == 0) ++killed;
  }
  Expect(killed == 1, std::to_string(killed) + " verifiers ran");
  // In the probe it waits for the new worker's answer, and the kernel does not let it die before.
  if (step_ == Step::kProbe) rig_.LetGo();
  End(Ends::kRollsBack, "the verifier died");
  rig_.LetGo();
  owner_ = held_.old_pid;
  ExpectDead(held_.new_pid, "new worker");
}

void Trial::Act() {
  switch (fault_) {
    case Fault::kOldDies:
      if (!Hold()) return;
      kill(held_.old_pid, SIGKILL);
      return OldGone();
    case Fault::kNewDies:
      if (!Hold()) return;
      kill(held_.new_pid, SIGKILL);
      return NewGone();
    case Fault::kSupervisorDies:
      if (Hold()) SupervisorDies();
      return;
    case Fault::kSupervisorDiesEntering:
      return SupervisorDiesEntering();
    case Fault::kOldHangsUp:
    case Fault::kOldSendsNoise:
      if (!Hold()) return;
      Disturb(held_.old_pid, fault_ == Fault::kOldSendsNoise ? kNoise : kNothing);
      return OldGone();
    case Fault::kNewHangsUp:
    case Fault::kNewSendsNoise:
    case Fault::kNewSendsNonsense:
      if (!Hold()) return;
      Disturb(held_.new_pid, fault_ == Fault::kNewHangsUp      ? kNothing
                             : fault_ == Fault::kNewSendsNoise ? kNoise
                                                               : kNonsense);
      return NewGone();
    case Fault::kOldSilent:
      return OldSilent();
    case Fault::kNewSilent:
      return NewSilent();
    case Fault::kOldRefuses:
      return OldRefuses();
    case Fault::kWrongBytes:
      return WrongBuild("fuse.wrong_bytes=wrong@0", "rehearse failed");
    case Fault::kWrongEnoent:
      return WrongBuild("fuse.wrong_enoent=wrong@0", "rehearse failed");
    case Fault::kWrongListing:
      return WrongBuild("fuse.wrong_listing=wrong@0", "rehearse failed");
    case Fault::kTrialWrongBytes:
      return WrongBuild("fuse.trial_wrong_bytes=wrong@0", "probe failed");
    case Fault::kTrialWrongEnoent:
      return WrongBuild("fuse.trial_wrong_enoent=wrong@0", "probe failed");
    case Fault::kTrialWrongListing:
      return WrongBuild("fuse.trial_wrong_listing=wrong@0", "probe failed");
    case Fault::kTrialWrongRead:
      return WrongRead();
    case Fault::kWrongAndLeft:
      return WrongAndLeft();
    case Fault::kNoMetadata:
      return WrongBuild("worker.take_metadata=eio", "takeMetadata failed");
    case Fault::kMetadataLocked:
      return MetadataLocked();
    case Fault::kDiskFull:
      return DiskFull();
    case Fault::kOldDequeues:
      return Dequeues(true);
    case Fault::kNewDequeues:
      return Dequeues(false);
    case Fault::kVerifierDies:
      return VerifierDies();
  }
}

// One owner, a truthful status, and nothing left.
void Trial::CheckAfter(const ctl::SupervisorStatus& before) {
  auto after = rig_.WaitSettled();
  if (!after) {
    auto now = rig_.Status();
    std::string what = now ? "phase " + now->phase : "no supervisor";
    for (const ctl::WorkerStatus& worker : now ? now->workers : std::vector<ctl::WorkerStatus>())
      what += ", " + worker.role + " " + std::to_string(worker.generation);
    Expect(false, "it does not come to rest: " + what);
    return rig_.Spoil();
  }
  const auto pid = static_cast<pid_t>(after->workers.front().pid);
  if (owner_ != 0) Expect(pid == owner_, "another owner than expected");
  if (owner_ == 0)
    Expect(pid != static_cast<pid_t>(before.workers.front().pid), "the owner is the same as before");
  Expect(after->crashes == before.crashes + crashes_, std::to_string(after->crashes - before.crashes) +
                                                          " crashes were counted, not " +
                                                          std::to_string(crashes_));
  Expect(after->last_swap.kind == kind_, "last swap: kind " + after->last_swap.kind + ", not " + kind_);
  Expect(Contains(after->last_swap.result, result_), "last swap: result " + after->last_swap.result);
}

Row Trial::Run() {
  const uint64_t begin = Clock::Real()->BootNanos();
  Watchdog watchdog(&rig_, 120);
  rig_.MarkLog();
  auto before = rig_.WaitSettled();
  if (!before) {
    rig_.Spoil();
    row_.problems.push_back("the node was not at rest");
    return row_;
  }
  const bool wrong_answers = fault_ >= Fault::kTrialWrongBytes && fault_ <= Fault::kWrongAndLeft;
  {
    Witness witness(rig_.image(), rig_.root(), rig_.cold(), &findings_);
    std::unique_ptr<WaitingRead> waiting;
    std::unique_ptr<RunningReaders> readers;
    // Who reads from a build that lies on trial is lied to; that it is taken back is what can be promised.
    if (!wrong_answers) {
      waiting =
          std::make_unique<WaitingRead>(rig_.image(), rig_.root(), rig_.registry(), rig_.cold(), &findings_);
      Expect(waiting->waiting(), "no read waited for the registry");
      readers = std::make_unique<RunningReaders>(rig_.image(), rig_.root(), rig_.cold(), &findings_);
    }
    Act();
    rig_.LetGo();
    rig_.SwapResult();
    CheckAfter(*before);
    if (waiting) waiting->Finish();
    if (readers) readers->Stop();
    if (readers) row_.longest_ms = readers->longest_ms();
    Expect(!IsSilent(fault_) || row_.longest_ms < kHangMillis * kTimeFactor, "the hang was noticed late");
    witness.Check();
  }
  if (rig_.usable()) {
    for (const std::string& left : rig_.Leftovers()) Expect(false, "left: " + left);
    rig_.BeginSwap(rig_.builds()->clean());
    const std::string error = rig_.SwapResult();
    Expect(error.empty(), "a good build is refused afterwards: " + error);
    if (!rig_.WaitSettled(30)) rig_.Spoil();
  }
  if (watchdog.Stop()) Expect(false, "it took too long and was ended");
  for (const std::string& wrong : findings_.wrong()) Expect(false, wrong);
  row_.checked = findings_.checked();
  row_.seconds = static_cast<double>(Clock::Real()->BootNanos() - begin) / 1e9;
  return row_;
}

class Matrix {
 public:
  explicit Matrix(std::vector<std::string> filters)
      : filters_(std::move(filters)), image_(MakeImage(4, {.small_files = 1500, .large_bytes = 48u << 20})) {}

  int Run() {
    printf("%-9s  %-41s  %-44s  %9s  %6s  %-6s  %7s\n", "step", "fault", "what happened", "longest", "reads",
           "result", "seconds");
    for (const FaultInfo& info : kFaults) {
      for (Step step : kSteps) One(step, info.fault);
    }
    printf("\nNot possible:\n");
    for (const FaultInfo& info : kFaults) {
      std::map<std::string, std::string> reasons;
      for (Step step : kSteps) {
        const char* why = Impossible(step, info.fault);
        if (why != nullptr) reasons[why] += std::string(reasons[why].empty() ? "" : ", ") + StepName(step);
      }
      for (const auto& [why, steps] : reasons)
        printf("  %s x %s: %s\n", info.name, steps.c_str(), why.c_str());
    }
    printf("\n%d cases, %d passed, %d failed\n", run_, run_ - failed_, failed_);
    return run_ > 0 && failed_ == 0 ? 0 : 1;
  }

 private:
  bool Wanted(const std::string& name) const {
    return filters_.empty() || std::any_of(filters_.begin(), filters_.end(),
                                           [&](const std::string& filter) { return Contains(name, filter); });
  }

  Rig* RigFor(Step step, Fault fault) {
    const bool silent = IsSilent(fault);
    RigOptions options;
    // Silent: short where nobody waits for the step, else the limits that a node has. Other cases hold
    // workers still for as long as the test, on a busy machine, needs to do its part.
    options.arguments = {"--limits", silent ? "register=2500,prepare=2500,rehearse=2500,yield=2500"
                                            : "park=20000,prepared=20000,yield=20000"};
    if (fault == Fault::kDiskFull) options.state_megabytes = 300;
    const bool dying = fault == Fault::kSupervisorDiesEntering;
    if (dying) options.environment = {"HOLDFAST_SUPERVISOR_FAULTS=" + DeathEntering(step)};
    std::unique_ptr<Rig>& rig = silent                      ? impatient_
                                : fault == Fault::kDiskFull ? small_
                                : dying                     ? dying_
                                                            : plain_;
    if (dying) rig.reset();  // it is armed for this step
    if (rig == nullptr || !rig->usable() || !rig->cold()->LastsForOneMore()) {
      rig.reset();
      rig = std::make_unique<Rig>(&builds_, &image_, &registry_, options);
    }
    return rig.get();
  }

  // Of the first start and the two swaps of the rig's own it survives each phase.
  static std::string DeathEntering(Step step) {
    static const std::map<Step, const char*> kPoints = {
        {Step::kStart, "starting=kill@4"},      {Step::kPrepare, "preparing=kill@3"},
        {Step::kRehearse, "rehearsing=kill@3"}, {Step::kPark, "parking=kill@3"},
        {Step::kServe, "serving=kill@4"},       {Step::kProbe, "probing=kill@3"},
        {Step::kYield, "yielding=kill@3"},      {Step::kCommit, "committing=kill@4"},
        {Step::kProbation, "running=kill@4"}};
    return std::string("supervisor.phase.") + kPoints.at(step);
  }

  void One(Step step, Fault fault) {
    if (Impossible(step, fault) != nullptr || !Wanted(std::string(StepName(step)) + "/" + FaultName(fault)))
      return;
    Rig* rig = RigFor(step, fault);
    Row row = Trial(rig, step, fault).Run();
    const bool passed = row.problems.empty();
    run_++;
    failed_ += passed ? 0 : 1;
    printf("%-9s  %-41s  %-44s  %6.0f ms  %6llu  %-6s  %7.1f\n", StepName(step), FaultName(fault),
           row.happened.c_str(), row.longest_ms, static_cast<unsigned long long>(row.checked),
           passed ? "passed" : "FAILED", row.seconds);
    for (const std::string& problem : row.problems) printf("    %s\n", problem.c_str());
    if (!passed || getenv("FAULT_MATRIX_LOG") != nullptr) {
      fprintf(stderr, "---- log of %s/%s\n%s----\n", StepName(step), FaultName(fault), rig->Log().c_str());
    }
    if (!passed) rig->Spoil();
    fflush(stdout);
  }

  const std::vector<std::string> filters_;
  const Image image_;
  RegistryServer registry_;
  Builds builds_;
  std::unique_ptr<Rig> plain_, impatient_, small_, dying_;
  int run_ = 0, failed_ = 0;
};

}  // namespace
}  // namespace holdfast::test

int main(int argc, char** argv) {
  FLAGS_logtostderr = true;
  google::InitGoogleLogging(argv[0]);
  return holdfast::test::Matrix(std::vector<std::string>(argv + 1, argv + argc)).Run();
}
