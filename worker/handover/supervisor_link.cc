#include "worker/handover/supervisor_link.h"

#include <capnp/rpc-twoparty.h>
#include <capnp/rpc.h>
#include <fcntl.h>
#include <kj/async-io.h>
#include <kj/async-unix.h>
#include <unistd.h>

#include <atomic>
#include <future>
#include <thread>
#include <utility>

#include "glog/logging.h"
#include "worker/handover/rpc_servers.h"

namespace holdfast::handover {
namespace {

constexpr uint32_t kMaxFdsPerMessage = 253;  // SCM_RIGHTS carries no more
constexpr uint32_t kMountsPerPage = 200;

std::string BytesOf(capnp::Data::Reader data) { return std::string(data.begin(), data.end()); }
std::string TextOf(capnp::Text::Reader text) { return std::string(text.cStr(), text.size()); }
capnp::Data::Reader DataOf(const std::string& bytes) {
  return capnp::Data::Reader(reinterpret_cast<const kj::byte*>(bytes.data()), bytes.size());
}

std::string HexOf(capnp::Data::Reader data) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string hex;
  for (kj::byte byte : data) {
    hex += kDigits[byte >> 4];
    hex += kDigits[byte & 15];
  }
  return hex;
}

// Dups the descriptor that a capability carries into *out; invalid when it carries none.
kj::Promise<void> TakeFd(schema::Descriptor::Client descriptor, UniqueFd* out) {
  auto promise = descriptor.getFd();
  return promise.then([out, keep = kj::mv(descriptor)](kj::Maybe<int> fd) mutable {
    KJ_IF_MAYBE (number, fd) {
      absl::StatusOr<UniqueFd> copy = DupFd(*number);
      if (!copy.ok()) kj::throwFatalException(ToException(copy.status()));
      *out = std::move(*copy);
    }
  });
}

using PipeList = capnp::List<schema::PipePair>::Reader;

void TakePipes(PipeList list, std::vector<PipePair>* out, kj::Vector<kj::Promise<void>>* promises) {
  out->resize(list.size());
  for (uint32_t i = 0; i < list.size(); ++i) {
    promises->add(TakeFd(list[i].getReadEnd(), &(*out)[i].read_end));
    promises->add(TakeFd(list[i].getWriteEnd(), &(*out)[i].write_end));
  }
}

void FillInfo(schema::MountEntry::Reader from, MountEntry* to) {
  to->mount_id = from.getMountId();
  to->state = static_cast<MountState>(from.getState());
  to->path = TextOf(from.getPath());
  to->init_request = BytesOf(from.getInitRequest());
  to->init_reply = BytesOf(from.getInitReply());
  to->blob = BytesOf(from.getBlob());
}

// The type a promise resolves to; never called.
template <typename T>
T Resolved(kj::Promise<T>);

class LinkImpl final : public SupervisorLink {
 public:
  LinkImpl() = default;
  ~LinkImpl() noexcept override;

  absl::Status Register(UniqueFd socket, const std::string& token, const std::string& build);

  Welcome* welcome() override { return &welcome_; }
  void Start(WorkerActions* actions, AdminActions* admin) override;
  bool lost() const override { return lost_; }

  absl::StatusOr<MountEntry> Mount(const std::string& path, const InitOptions& options,
                                   const std::string& blob) override;
  absl::StatusOr<MountState> Unmount(uint64_t mount_id) override;
  absl::StatusOr<std::vector<MountEntry>> ListMounts() override;
  absl::StatusOr<std::vector<OldLedger>> OldLedgers() override;
  absl::Status Drained(uint64_t generation) override;

 private:
  // Everything that belongs to the event loop's thread.
  struct Loop {
    kj::AsyncIoContext io;
    kj::Own<kj::AsyncCapabilityStream> stream;
    capnp::TwoPartyVatNetwork network;
    capnp::RpcSystem<capnp::rpc::twoparty::VatId> rpc;
    schema::Supervisor::Client supervisor;
    kj::Own<kj::PromiseFulfiller<void>> quit;

    Loop(kj::AsyncIoContext context, kj::Own<kj::AsyncCapabilityStream> connected)
        : io(kj::mv(context)),
          stream(kj::mv(connected)),
          network(*stream, kMaxFdsPerMessage, capnp::rpc::twoparty::Side::CLIENT),
          rpc(capnp::makeRpcClient(network)),
          supervisor(Bootstrap()) {}

    schema::Supervisor::Client Bootstrap() {
      capnp::MallocMessageBuilder message(8);
      auto vat = message.getRoot<capnp::rpc::twoparty::VatId>();
      vat.setSide(capnp::rpc::twoparty::Side::SERVER);
      return rpc.bootstrap(vat).castAs<schema::Supervisor>();
    }
  };

  void RunLoop(int socket, std::promise<absl::Status>* started);
  void OnDisconnect();
  kj::Promise<void> SendHello(const std::string& token, const std::string& build);
  kj::Promise<void> TakeWelcome(schema::Welcome::Reader welcome);
  kj::Promise<std::vector<MountEntry>> FetchPage(uint64_t after, bool* more);
  kj::Promise<std::vector<OldLedger>> FetchLedgers(uint64_t after, bool* more);
  template <typename T, typename Fetch, typename Number>
  absl::StatusOr<std::vector<T>> AllPages(Fetch fetch, Number number);

  // Runs `function`, which returns a kj::Promise, on the loop and waits for its result.
  template <typename Function>
  auto OnLoop(Function&& function) -> absl::StatusOr<decltype(Resolved(function()))>;

  absl::Status LostStatus() const { return Unavailable("the supervisor is gone"); }

  std::thread thread_;
  kj::Own<const kj::Executor> executor_;
  Loop* loop_ = nullptr;  // loop thread only; alive while executor_ accepts work
  Welcome welcome_;
  Callbacks callbacks_;
  SerialExecutor action_thread_, admin_thread_;
  std::atomic<bool> lost_{false};
};

template <typename Function>
auto LinkImpl::OnLoop(Function&& function) -> absl::StatusOr<decltype(Resolved(function()))> {
  if (lost_) return LostStatus();
  try {
    return executor_->executeSync([&] { return function(); });
  } catch (const kj::Exception& exception) {
    return FromException(exception);
  }
}

LinkImpl::~LinkImpl() noexcept {
  action_thread_.Stop();
  admin_thread_.Stop();
  if (!thread_.joinable()) return;
  try {
    executor_->executeSync([this] { loop_->quit->fulfill(); });
  } catch (const kj::Exception&) {
    // The loop has ended by itself.
  }
  thread_.join();
}

absl::Status LinkImpl::Register(UniqueFd socket, const std::string& token, const std::string& build) {
  std::promise<absl::Status> started;
  std::future<absl::Status> result = started.get_future();
  thread_ = std::thread([this, fd = socket.Release(), &started] { RunLoop(fd, &started); });
  absl::Status status = result.get();
  if (!status.ok()) {
    thread_.join();
    return status;
  }
  return OnLoop([&] { return SendHello(token, build).then([] { return true; }); }).status();
}

void LinkImpl::RunLoop(int socket, std::promise<absl::Status>* started) {
  bool announced = false;
  try {
    kj::AsyncIoContext io = kj::setupAsyncIo();
    auto stream = io.lowLevelProvider->wrapUnixSocketFd(socket, kj::LowLevelAsyncIoProvider::TAKE_OWNERSHIP);
    kj::WaitScope& wait_scope = io.waitScope;
    Loop loop(kj::mv(io), kj::mv(stream));
    auto quit = kj::newPromiseAndFulfiller<void>();
    loop.quit = kj::mv(quit.fulfiller);
    loop_ = &loop;
    executor_ = kj::getCurrentThreadExecutor().addRef();
    auto watch = loop.network.onDisconnect().then([this] { OnDisconnect(); }).eagerlyEvaluate(nullptr);
    announced = true;
    started->set_value(absl::OkStatus());
    quit.promise.wait(wait_scope);
  } catch (const kj::Exception& exception) {
    if (!announced) started->set_value(FromException(exception));
    LOG_IF(ERROR, announced) << "supervisor_link.loop_failed error=" << exception.getDescription().cStr();
    if (announced) OnDisconnect();
  }
}

void LinkImpl::OnDisconnect() {
  if (lost_.exchange(true)) return;
  action_thread_.Post([this] { callbacks_.actions.load()->SupervisorLost(); });
}

kj::Promise<void> LinkImpl::SendHello(const std::string& token, const std::string& build) {
  auto request = loop_->supervisor.registerRequest();
  auto hello = request.initHello();
  hello.setCapabilities(schema::CAP_SERVE_READS | schema::CAP_METADATA_HANDOVER);
  hello.setBuild(build.c_str());
  hello.setToken(DataOf(token));
  hello.setPid(static_cast<uint32_t>(getpid()));
  request.setWorker(MakeWorkerServer(&action_thread_, &callbacks_));
  request.setAdmin(MakeAdminServer(&admin_thread_, &callbacks_));
  return request.send().then([this](auto&& response) {
    auto promise = TakeWelcome(response.getWelcome());
    return promise.attach(kj::mv(response));
  });
}

kj::Promise<void> LinkImpl::TakeWelcome(schema::Welcome::Reader welcome) {
  welcome_.capabilities = welcome.getCapabilities();
  welcome_.generation = welcome.getGeneration();
  welcome_.vault_id = HexOf(welcome.getVaultId());
  welcome_.state_dir = TextOf(welcome.getStateDir());
  welcome_.runtime_dir = TextOf(welcome.getRuntimeDir());
  kj::Vector<kj::Promise<void>> promises;
  promises.add(TakeFd(welcome.getLedger(), &welcome_.ledger));
  if (welcome.hasSnapshotListener()) {
    promises.add(TakeFd(welcome.getSnapshotListener(), &welcome_.snapshot_listener));
  }
  TakePipes(welcome.getRequestPipes(), &welcome_.request_pipes, &promises);
  return kj::joinPromises(promises.releaseAsArray());
}

void LinkImpl::Start(WorkerActions* actions, AdminActions* admin) {
  callbacks_.actions = actions;
  callbacks_.admin = admin;
  action_thread_.Open();
  admin_thread_.Open();
}

absl::StatusOr<MountEntry> LinkImpl::Mount(const std::string& path, const InitOptions& options,
                                           const std::string& blob) {
  return OnLoop([&] {
    auto request = loop_->supervisor.mountRequest();
    request.setPath(path.c_str());
    request.setBlob(DataOf(blob));
    auto out = request.initOptions();
    out.setFlags(options.flags);
    out.setMaxBackground(options.max_background);
    out.setCongestionThreshold(options.congestion_threshold);
    out.setMaxPages(options.max_pages);
    out.setMaxStackDepth(options.max_stack_depth);
    out.setReadAheadKib(options.read_ahead_kib);
    return request.send().then([](auto&& response) {
      auto entry = kj::heap<MountEntry>();
      FillInfo(response.getEntry(), entry.get());
      auto promise = TakeFd(response.getEntry().getDevice(), &entry->device);
      return promise.then([entry = kj::mv(entry)]() mutable { return std::move(*entry); })
          .attach(kj::mv(response));
    });
  });
}

absl::StatusOr<MountState> LinkImpl::Unmount(uint64_t mount_id) {
  return OnLoop([&] {
    auto request = loop_->supervisor.unmountRequest();
    request.setMountId(mount_id);
    return request.send().then([](auto&& response) { return static_cast<MountState>(response.getState()); });
  });
}

kj::Promise<std::vector<MountEntry>> LinkImpl::FetchPage(uint64_t after, bool* more) {
  auto request = loop_->supervisor.mountsRequest();
  request.setAfter(after);
  request.setLimit(kMountsPerPage);
  return request.send().then([more](auto&& response) {
    *more = response.getMore();
    auto list = response.getEntries();
    auto entries = kj::heap<std::vector<MountEntry>>();
    entries->resize(list.size());
    kj::Vector<kj::Promise<void>> promises;
    for (uint32_t i = 0; i < list.size(); ++i) {
      FillInfo(list[i], &(*entries)[i]);
      promises.add(TakeFd(list[i].getDevice(), &(*entries)[i].device));
    }
    return kj::joinPromises(promises.releaseAsArray())
        .then([entries = kj::mv(entries)]() mutable { return std::move(*entries); })
        .attach(kj::mv(response));
  });
}

kj::Promise<std::vector<OldLedger>> LinkImpl::FetchLedgers(uint64_t after, bool* more) {
  auto request = loop_->supervisor.oldLedgersRequest();
  request.setAfter(after);
  return request.send().then([more](auto&& response) {
    *more = response.getMore();
    auto list = response.getLedgers();
    auto ledgers = kj::heap<std::vector<OldLedger>>();
    ledgers->resize(list.size());
    kj::Vector<kj::Promise<void>> promises;
    for (uint32_t i = 0; i < list.size(); ++i) {
      OldLedger& ledger = (*ledgers)[i];
      ledger.generation = list[i].getGeneration();
      ledger.owner_exited = list[i].getOwnerExited();
      promises.add(TakeFd(list[i].getLedger(), &ledger.memory));
      TakePipes(list[i].getRequestPipes(), &ledger.pipes, &promises);
    }
    return kj::joinPromises(promises.releaseAsArray())
        .then([ledgers = kj::mv(ledgers)]() mutable { return std::move(*ledgers); })
        .attach(kj::mv(response));
  });
}

// All pages of a list whose elements are numbered by `number`.
template <typename T, typename Fetch, typename Number>
absl::StatusOr<std::vector<T>> LinkImpl::AllPages(Fetch fetch, Number number) {
  std::vector<T> all;
  bool more = true;
  while (more) {
    uint64_t after = all.empty() ? 0 : number(all.back());
    HF_ASSIGN_OR_RETURN(std::vector<T> page, OnLoop([&] { return fetch(after, &more); }));
    if (page.empty()) break;
    for (T& element : page) all.push_back(std::move(element));
  }
  return all;
}

absl::StatusOr<std::vector<MountEntry>> LinkImpl::ListMounts() {
  return AllPages<MountEntry>([this](uint64_t after, bool* more) { return FetchPage(after, more); },
                              [](const MountEntry& entry) { return entry.mount_id; });
}

absl::StatusOr<std::vector<OldLedger>> LinkImpl::OldLedgers() {
  return AllPages<OldLedger>([this](uint64_t after, bool* more) { return FetchLedgers(after, more); },
                             [](const OldLedger& ledger) { return ledger.generation; });
}

absl::Status LinkImpl::Drained(uint64_t generation) {
  return OnLoop([&] {
           auto request = loop_->supervisor.drainedRequest();
           request.setGeneration(generation);
           return request.send().then([](auto&&) { return true; });
         })
      .status();
}

}  // namespace

absl::StatusOr<std::unique_ptr<SupervisorLink>> SupervisorLink::Connect(UniqueFd socket,
                                                                        const std::string& token,
                                                                        const std::string& build) {
  auto link = std::make_unique<LinkImpl>();
  HF_RETURN_IF_ERROR(
      Annotate(link->Register(std::move(socket), token, build), "register with the supervisor"));
  if (!link->welcome()->ledger.valid()) return Internal("the supervisor gave no ledger");
  return std::unique_ptr<SupervisorLink>(std::move(link));
}

}  // namespace holdfast::handover
