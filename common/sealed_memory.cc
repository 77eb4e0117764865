#include "common/sealed_memory.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

namespace holdfast {

absl::StatusOr<UniqueFd> MakeSealedMemory(const std::string& name, uint64_t bytes) {
  UniqueFd memory(memfd_create(name.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!memory.valid()) return ErrnoStatus(errno, "memfd_create");
  if (ftruncate(memory.get(), static_cast<off_t>(bytes)) != 0)
    return ErrnoStatus(errno, "ftruncate of " + name);
  if (fcntl(memory.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0)
    return ErrnoStatus(errno, "sealing " + name);
  return memory;
}

}  // namespace holdfast
