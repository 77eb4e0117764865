#include "supervisor/helper.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "common/log.h"
#include "common/sealed_memory.h"
#include "glog/logging.h"
#include "supervisor/offload.h"

namespace holdfast::supervisor {
namespace {

constexpr off_t kOutputBytes = 1 << 20;  // what it prints beyond is refused
constexpr size_t kShownBytes = 2'000;    // the end of it, in a message

absl::StatusOr<UniqueFd> MemoryFile(std::string_view content) {
  UniqueFd file(memfd_create("holdfast-helper", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!file.valid()) return ErrnoStatus(errno, "memfd_create");
  HF_RETURN_IF_ERROR(PwriteFull(file.get(), content.data(), content.size(), 0));
  return file;
}

// Of a fixed size, so that no helper can fill the memory.
absl::StatusOr<UniqueFd> OutputFile() { return MakeSealedMemory("holdfast-helper", kOutputBytes); }

// What was written, without the line ends after it.
std::string ReadOutput(int fd) {
  std::string text;
  char buffer[4096];
  while (text.find('\0') == std::string::npos) {
    ssize_t got = pread(fd, buffer, sizeof(buffer), static_cast<off_t>(text.size()));
    if (got <= 0) break;
    text.append(buffer, static_cast<size_t>(got));
  }
  text.resize(std::min(text.find('\0'), text.size()));
  while (!text.empty() && text.back() == '\n') text.pop_back();
  return text;
}

std::string LastLine(const std::string& text) { return text.substr(text.rfind('\n') + 1); }
std::string End(const std::string& text) {
  return text.size() <= kShownBytes ? text : text.substr(text.size() - kShownBytes);
}

absl::StatusOr<std::string> ProbeResult(const std::string& how, const std::string& output,
                                        uint64_t deadline_ms) {
  std::string last = LastLine(output);
  if (how.empty()) {
    std::string where = last.substr(0, 3) == "at " ? "; it was at mount " + last.substr(3) : "";
    return DeadlineExceeded("the probe did not answer within " + std::to_string(deadline_ms) + " ms" + where);
  }
  if (how == "exit 0" && last.substr(0, 3) == "ok ") return last.substr(3);
  if (last.substr(0, 8) == "failed: ") return FailedPrecondition(last.substr(8));
  return Internal("the probe ended with " + how + ": " + End(output));
}

}  // namespace

Helpers::Helpers(kj::AsyncIoContext* io, UniqueFd program)
    : io_(io), program_(std::make_shared<const UniqueFd>(std::move(program))), tasks_(*this) {}

Helpers::~Helpers() {
  for (const auto& child : children_) Kill(*child);
}

void Helpers::taskFailed(kj::Exception&& exception) {
  LOG(ERROR) << "event=helper_failed error=" << LogValue(exception.getDescription().cStr());
}

void Helpers::Kill(const Child& child) {
  if (child.started && child.how.empty()) {
    syscall(SYS_pidfd_send_signal, child.process.pidfd.get(), SIGKILL, nullptr, 0);
  }
}

kj::Promise<std::shared_ptr<Helpers::Child>> Helpers::Run(std::shared_ptr<const UniqueFd> program,
                                                          std::vector<std::string> argv, std::string input,
                                                          uint64_t deadline_ms, std::function<void()> ended) {
  auto child = std::make_shared<Child>();
  children_.insert(child);
  auto started = Offload<absl::Status>([child, program, argv, input]() -> absl::Status {
    HF_ASSIGN_OR_RETURN(UniqueFd in, MemoryFile(input));
    HF_ASSIGN_OR_RETURN(child->output, OutputFile());
    ProcessSpec spec{
        .program = program->get(),
        .argv = argv,
        .environment = EnvironmentWithout({"NOTIFY_SOCKET=", "LISTEN_", "WATCHDOG_", "HOLDFAST_TOKEN="}),
        .descriptors = {{in.get(), 0}, {child->output.get(), 1}, {child->output.get(), 2}}};
    HF_ASSIGN_OR_RETURN(child->process, StartProcess(spec));
    return absl::OkStatus();
  });
  auto gone = started.then([this, child](kj::Own<absl::Status>&& status) {
    child->start = *status;
    return Watch(child);
  });
  auto over = gone.then([this, child, ended] {
                    children_.erase(child);
                    ended();
                  })
                  .fork();
  tasks_.add(over.addBranch());
  auto late = io_->provider->getTimer().afterDelay(deadline_ms * kj::MILLISECONDS).then([child] {
    child->expired = true;
    Kill(*child);
  });
  return over.addBranch().exclusiveJoin(kj::mv(late)).then([child] { return child; });
}

// Until it is reaped.
kj::Promise<void> Helpers::Watch(std::shared_ptr<Child> child) {
  if (!child->start.ok()) return kj::READY_NOW;
  child->started = true;
  if (child->expired) Kill(*child);
  child->exit = kj::heap<kj::UnixEventPort::FdObserver>(io_->unixEventPort, child->process.pidfd.get(),
                                                        kj::UnixEventPort::FdObserver::OBSERVE_READ);
  return child->exit->whenBecomesReadable().then([child] {
    child->how = ReapReason(child->process.pidfd.get());
    child->exit = nullptr;  // here, on the main thread, and before its descriptor
  });
}

kj::Promise<absl::StatusOr<std::string>> Helpers::Probe(const ProbeRequest& request, uint64_t deadline_ms) {
  using Result = absl::StatusOr<std::string>;
  auto input = EncodeProbe(request);
  if (!input.ok()) return Result(input.status());
  std::vector<uint64_t> ids;
  for (const ProbeMount& mount : request.mounts) {
    if (busy_mounts_.count(mount.id) != 0) {
      return Result(
          Unavailable("an earlier probe of mount " + std::to_string(mount.id) + " has not ended yet"));
    }
    ids.push_back(mount.id);
  }
  busy_mounts_.insert(ids.begin(), ids.end());
  auto ended = [this, ids] {
    for (uint64_t id : ids) busy_mounts_.erase(id);
  };
  return Run(program_, {"holdfast-supervisor", kProbeArgument}, std::move(*input), deadline_ms, ended)
      .then([deadline_ms](std::shared_ptr<Child> child) -> Result {
        if (!child->start.ok()) return Annotate(child->start, "probe");
        return ProbeResult(child->how, child->started ? ReadOutput(child->output.get()) : "", deadline_ms);
      });
}

kj::Promise<SelfTestResult> Helpers::SelfTest(std::shared_ptr<const Executable> executable,
                                              uint64_t deadline_ms) {
  std::shared_ptr<const UniqueFd> program(executable, &executable->file);
  return Run(program, {"holdfast-worker", "--self-test"}, "", deadline_ms, [] {})
      .then([deadline_ms](std::shared_ptr<Child> child) -> SelfTestResult {
        if (!child->start.ok()) return {false, std::string(FromAbsl(child->start.message()))};
        std::string output = child->started ? End(ReadOutput(child->output.get())) : "";
        if (child->how == "exit 0") return {true, output};
        std::string why = child->how.empty() ? "did not end within " + std::to_string(deadline_ms) + " ms"
                                             : "ended with " + child->how;
        return {false, "the self-test " + why + ": " + output};
      });
}

}  // namespace holdfast::supervisor
