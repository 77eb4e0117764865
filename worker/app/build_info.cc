#include "worker/app/build_info.h"

#include <elf.h>
#include <link.h>

#include <cstring>

namespace holdfast::app {
namespace {

constexpr size_t kShownBytes = 4;

// The first object that dl_iterate_phdr reports is the executable.
int FindBuildId(dl_phdr_info* info, size_t, void* result) {
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr)& header = info->dlpi_phdr[i];
    if (header.p_type != PT_NOTE) continue;
    const char* note = reinterpret_cast<const char*>(info->dlpi_addr + header.p_vaddr);
    const char* end = note + header.p_memsz;
    while (note + sizeof(ElfW(Nhdr)) <= end) {
      ElfW(Nhdr) head;
      memcpy(&head, note, sizeof head);
      const char* name = note + sizeof head;
      const char* content = name + (head.n_namesz + 3) / 4 * 4;
      if (head.n_type == NT_GNU_BUILD_ID && head.n_namesz == 4 && memcmp(name, "GNU", 4) == 0) {
        static_cast<std::string*>(result)->assign(content, head.n_descsz);
        return 1;
      }
      note = content + (head.n_descsz + 3) / 4 * 4;
    }
  }
  return 1;
}

}  // namespace

std::string BuildName() {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string id;
  dl_iterate_phdr(FindBuildId, &id);
  std::string name = HOLDFAST_VERSION;
  if (!id.empty()) name += "+";
  for (char c : id.substr(0, kShownBytes)) {
    const auto byte = static_cast<unsigned char>(c);
    name += kDigits[byte >> 4];
    name += kDigits[byte & 15];
  }
  return name;
}

}  // namespace holdfast::app
