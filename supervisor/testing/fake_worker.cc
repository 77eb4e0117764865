// A stand-in for the worker in the supervisor's tests: speaks the whole protocol and serves GETATTR of mount
// roots, through the ledger, and nothing else. How it misbehaves is read from the tail of its own executable
// ("HFMODE:<mode>\n"), so that a test makes differently behaving builds by appending to a copy. Files in the
// state folder steer a running one: while "hold" exists a request taken is left in its slot (and "held" is
// made), with "hold-pipe" in its pipe; with "stuck" the reading thread never ends executing it, with "slow"
// only after two seconds, with "deaf" it reads nothing; with "held-back" ping says that it does so on
// purpose; "stop-<call>" (serve, take, park, resume, yield, held) stops the whole process there, the first
// one that comes by.
#include <capnp/rpc-twoparty.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <kj/async-io.h>
#include <linux/fuse.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "common/clock.h"
#include "common/io.h"
#include "common/urgency.h"
#include "schema/control.capnp.h"
#include "schema/handover.capnp.h"
#include "schema/ledger.h"
#include "schema/probe.h"
#include "schema/rpc.h"
#include "schema/touched.h"
#include "supervisor/testing/fake_worker.capnp.h"

#pragma GCC diagnostic ignored "-Wnon-virtual-dtor"  // generated server bases

namespace holdfast::supervisor::testing {
namespace {

std::string OwnMode() {
  auto exe = ReadFile("/proc/self/exe");
  if (!exe.ok()) return "";
  std::string tail = exe->substr(exe->size() - std::min<size_t>(exe->size(), 64));
  size_t at = tail.find("HFMODE:");
  if (at == std::string::npos) return "good";
  at += 7;
  return tail.substr(at, tail.find('\n', at) - at);
}

UniqueFd Dup(int fd) { return UniqueFd(fcntl(fd, F_DUPFD_CLOEXEC, 3)); }

std::atomic_ref<uint32_t> Word(void* address) {
  return std::atomic_ref<uint32_t>(*static_cast<uint32_t*>(address));
}

struct LedgerMap {
  char* base = nullptr;
  UniqueFd memory;
  std::vector<std::pair<UniqueFd, UniqueFd>> pipes;
  hf_ledger_header* header() { return reinterpret_cast<hf_ledger_header*>(base); }
  hf_slot* slot(uint32_t i) {
    return reinterpret_cast<hf_slot*>(base + header()->slot_offset + uint64_t{i} * header()->slot_stride);
  }
  hf_record* record(uint32_t i) {
    return reinterpret_cast<hf_record*>(base + header()->record_offset +
                                        uint64_t{i} * header()->record_stride);
  }
};

LedgerMap MapLedger(UniqueFd memory) {
  LedgerMap map;
  void* base = mmap(nullptr, HF_LEDGER_TOTAL_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, memory.get(), 0);
  if (base == MAP_FAILED) _exit(97);
  map.base = static_cast<char*>(base);
  map.memory = std::move(memory);
  return map;
}

// Reads requests of all mounts on one thread, through slot 0 and its pipe.
class Server {
 public:
  Server(LedgerMap own, uint64_t generation, std::string state_dir, std::string mode)
      : own_(std::move(own)),
        generation_(generation),
        state_dir_(std::move(state_dir)),
        mode_(std::move(mode)) {
    thread_ = std::thread([this] { Loop(); });
    thread_.detach();
  }

  void Add(uint64_t id, UniqueFd device, std::string blob) {
    std::lock_guard lock(mutex_);
    blobs_[id] = std::move(blob);
    if (devices_.count(id) == 0) devices_[id] = std::make_shared<UniqueFd>(std::move(device));
  }
  // Reads this one from now on, whatever SetReading says.
  void ReadNow(uint64_t id) {
    std::lock_guard lock(mutex_);
    now_.push_back(id);
  }
  // What it answers for is noted there; null: it is not on trial.
  void SetTouched(char* touched) { touched_ = touched; }
  void Remove(uint64_t id) {
    std::lock_guard lock(mutex_);
    devices_.erase(id);
    blobs_.erase(id);
  }
  void SetReading(bool reading) {
    reading_ = reading;
    if (!reading) std::lock_guard lock(turn_);  // the turn under way ends
  }
  bool holding() const { return holding_; }
  std::map<uint64_t, std::string> blobs() {
    std::lock_guard lock(mutex_);
    return blobs_;
  }
  uint64_t adopted() const { return adopted_; }
  std::map<uint64_t, std::shared_ptr<UniqueFd>> devices() {
    std::lock_guard lock(mutex_);
    return devices_;
  }
  LedgerMap& own() { return own_; }

  // Answers what is left in a ledger.
  void Adopt(LedgerMap& ledger) {
    for (uint32_t i = 0; i < ledger.header()->slot_count; ++i) {
      hf_slot* slot = ledger.slot(i);
      if (Word(&slot->state) == HF_SLOT_FREE) continue;
      if (Word(&slot->state) == HF_SLOT_RECEIVING) {
        ssize_t got = read(ledger.pipes[i].first.get(), slot->request, sizeof(slot->request));
        if (got <= 0 && Word(slot->request) == 0) {
          Word(&slot->state) = HF_SLOT_FREE;
          continue;
        }
      }
      if (Answer(slot->mount_id, slot->request)) ++adopted_;
      Word(&slot->state) = HF_SLOT_FREE;
    }
    for (uint32_t i = 0; i < ledger.header()->record_high_water; ++i)
      Word(&ledger.record(i)->state) = HF_RECORD_FREE;
  }
  void AdoptOwn() {
    holding_ = false;
    Adopt(own_);
  }

 private:
  void Loop() {
    pthread_setname_np(pthread_self(), "fake-reader");
    for (;;) {
      std::vector<pollfd> polls;
      std::vector<uint64_t> ids;
      {
        std::lock_guard turn(turn_);
        if (!holding_ && !PathExists(state_dir_ + "/deaf")) {
          {
            std::lock_guard lock(mutex_);
            for (auto& [id, fd] : devices_) {
              if (!reading_ && std::find(now_.begin(), now_.end(), id) == now_.end()) continue;
              polls.push_back({.fd = fd->get(), .events = POLLIN, .revents = 0});
              ids.push_back(id);
            }
          }
          if (!polls.empty()) {
            if (poll(polls.data(), polls.size(), 2) > 0) {
              for (size_t i = 0; i < polls.size() && !holding_; ++i) {
                if ((polls[i].revents & POLLIN) != 0) TakeOne(ids[i], polls[i].fd);
              }
            }
            continue;
          }
        }
      }
      usleep(1000);
    }
  }

  void TakeOne(uint64_t id, int device) {
    hf_slot* slot = own_.slot(0);
    Word(slot->request) = 0;
    slot->mount_id = id;
    slot->received_ns = Clock::Real()->BootNanos();
    slot->owner_generation = static_cast<uint32_t>(generation_);
    Word(&slot->state) = HF_SLOT_RECEIVING;
    ssize_t got = splice(device, nullptr, own_.pipes[0].second.get(), nullptr, HF_LEDGER_REQUEST_BYTES,
                         SPLICE_F_NONBLOCK);
    if (got <= 0) {
      Word(&slot->state) = HF_SLOT_FREE;
      return;
    }
    if (PathExists(state_dir_ + "/hold-pipe")) {
      holding_ = true;
      ++own_.header()->requests_received;
      return;
    }
    if (read(own_.pipes[0].first.get(), slot->request, HF_LEDGER_REQUEST_BYTES) != got) _exit(96);
    slot->length = static_cast<uint32_t>(got);
    Word(&slot->state) = HF_SLOT_EXECUTING;
    if (PathExists(state_dir_ + "/hold")) {
      holding_ = true;
      UniqueFd(open((state_dir_ + "/held").c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600)).Reset();
      ++own_.header()->requests_received;
      return;
    }
    ++own_.header()->requests_received;
    if (PathExists(state_dir_ + "/slow")) usleep(2'000'000);
    // Not by looking again and again: a report of the stuck thread should find it asleep, however busy the
    // machine.
    while (PathExists(state_dir_ + "/stuck")) pause();
    Answer(id, slot->request);
    ++own_.header()->requests_answered;
    Word(&slot->state) = HF_SLOT_FREE;
  }

  bool Answer(uint64_t id, const uint8_t* request) {
    std::shared_ptr<UniqueFd> device;
    {
      std::lock_guard lock(mutex_);
      auto it = devices_.find(id);
      if (it == devices_.end()) return false;
      device = it->second;
    }
    fuse_in_header in;
    memcpy(&in, request, sizeof(in));
    if (in.opcode == FUSE_FORGET || in.opcode == FUSE_BATCH_FORGET || in.opcode == FUSE_INTERRUPT)
      return false;
    Touch(id, in.nodeid);
    struct {
      fuse_out_header header;
      union {
        fuse_attr_out attr;
        fuse_statfs_out statfs;
        struct {
          fuse_ioctl_out result;
          hf_probe_live live;
        } ioctl;
      };
    } out{};
    out.header.len = sizeof(out.header);
    out.header.unique = in.unique;
    out.header.error = -ENOSYS;
    if (in.opcode == FUSE_GETATTR) {
      out.header.error = 0;
      out.header.len += static_cast<uint32_t>(sizeof(out.attr));
      out.attr = {};
      out.attr.attr.ino = 1;
      out.attr.attr.mode = S_IFDIR | 0755;
      out.attr.attr.nlink = 2;
      out.attr.attr.mtime = generation_;  // tells a test who answered
    } else if (in.opcode == FUSE_STATFS) {
      out.header.error = 0;
      out.header.len += static_cast<uint32_t>(sizeof(out.statfs));
      out.statfs = {};
      out.statfs.st.namelen = 255;
    } else if (in.opcode == FUSE_LOOKUP) {
      bool wrong = mode_ == "wrong-everywhere" || (mode_ == "wrong-on-trial" && touched_ != nullptr);
      out.header.error = wrong ? -EIO : -ENOENT;
    } else if (in.opcode == FUSE_IOCTL) {
      fuse_ioctl_in ask;
      memcpy(&ask, request + sizeof(in), sizeof(ask));
      out.header.error = -ENOTTY;
      if (ask.cmd == HF_PROBE_LIVE && in.nodeid == 1) {
        out.header.error = 0;
        out.header.len += static_cast<uint32_t>(sizeof(out.ioctl));
        out.ioctl = {};
        out.ioctl.live.generation = mode_ == "wrong-generation" ? 1 : generation_;
        strncpy(out.ioctl.live.build, mode_.c_str(), sizeof(out.ioctl.live.build) - 1);
      }
    } else if (in.opcode == FUSE_GETXATTR) {
      out.header.error = -ENODATA;
    }
    return write(device->get(), &out, out.header.len) == static_cast<ssize_t>(out.header.len);
  }

  void Touch(uint64_t id, uint64_t node) {
    char* touched = touched_;
    if (touched == nullptr) return;
    auto* header = reinterpret_cast<hf_touched_header*>(touched);
    uint64_t at = std::atomic_ref<uint64_t>(header->count).fetch_add(1);
    if (at >= header->capacity) return;
    auto* entry =
        reinterpret_cast<hf_touched_entry*>(touched + header->header_size + at * header->entry_stride);
    entry->nodeid = node;
    std::atomic_ref<uint64_t>(entry->mount_id).store(id);
  }

  LedgerMap own_;
  const uint64_t generation_;
  const std::string state_dir_, mode_;
  std::atomic<char*> touched_{nullptr};
  std::vector<uint64_t> now_;  // under mutex_
  std::atomic<bool> reading_{false};
  std::atomic<bool> holding_{false};
  std::atomic<uint64_t> adopted_{0};
  std::mutex turn_;
  std::mutex mutex_;
  std::map<uint64_t, std::shared_ptr<UniqueFd>> devices_;
  std::map<uint64_t, std::string> blobs_;
  std::thread thread_;
};

std::string Text(capnp::Data::Reader data) {
  return std::string(reinterpret_cast<const char*>(data.begin()), data.size());
}

schema::Descriptor::Client MakeFd(int fd) { return MakeDescriptor(Dup(fd)); }

struct Connection {
  Connection(kj::Own<kj::AsyncCapabilityStream> s) : stream(kj::mv(s)), client(*stream, 253) {}
  kj::Own<kj::AsyncCapabilityStream> stream;
  capnp::TwoPartyClient client;
  kj::Promise<void> lost = nullptr;
};

// What the RPC objects share; main thread only.
struct Context {
  std::string mode = OwnMode();
  kj::Maybe<schema::Supervisor::Client> supervisor;
  kj::Timer* timer = nullptr;
  std::unique_ptr<Server> server;
  uint64_t generation = 0;
  std::string state_dir;
  UniqueFd listener;
  UniqueFd metadata;
  std::map<uint64_t, LedgerMap> old_ledgers;
  std::vector<uint64_t> exited;
  std::vector<uint64_t> gone;
  std::vector<uint64_t> ledgers_seen;
  std::vector<std::string> calls;  // that the test wants to know of
  uint32_t pages = 0;
  uint64_t capabilities = 0;
  std::string token, control_socket;
  UniqueFd state;  // of the supervisor, for its successor
  kj::AsyncIoContext* io = nullptr;
  std::vector<kj::Own<Connection>> connections;  // the last one is in use

  schema::Supervisor::Client& link() { return KJ_ASSERT_NONNULL(supervisor); }
};

kj::Promise<UniqueFd> TakeFd(schema::Descriptor::Client descriptor) {
  auto promise = descriptor.getFd();
  return promise.then(
      [keep = kj::mv(descriptor)](kj::Maybe<int> fd) mutable { return Dup(KJ_REQUIRE_NONNULL(fd)); });
}

kj::Promise<void> TakePipes(capnp::List<schema::PipePair>::Reader list, LedgerMap* ledger) {
  auto promises = kj::heapArrayBuilder<kj::Promise<void>>(list.size() * 2);
  ledger->pipes.resize(list.size());
  for (unsigned i = 0; i < list.size(); ++i) {
    promises.add(TakeFd(list[i].getReadEnd()).then([ledger, i](UniqueFd fd) {
      ledger->pipes[i].first = std::move(fd);
    }));
    promises.add(TakeFd(list[i].getWriteEnd()).then([ledger, i](UniqueFd fd) {
      ledger->pipes[i].second = std::move(fd);
    }));
  }
  return kj::joinPromises(promises.finish());
}

kj::Promise<void> WalkMounts(Context& c, uint64_t after) {
  auto request = c.link().mountsRequest();
  request.setAfter(after);
  request.setLimit(1'000);  // the supervisor gives at most 200
  return request.send().then(
      [&c](capnp::Response<schema::Supervisor::MountsResults>&& page) -> kj::Promise<void> {
        ++c.pages;
        auto entries = page.getEntries();
        if (entries.size() > 200) _exit(95);
        auto promises = kj::heapArrayBuilder<kj::Promise<void>>(entries.size());
        for (auto entry : entries) {
          promises.add(TakeFd(entry.getDevice())
                           .then([&c, id = entry.getMountId(), blob = Text(entry.getBlob())](UniqueFd fd) {
                             c.server->Add(id, std::move(fd), blob);
                           }));
        }
        uint64_t last = entries.size() == 0 ? 0 : entries[entries.size() - 1].getMountId();
        bool more = page.getMore();
        return kj::joinPromises(promises.finish())
            .attach(kj::mv(page))
            .then([&c, more, last]() -> kj::Promise<void> {
              if (!more) return kj::READY_NOW;
              return WalkMounts(c, last);
            });
      });
}

kj::Promise<void> WalkLedgers(Context& c, uint64_t after) {
  auto request = c.link().oldLedgersRequest();
  request.setAfter(after);
  return request.send().then(
      [&c](capnp::Response<schema::Supervisor::OldLedgersResults>&& page) -> kj::Promise<void> {
        auto list = page.getLedgers();
        auto promises = kj::heapArrayBuilder<kj::Promise<void>>(list.size());
        uint64_t last = 0;
        for (auto entry : list) {
          last = entry.getGeneration();
          c.ledgers_seen.push_back(last);
          LedgerMap* ledger = &c.old_ledgers[last];
          promises.add(TakeFd(entry.getLedger())
                           .then([ledger](UniqueFd memory) { *ledger = MapLedger(std::move(memory)); })
                           .then([entry, ledger]() { return TakePipes(entry.getRequestPipes(), ledger); })
                           .then([&c, ledger, last] {
                             c.server->Adopt(*ledger);
                             auto drained = c.link().drainedRequest();
                             drained.setGeneration(last);
                             return drained.send().ignoreResult();
                           }));
        }
        bool more = page.getMore();
        return kj::joinPromises(promises.finish())
            .attach(kj::mv(page))
            .then([&c, more, last]() -> kj::Promise<void> {
              if (!more) return kj::READY_NOW;
              return WalkLedgers(c, last);
            });
      });
}

void StopIfAsked(const Context& c, const std::string& where) {
  if (unlink((c.state_dir + "/stop-" + where).c_str()) == 0) kill(getpid(), SIGSTOP);
}

// Tells the test that it has come there, and takes its time.
kj::Promise<void> Dawdle(const Context& c, const char* file, kj::Duration time) {
  if (!WriteFileAtomic(c.state_dir + "/" + file, "1").ok()) _exit(93);
  return c.timer->afterDelay(time);
}

class WorkerServer final : public schema::Worker::Server {
 public:
  explicit WorkerServer(Context* context) : c_(*context) {}

  kj::Promise<void> serve(ServeContext context) override {
    StopIfAsked(c_, "serve");
    auto takeover = context.getParams().getTakeover();
    c_.calls.push_back(std::string(context.getParams().getTrial() ? "serve trial" : "serve") + " last " +
                       std::to_string(takeover.getLastMount()) + " ledgers " +
                       std::to_string(takeover.getLedgers().size()));
    if (c_.mode == "fail-serve") KJ_FAIL_REQUIRE("this build cannot serve");
    if (c_.mode == "die-serve") _exit(3);
    if (c_.mode == "hang-serve") return kj::NEVER_DONE;
    auto noted = WhenReady();
    if (context.getParams().getTrial()) {
      noted = noted.then([context]() mutable { return TakeFd(context.getParams().getTouched()); })
                  .then([this](UniqueFd fd) {
                    void* base =
                        mmap(nullptr, HF_TOUCHED_TOTAL_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
                    if (base == MAP_FAILED) _exit(94);
                    c_.server->SetTouched(static_cast<char*>(base));
                  });
    }
    return noted.then([this] { return WalkMounts(c_, 0); })
        .then([this] { return WalkLedgers(c_, 0); })
        .then([this] { c_.server->SetReading(true); });
  }
  kj::Promise<void> ownerExited(OwnerExitedContext context) override {
    uint64_t generation = context.getParams().getGeneration();
    c_.exited.push_back(generation);
    auto it = c_.old_ledgers.find(generation);
    // Not got yet: serve is under way, and will find it.
    if (it == c_.old_ledgers.end() || it->second.base == nullptr) return kj::READY_NOW;
    c_.server->Adopt(it->second);
    auto drained = c_.link().drainedRequest();
    drained.setGeneration(generation);
    return drained.send().ignoreResult();
  }
  kj::Promise<void> takeMetadata(TakeMetadataContext) override {
    StopIfAsked(c_, "take");
    if (c_.mode == "fail-take") KJ_FAIL_REQUIRE("this build cannot read the metadata");
    if (c_.mode == "die-take") _exit(3);
    c_.metadata =
        UniqueFd(open((c_.state_dir + "/fake-metadata").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
    // Exclusive for real: two owners would show as an error.
    KJ_REQUIRE(flock(c_.metadata.get(), LOCK_EX | LOCK_NB) == 0, "another worker holds the metadata");
    return WalkMounts(c_, 0);
  }
  kj::Promise<void> park(ParkContext) override {
    StopIfAsked(c_, "park");
    if (c_.mode == "fail-park") KJ_FAIL_REQUIRE("this build does not park");
    if (c_.mode == "die-park") _exit(3);
    c_.server->SetReading(false);
    return kj::READY_NOW;
  }
  kj::Promise<void> resume(ResumeContext) override {
    StopIfAsked(c_, "resume");
    if (c_.mode == "fail-resume") KJ_FAIL_REQUIRE("this build does not go back");
    c_.server->AdoptOwn();
    return WalkLedgers(c_, 0).then([this] { c_.server->SetReading(true); });
  }
  kj::Promise<void> yieldMetadata(YieldMetadataContext) override {
    StopIfAsked(c_, "yield");
    if (c_.mode == "fail-yield") KJ_FAIL_REQUIRE("this build keeps the metadata");
    if (c_.mode == "die-yield") _exit(3);
    c_.metadata.Reset();
    if (c_.mode == "slow-yield") return Dawdle(c_, "yielding", 500 * kj::MILLISECONDS);
    return kj::READY_NOW;
  }
  kj::Promise<void> retire(RetireContext) override {
    if (c_.mode == "hang-retire") return kj::READY_NOW;
    std::thread([] {
      usleep(20'000);
      _exit(0);
    }).detach();
    return kj::READY_NOW;
  }
  kj::Promise<void> ping(PingContext context) override {
    if (c_.server == nullptr || !PathExists(c_.state_dir + "/held-back")) return kj::READY_NOW;
    auto blobs = c_.server->blobs();
    auto list = context.getResults().initHeldBack(static_cast<unsigned>(blobs.size()));
    unsigned i = 0;
    for (const auto& [id, blob] : blobs) list.set(i++, id);
    return kj::READY_NOW;
  }
  kj::Promise<void> swapAhead(SwapAheadContext context) override {
    c_.calls.emplace_back(context.getParams().getOver() ? "swap over" : "swap ahead");
    return kj::READY_NOW;
  }
  kj::Promise<void> prepare(PrepareContext) override {
    c_.calls.emplace_back("prepare");
    if (c_.mode == "fail-prepare") KJ_FAIL_REQUIRE("this build cannot prepare");
    if (c_.mode == "hang-prepare") return kj::NEVER_DONE;
    if (c_.mode == "die-prepare") _exit(3);
    if (c_.mode == "crash-prepare") {
      signal(SIGSEGV, SIG_DFL);  // a sanitizer would report it and exit
      kill(getpid(), SIGSEGV);
    }
    if (c_.mode == "hang-up-prepare" || c_.mode.rfind("undying-", 0) == 0) HangUp();
    if (c_.mode == "late-prepare") return c_.timer->afterDelay(550 * kj::MILLISECONDS);
    return WhenReady().then([this] { return WalkMounts(c_, 0); });
  }
  // The attributes of each root, and a name that no root has.
  kj::Promise<void> samples(SamplesContext context) override {
    if (c_.mode == "hang-samples") return kj::NEVER_DONE;
    if (c_.mode == "fail-samples") KJ_FAIL_REQUIRE("this build forgets");
    auto blobs = c_.server->blobs();
    auto requests = context.getResults().initRequests(static_cast<unsigned>(blobs.size()));
    auto files = context.getResults().initFiles(static_cast<unsigned>(blobs.size()));
    fuse_in_header in{};
    in.len = sizeof(in);
    in.opcode = FUSE_GETATTR;
    in.nodeid = 1;
    unsigned i = 0;
    for (const auto& [id, blob] : blobs) {
      requests[i].setMountId(id);
      requests[i].setRequest(kj::arrayPtr(reinterpret_cast<const kj::byte*>(&in), sizeof(in)));
      files[i].setMountId(id);
      files[i].setKind(schema::SampleKind::ABSENT);
      // "wrong-samples": nobody's mount is like this.
      files[i++].setPath(kj::StringPtr(c_.mode == "wrong-samples" ? "." : "no such name").asBytes());
    }
    return kj::READY_NOW;
  }
  kj::Promise<void> replay(ReplayContext context) override {
    c_.calls.push_back("replay " + std::to_string(context.getParams().getRequests().size()));
    if (c_.mode == "die-replay") _exit(3);
    if (c_.mode == "slow-replay") return Dawdle(c_, "replaying", 2'600 * kj::MILLISECONDS);
    if (c_.mode == "differs") context.getResults().initDifferent(1).set(0, 0);
    return kj::READY_NOW;
  }
  kj::Promise<void> addMounts(AddMountsContext context) override {
    auto entries = context.getParams().getEntries();
    c_.calls.push_back("add " + std::to_string(entries.size()));
    auto promises = kj::heapArrayBuilder<kj::Promise<void>>(entries.size());
    for (auto entry : entries) {
      promises.add(TakeFd(entry.getDevice())
                       .then([this, id = entry.getMountId(), blob = Text(entry.getBlob())](UniqueFd fd) {
                         c_.server->Add(id, std::move(fd), blob);
                         c_.server->ReadNow(id);
                       }));
    }
    return kj::joinPromises(promises.finish()).attach(kj::mv(context));
  }
  kj::Promise<void> endTrial(EndTrialContext) override {
    c_.calls.emplace_back("end trial");
    c_.server->SetTouched(nullptr);
    return kj::READY_NOW;
  }
  kj::Promise<void> distrust(DistrustContext context) override {
    auto params = context.getParams();
    if (c_.mode == "die-distrust") _exit(3);
    if (c_.mode == "fail-distrust") KJ_FAIL_REQUIRE("the kernel does not listen");
    std::string what = "distrust " + std::to_string(params.getGeneration()) + " vault id " +
                       std::to_string(params.getVaultId().size());
    if (!params.hasTouched()) {
      c_.calls.push_back(what + " unknown");
      return kj::READY_NOW;
    }
    return TakeFd(params.getTouched()).then([this, what](UniqueFd fd) {
      hf_touched_header header{};
      if (pread(fd.get(), &header, sizeof(header), 0) != sizeof(header)) _exit(93);
      c_.calls.push_back(what + (header.count != 0 ? " touched" : " untouched"));
    });
  }
  kj::Promise<void> heldMounts(HeldMountsContext context) override {
    StopIfAsked(c_, "held");
    auto devices = c_.server->devices();
    std::vector<std::pair<uint64_t, int>> page;
    bool more = false;
    for (auto it = devices.upper_bound(context.getParams().getAfter()); it != devices.end(); ++it) {
      if ((more = page.size() == 200)) break;
      page.emplace_back(it->first, it->second->get());
    }
    auto out = context.getResults().initMounts(static_cast<unsigned>(page.size()));
    for (unsigned i = 0; i < page.size(); ++i) {
      out[i].setMountId(page[i].first);
      out[i].setDevice(MakeFd(page[i].second));
    }
    context.getResults().setMore(more);
    return kj::READY_NOW;
  }
  kj::Promise<void> heldLedgers(HeldLedgersContext context) override {
    std::vector<std::pair<uint64_t, LedgerMap*>> all;
    for (auto& [generation, ledger] : c_.old_ledgers) all.emplace_back(generation, &ledger);
    all.emplace_back(c_.generation, &c_.server->own());
    std::sort(all.begin(), all.end());
    uint64_t after = context.getParams().getAfter();
    all.erase(std::remove_if(all.begin(), all.end(), [&](auto& entry) { return entry.first <= after; }),
              all.end());
    context.getResults().setMore(all.size() > 7);
    auto out = context.getResults().initLedgers(static_cast<unsigned>(std::min<size_t>(all.size(), 7)));
    for (unsigned i = 0; i < out.size(); ++i) {
      out[i].setGeneration(all[i].first);
      out[i].setLedger(MakeFd(all[i].second->memory.get()));
      auto pipes = out[i].initRequestPipes(static_cast<unsigned>(all[i].second->pipes.size()));
      for (unsigned p = 0; p < pipes.size(); ++p) {
        pipes[p].setReadEnd(MakeFd(all[i].second->pipes[p].first.get()));
        pipes[p].setWriteEnd(MakeFd(all[i].second->pipes[p].second.get()));
      }
    }
    return kj::READY_NOW;
  }
  kj::Promise<void> heldListener(HeldListenerContext context) override {
    context.getResults().setSnapshotListener(MakeFd(c_.listener.get()));
    return kj::READY_NOW;
  }
  kj::Promise<void> mountsGone(MountsGoneContext context) override {
    for (uint64_t id : context.getParams().getMountIds()) {
      c_.gone.push_back(id);
      if (c_.server != nullptr) c_.server->Remove(id);
    }
    return kj::READY_NOW;
  }

 private:
  // An undying one waits for an answer of the owner, which holds it back: then no signal ends it. The hung
  // one hangs up when it is asked for its stacks.
  void HangUp() {
    if (c_.mode != "hang-up-prepare") {
      std::thread([path = c_.state_dir + "/mounts/a"] {
        struct stat info;
        stat(path.c_str(), &info);
      }).detach();
      while (!PathExists(c_.state_dir + "/held")) usleep(1000);
    }
    if (c_.mode == "undying-hung") signal(SIGQUIT, [](int) { shutdown(3, SHUT_RDWR); });
    if (c_.mode != "undying-hung") shutdown(3, SHUT_RDWR);
    for (;;) pause();
  }
  // serve() may come before the welcome's descriptors are taken.
  kj::Promise<void> WhenReady() {
    if (c_.server != nullptr) return kj::READY_NOW;
    return c_.timer->afterDelay(1 * kj::MILLISECONDS).then([this] { return WhenReady(); });
  }

  Context& c_;
};

class AdminServer final : public FakeAdmin::Server {
 public:
  explicit AdminServer(Context* context) : c_(*context) {}

  kj::Promise<void> mount(MountContext context) override {
    auto params = context.getParams();
    auto request = c_.link().mountRequest();
    request.setPath(params.getPath());
    request.setOptions(params.getOptions());
    request.setBlob(params.getBlob());
    return request.send().then(
        [this, context](capnp::Response<schema::Supervisor::MountResults>&& result) mutable {
          auto entry = result.getEntry();
          context.getResults().setEntry(entry);
          return TakeFd(entry.getDevice())
              .then([this, id = entry.getMountId(), blob = Text(entry.getBlob())](UniqueFd fd) {
                c_.server->Add(id, std::move(fd), blob);
              });
        });
  }
  kj::Promise<void> unmount(UnmountContext context) override {
    auto request = c_.link().unmountRequest();
    request.setMountId(context.getParams().getMountId());
    return request.send().then(
        [context](capnp::Response<schema::Supervisor::UnmountResults>&& result) mutable {
          context.getResults().setState(result.getState());
        });
  }
  kj::Promise<void> setBlob(SetBlobContext context) override {
    auto request = c_.link().setBlobRequest();
    request.setMountId(context.getParams().getMountId());
    request.setBlob(context.getParams().getBlob());
    return request.send().ignoreResult();
  }
  kj::Promise<void> info(InfoContext context) override {
    auto out = context.getResults();
    out.setGeneration(c_.generation);
    out.setAdopted(c_.server->adopted());
    out.setPagesSeen(c_.pages);
    auto blobs = c_.server->blobs();
    auto ids = out.initMountIds(static_cast<unsigned>(blobs.size()));
    auto data = out.initBlobs(static_cast<unsigned>(blobs.size()));
    unsigned i = 0;
    for (auto& [id, blob] : blobs) {
      ids.set(i, id);
      data.set(i++, kj::arrayPtr(reinterpret_cast<const kj::byte*>(blob.data()), blob.size()));
    }
    Copy(c_.exited, out.initExited(static_cast<unsigned>(c_.exited.size())));
    Copy(c_.gone, out.initGone(static_cast<unsigned>(c_.gone.size())));
    Copy(c_.ledgers_seen, out.initLedgersSeen(static_cast<unsigned>(c_.ledgers_seen.size())));
    auto calls = out.initCalls(static_cast<unsigned>(c_.calls.size()));
    for (unsigned n = 0; n < calls.size(); ++n) calls.set(n, c_.calls[n].c_str());
    int listening = 0;
    socklen_t size = sizeof(listening);
    out.setListenerWorks(getsockopt(c_.listener.get(), SOL_SOCKET, SO_ACCEPTCONN, &listening, &size) == 0 &&
                         listening == 1);
    auto fds = out.initOpenFds(static_cast<unsigned>(inherited.size()));
    for (unsigned f = 0; f < inherited.size(); ++f) fds.set(f, inherited[f].c_str());
    return kj::READY_NOW;
  }

  // Descriptors open when main began.
  static inline std::vector<std::string> inherited;

 private:
  static void Copy(const std::vector<uint64_t>& from, capnp::List<uint64_t>::Builder to) {
    for (unsigned i = 0; i < from.size(); ++i) to.set(i, from[i]);
  }
  Context& c_;
};

// Lives until a SIGUSR1, unlike the process.
uint32_t StartThread() {
  sigset_t told;
  sigemptyset(&told);
  sigaddset(&told, SIGUSR1);
  pthread_sigmask(SIG_BLOCK, &told, nullptr);
  static std::atomic<pid_t> id{0};
  std::thread([told] {
    id = gettid();
    int signal = 0;
    sigwait(&told, &signal);
  }).detach();
  while (id == 0) sched_yield();
  return static_cast<uint32_t>(id);
}

void FillHello(const Context& c, const std::string& token, schema::Hello::Builder hello) {
  uint64_t capabilities = schema::CAP_SERVE_READS | schema::CAP_METADATA_HANDOVER;
  if (c.mode != "no-reattach") capabilities |= schema::CAP_REATTACH;
  if (c.mode != "old") capabilities |= schema::CAP_PREPARE | schema::CAP_TRIAL | schema::CAP_HEALTH;
  capabilities |= schema::CAP_NEVER_SUPPORTED;
  hello.setCapabilities(capabilities);
  hello.setBuild("fake " + c.mode);
  hello.setToken(kj::arrayPtr(reinterpret_cast<const kj::byte*>(token.data()), token.size()));
  hello.setPid(static_cast<uint32_t>(getpid()));
  if (c.mode == "thread") hello.setThread(StartThread());
}

// The supervisor is gone: serves on, and tries until the next one takes it. One that does not want it ends
// it.
kj::Promise<void> Reattach(Context& c) {
  if ((c.capabilities & schema::CAP_REATTACH) == 0) _exit(5);
  if (c.mode == "never-reattach") return kj::NEVER_DONE;
  kj::Promise<void> again = c.timer->afterDelay(2 * kj::MILLISECONDS).then([&c] { return Reattach(c); });
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  strncpy(address.sun_path, c.control_socket.c_str(), sizeof(address.sun_path) - 1);
  UniqueFd fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) return again;
  auto connection = kj::heap<Connection>(
      c.io->lowLevelProvider->wrapUnixSocketFd(fd.Release(), kj::LowLevelAsyncIoProvider::TAKE_OWNERSHIP));
  Connection* current = connection.get();
  c.connections.push_back(kj::mv(connection));
  auto request = current->client.bootstrap().castAs<schema::Control>().reattachRequest();
  FillHello(c, c.mode == "reattach-wrong-token" ? "guess" : c.token, request.initHello());
  request.setWorker(kj::heap<WorkerServer>(&c));
  request.setAdmin(kj::heap<AdminServer>(&c));
  request.setState(MakeFd(c.state.get()));
  request.setGeneration(c.generation);
  request.setHoldsMetadata(c.metadata.valid());
  return request.send().then(
      [&c, current](capnp::Response<schema::Control::ReattachResults>&& response) -> kj::Promise<void> {
        c.supervisor = response.getSupervisor();
        current->lost = current->client.onDisconnect()
                            .catch_([](kj::Exception&&) {})
                            .then([&c] { return Reattach(c); })
                            .eagerlyEvaluate(nullptr);
        return kj::READY_NOW;
      },
      [&c](kj::Exception&& exception) -> kj::Promise<void> {
        if (exception.getType() == kj::Exception::Type::DISCONNECTED) {
          return c.timer->afterDelay(2 * kj::MILLISECONDS).then([&c] { return Reattach(c); });
        }
        // Not wanted: what containers use is served on, everything else is given up.
        c.metadata.Reset();
        c.listener.Reset();
        return kj::READY_NOW;
      });
}

void NoteInherited() {
  DIR* folder = opendir("/proc/self/fd");
  while (dirent* entry = readdir(folder)) {
    if (entry->d_name[0] != '.' && atoi(entry->d_name) != dirfd(folder))
      AdminServer::inherited.emplace_back(entry->d_name);
  }
  closedir(folder);
}

int Run() {
  auto io = kj::setupAsyncIo();  // outlives the connections of the context
  Context c;
  if (c.mode == "exit") return 3;
  if (c.mode != "urgent") LeaveUrgency();
  c.timer = &io.provider->getTimer();
  c.io = &io;
  c.connections.push_back(kj::heap<Connection>(
      io.lowLevelProvider->wrapUnixSocketFd(3, kj::LowLevelAsyncIoProvider::TAKE_OWNERSHIP)));
  capnp::TwoPartyClient& client = c.connections.back()->client;
  auto lost = client.onDisconnect()
                  .catch_([](kj::Exception&&) {})
                  .then([&c] { return Reattach(c); })
                  .eagerlyEvaluate(nullptr);
  if (c.mode == "silent") kj::Promise<void>(kj::NEVER_DONE).wait(io.waitScope);
  c.supervisor = client.bootstrap().castAs<schema::Supervisor>();
  auto request = c.link().registerRequest();
  const char* token = getenv("HOLDFAST_TOKEN");
  if (token == nullptr) return 98;
  c.token = token;
  FillHello(c, c.mode == "wrong-token" ? "guess" : token, request.initHello());
  request.setWorker(kj::heap<WorkerServer>(&c));
  request.setAdmin(kj::heap<AdminServer>(&c));
  auto result = request.send().wait(io.waitScope);
  auto welcome = result.getWelcome();
  c.generation = welcome.getGeneration();
  c.state_dir = welcome.getStateDir().cStr();
  LedgerMap own = MapLedger(TakeFd(welcome.getLedger()).wait(io.waitScope));
  TakePipes(welcome.getRequestPipes(), &own).wait(io.waitScope);
  c.listener = TakeFd(welcome.getSnapshotListener()).wait(io.waitScope);
  c.capabilities = welcome.getCapabilities();
  c.control_socket = welcome.getControlSocket().cStr();
  if (welcome.hasState()) c.state = TakeFd(welcome.getState()).wait(io.waitScope);
  c.server = std::make_unique<Server>(std::move(own), c.generation, c.state_dir, c.mode);
  kj::Promise<void>(kj::NEVER_DONE).wait(io.waitScope);
  return 0;
}

int SelfTest() {
  std::string mode = OwnMode();
  if (mode.rfind("fork-", 0) == 0) {
    const pid_t child = fork();
    if (child == 0) pause();
    printf("child %d\n", child);
    fflush(stdout);
  }
  if (mode == "hang-self-test" || mode == "fork-hang-self-test") pause();
  printf("self-test of fake %s\n", mode.c_str());
  return mode == "fail-self-test" ? 1 : 0;
}

}  // namespace
}  // namespace holdfast::supervisor::testing

int main(int argc, char** argv) {
  signal(SIGPIPE, SIG_IGN);
  signal(SIGQUIT, SIG_IGN);  // a worker prints its stacks and lives on
  if (argc > 1 && strcmp(argv[1], "--self-test") == 0) return holdfast::supervisor::testing::SelfTest();
  holdfast::supervisor::testing::NoteInherited();
  try {
    return holdfast::supervisor::testing::Run();
  } catch (const kj::Exception& exception) {
    fprintf(stderr, "fake worker: %s\n", exception.getDescription().cStr());
    return 4;
  }
}
