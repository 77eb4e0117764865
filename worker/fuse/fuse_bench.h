// For tests: plays the supervisor (mounts, answers INIT, makes ledgers, keeps all descriptors), runs servers
// in processes of their own, and readers in others. The test process itself has one thread, so that it may
// fork, and never touches a path below its mounts. Everything ends with the Bench: mounts live in a private
// mount namespace, children die with their parent.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "common/fault.h"
#include "common/io.h"
#include "schema/ledger_map.h"
#include "schema/touched.h"
#include "worker/fuse/fake_layer.h"
#include "worker/fuse/fuse_server.h"

namespace holdfast::fuse {

class Bench {
 public:
  struct MountPoint {
    uint64_t id = 0;
    std::string path;
    UniqueFd device;
    std::string init_request;
    MountFlags flags;
  };
  struct Ledger {
    UniqueFd memory;
    LedgerMap map;  // here too, for assertions
    std::vector<PipePair> pipes{};
    hf_ledger_header* const header = map.header();
    hf_slot* slot(uint32_t index) const { return map.slot(index); }
    hf_record* record(uint32_t index) const { return map.record(index); }
  };

  Bench();
  ~Bench();
  Bench(const Bench&) = delete;
  Bench& operator=(const Bench&) = delete;

  MountPoint& Mount(const MountFlags& flags = {});
  // A read-only overlay over the mount and an empty folder, as a container has it. Made by a child process;
  // a server must be serving the mount. Its path.
  std::string MountOverlay(const MountPoint& lower);
  Ledger& MakeLedger(uint64_t generation);
  // The log for a trial, empty again; `entries` of it, at most HF_TOUCHED_ENTRIES.
  void MakeTouched(uint32_t entries = HF_TOUCHED_ENTRIES);
  void Unmount(const MountPoint& mount);  // and the kernel says ENODEV
  // In a reader: a process that waits for the mount must not hold it alive.
  void CloseDevices();
  // Waits until the kernel has a request on that mount.
  bool WaitReadable(const MountPoint& mount, int seconds);

  std::map<uint64_t, MountPoint> mounts;
  std::map<uint64_t, std::unique_ptr<Ledger>> ledgers;
  UniqueFd touched;

 private:
  void AnswerInit(MountPoint& mount);
  std::vector<std::string> overlays_;
  TempDir folder_;
};

LedgerHandle DupLedger(const Bench::Ledger& ledger);

// A child that ends with its parent.
class ChildProcess {
 public:
  explicit ChildProcess(const std::function<int()>& body);
  ~ChildProcess();  // kills
  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;
  // Exit code; 1000 + signal if killed; -1 when it still runs after `seconds`.
  int Wait(double seconds);
  void Signal(int signal);
  void Kill();  // SIGKILL, and waits
  pid_t pid() const { return pid_; }

 private:
  pid_t pid_ = -1;
  int pidfd_ = -1;
  int status_ = -1;
};

struct ServerSetup {
  uint64_t generation = 1;
  ServerOptions options;  // generation and faults are filled in
  std::function<std::shared_ptr<FakeIndex>(uint64_t mount_id)> index;
  std::function<void(uint64_t mount_id, FakeLayer&)> prepare;  // before it serves
  std::string faults;                                          // FaultPoints::Parse
  std::vector<uint64_t> leave_out;                             // mounts that it does not serve
  std::vector<uint64_t> serve_now;                             // mounts that it serves before "start"
  int fail_opens = 0;                                          // the first n calls of open_layer fail
  bool record_crashes = false;
};

// A server in a process of its own, driven by one-line commands; each answers "ok ..." or an error text.
//   start | begin (start, on a thread of its own) | atwork (what the LoopWatch says) | park | resume |
//   hurry MILLIS | destroy | stats | adopt GEN FINAL [HUNG] | drained GEN | trial LOG | endtrial | forget LOG
//   (LOG: 1 = bench.touched, 0 = none) | heldback | fault SPEC | hold MOUNT 0/1 | release MOUNT | fail MOUNT
//   | store MOUNT NODE HOW | waiting MOUNT | fetches MOUNT | fired POINT COUNT | unblock POINT | remove MOUNT
//   | ended
class ServerProcess {
 public:
  ServerProcess(Bench& bench, ServerSetup setup);
  std::string Call(const std::string& command, double seconds = 20);
  void Send(const std::string& command);
  uint64_t Number(const std::string& command);  // the number after "ok"
  std::map<std::string, uint64_t> Stats();
  void Kill() { process_->Kill(); }
  ChildProcess& process() { return *process_; }
  pid_t ThreadNamed(const std::string& name) const;

 private:
  UniqueFd control_;
  std::unique_ptr<ChildProcess> process_;
};

// Polls until `condition` holds; false after `seconds`.
bool Eventually(const std::function<bool()>& condition, double seconds = 10);

// In a reader: 0 when the file's bytes [offset, offset + size) are those of `nodeid`; else a small number
// that says what was wrong: errno, or 200 (wrong bytes), 201 (short).
int CheckFile(const std::string& path, uint64_t nodeid, uint64_t offset, uint64_t size, bool direct = false);

}  // namespace holdfast::fuse
