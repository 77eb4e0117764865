// Copies from a mapping of a file; a read error there arrives as SIGBUS in the thread that touched it.
#pragma once

#include <cstdint>

namespace holdfast::reader {

// Once, before the first CopyMapped. A SIGBUS anywhere else ends the process with 70.
void InstallSigbus();
// False when the pages could not be read.
bool CopyMapped(void* to, const void* from, uint64_t size);

}  // namespace holdfast::reader
