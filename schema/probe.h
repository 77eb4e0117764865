/* The liveness probe: an ioctl on the root folder of a mount, answered by whichever worker reads it now. It
 * has no name that an image could collide with or a kernel could cache (docs/HANDOVER.md). Frozen; older
 * workers answer ENOTTY.
 */
#ifndef HOLDFAST_SCHEMA_PROBE_H_
#define HOLDFAST_SCHEMA_PROBE_H_

#include <stdint.h>
#include <sys/ioctl.h>

struct hf_probe_live {
  uint64_t generation;
  char build[56]; /* NUL-terminated, cut off */
};

#define HF_PROBE_LIVE _IOR('H', 0x46, struct hf_probe_live)

#ifdef __cplusplus
static_assert(sizeof(struct hf_probe_live) == 64, "frozen");
#endif

#endif
