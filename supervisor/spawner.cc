#include "supervisor/spawner.h"

#include <errno.h>
#include <sys/socket.h>

#include <utility>

namespace holdfast::supervisor {

absl::StatusOr<WorkerChild> Spawn(const Executable& executable, const std::vector<std::string>& args,
                                  const std::string& token, bool urgent) {
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) return ErrnoStatus(errno, "socketpair");
  WorkerChild child;
  child.socket.Reset(ends[0]);
  UniqueFd child_end(ends[1]);
  // The service manager's variables speak to us, not to the worker.
  ProcessSpec spec{
      .program = executable.file.get(),
      .argv = {"holdfast-worker"},
      .environment = EnvironmentWithout({"HOLDFAST_TOKEN=", "NOTIFY_SOCKET=", "LISTEN_", "WATCHDOG_"}),
      .descriptors = {{child_end.get(), kWorkerSocket}},
      .urgent = urgent};
  spec.argv.insert(spec.argv.end(), args.begin(), args.end());
  spec.environment.push_back("HOLDFAST_TOKEN=" + token);
  HF_ASSIGN_OR_RETURN(child.process, StartProcess(spec));
  return child;
}

}  // namespace holdfast::supervisor
