// A whole holdfast for one test: real supervisor, real worker, in a temporary folder, with the registry in
// the test's process. Everything it started is gone after the destructor, also when the test failed:
// processes by pid, mounts by path.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "common/io.h"
#include "common/status.h"
#include "worker/ctl/control_client.h"

namespace holdfast::test {

using Labels = std::map<std::string, std::string>;

// containerd's side of the snapshots API.
class SnapshotsClient {
 public:
  struct Mount {
    std::string type, source;
    std::vector<std::string> options;
  };
  virtual ~SnapshotsClient() = default;
  static std::unique_ptr<SnapshotsClient> Connect(const std::string& socket);
  // Errors keep the gRPC code.
  virtual absl::StatusOr<std::vector<Mount>> Prepare(const std::string& key, const std::string& parent,
                                                     const Labels& labels) = 0;
  virtual absl::StatusOr<std::vector<std::string>> List(const std::string& filter) = 0;  // names
  virtual absl::Status Stat(const std::string& key) = 0;
  virtual absl::Status Remove(const std::string& key) = 0;
  virtual absl::Status Cleanup() = 0;
};

// What a node runs, and how.
struct NodePrograms {
  std::string supervisor, worker;          // empty: today's build, of the folder HOLDFAST_BIN
  std::vector<std::string> arguments{};    // more of them, for the supervisor
  std::vector<std::string> environment{};  // "NAME=value", beside the test's own
  std::string log{};        // what it and its workers print is appended here; empty: to the test's output
  int state_megabytes = 0;  // > 0: the state folder is a tmpfs of that size
};

class Node {
 public:
  using Programs = NodePrograms;
  // `config`: text of config.toml.
  explicit Node(const std::string& config, Programs programs = {});
  ~Node();
  Node(const Node&) = delete;
  Node& operator=(const Node&) = delete;

  const std::string& root() const { return root_.path(); }
  std::string control_socket() const { return root() + "/run/supervisor.sock"; }
  SnapshotsClient* snapshots() { return snapshots_.get(); }
  // After a death: a call on the connection to the dead worker may fail.
  void Reconnect();
  // A retired worker lives as long as connections to it.
  void CloseSnapshots() { snapshots_.reset(); }

  // A fresh connection, so any thread may have its own.
  std::unique_ptr<ctl::ControlClient> Control() const;
  // False when no worker was the owner within the time, or still the one that was killed.
  bool WaitRunning(int seconds = 20, pid_t killed = 0) const;
  pid_t WorkerPid() const;  // of the owner; 0 = none
  // SIGKILL to the owner; its pid.
  pid_t KillWorker();
  // SIGKILL to the supervisor alone; its worker lives on. The worker's pid.
  pid_t KillSupervisor();
  // A new supervisor on the same state and runtime folders, after KillSupervisor. False: it did not come up.
  bool StartAgain();
  pid_t supervisor() const { return supervisor_; }
  // True when the process ended within the time.
  bool WaitEnded(pid_t pid, int seconds = 20) const;

  // Mounts what Prepare returned; unmounted by the destructor at the latest. Returns the folder.
  std::string MountAll(const std::vector<SnapshotsClient::Mount>& mounts);
  void UnmountAll();

  // Ends everything (SIGINT to the supervisor); its exit status, or -1 when it did not end in time.
  int Stop(int seconds = 30);
  // Paths of mounts under root().
  std::vector<std::string> MountsLeft() const;

 private:
  void Start(const std::string& config);
  void Spawn();
  void NoteWorkers();

  const Programs programs_;
  TempDir root_;
  pid_t supervisor_ = 0;
  std::vector<pid_t> workers_;  // all seen
  std::vector<std::string> mounted_;
  std::unique_ptr<SnapshotsClient> snapshots_;
};

}  // namespace holdfast::test
