#include "supervisor/options.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <unistd.h>

#include <filesystem>
#include <map>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "common/fuse_mount.h"

namespace holdfast::supervisor {
namespace {

constexpr char kVerifier[] = "holdfast-verifier";
constexpr uint64_t kMaxProbationSeconds = 86'400;
constexpr uint64_t kMaxHangMillis = 86'400'000;

absl::Status RefuseInsideFuse(const std::string& folder) {
  HF_ASSIGN_OR_RETURN(std::vector<MountInfo> mounts, ReadMountInfo());
  const MountInfo* nearest = nullptr;
  for (const MountInfo& mount : mounts) {
    size_t depth = nearest == nullptr ? 0 : nearest->path.size();
    if (IsUnder(folder, mount.path) && mount.path.size() >= depth) nearest = &mount;
  }
  if (nearest != nullptr && nearest->type.substr(0, 4) == "fuse" && nearest->type != "fusectl") {
    return FailedPrecondition("state folder " + folder + " lies in the FUSE mount " + nearest->path);
  }
  return absl::OkStatus();
}

absl::Status ParseLimits(const std::string& text, Limits* limits) {
  const std::map<std::string, uint64_t*> known = {
      {"register", &limits->register_ms}, {"prepare", &limits->prepare_ms},
      {"rehearse", &limits->rehearse_ms}, {"park", &limits->park_ms},
      {"serve", &limits->serve_ms},       {"probe", &limits->probe_ms},
      {"yield", &limits->yield_ms},       {"take", &limits->take_ms},
      {"resume", &limits->resume_ms},     {"retired", &limits->retired_ms},
      {"first", &limits->first_ms},       {"prepared", &limits->prepared_serve_ms}};
  for (absl::string_view item : absl::StrSplit(text, ',', absl::SkipEmpty())) {
    std::pair<std::string, std::string> parts = absl::StrSplit(item, absl::MaxSplits('=', 1));
    auto limit = known.find(parts.first);
    if (limit == known.end() || !absl::SimpleAtoi(parts.second, limit->second))
      return InvalidArgument("--limits: '" + std::string(item) + "' is not a step and a number");
  }
  return absl::OkStatus();
}

}  // namespace

const char kUsage[] =
    R"(holdfast-supervisor: holds the FUSE mounts of lazily pulled container images and runs the worker that serves them.

Usage: holdfast-supervisor [options] [-- worker arguments...]

  --worker PATH              worker program (default /usr/lib/holdfast/holdfast-worker); a private copy is run
  --verifier PATH            program that judges a new worker (default: holdfast-verifier beside this program, else in
                             /usr/lib/holdfast)
  --state DIR                state, mounts and worker copies (default /var/lib/holdfast); one supervisor a folder
  --runtime DIR              sockets (default /run/holdfast)
  --snapshotter-socket PATH  containerd's end (default <runtime>/snapshotter.sock): proxy_plugins address
  --control-socket PATH      holdfastctl's end (default <runtime>/supervisor.sock), for root only
  --spare                    keep a second worker ready that takes over at once when the first one dies
  --hang-limit MS            how long the worker may be stuck before it is replaced (default 3000; 0: for ever)
  --probation SECONDS        how long a new build must run to become the one that is brought back (default 60)

What follows -- goes to every worker, e.g. -- --config /etc/holdfast/config.toml

The worker can be killed or upgraded (holdfastctl upgrade) while containers read. SIGTERM ends the supervisor alone: worker
and mounts stay for the next one (that is how it is upgraded). SIGINT ends everything in good order; containers whose layers
it still holds lose them, so drain the node first. `holdfastctl status` shows all.
Exit codes: 0 stopped in good order, 1 failed (one line on standard error says why), 2 wrong usage.
)";

absl::StatusOr<Options> ParseOptions(const std::vector<std::string>& args) {
  Options options;
  std::string probation;
  std::string hang_limit;
  std::string limits;  // for tests: "register=500,take=800", in milliseconds
  std::map<std::string, std::string*> flags = {{"--worker", &options.worker},
                                               {"--verifier", &options.verifier},
                                               {"--state", &options.state_dir},
                                               {"--runtime", &options.runtime_dir},
                                               {"--snapshotter-socket", &options.snapshotter_socket},
                                               {"--control-socket", &options.control_socket},
                                               {"--probation", &probation},
                                               {"--hang-limit", &hang_limit},
                                               {"--limits", &limits}};
  for (size_t i = 0; i < args.size(); ++i) {
    options.help |= args[i] == "--help" || args[i] == "-h";
    if (options.help) return options;
    if (args[i] == "--") {
      options.worker_args.assign(args.begin() + static_cast<ptrdiff_t>(i) + 1, args.end());
      break;
    }
    if (args[i] == "--spare") {
      options.limits.spare = true;
      continue;
    }
    std::string name = args[i].substr(0, args[i].find('='));
    auto flag = flags.find(name);
    if (flag == flags.end()) return InvalidArgument("unknown argument '" + args[i] + "'");
    bool inline_value = name.size() < args[i].size();
    *flag->second = inline_value ? args[i].substr(name.size() + 1) : ++i < args.size() ? args[i] : "";
    if (flag->second->empty()) return InvalidArgument(name + " needs a value");
  }
  HF_RETURN_IF_ERROR(ParseLimits(limits, &options.limits));
  if (!hang_limit.empty() && (!absl::SimpleAtoi(ToAbsl(hang_limit), &options.hang_limit_ms) ||
                              options.hang_limit_ms > kMaxHangMillis)) {
    return InvalidArgument("--hang-limit needs a number of milliseconds up to a day, not '" + hang_limit +
                           "'");
  }
  uint64_t seconds = options.limits.probation_ms / 1'000;
  if (!probation.empty() &&
      (!absl::SimpleAtoi(ToAbsl(probation), &seconds) || seconds > kMaxProbationSeconds)) {
    return InvalidArgument("--probation needs a number of seconds up to a day, not '" + probation + "'");
  }
  options.limits.probation_ms = seconds * 1'000;
  return options;
}

absl::Status PrepareProcess() {
  if (geteuid() != 0) return PermissionDenied("it must run as root (it mounts file systems)");
  if (access("/dev/fuse", R_OK | W_OK) != 0) {
    return Unavailable(
        "/dev/fuse cannot be used: load the module (modprobe fuse), or give the container the device");
  }
  // What the parent leaked must not reach the workers.
  close_range(3, ~0U, CLOSE_RANGE_CLOEXEC);
  rlimit files{};
  if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
  }
  // Inherited by the workers: dumping core would delay the proof of a worker's death by up to seconds.
  rlimit core{};
  setrlimit(RLIMIT_CORE, &core);
  return absl::OkStatus();
}

absl::StatusOr<UniqueFd> PrepareFolders(Options* options) {
  HF_RETURN_IF_ERROR(Annotate(MakeDirs(options->state_dir, 0711), "state folder"));
  HF_RETURN_IF_ERROR(Annotate(MakeDirs(options->runtime_dir, 0711), "runtime folder"));
  options->state_dir = std::filesystem::canonical(options->state_dir).string();
  options->runtime_dir = std::filesystem::canonical(options->runtime_dir).string();
  std::string folder = options->runtime_dir;
  if (options->verifier.empty()) {
    options->verifier = std::filesystem::read_symlink("/proc/self/exe").parent_path() / kVerifier;
    if (!PathExists(options->verifier)) options->verifier = std::string("/usr/lib/holdfast/") + kVerifier;
  }
  if (options->snapshotter_socket.empty()) options->snapshotter_socket = folder + "/snapshotter.sock";
  if (options->control_socket.empty()) options->control_socket = folder + "/supervisor.sock";
  HF_RETURN_IF_ERROR(RefuseInsideFuse(options->state_dir));
  std::string path = options->state_dir + "/lock";
  HF_ASSIGN_OR_RETURN(UniqueFd lock, OpenFile(path, O_RDWR | O_CREAT, 0600));
  if (flock(lock.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK) return ErrnoStatus(errno, "locking " + path);
    return AlreadyExists("another holdfast-supervisor runs on the state folder " + options->state_dir);
  }
  return lock;
}

std::vector<std::string> MachineWarnings() {
  std::vector<std::string> warnings;
  for (const char* name : {"default_request_timeout", "max_request_timeout"}) {
    auto text = ReadFile(std::string("/proc/sys/fs/fuse/") + name);
    if (!text.ok() || *text == "0\n") continue;
    warnings.push_back(std::string("sysctl fs.fuse.") + name + " is " + text->substr(0, text->find('\n')) +
                       ": the kernel aborts mounts whose requests wait longer; set it to 0");
  }
  return warnings;
}

}  // namespace holdfast::supervisor
