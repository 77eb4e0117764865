// Samples and replays, without a kernel: what a build answers before it has been started, or while it is
// parked.
#include <fcntl.h>
#include <linux/fuse.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <set>
#include <sstream>

#include "common/crc32c.h"
#include "glog/logging.h"
#include "gtest/gtest.h"
#include "worker/fuse/fuse_bench.h"
#include "worker/fuse/ledger_view.h"
#include "worker/fuse/sampler.h"
#include "worker/layer/digest.h"

namespace holdfast::fuse {
namespace {

constexpr uint64_t kRoot = layer::kRootNode;
enum Node : uint64_t { kMissing = 2, kStored, kFolder, kInFolder, kLink };

template <typename T>
std::string BytesOf(const T& value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof value);
}

std::string Request(uint32_t opcode, uint64_t nodeid, const std::string& arguments, uint64_t unique = 2) {
  fuse_in_header in{};
  in.len = static_cast<uint32_t>(sizeof in + arguments.size());
  in.opcode = opcode;
  in.unique = unique;
  in.nodeid = nodeid;
  return BytesOf(in) + arguments;
}
std::string Lookup(uint64_t folder, const std::string& name, uint64_t unique = 2) {
  return Request(FUSE_LOOKUP, folder, name + std::string(1, '\0'), unique);
}
std::string ReadOf(uint32_t opcode, uint64_t nodeid, uint64_t offset, uint32_t size, uint64_t unique = 2) {
  fuse_read_in read{};
  read.offset = offset;
  read.size = size;
  return Request(opcode, nodeid, BytesOf(read), unique);
}
std::string Raw(const toc::Digest& digest) {
  return std::string(reinterpret_cast<const char*>(digest.data()), digest.size());
}

std::shared_ptr<FakeLayer> MakeLayer() {
  auto index = std::make_shared<FakeIndex>();
  index->Add(kRoot, "missing", S_IFREG | 0644, 1 << 20);
  index->Add(kRoot, "stored", S_IFREG | 0644, 1 << 20);
  index->Add(kRoot, "folder", S_IFDIR | 0755);
  index->Add(kFolder, "in-folder", S_IFREG | 0644, 100);
  index->AddSymlink(kRoot, "link", "folder/in-folder");
  index->SetXattr(kStored, "user.one", "value");
  auto layer = std::make_shared<FakeLayer>(index);
  layer->Store(kStored, Stored::kFile);
  layer->Store(kInFolder, Stored::kMemory);
  layer->Hold(true);
  return layer;
}

// What the kernel sent as FUSE_INIT, as far as libfuse looks at it.
std::string InitRequest() {
  fuse_init_in init{};
  init.major = FUSE_KERNEL_VERSION;
  init.minor = 38;
  init.max_readahead = 131072;
  init.flags = FUSE_ASYNC_READ | FUSE_DO_READDIRPLUS | FUSE_PARALLEL_DIROPS | FUSE_NO_OPEN_SUPPORT;
  return Request(FUSE_INIT, 0, BytesOf(init));
}

// A server without a kernel: its one mount's device is a socket.
class Build {
 public:
  explicit Build(uint64_t generation, const std::string& faults = "", const MountFlags& flags = {}) {
    CHECK(faults_.Parse(faults).ok());
    ServerOptions options;
    options.generation = generation;
    options.build = std::string(100, 'b');
    options.faults = &faults_;
    auto created = FuseServer::Create(options, DupLedger(bench.MakeLedger(generation)));
    CHECK(created.ok()) << created.status();
    server = *std::move(created);
    int ends[2];
    PCHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) == 0);
    kernel.Reset(ends[1]);
    MountSpec spec;
    spec.mount_id = 100;
    spec.device.Reset(ends[0]);
    spec.init_request = InitRequest();
    spec.flags = flags;
    spec.open_layer = [this] { return absl::StatusOr<std::shared_ptr<layer::Layer>>(layer); };
    CHECK(server->AddMount(std::move(spec)).ok());
  }
  void Send(const std::string& request) const {
    PCHECK(write(kernel.get(), request.data(), request.size()) == static_cast<ssize_t>(request.size()));
  }
  // The next reply, whole; empty after 5 s.
  std::string Receive() const {
    std::string reply;
    Eventually(
        [&] {
          char bytes[65536];
          ssize_t n = read(kernel.get(), bytes, sizeof bytes);
          if (n > 0) reply.append(bytes, static_cast<size_t>(n));
          uint32_t length = 0;
          if (reply.size() >= 16) memcpy(&length, reply.data(), 4);
          return length > 0 && reply.size() == length;
        },
        5);
    return reply;
  }

  Bench bench;
  FaultPoints faults_;
  std::shared_ptr<FakeLayer> layer = MakeLayer();
  UniqueFd kernel;
  std::unique_ptr<FuseServer> server;
};

const std::vector<std::string>& Requests() {
  static const std::vector<std::string> requests = {
      Lookup(kRoot, "stored"),
      Lookup(kRoot, "absent"),
      Lookup(kStored, "x"),
      Request(FUSE_GETATTR, kStored, BytesOf(fuse_getattr_in{})),
      Request(FUSE_GETATTR, 999, BytesOf(fuse_getattr_in{})),
      Request(FUSE_READLINK, kLink, ""),
      ReadOf(FUSE_READ, kStored, 4096, 100'000),
      ReadOf(FUSE_READ, kInFolder, 0, 4096),
      ReadOf(FUSE_READDIR, kRoot, 0, 4096),
      ReadOf(FUSE_READDIRPLUS, kRoot, 0, 4096),
      Request(FUSE_GETXATTR, kStored, BytesOf(fuse_getxattr_in{100, 0}) + std::string("user.one\0", 9)),
      Request(FUSE_LISTXATTR, kStored, BytesOf(fuse_getxattr_in{100, 0})),
      Request(FUSE_STATFS, kRoot, ""),
  };
  return requests;
}

TEST(ReplayTest, TheDigestIsThatOfWhatTheKernelIsToldWithoutTimes) {
  Build build(1);
  std::string bytes = ContentBytes(kStored, 4096, 100'000);
  int32_t no_error = 0, enotdir = -ENOTDIR;
  EXPECT_EQ(*build.server->Replay(100, ReadOf(FUSE_READ, kStored, 4096, 100'000)),
            Raw(layer::Sha256Raw(BytesOf(no_error) + bytes)));
  EXPECT_EQ(*build.server->Replay(100, Lookup(kStored, "x")), Raw(layer::Sha256Raw(BytesOf(enotdir))));
  EXPECT_EQ(*build.server->Replay(100, Request(FUSE_READLINK, kLink, "")),
            Raw(layer::Sha256Raw(BytesOf(no_error) + "folder/in-folder")));
  // The whole answer to a LOOKUP, from its socket, with the times wiped out by hand.
  build.server->Start();
  build.Send(Lookup(kRoot, "stored"));
  std::string reply = build.Receive();
  ASSERT_EQ(reply.size(), sizeof(fuse_out_header) + sizeof(fuse_entry_out));
  fuse_entry_out entry;
  memcpy(&entry, reply.data() + sizeof(fuse_out_header), sizeof entry);
  EXPECT_EQ(entry.entry_valid, 86400u);
  entry.entry_valid = entry.attr_valid = 0;
  entry.entry_valid_nsec = entry.attr_valid_nsec = 0;
  EXPECT_EQ(*build.server->Replay(100, Lookup(kRoot, "stored")),
            Raw(layer::Sha256Raw(BytesOf(no_error) + BytesOf(entry))));
}

TEST(ReplayTest, TwoBuildsAgreeWhetherStartedParkedOrOnTrialAndWhoeverAsks) {
  Build running(1), candidate(2), on_trial(3);
  running.server->Start();
  ASSERT_TRUE(on_trial.server->BeginTrial(UniqueFd()).ok());
  for (const std::string& request : Requests()) {
    auto expected = running.server->Replay(100, request);
    ASSERT_TRUE(expected.ok()) << expected.status();
    EXPECT_EQ(*candidate.server->Replay(100, request), *expected);
    EXPECT_EQ(*on_trial.server->Replay(100, request), *expected);
    std::string other = request;
    other[offsetof(fuse_in_header, unique)] = 77;
    EXPECT_EQ(*candidate.server->Replay(100, other), *expected);
  }
  running.server->Park();
  EXPECT_EQ(*running.server->Replay(100, Requests()[0]), *candidate.server->Replay(100, Requests()[0]));
  char byte;
  EXPECT_EQ(read(candidate.kernel.get(), &byte, 1), -1) << "a replay answers nobody";
  EXPECT_EQ(candidate.server->stats().errors + candidate.server->stats().requests, 0u);
}

TEST(ReplayTest, WhatIsNotOnThisDiskIsUnavailableAndLeavesNoTrace) {
  Build build(1);
  EXPECT_EQ(build.server->Replay(100, ReadOf(FUSE_READ, kMissing, 0, 4096)).status().code(),
            absl::StatusCode::kUnavailable);
  build.layer->Store(kMissing, Stored::kTruncated);
  EXPECT_EQ(build.server->Replay(100, ReadOf(FUSE_READ, kMissing, 1 << 19, 4096)).status().code(),
            absl::StatusCode::kUnavailable);
  EXPECT_EQ(build.layer->fetches(), 0u);
  EXPECT_EQ(build.server->stats().pending, 0u);
  EXPECT_EQ(build.bench.ledgers[1]->header->record_high_water, 0u);
  EXPECT_EQ(build.server->Replay(99, Requests()[0]).status().code(), absl::StatusCode::kNotFound);
}

TEST(ReplayTest, WhatIsNoRequestIsInvalid) {
  Build build(1);
  std::string cut = Requests()[0].substr(0, 30), longer = Requests()[0] + "x";
  std::string forget = Request(FUSE_FORGET, kStored, BytesOf(fuse_forget_in{}));
  for (const std::string& request :
       {std::string(), cut, longer, forget, std::string(100'000, 'x'), Request(FUSE_DESTROY, 0, ""),
        Request(FUSE_INTERRUPT, 0, BytesOf(uint64_t{2}))}) {
    EXPECT_EQ(build.server->Replay(100, request).status().code(), absl::StatusCode::kInvalidArgument);
  }
  // Arguments that are missing are no reason to fall over.
  for (uint32_t opcode : {FUSE_LOOKUP, FUSE_GETATTR, FUSE_READ, FUSE_READDIRPLUS, FUSE_GETXATTR}) {
    EXPECT_TRUE(build.server->Replay(100, Request(opcode, kRoot, "")).ok()) << opcode;
  }
}

TEST(ReplayTest, AWrongBuildIsFoundOut) {
  Build good(1);
  struct Case {
    const char* fault;
    std::string request;
  };
  for (const Case& c :
       {Case{"fuse.wrong_bytes", Requests()[6]}, Case{"fuse.wrong_enoent", Requests()[0]},
        Case{"fuse.wrong_listing", Requests()[8]}, Case{"fuse.wrong_listing", Requests()[9]}}) {
    Build wrong(2, std::string(c.fault) + "=wrong@0");
    auto answer = wrong.server->Replay(100, c.request);
    ASSERT_TRUE(answer.ok()) << answer.status();
    EXPECT_NE(*answer, *good.server->Replay(100, c.request)) << c.fault;
    EXPECT_GT(wrong.faults_.fired(c.fault), 0) << c.fault;
  }
  // One that is wrong on trial only is not.
  Build sly(
      2, "fuse.trial_wrong_bytes=wrong@0;fuse.trial_wrong_enoent=wrong@0;fuse.trial_wrong_listing=wrong@0");
  ASSERT_TRUE(sly.server->BeginTrial(UniqueFd()).ok());
  for (const std::string& request : Requests()) {
    EXPECT_EQ(*sly.server->Replay(100, request), *good.server->Replay(100, request));
  }
}

TEST(ReplayTest, SamplesAreWhatTheKernelAskedAndTheRestIsMadeUp) {
  Build build(1), candidate(2);
  build.server->Start();
  for (const std::string& request : Requests()) {
    build.Send(request);
    ASSERT_FALSE(build.Receive().empty());
  }
  build.Send(ReadOf(FUSE_READ, kMissing, 0, 4096));  // waits: it has no answer on this disk
  ASSERT_TRUE(Eventually([&] { return build.server->stats().pending == 1; }));
  std::vector<Sample> samples = build.server->Samples(40, ~uint64_t{0});
  EXPECT_LE(samples.size(), 40u);
  std::set<std::string> asked;
  for (const Sample& sample : samples) {
    EXPECT_EQ(sample.mount_id, 100u);
    EXPECT_EQ(sample.reply_digest.size(), 32u);
    EXPECT_EQ(*candidate.server->Replay(100, sample.request), sample.reply_digest);
    EXPECT_TRUE(asked.insert(sample.request).second);
  }
  for (const std::string& request : Requests()) EXPECT_TRUE(asked.contains(request));
  EXPECT_GT(samples.size(), Requests().size()) << "nothing was made up";
  EXPECT_LE(build.server->Samples(5, ~uint64_t{0}).size(), 5u);
  EXPECT_TRUE(build.server->Samples(40, 1).empty()) << "the time is over";
  EXPECT_EQ(build.server->stats().pending, 1u);
  EXPECT_FALSE(candidate.server->Samples(10, ~uint64_t{0}).empty()) << "nothing was ever asked of it";
}

TEST(SamplerTest, ABusyMountLeavesRoomForTheOthersAndReadsForNames) {
  Sampler sampler;
  sampler.SetMounts(8);
  Sampler::Seen seen[9];
  auto offer = [&](uint64_t mount, const std::string& request) {
    fuse_in_header in;
    memcpy(&in, request.data(), sizeof in);
    sampler.Offer(mount, seen[mount], in.opcode, reinterpret_cast<const uint8_t*>(request.data()), in.len, 1);
  };
  for (uint64_t mount = 1; mount <= 8; mount++) offer(mount, Lookup(kRoot, "x"));
  for (uint64_t i = 0; i < 200'000; i++) offer(3, ReadOf(FUSE_READ, kStored, i * 4096, 4096));
  offer(3, Request(FUSE_RELEASE, kStored, ""));
  offer(3, Lookup(kRoot, std::string(1000, 'n')));  // too long to keep
  std::map<uint64_t, int> kept;
  int names = 0;
  for (const Sampler::Kept& k : sampler.All()) {
    kept[k.mount_id]++;
    if (k.request == Lookup(kRoot, "x")) names++;
  }
  EXPECT_EQ(kept.size(), 8u);
  EXPECT_EQ(names, 8);
  EXPECT_EQ(kept[3], 1 + 16);  // a quarter of its eighth of 512
}

// The kernel remembers for a connection's life which operations were answered ENOSYS, so builds must agree.
TEST(ReplayTest, TheOperationsThatAreNeverAnsweredAreTheSameInEveryBuildAndOnTrial) {
  for (bool flags_set : {false, true}) {
    for (bool trial : {false, true}) {
      MountFlags flags;
      flags.zero_open = flags.no_xattrs = flags_set;
      Build build(1, "", flags);
      if (trial) {
        ASSERT_TRUE(build.server->BeginTrial(UniqueFd()).ok());
      }
      build.server->Start();
      std::set<uint32_t> enosys;
      for (uint32_t opcode = 1; opcode <= 52; opcode++) {
        if (opcode == FUSE_FORGET || opcode == FUSE_BATCH_FORGET || opcode == FUSE_INTERRUPT ||
            opcode == FUSE_NOTIFY_REPLY || opcode == FUSE_INIT || opcode == 7 || opcode == 19) {
          continue;  // not answered, or no operation
        }
        build.Send(Request(opcode, kStored, std::string(64, '\0')));
        std::string reply = build.Receive();
        ASSERT_GE(reply.size(), sizeof(fuse_out_header)) << opcode;
        fuse_out_header out;
        memcpy(&out, reply.data(), sizeof out);
        if (out.error == -ENOSYS) enosys.insert(opcode);
      }
      std::set<uint32_t> expected = {FUSE_SETATTR,
                                     FUSE_SYMLINK,
                                     FUSE_MKNOD,
                                     FUSE_MKDIR,
                                     FUSE_UNLINK,
                                     FUSE_RMDIR,
                                     FUSE_RENAME,
                                     FUSE_LINK,
                                     FUSE_WRITE,
                                     FUSE_FSYNC,
                                     FUSE_SETXATTR,
                                     FUSE_REMOVEXATTR,
                                     FUSE_FLUSH,
                                     FUSE_OPENDIR,
                                     FUSE_FSYNCDIR,
                                     FUSE_GETLK,
                                     FUSE_SETLK,
                                     FUSE_SETLKW,
                                     FUSE_ACCESS,
                                     FUSE_CREATE,
                                     FUSE_BMAP,
                                     FUSE_POLL,
                                     FUSE_FALLOCATE,
                                     FUSE_RENAME2,
                                     FUSE_LSEEK,
                                     FUSE_COPY_FILE_RANGE,
                                     FUSE_SETUPMAPPING,
                                     FUSE_REMOVEMAPPING,
                                     FUSE_SYNCFS,
                                     FUSE_TMPFILE,
                                     52 /* STATX */};
      if (flags_set) expected.insert({FUSE_OPEN, FUSE_GETXATTR});
      EXPECT_EQ(enosys, expected) << "flags " << flags_set << " trial " << trial;
    }
  }
}

// tests/golden/ledger/v1.txt: "OFFSET HEX" lines of a ledger that a build of version 1 left behind when it
// was killed: a LOOKUP in slot 0, and a READ in record 0. To write it anew (only ever for a new version):
// HOLDFAST_WRITE_GOLDEN=FILE.
constexpr uint64_t kGoldenGeneration = 41, kLookupUnique = 12, kReadUnique = 10;

void WriteGolden(const char* path) {
  Build build(kGoldenGeneration, "fuse.received=block@2");
  build.server->Start();
  build.Send(ReadOf(FUSE_READ, kMissing, 8192, 4096, kReadUnique));
  CHECK(Eventually([&] { return build.server->stats().pending == 1; }));
  build.Send(Lookup(kRoot, "stored", kLookupUnique));
  CHECK(build.faults_.WaitFired("fuse.received", 1, 10));
  const Bench::Ledger& ledger = *build.bench.ledgers[kGoldenGeneration];
  uint32_t slot = 0;
  while (ledger.slot(slot)->state != HF_SLOT_EXECUTING) slot++;
  const auto* base = reinterpret_cast<const uint8_t*>(ledger.header);
  std::ofstream out(path);
  auto range = [&](uint64_t from, uint64_t from_memory, uint64_t length) {
    for (uint64_t at = 0; at < length; at += 32) {
      char text[8];
      out << from + at << ' ';
      for (uint64_t i = at; i < std::min(length, at + 32); i++) {
        snprintf(text, sizeof text, "%02x", base[from_memory + i]);
        out << text;
      }
      out << '\n';
    }
  };
  range(0, 0, sizeof(hf_ledger_header));
  range(HF_LEDGER_SLOT_OFFSET, HF_LEDGER_SLOT_OFFSET + uint64_t{slot} * HF_LEDGER_SLOT_STRIDE,
        64 + ledger.slot(slot)->length);
  range(HF_LEDGER_RECORD_OFFSET, HF_LEDGER_RECORD_OFFSET, sizeof(hf_record));
  build.faults_.Release("fuse.received");
}

TEST(GoldenLedgerTest, ALedgerOfVersion1IsReadAndItsRequestsAnswered) {
  if (const char* path = std::getenv("HOLDFAST_WRITE_GOLDEN")) WriteGolden(path);
  const char* source = std::getenv("HOLDFAST_SOURCE");
  ASSERT_NE(source, nullptr) << "run by ctest, or set HOLDFAST_SOURCE to the source folder";
  auto text = ReadFile(std::string(source) + "/tests/golden/ledger/v1.txt");
  ASSERT_TRUE(text.ok()) << text.status();
  EXPECT_EQ(layer::Sha256Hex(*text), "2f2b24db4759b62f8c420ca58605b683278c4f22a82be8d6706e99932b54d8d7");
  Build build(42);
  build.layer->Store(kMissing, Stored::kMemory);
  Bench::Ledger& old = build.bench.MakeLedger(kGoldenGeneration);
  auto* base = reinterpret_cast<uint8_t*>(old.header);
  memset(base, 0, sizeof(hf_ledger_header));
  std::istringstream in(*text);
  std::string hex;
  for (uint64_t offset = 0; in >> offset >> hex;) {
    for (size_t i = 0; i + 1 < hex.size(); i += 2) {
      base[offset + i / 2] = static_cast<uint8_t>(std::strtoul(hex.substr(i, 2).c_str(), nullptr, 16));
    }
  }
  auto taken = build.server->AdoptLedger(kGoldenGeneration, DupLedger(old), true, false);
  ASSERT_TRUE(taken.ok()) << taken.status();
  EXPECT_EQ(*taken, 2u);
  EXPECT_EQ(build.server->stats().dropped, 0u);
  EXPECT_FALSE(build.server->Drained(kGoldenGeneration));
  build.server->Start();
  EXPECT_TRUE(Eventually([&] { return build.server->Drained(kGoldenGeneration); }));
  std::string replies;
  char bytes[16384];
  for (ssize_t n; (n = read(build.kernel.get(), bytes, sizeof bytes)) > 0;) {
    replies.append(bytes, static_cast<size_t>(n));
  }
  ASSERT_EQ(replies.size(), 2 * sizeof(fuse_out_header) + 4096 + sizeof(fuse_entry_out));
  fuse_out_header read_reply, lookup_reply;
  fuse_entry_out entry;
  memcpy(&lookup_reply, replies.data(), sizeof lookup_reply);
  memcpy(&entry, replies.data() + sizeof lookup_reply, sizeof entry);
  memcpy(&read_reply, replies.data() + lookup_reply.len, sizeof read_reply);
  EXPECT_EQ(read_reply.unique, kReadUnique);
  EXPECT_EQ(read_reply.error, 0);
  EXPECT_EQ(replies.substr(lookup_reply.len + sizeof read_reply, 4096), ContentBytes(kMissing, 8192, 4096));
  EXPECT_EQ(lookup_reply.unique, kLookupUnique);
  EXPECT_EQ(lookup_reply.error, 0);
  EXPECT_EQ(entry.nodeid, uint64_t{kStored});
}

}  // namespace
}  // namespace holdfast::fuse
