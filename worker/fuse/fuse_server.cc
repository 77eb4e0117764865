#include "worker/fuse/fuse_server.h"

#include <string>
#include <utility>

#include "worker/fuse/crash_recorder.h"
#include "worker/fuse/server_core.h"

namespace holdfast::fuse {
namespace {

class ServerImpl final : public FuseServer {
 public:
  explicit ServerImpl(std::shared_ptr<ServerCore> core) : core_(std::move(core)) {}
  ~ServerImpl() override {
    UninstallCrashRecorder(core_->ledger());
    core_->Shutdown();
  }

  absl::Status AddMount(MountSpec spec) override { return core_->AddMount(std::move(spec)); }
  void RemoveMount(uint64_t mount_id) override { core_->RemoveMount(mount_id); }
  void OnMountEnded(std::function<void(uint64_t)> callback) override {
    core_->OnMountEnded(std::move(callback));
  }
  absl::StatusOr<uint64_t> AdoptLedger(uint64_t generation, LedgerHandle ledger, bool final_walk,
                                       bool owner_hung) override {
    return core_->AdoptLedger(generation, std::move(ledger), final_walk, owner_hung);
  }
  bool Drained(uint64_t generation) const override { return core_->Drained(generation); }
  void Start() override { core_->Start(); }
  void Park() override { core_->Park(); }
  void Resume() override { core_->Resume(); }
  void Hurry(uint64_t nanos) override { core_->Hurry(nanos); }
  absl::Status BeginTrial(UniqueFd touched) override { return core_->BeginTrial(std::move(touched)); }
  void EndTrial() override { core_->EndTrial(); }
  absl::StatusOr<uint64_t> ForgetCached(UniqueFd touched) override {
    return core_->ForgetCached(std::move(touched));
  }
  std::vector<Sample> Samples(size_t limit, uint64_t deadline_boot_nanos) override {
    return core_->Samples(limit, deadline_boot_nanos);
  }
  absl::StatusOr<std::string> Replay(uint64_t mount_id, std::string_view request) override {
    return core_->Replay(mount_id, request);
  }
  std::vector<uint64_t> HeldBack() const override { return core_->HeldBack(); }
  ServerStats stats() const override { return core_->stats(); }

  const LedgerView& ledger() const { return core_->ledger(); }

 private:
  const std::shared_ptr<ServerCore> core_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<FuseServer>> FuseServer::Create(const ServerOptions& options,
                                                               LedgerHandle own_ledger) {
  HF_ASSIGN_OR_RETURN(std::shared_ptr<LedgerView> ledger,
                      LedgerView::Map(std::move(own_ledger), options.generation));
  if (options.threads < 1 || static_cast<uint32_t>(options.threads) > ledger->slot_count()) {
    return InvalidArgument("threads must be from 1 to " + std::to_string(ledger->slot_count()));
  }
  if (ledger->slot_count() < 2) return InvalidArgument("a ledger with a single slot");
  auto core = std::make_shared<ServerCore>(options, std::move(ledger));
  HF_RETURN_IF_ERROR(core->Initialize());
  return std::make_unique<ServerImpl>(std::move(core));
}

void InstallCrashRecorder(FuseServer* server) { RecordCrashesIn(static_cast<ServerImpl*>(server)->ledger()); }

}  // namespace holdfast::fuse
