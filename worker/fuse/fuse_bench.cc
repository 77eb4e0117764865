#include "worker/fuse/fuse_bench.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <thread>

#include "common/testing/time_limit.h"
#include "glog/logging.h"

namespace holdfast::fuse {
namespace {

using std::chrono::steady_clock;

constexpr uint32_t kInitFlags = FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_DO_READDIRPLUS |
                                FUSE_PARALLEL_DIROPS | FUSE_MAX_PAGES | FUSE_CACHE_SYMLINKS |
                                FUSE_NO_OPEN_SUPPORT | FUSE_NO_OPENDIR_SUPPORT;

// Once per test process: mounts made here are seen by nobody else and end with the last process of the test.
void EnterPrivateNamespace() {
  static const bool entered = [] {
    PCHECK(unshare(CLONE_NEWNS) == 0);
    PCHECK(mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0);
    return true;
  }();
  (void)entered;
}

}  // namespace

Bench::Bench() { EnterPrivateNamespace(); }

Bench::~Bench() {
  for (const std::string& path : overlays_) umount2(path.c_str(), MNT_DETACH);
  for (auto& [id, mount] : mounts) {
    mount.device.Reset();  // the last descriptor of the connection: it aborts, nobody hangs
    umount2(mount.path.c_str(), MNT_DETACH);
  }
}

Bench::MountPoint& Bench::Mount(const MountFlags& flags) {
  uint64_t id = 100 + mounts.size();
  MountPoint& point = mounts[id];
  point.id = id;
  point.flags = flags;
  point.path = folder_.path() + "/" + std::to_string(id);
  PCHECK(mkdir(point.path.c_str(), 0755) == 0);
  point.device.Reset(open("/dev/fuse", O_RDWR | O_CLOEXEC | O_NONBLOCK));
  PCHECK(point.device.valid());
  std::string data = "fd=" + std::to_string(point.device.get()) +
                     ",rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions";
  PCHECK(mount("holdfast-test", point.path.c_str(), "fuse", MS_RDONLY | MS_NODEV, data.c_str()) == 0);
  AnswerInit(point);
  return point;
}

std::string Bench::MountOverlay(const MountPoint& lower) {
  std::string path = folder_.path() + "/overlay-" + std::to_string(lower.id), empty = path + "-empty";
  PCHECK(mkdir(path.c_str(), 0755) == 0 && mkdir(empty.c_str(), 0755) == 0);
  std::string data = "lowerdir=" + lower.path + ":" + empty;
  ChildProcess child([&] {
    CloseDevices();
    return mount("overlay", path.c_str(), "overlay", MS_RDONLY, data.c_str()) == 0 ? 0 : errno;
  });
  CHECK_EQ(child.Wait(20), 0);
  overlays_.push_back(path);
  return path;
}

void Bench::MakeTouched(uint32_t entries) {
  touched.Reset(memfd_create("touched", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  PCHECK(touched.valid());
  PCHECK(ftruncate(touched.get(), HF_TOUCHED_TOTAL_SIZE) == 0);
  hf_touched_header header{};
  header.magic = HF_TOUCHED_MAGIC;
  header.version = HF_TOUCHED_VERSION;
  header.header_size = sizeof header;
  header.entry_stride = sizeof(hf_touched_entry);
  header.capacity = entries;
  PCHECK(pwrite(touched.get(), &header, sizeof header, 0) == static_cast<ssize_t>(sizeof header));
}

void Bench::AnswerInit(MountPoint& point) {
  CHECK(WaitReadable(point, 5));
  char buffer[65536];
  ssize_t n = read(point.device.get(), buffer, sizeof buffer);
  PCHECK(n > 0);
  point.init_request.assign(buffer, static_cast<size_t>(n));
  fuse_in_header in;
  memcpy(&in, buffer, sizeof in);
  CHECK(in.opcode == FUSE_INIT);
  fuse_init_in asked;
  memcpy(&asked, buffer + sizeof in, sizeof asked);
  struct {
    fuse_out_header header;
    fuse_init_out init;
  } reply{};
  reply.header.len = sizeof reply;
  reply.header.unique = in.unique;
  reply.init.major = FUSE_KERNEL_VERSION;
  reply.init.minor = std::min<uint32_t>(asked.minor, 41);
  reply.init.max_readahead = asked.max_readahead;
  reply.init.flags = kInitFlags & asked.flags;
  reply.init.max_background = 64;
  reply.init.congestion_threshold = 48;
  reply.init.max_write = 4096;
  reply.init.time_gran = 1;
  reply.init.max_pages = 256;
  PCHECK(write(point.device.get(), &reply, sizeof reply) == static_cast<ssize_t>(sizeof reply));
}

Bench::Ledger& Bench::MakeLedger(uint64_t generation) {
  auto memory = LedgerMap::Make(generation);
  CHECK(memory.ok()) << memory.status();
  auto map = LedgerMap::MapGiven(memory->get(), PROT_READ | PROT_WRITE);
  CHECK(map.ok()) << map.status();
  std::unique_ptr<Ledger> ledger(new Ledger{*std::move(memory), *std::move(map)});
  for (uint32_t i = 0; i < HF_LEDGER_SLOTS; i++) {
    int ends[2];
    PCHECK(pipe2(ends, O_CLOEXEC) == 0);
    ledger->pipes.push_back({UniqueFd(ends[0]), UniqueFd(ends[1])});
  }
  return *(ledgers[generation] = std::move(ledger));
}

void Bench::Unmount(const MountPoint& point) { PCHECK(umount2(point.path.c_str(), MNT_DETACH) == 0); }

void Bench::CloseDevices() {
  for (auto& [id, point] : mounts) point.device.Reset();
}

bool Bench::WaitReadable(const MountPoint& point, int seconds) {
  pollfd p{point.device.get(), POLLIN, 0};
  return poll(&p, 1, seconds * 1000) == 1 && (p.revents & POLLIN) != 0;
}

LedgerHandle DupLedger(const Bench::Ledger& ledger) {
  LedgerHandle handle;
  handle.memory = *DupFd(ledger.memory.get());
  for (const PipePair& pipe : ledger.pipes) {
    handle.pipes.push_back({*DupFd(pipe.read_end.get()), *DupFd(pipe.write_end.get())});
  }
  return handle;
}

ChildProcess::ChildProcess(const std::function<int()>& body) {
  pid_t parent = getpid();
  pid_ = fork();
  PCHECK(pid_ >= 0);
  if (pid_ == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(1);
    _exit(body());
  }
  pidfd_ = static_cast<int>(syscall(SYS_pidfd_open, pid_, 0));
  PCHECK(pidfd_ >= 0);
}

ChildProcess::~ChildProcess() {
  if (pid_ > 0) Kill();
  close(pidfd_);
}

int ChildProcess::Wait(double seconds) {
  if (pid_ < 0) return status_;
  pollfd p{pidfd_, POLLIN, 0};
  if (poll(&p, 1, static_cast<int>(seconds * 1000)) != 1) return -1;
  int status = 0;
  PCHECK(waitpid(pid_, &status, 0) == pid_);
  pid_ = -1;
  status_ = WIFSIGNALED(status) ? 1000 + WTERMSIG(status) : WEXITSTATUS(status);
  return status_;
}

void ChildProcess::Signal(int signal) { kill(pid_, signal); }

void ChildProcess::Kill() {
  if (pid_ < 0) return;
  kill(pid_, SIGKILL);
  // A reader may be uninterruptible until its mount is gone; then it is left to init.
  if (Wait(2) == -1) pid_ = -1;
}

namespace {

// The server's side of ServerProcess.
class ServerMain {
 public:
  ServerMain(Bench& bench, ServerSetup setup) : bench_(bench), setup_(std::move(setup)) {}

  int Run(int control) {
    Prepare();
    char buffer[4096];
    while (true) {
      ssize_t n = recv(control, buffer, sizeof buffer, 0);
      if (n <= 0) return 0;
      std::istringstream in(std::string(buffer, static_cast<size_t>(n)));
      std::string answer = Handle(in);
      (void)!send(control, answer.data(), answer.size(), MSG_NOSIGNAL);
    }
  }

 private:
  void Prepare() {
    CHECK(faults_.Parse(setup_.faults).ok());
    setup_.options.generation = setup_.generation;
    setup_.options.build = "build-" + std::to_string(setup_.generation);
    setup_.options.faults = &faults_;
    setup_.options.watch = &watch_;
    absl::StatusOr<std::unique_ptr<FuseServer>> server =
        FuseServer::Create(setup_.options, DupLedger(*bench_.ledgers[setup_.generation]));
    CHECK(server.ok()) << server.status();
    server_ = *std::move(server);
    server_->OnMountEnded([this](uint64_t id) {
      MutexLock lock(&mutex_);
      ended_ += " " + std::to_string(id);
    });
    if (setup_.record_crashes) {
      // A sanitizer's handlers would report the signal that a test sends, and end the process in their own
      // way.
      for (int fatal : {SIGSEGV, SIGABRT}) signal(fatal, SIG_DFL);
      InstallCrashRecorder(server_.get());
    }
    for (auto& [id, point] : bench_.mounts) {
      if (std::count(setup_.leave_out.begin(), setup_.leave_out.end(), id) == 0) AddMount(point);
    }
  }

  void AddMount(Bench::MountPoint& point) {
    auto layer = std::make_shared<FakeLayer>(setup_.index(point.id));
    layers_[point.id] = layer;
    if (setup_.prepare) setup_.prepare(point.id, *layer);
    MountSpec spec;
    spec.mount_id = point.id;
    spec.device = *DupFd(point.device.get());
    spec.init_request = point.init_request;
    spec.flags = point.flags;
    spec.description = "sha256:test";
    spec.serve_now = std::count(setup_.serve_now.begin(), setup_.serve_now.end(), point.id) > 0;
    spec.open_layer = [this, layer]() -> absl::StatusOr<std::shared_ptr<layer::Layer>> {
      if (setup_.fail_opens > 0) {
        setup_.fail_opens--;
        return DataLoss("damaged index");
      }
      return layer;
    };
    absl::Status added = server_->AddMount(std::move(spec));
    CHECK(added.ok()) << added;
  }

  std::string Handle(std::istringstream& in) {
    std::string verb;
    in >> verb;
    if (verb == "start") {
      server_->Start();
    } else if (verb == "begin") {
      starting_ = std::thread([this] { server_->Start(); });
    } else if (verb == "park") {
      server_->Park();
    } else if (verb == "resume") {
      server_->Resume();
    } else if (verb == "hurry") {
      uint64_t millis = 0;
      in >> millis;
      server_->Hurry(millis * 1'000'000);
    } else if (verb == "destroy") {
      server_.reset();
    } else if (verb == "adopt") {
      uint64_t generation = 0;
      int final_walk = 0;
      in >> generation >> final_walk;
      int hung = 0;
      in >> hung;
      auto taken = server_->AdoptLedger(generation, DupLedger(*bench_.ledgers[generation]), final_walk != 0,
                                        hung != 0);
      return taken.ok() ? "ok " + std::to_string(*taken) : taken.status().ToString();
    } else if (verb == "drained") {
      uint64_t generation = 0;
      in >> generation;
      return server_->Drained(generation) ? "ok 1" : "ok 0";
    } else if (verb == "remove") {
      uint64_t id = 0;
      in >> id;
      server_->RemoveMount(id);
    } else if (verb == "trial") {
      absl::Status begun = server_->BeginTrial(Log(in));
      return begun.ok() ? "ok" : begun.ToString();
    } else if (verb == "endtrial") {
      server_->EndTrial();
    } else if (verb == "forget") {
      auto told = server_->ForgetCached(Log(in));
      return told.ok() ? "ok " + std::to_string(*told) : told.status().ToString();
    } else if (verb == "fault") {
      std::string spec;
      in >> spec;
      return faults_.Parse(spec).ok() ? "ok" : "not a fault";
    } else if (verb == "heldback") {
      std::string answer = "ok";
      for (uint64_t id : server_->HeldBack()) answer += " " + std::to_string(id);
      return answer;
    } else if (verb == "atwork") {
      LoopWatch::Age oldest = watch_.Oldest();
      return oldest.nanos == 0 ? "ok" : "ok " + oldest.name;
    } else if (verb == "ended") {
      MutexLock lock(&mutex_);
      return "ok" + ended_;
    } else if (verb == "stats") {
      ServerStats s = server_->stats();
      return "ok requests " + std::to_string(s.requests) + " pending " + std::to_string(s.pending) +
             " adopted " + std::to_string(s.adopted) + " interrupted " + std::to_string(s.interrupted) +
             " errors " + std::to_string(s.errors) + " dropped " + std::to_string(s.dropped) + " poisoned " +
             std::to_string(s.poisoned);
    } else if (verb == "fired") {
      std::string point;
      int count = 0;
      in >> point >> count;
      return faults_.WaitFired(point, count, 10) ? "ok" : "it did not fire";
    } else if (verb == "unblock") {
      std::string point;
      in >> point;
      faults_.Release(point);
    } else {
      return HandleLayer(verb, in);
    }
    return "ok";
  }

  UniqueFd Log(std::istringstream& in) {
    int with = 0;
    in >> with;
    return with != 0 ? *DupFd(bench_.touched.get()) : UniqueFd();
  }

  std::string HandleLayer(const std::string& verb, std::istringstream& in) {
    uint64_t id = 0, node = 0;
    int value = 0;
    in >> id;
    FakeLayer& layer = *layers_.at(id);
    if (verb == "hold") {
      in >> value;
      layer.Hold(value != 0);
    } else if (verb == "release") {
      layer.Release();
    } else if (verb == "fail") {
      layer.Release(Unavailable("the registry is down"));
    } else if (verb == "store") {
      in >> node >> value;
      layer.Store(node, static_cast<Stored>(value));
    } else if (verb == "waiting") {
      return "ok " + std::to_string(layer.waiting());
    } else if (verb == "fetches") {
      return "ok " + std::to_string(layer.fetches());
    } else {
      return "unknown command " + verb;
    }
    return "ok";
  }

  Bench& bench_;
  ServerSetup setup_;
  FaultPoints faults_;
  LoopWatch watch_{Clock::Real()};
  std::map<uint64_t, std::shared_ptr<FakeLayer>> layers_;
  Mutex mutex_;
  std::string ended_ ABSL_GUARDED_BY(mutex_);
  std::unique_ptr<FuseServer> server_;
  std::thread starting_;
};

}  // namespace

ServerProcess::ServerProcess(Bench& bench, ServerSetup setup) {
  if (!bench.ledgers.contains(setup.generation)) bench.MakeLedger(setup.generation);
  int ends[2];
  PCHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0);
  control_.Reset(ends[0]);
  process_ = std::make_unique<ChildProcess>([&]() -> int {
    close(ends[0]);
    ServerMain server(bench, setup);
    _exit(server.Run(ends[1]));  // the layers' threads are not waited for
  });
  close(ends[1]);
}

void ServerProcess::Send(const std::string& command) {
  (void)!send(control_.get(), command.data(), command.size(), MSG_NOSIGNAL);
}

std::string ServerProcess::Call(const std::string& command, double seconds) {
  Send(command);
  pollfd p{control_.get(), POLLIN, 0};
  if (poll(&p, 1, static_cast<int>(seconds * 1000) * kTimeFactor) != 1) return "no answer to " + command;
  char buffer[4096];
  ssize_t n = recv(control_.get(), buffer, sizeof buffer, 0);
  return n > 0 ? std::string(buffer, static_cast<size_t>(n)) : "the server has ended";
}

uint64_t ServerProcess::Number(const std::string& command) {
  std::string answer = Call(command);
  CHECK(answer.starts_with("ok ")) << command << ": " << answer;
  return std::strtoull(answer.c_str() + 3, nullptr, 10);
}

std::map<std::string, uint64_t> ServerProcess::Stats() {
  std::istringstream in(Call("stats"));
  std::map<std::string, uint64_t> result;
  std::string name;
  in >> name;
  for (uint64_t value = 0; in >> name >> value;) result[name] = value;
  return result;
}

pid_t ServerProcess::ThreadNamed(const std::string& name) const {
  std::string folder = "/proc/" + std::to_string(process_->pid()) + "/task";
  DIR* dir = opendir(folder.c_str());
  PCHECK(dir != nullptr);
  pid_t found = -1;
  while (dirent* entry = readdir(dir)) {
    auto comm = ReadFile(folder + "/" + entry->d_name + "/comm");
    if (comm.ok() && *comm == name + "\n") found = atoi(entry->d_name);
  }
  closedir(dir);
  return found;
}

bool Eventually(const std::function<bool()>& condition, double seconds) {
  auto deadline = steady_clock::now() + std::chrono::duration<double>(seconds * kTimeFactor);
  while (!condition()) {
    if (steady_clock::now() > deadline) return false;
    usleep(2000);
  }
  return true;
}

int CheckFile(const std::string& path, uint64_t nodeid, uint64_t offset, uint64_t size, bool direct) {
  int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | (direct ? O_DIRECT : 0));
  if (fd < 0) return errno;
  void* memory = nullptr;
  PCHECK(posix_memalign(&memory, 4096, size) == 0);
  auto* bytes = static_cast<char*>(memory);
  uint64_t done = 0;
  int result = 0;
  while (done < size && result == 0) {
    ssize_t n = pread(fd, bytes + done, size - done, static_cast<off_t>(offset + done));
    if (n < 0) result = errno;
    if (n == 0) result = 201;
    if (n > 0) done += static_cast<uint64_t>(n);
  }
  for (uint64_t i = 0; i < done && result == 0; i++) {
    if (bytes[i] != ContentByte(nodeid, offset + i)) result = 200;
  }
  free(memory);
  close(fd);
  return result;
}

}  // namespace holdfast::fuse
