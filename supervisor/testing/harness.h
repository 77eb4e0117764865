// Runs a real supervisor on a folder of its own for one test, with copies of the fake worker. Whatever
// happens, the destructor ends every process it started and unmounts what they left.
#pragma once

#include <capnp/rpc-twoparty.h>
#include <kj/async-io.h>
#include <sys/types.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "common/io.h"
#include "common/testing/time_limit.h"
#include "schema/control.capnp.h"
#include "supervisor/testing/fake_worker.capnp.h"
#include "supervisor/testing/service_manager.h"

namespace holdfast::supervisor::testing {

struct WorkerView {
  uint64_t generation = 0;
  pid_t pid = 0;
  std::string role, build, executable;
  uint64_t received = 0;
};

struct StepView {
  std::string name, detail;
  uint64_t nanos = 0;
};

struct StatusView {
  std::string phase, swap_kind, swap_result, to_build, from_build, state_source;
  bool fd_store = false;
  uint64_t restarts = 0;
  uint64_t crashes = 0, hangs = 0, swaps = 0, live = 0, detached = 0, carried = 0, pause_nanos = 0;
  std::vector<WorkerView> workers;
  std::vector<std::string> warnings;
  std::vector<StepView> steps;  // of the last swap
  std::string last_good, spare, last_death;
  int64_t last_death_wall_nanos = 0;
  uint64_t probation_seconds = 0;
  // The worker with that role; fails the test when there is none.
  WorkerView Worker(const std::string& role) const;
};

struct Info {
  uint64_t generation = 0, adopted = 0, pages = 0;
  std::vector<uint64_t> mount_ids, exited, gone, ledgers_seen;
  std::vector<std::string> blobs, inherited_fds, calls;
  bool listener_works = false;
};

struct MountView {
  uint64_t id = 0;
  std::string path, init_request, init_reply, blob;
  schema::MountState state = schema::MountState::GONE;
};

class Harness {
 public:
  Harness();
  ~Harness();

  std::string state_dir() const { return dir_.path() + "/state"; }
  std::string control_socket() const { return dir_.path() + "/run/supervisor.sock"; }
  std::string snapshotter_socket() const { return dir_.path() + "/run/snapshotter.sock"; }
  // A worker program that behaves as `mode` says (fake_worker.cc).
  std::string MakeWorker(const std::string& mode);

  // Starts the supervisor and waits until its worker has everything.
  void Start(const std::vector<std::string>& extra = {}, const std::string& mode = "good");
  // Starts it with the usual folders plus `extra` and waits for its end (10 s); its exit code, *output = what
  // it printed.
  int RunToEnd(const std::vector<std::string>& extra, std::string* output);
  pid_t pid() const { return pid_; }
  int Stop(int signal);  // and waits; the exit code, or -signal
  int WaitEnd();         // of a supervisor that ends by itself; as Stop
  // The supervisor is started by a stand-in for systemd, which keeps its descriptors.
  ServiceManager& UseServiceManager();
  ServiceManager& manager() { return *manager_; }
  bool LogContains(const std::string& text) const;  // of all supervisors of this test
  // The supervisors started from now on may not use real-time scheduling.
  void RefuseUrgency() { urgency_refused_ = true; }
  // HOLDFAST_SUPERVISOR_FAULTS of the supervisors started from now on.
  void SetFaults(const std::string& faults) { faults_ = faults; }
  // With the arguments of the last Start(). Does not wait for the worker.
  void StartAgain();
  // Ended children, other than the supervisor, that a dead supervisor left behind.
  static void ReapOrphans();
  void Connect();

  StatusView Status();
  // Polls until the phase is `phase`; fails the test after `seconds`.
  StatusView WaitPhase(const std::string& phase, int seconds = 20);
  // Empty when done, else the error; *changed as returned.
  std::string Upgrade(const std::string& path, bool force, bool* changed);
  // Empty when done, else the error. *begun, if given: the names of the steps that it told, in order.
  std::string Rollback(std::vector<std::string>* begun = nullptr);
  // "ready <sha>" or "not ready: <reason>".
  std::string CheckRollback();
  std::vector<MountView> Mounts(uint64_t after, uint32_t limit, bool* more);
  std::vector<uint64_t> LedgerGenerations();

  MountView Mount(const std::string& name, uint64_t flags = 0,
                  const std::string& blob = "");  // a new folder mounts/<name>
  schema::MountState Unmount(uint64_t id);
  void SetBlob(uint64_t id, const std::string& blob);
  Info WorkerInfo();

  // What the supervisor's descriptors are ("socket", "/memfd", ...), and how many of each.
  std::map<std::string, int> OpenFds() const;

  template <typename T>
  T Wait(kj::Promise<T> promise, int seconds = 20) {
    return io_.provider->getTimer()
        .timeoutAfter(seconds * kTimeFactor * kj::SECONDS, kj::mv(promise))
        .wait(io_.waitScope);
  }

 private:
  pid_t Launch(const std::vector<std::string>& args, int output);
  FakeAdmin::Client Admin();

  TempDir dir_;
  kj::AsyncIoContext io_;
  pid_t pid_ = 0;
  int made_ = 0;
  std::vector<std::string> args_;
  std::string faults_;
  bool urgency_refused_ = false;
  std::unique_ptr<ServiceManager> manager_;
  kj::Own<kj::AsyncCapabilityStream> stream_;
  kj::Own<capnp::TwoPartyClient> client_;
  kj::Maybe<schema::Control::Client> control_;
};

// Asks for the attributes of `path` in a child process. Result(): the generation that answered, or -errno.
class Stat {
 public:
  explicit Stat(const std::string& path);
  ~Stat();
  bool Done(int seconds);  // false: still waiting
  int64_t Result(int seconds = 15);

 private:
  pid_t pid_;
  UniqueFd pipe_;
};

// Waits until `condition` holds; false after `seconds`.
bool Eventually(const std::function<bool()>& condition, int seconds = 15);

}  // namespace holdfast::supervisor::testing
