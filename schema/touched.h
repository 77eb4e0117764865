/* What a worker on trial has answered for: nodes whose cached names, attributes and content the kernel must
 * forget if the swap is rolled back (DESIGN 4.4, handover.capnp serve and distrust). The supervisor creates
 * the memfd (zeroed, sealed against resizing) and fills the header; the worker on trial appends; after a
 * rollback the older worker reads.
 *
 * A frozen C ABI, version 1, as ledger.h. Writers take an index by raising `count`, then fill the entry,
 * nodeid first; so an entry below `count` may be incomplete. The reader comes when the writer's exit is
 * proven, and skips one whose mount_id is 0: it is noted before the answer is sent, so that answer never was.
 */
#ifndef HOLDFAST_SCHEMA_TOUCHED_H_
#define HOLDFAST_SCHEMA_TOUCHED_H_

#include <stddef.h>
#include <stdint.h>

#define HF_TOUCHED_MAGIC 0x31484354444c4648ull /* "HFLDTCH1" little-endian */
#define HF_TOUCHED_VERSION 1u
#define HF_TOUCHED_ENTRIES 65536u

struct hf_touched_header {
  uint64_t magic;
  uint32_t version;
  uint32_t header_size;
  uint32_t entry_stride;
  uint32_t capacity;
  uint64_t count; /* atomic; the next index to be written. Above capacity: overflowed, all was touched */
  uint8_t reserved[32];
};

struct hf_touched_entry {
  uint64_t mount_id; /* written last (release): 0 = not complete */
  uint64_t nodeid;   /* both what was asked about and, for a name or a listing, what was found; 0: a name was
                        answered to be absent */
};

enum { HF_TOUCHED_TOTAL_SIZE = 64 + 65536 * 16 };

#ifdef __cplusplus
static_assert(sizeof(struct hf_touched_header) == 64, "frozen");
static_assert(sizeof(struct hf_touched_entry) == 16, "frozen");
#endif

#endif
