#include "supervisor/rpc.h"

#include <algorithm>
#include <string>
#include <utility>

#include "supervisor/supervisor.h"

// Generated server bases have a protected life cycle (kj::Own) and no virtual destructor.
#pragma GCC diagnostic ignored "-Wnon-virtual-dtor"

namespace holdfast::supervisor {
namespace {

constexpr unsigned kMaxMountsPerPage = 200;
constexpr unsigned kLedgersPerPage = 7;  // 33 descriptors each; 253 fit into one message

class DescriptorServer final : public schema::Descriptor::Server {
 public:
  explicit DescriptorServer(SharedFd fd) : fd_(std::move(fd)) {}
  kj::Maybe<int> getFd() override { return fd_->get(); }

 private:
  const SharedFd fd_;
};

kj::ArrayPtr<const kj::byte> Bytes(const std::string& text) {
  return kj::arrayPtr(reinterpret_cast<const kj::byte*>(text.data()), text.size());
}

std::string String(capnp::Data::Reader data) {
  auto chars = data.asChars();
  return std::string(chars.begin(), chars.size());
}

schema::MountState Convert(MountState state) {
  switch (state) {
    case MountState::kMounting:
      return schema::MountState::MOUNTING;
    case MountState::kLive:
      return schema::MountState::LIVE;
    case MountState::kDetached:
      return schema::MountState::DETACHED;
    case MountState::kGone:
      break;
  }
  return schema::MountState::GONE;
}

InitOptions Convert(schema::InitOptions::Reader in) {
  InitOptions out;
  out.flags = in.getFlags();
  out.max_background = in.getMaxBackground();
  out.congestion_threshold = in.getCongestionThreshold();
  out.max_pages = in.getMaxPages();
  out.max_stack_depth = in.getMaxStackDepth();
  out.read_ahead_kib = in.getReadAheadKib();
  out.max_readahead = in.getMaxReadahead();
  return out;
}

class SupervisorServer final : public schema::Supervisor::Server {
 public:
  SupervisorServer(Supervisor* supervisor, uint64_t generation) : supervisor_(*supervisor), generation_(generation) {}

  kj::Promise<void> register_(RegisterContext context) override {
    auto params = context.getParams();
    supervisor_.Register(generation_, params.getHello(), params.getWorker(), params.getAdmin(),
                         context.getResults().initWelcome());
    registered_ = true;
    return kj::READY_NOW;
  }

  kj::Promise<void> mount(MountContext context) override {
    RequireRegistered();
    auto params = context.getParams();
    return supervisor_
        .MountLayer(generation_, params.getPath().cStr(), Convert(params.getOptions()), String(params.getBlob()))
        .then([context](const Mount* mount) mutable {
          FillMountEntry(*mount, true, context.getResults().initEntry());
        });
  }

  kj::Promise<void> setBlob(SetBlobContext context) override {
    RequireRegistered();
    auto params = context.getParams();
    absl::Status status = supervisor_.vault().SetBlob(params.getMountId(), String(params.getBlob()));
    KJ_REQUIRE(status.ok(), "no such mount", params.getMountId());
    return kj::READY_NOW;
  }

  kj::Promise<void> unmount(UnmountContext context) override {
    RequireRegistered();
    return supervisor_.UnmountLayer(generation_, context.getParams().getMountId())
        .then([context](MountState state) mutable { context.getResults().setState(Convert(state)); });
  }

  kj::Promise<void> mounts(MountsContext context) override {
    RequireRegistered();
    return supervisor_.MountsSettled(generation_).then([this, context]() mutable {
      auto params = context.getParams();
      unsigned limit = params.getLimit() == 0 ? kMaxMountsPerPage : std::min(params.getLimit(), kMaxMountsPerPage);
      bool more = false;
      auto page = supervisor_.vault().Page(params.getAfter(), limit, &more);
      auto results = context.getResults();
      results.setMore(more);
      auto entries = results.initEntries(static_cast<unsigned>(page.size()));
      for (unsigned i = 0; i < page.size(); ++i) FillMountEntry(*page[i], true, entries[i]);
    });
  }

  kj::Promise<void> oldLedgers(OldLedgersContext context) override {
    RequireRegistered();
    bool more = false;
    auto page = supervisor_.ledgers().Page(context.getParams().getAfter(), generation_, kLedgersPerPage, &more);
    auto results = context.getResults();
    results.setMore(more);
    auto out = results.initLedgers(static_cast<unsigned>(page.size()));
    for (unsigned i = 0; i < page.size(); ++i) FillLedger(*page[i], true, out[i]);
    return kj::READY_NOW;
  }

  kj::Promise<void> drained(DrainedContext context) override {
    RequireRegistered();
    supervisor_.ledgers().Drained(context.getParams().getGeneration());
    return kj::READY_NOW;
  }

  kj::Promise<void> progress(ProgressContext context) override {
    RequireRegistered();
    supervisor_.Progress(generation_, context.getParams().getStep().cStr());
    return kj::READY_NOW;
  }

 private:
  void RequireRegistered() const { KJ_REQUIRE(registered_, "register first"); }

  Supervisor& supervisor_;
  const uint64_t generation_;
  bool registered_ = false;
};

}  // namespace

capnp::Capability::Client MakeSupervisorServer(Supervisor* supervisor, uint64_t generation) {
  return schema::Supervisor::Client(kj::heap<SupervisorServer>(supervisor, generation));
}

schema::Descriptor::Client MakeDescriptor(SharedFd fd) { return kj::heap<DescriptorServer>(std::move(fd)); }

void FillPipes(const Ledger& ledger, capnp::List<schema::PipePair>::Builder out) {
  for (unsigned i = 0; i < out.size(); ++i) {
    out[i].setReadEnd(MakeDescriptor(ledger.pipes()[i].read_end));
    out[i].setWriteEnd(MakeDescriptor(ledger.pipes()[i].write_end));
  }
}

void FillMountEntry(const Mount& mount, bool with_device, schema::MountEntry::Builder out) {
  out.setMountId(mount.id);
  out.setState(Convert(mount.state));
  out.setPath(mount.path.c_str());
  if (with_device) out.setDevice(MakeDescriptor(mount.device));
  out.setInitRequest(Bytes(mount.init_request));
  out.setInitReply(Bytes(mount.init_reply));
  out.setBlob(Bytes(mount.blob));
}

void FillLedger(const Ledger& ledger, bool with_pipes, schema::OldLedger::Builder out) {
  out.setGeneration(ledger.generation());
  out.setLedger(MakeDescriptor(ledger.memory()));
  out.setOwnerExited(ledger.owner_exited);
  if (with_pipes) FillPipes(ledger, out.initRequestPipes(static_cast<unsigned>(ledger.pipes().size())));
}

}  // namespace holdfast::supervisor
