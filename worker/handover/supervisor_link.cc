#include "worker/handover/supervisor_link.h"

#include <capnp/rpc-twoparty.h>
#include <capnp/rpc.h>
#include <fcntl.h>
#include <kj/async-io.h>
#include <kj/async-unix.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <future>
#include <thread>
#include <utility>

#include "common/log.h"
#include "common/mutex.h"
#include "common/urgency.h"
#include "glog/logging.h"
#include "schema/control.capnp.h"
#include "worker/handover/rpc_servers.h"

namespace holdfast::handover {
namespace {

constexpr uint32_t kMaxFdsPerMessage = 253;  // SCM_RIGHTS carries no more
constexpr uint32_t kMountsPerPage = 200;
constexpr rlim_t kHighDescriptor = 16'383;  // above those of 5,000 mounts; a table of 128 KiB
constexpr std::chrono::milliseconds kFirstPause{20}, kLongestPause{1000};

absl::StatusOr<UniqueFd> ConnectUnix(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) return InvalidArgument("socket path too long: " + path);
  memcpy(address.sun_path, path.data(), path.size());
  UniqueFd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!socket.valid()) return ErrnoStatus(errno, "socket");
  const auto* target = static_cast<const sockaddr*>(static_cast<const void*>(&address));
  if (connect(socket.get(), target, sizeof address) != 0) return ErrnoStatus(errno, path);
  return socket;
}

static_assert(kCapServeReads == schema::CAP_SERVE_READS &&
              kCapMetadataHandover == schema::CAP_METADATA_HANDOVER && kCapPrepare == schema::CAP_PREPARE &&
              kCapTrial == schema::CAP_TRIAL && kCapHealth == schema::CAP_HEALTH &&
              kCapReattach == schema::CAP_REATTACH);

// The type a promise resolves to; never called.
template <typename T>
T Resolved(kj::Promise<T>);

class LinkImpl final : public SupervisorLink {
 public:
  LinkImpl() = default;
  ~LinkImpl() noexcept override;

  absl::Status Register(UniqueFd socket, const Identity& identity);

  Welcome* welcome() override { return &welcome_; }
  void Start(WorkerActions* actions, AdminActions* admin) override;
  bool lost() const override { return lost_; }

  absl::StatusOr<MountEntry> Mount(const std::string& path, const InitOptions& options,
                                   const std::string& blob) override;
  absl::StatusOr<MountState> Unmount(uint64_t mount_id) override;
  absl::StatusOr<std::vector<MountEntry>> ListMounts(uint64_t after) override;
  absl::StatusOr<std::vector<OldLedger>> OldLedgers() override;
  absl::Status Drained(uint64_t generation) override;

 private:
  // One socket to a supervisor; belongs to the event loop's thread. `Bootstrap`: what the other side is.
  struct Connection {
    kj::Own<kj::AsyncCapabilityStream> stream;
    capnp::TwoPartyVatNetwork network;
    capnp::RpcSystem<capnp::rpc::twoparty::VatId> rpc;
    kj::Promise<void> watch = nullptr;

    explicit Connection(kj::Own<kj::AsyncCapabilityStream> connected)
        : stream(kj::mv(connected)),
          network(*stream, kMaxFdsPerMessage, capnp::rpc::twoparty::Side::CLIENT),
          rpc(capnp::makeRpcClient(network)) {}

    capnp::Capability::Client Bootstrap() {
      capnp::MallocMessageBuilder message(8);
      auto vat = message.getRoot<capnp::rpc::twoparty::VatId>();
      vat.setSide(capnp::rpc::twoparty::Side::SERVER);
      return rpc.bootstrap(vat);
    }
  };
  // Everything that belongs to the event loop's thread.
  struct Loop {
    kj::AsyncIoContext io;
    kj::Own<Connection> connection;
    schema::Supervisor::Client supervisor = nullptr;
    kj::Own<kj::PromiseFulfiller<void>> quit;
    explicit Loop(kj::AsyncIoContext context) : io(kj::mv(context)) {}
  };

  void RunLoop(int socket, std::promise<absl::Status>* started);
  void Open(UniqueFd socket);  // a connection in place of the one before it
  void OnDisconnect();
  void FillHello(schema::Hello::Builder hello) const;
  kj::Promise<void> SendHello();
  kj::Promise<void> TakeWelcome(schema::Welcome::Reader welcome);

  void StartReattaching();
  void LookForSupervisor();
  // Unavailable: no supervisor there yet, or it went away. Any other error: it does not want us.
  absl::Status Reattach(UniqueFd socket, bool holds_metadata);
  kj::Promise<bool> SendReattach(bool holds_metadata);

  kj::Promise<std::vector<MountEntry>> FetchPage(uint64_t after, bool* more);
  kj::Promise<std::vector<OldLedger>> FetchLedgers(uint64_t after, bool* more);
  template <typename T, typename Fetch, typename Number>
  absl::StatusOr<std::vector<T>> AllPages(uint64_t after, Fetch fetch, Number number);

  // Runs `function`, which returns a kj::Promise, on the loop and waits for its result. OnLoop: only while
  // there is a supervisor.
  template <typename Function>
  auto OnLoop(Function&& function) -> absl::StatusOr<decltype(Resolved(function()))>;
  template <typename Function>
  auto OnLoopEvenIfLost(Function&& function) -> absl::StatusOr<decltype(Resolved(function()))>;

  absl::Status LostStatus() const { return Unavailable("the supervisor is gone"); }

  std::thread thread_;
  kj::Own<const kj::Executor> executor_;
  Loop* loop_ = nullptr;  // loop thread only; alive while executor_ accepts work
  Identity identity_;
  Welcome welcome_;
  uint64_t generation_ = 0;
  Callbacks callbacks_;
  SerialExecutor action_thread_, slow_thread_, admin_thread_;
  std::atomic<bool> lost_{false};

  Mutex reattach_mutex_;
  CondVar reattach_changed_;
  bool stopping_ ABSL_GUARDED_BY(reattach_mutex_) = false;
  std::thread reattach_thread_;  // action thread's, and the destructor's once that has ended
};

template <typename Function>
auto LinkImpl::OnLoop(Function&& function) -> absl::StatusOr<decltype(Resolved(function()))> {
  if (lost_) return LostStatus();
  return OnLoopEvenIfLost(std::forward<Function>(function));
}

template <typename Function>
auto LinkImpl::OnLoopEvenIfLost(Function&& function) -> absl::StatusOr<decltype(Resolved(function()))> {
  try {
    return executor_->executeSync([&] { return function(); });
  } catch (const kj::Exception& exception) {
    return FromException(exception);
  }
}

LinkImpl::~LinkImpl() noexcept {
  action_thread_.Stop();
  slow_thread_.Stop();
  admin_thread_.Stop();
  {
    MutexLock lock(&reattach_mutex_);
    stopping_ = true;
    reattach_changed_.SignalAll();
  }
  if (!thread_.joinable()) return;
  try {
    executor_->executeSync([this] {
      loop_->connection = nullptr;  // whoever waits for an answer is told that there will be none
      loop_->quit->fulfill();
    });
  } catch (const kj::Exception&) {
    // The loop has ended by itself.
  }
  if (reattach_thread_.joinable()) reattach_thread_.join();
  thread_.join();
}

absl::Status LinkImpl::Register(UniqueFd socket, const Identity& identity) {
  identity_ = identity;
  std::promise<absl::Status> started;
  std::future<absl::Status> result = started.get_future();
  thread_ = std::thread([this, fd = socket.Release(), &started] { RunLoop(fd, &started); });
  absl::Status status = result.get();
  if (!status.ok()) {
    thread_.join();
    return status;
  }
  return OnLoop([&] { return SendHello().then([] { return true; }); }).status();
}

void LinkImpl::RunLoop(int socket, std::promise<absl::Status>* started) {
  bool announced = false;
  BecomeUrgent().IgnoreError();  // refused to the supervisor as well, which says so
  try {
    kj::AsyncIoContext io = kj::setupAsyncIo();
    kj::WaitScope& wait_scope = io.waitScope;
    Loop loop(kj::mv(io));
    auto quit = kj::newPromiseAndFulfiller<void>();
    loop.quit = kj::mv(quit.fulfiller);
    loop_ = &loop;
    Open(UniqueFd(socket));
    loop.supervisor = loop.connection->Bootstrap().castAs<schema::Supervisor>();
    executor_ = kj::getCurrentThreadExecutor().addRef();
    announced = true;
    started->set_value(absl::OkStatus());
    quit.promise.wait(wait_scope);
  } catch (const kj::Exception& exception) {
    if (!announced) started->set_value(FromException(exception));
    LOG_IF(ERROR, announced) << "supervisor_link.loop_failed error=" << exception.getDescription().cStr();
    if (announced) OnDisconnect();
  }
}

void LinkImpl::Open(UniqueFd socket) {
  loop_->connection = nullptr;  // calls of its supervisor fail from now on, those under way too
  MoveUp(&socket);
  auto stream = loop_->io.lowLevelProvider->wrapUnixSocketFd(socket.Release(),
                                                             kj::LowLevelAsyncIoProvider::TAKE_OWNERSHIP);
  loop_->connection = kj::heap<Connection>(kj::mv(stream));
  Connection& connection = *loop_->connection;
  connection.watch =
      connection.network.onDisconnect().then([this] { OnDisconnect(); }).eagerlyEvaluate(nullptr);
}

void LinkImpl::OnDisconnect() {
  if (lost_.exchange(true)) return;
  action_thread_.Post([this] {
    if (callbacks_.actions.load()->SupervisorLost() == WorkerActions::AfterLoss::kReattach)
      StartReattaching();
  });
}

void LinkImpl::FillHello(schema::Hello::Builder hello) const {
  hello.setCapabilities(identity_.capabilities);
  hello.setBuild(identity_.build.c_str());
  hello.setToken(Bytes(identity_.token));
  hello.setPid(static_cast<uint32_t>(getpid()));
  hello.setThread(static_cast<uint32_t>(gettid()));  // the event loop's
}

kj::Promise<void> LinkImpl::SendHello() {
  auto request = loop_->supervisor.registerRequest();
  FillHello(request.initHello());
  request.setWorker(MakeWorkerServer(&action_thread_, &slow_thread_, &callbacks_));
  request.setAdmin(MakeAdminServer(&admin_thread_, &callbacks_));
  return request.send().then([this](auto&& response) {
    auto promise = TakeWelcome(response.getWelcome());
    return promise.attach(kj::mv(response));
  });
}

void LinkImpl::StartReattaching() {
  if (welcome_.control_socket.empty()) return;
  if (reattach_thread_.joinable()) reattach_thread_.join();  // it has found the supervisor that is lost now
  reattach_thread_ = std::thread([this] { LookForSupervisor(); });
}

void LinkImpl::LookForSupervisor() {
  std::chrono::milliseconds pause = kFirstPause;
  absl::Status status;
  while (true) {
    absl::StatusOr<bool> holds_metadata = callbacks_.actions.load()->Reattaching();
    status = holds_metadata.status();
    if (status.ok()) {
      absl::StatusOr<UniqueFd> socket = ConnectUnix(welcome_.control_socket);
      if (socket.ok()) {
        status = Reattach(std::move(*socket), *holds_metadata);
        if (status.ok()) return;
        if (!absl::IsUnavailable(status)) break;
      }
    }
    MutexLock lock(&reattach_mutex_);
    const auto until = std::chrono::steady_clock::now() + pause;
    while (!stopping_ && reattach_changed_.WaitUntil(&reattach_mutex_, until)) {
    }
    if (stopping_) return;
    pause = std::min(2 * pause, kLongestPause);
  }
  action_thread_.Post([this, status] { callbacks_.actions.load()->ReattachRefused(status); });
}

absl::Status LinkImpl::Reattach(UniqueFd socket, bool holds_metadata) {
  {
    // Whoever stops this link ends the connection after this; nothing is sent on a later one.
    MutexLock lock(&reattach_mutex_);
    if (stopping_) return LostStatus();
  }
  auto attempt = [&] {
    Open(std::move(socket));
    return SendReattach(holds_metadata);
  };
  absl::Status status = OnLoopEvenIfLost(attempt).status();
  LOG_IF(WARNING, !status.ok()) << "supervisor_link.not_reattached error="
                                << LogValue(FromAbsl(status.message()));
  return status;
}

kj::Promise<bool> LinkImpl::SendReattach(bool holds_metadata) {
  auto request = loop_->connection->Bootstrap().castAs<schema::Control>().reattachRequest();
  FillHello(request.initHello());
  request.setWorker(MakeWorkerServer(&action_thread_, &slow_thread_, &callbacks_));
  request.setAdmin(MakeAdminServer(&admin_thread_, &callbacks_));
  if (welcome_.state.valid()) {
    absl::StatusOr<UniqueFd> state = DupFd(welcome_.state.get());
    if (!state.ok()) kj::throwFatalException(ToException(state.status()));
    request.setState(MakeDescriptor(std::move(*state)));
  }
  request.setGeneration(generation_);
  request.setHoldsMetadata(holds_metadata);
  return request.send().then([this](auto&& response) {
    loop_->supervisor = response.getSupervisor();
    // On the loop's thread, as OnDisconnect: a loss of this connection is noticed after it.
    lost_ = false;
    action_thread_.Post(
        [this, vault_id = HexOf(response.getVaultId())] { callbacks_.actions.load()->Reattached(vault_id); });
    return true;
  });
}

kj::Promise<void> LinkImpl::TakeWelcome(schema::Welcome::Reader welcome) {
  welcome_.capabilities = welcome.getCapabilities() & identity_.capabilities;
  welcome_.generation = generation_ = welcome.getGeneration();
  welcome_.vault_id = HexOf(welcome.getVaultId());
  welcome_.state_dir = TextOf(welcome.getStateDir());
  welcome_.runtime_dir = TextOf(welcome.getRuntimeDir());
  welcome_.control_socket = TextOf(welcome.getControlSocket());
  kj::Vector<kj::Promise<void>> promises;
  promises.add(TakeFd(welcome.getLedger(), &welcome_.ledger));
  if (welcome.hasSnapshotListener()) {
    promises.add(TakeFd(welcome.getSnapshotListener(), &welcome_.snapshot_listener));
  }
  if (welcome.hasState()) promises.add(TakeFd(welcome.getState(), &welcome_.state));
  TakePipes(welcome.getRequestPipes(), &welcome_.request_pipes, &promises);
  return kj::joinPromises(promises.releaseAsArray());
}

void LinkImpl::Start(WorkerActions* actions, AdminActions* admin) {
  callbacks_.actions = actions;
  callbacks_.admin = admin;
  action_thread_.Open();
  slow_thread_.Open();
  admin_thread_.Open();
}

absl::StatusOr<MountEntry> LinkImpl::Mount(const std::string& path, const InitOptions& options,
                                           const std::string& blob) {
  return OnLoop([&] {
    auto request = loop_->supervisor.mountRequest();
    request.setPath(path.c_str());
    request.setBlob(Bytes(blob));
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
    auto ledgers = kj::heap<std::vector<OldLedger>>();
    auto taken = TakeLedgers(response.getLedgers(), ledgers.get());
    return taken.then([ledgers = kj::mv(ledgers)]() mutable { return std::move(*ledgers); })
        .attach(kj::mv(response));
  });
}

// All pages, from behind `after`, of a list whose elements are numbered by `number`.
template <typename T, typename Fetch, typename Number>
absl::StatusOr<std::vector<T>> LinkImpl::AllPages(uint64_t after, Fetch fetch, Number number) {
  std::vector<T> all;
  bool more = true;
  while (more) {
    HF_ASSIGN_OR_RETURN(std::vector<T> page, OnLoop([&] { return fetch(after, &more); }));
    if (page.empty()) break;
    for (T& element : page) all.push_back(std::move(element));
    after = number(all.back());
  }
  return all;
}

absl::StatusOr<std::vector<MountEntry>> LinkImpl::ListMounts(uint64_t after) {
  return AllPages<MountEntry>(
      after, [this](uint64_t from, bool* more) { return FetchPage(from, more); },
      [](const MountEntry& entry) { return entry.mount_id; });
}

absl::StatusOr<std::vector<OldLedger>> LinkImpl::OldLedgers() {
  return AllPages<OldLedger>(
      0, [this](uint64_t from, bool* more) { return FetchLedgers(from, more); },
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

void MoveUp(UniqueFd* socket) {
  rlimit limit{};
  if (!socket->valid() || getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  const int high = static_cast<int>(std::min<rlim_t>(limit.rlim_cur, kHighDescriptor + 1)) - 1;
  if (socket->get() >= high) return;
  UniqueFd moved(fcntl(socket->get(), F_DUPFD_CLOEXEC, high));
  if (moved.valid()) *socket = std::move(moved);  // else it stays: the supervisor notices later
}

absl::StatusOr<std::unique_ptr<SupervisorLink>> SupervisorLink::Connect(UniqueFd socket,
                                                                        const Identity& identity) {
  auto link = std::make_unique<LinkImpl>();
  HF_RETURN_IF_ERROR(Annotate(link->Register(std::move(socket), identity), "register with the supervisor"));
  if (!link->welcome()->ledger.valid()) return Internal("the supervisor gave no ledger");
  return std::unique_ptr<SupervisorLink>(std::move(link));
}

}  // namespace holdfast::handover
