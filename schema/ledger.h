/* The request ledger: the shared memory in which a worker keeps every FUSE request that it has taken from the
 * kernel and not yet answered, so that its successor can answer it (DESIGN 4.3, docs/HANDOVER.md).
 *
 * This is a frozen C ABI, version 1: after a rollback an older build reads a newer one's ledger. Nothing here
 * may move or change its meaning; new meaning goes into `reserved` words and only when both sides announced
 * the capability. Readers find things by the offsets and sizes the header states. schema/ledger_abi_test.cc
 * holds the golden layout.
 *
 * The supervisor creates the memfd (zeroed, sealed against resizing), fills the header once and keeps a
 * descriptor. The supervisor itself reads only the header's counters, and those only as numbers.
 *
 * Who writes what:
 *  - a receive slot belongs to one pool thread of the worker that owns the ledger (header.generation);
 *  - a pending record is written by the owner until it dies or parks, then adopted by a successor by
 * compare-and-swap on owner_generation. Whoever's generation stands there, and nobody else, answers it and
 * frees it;
 *  - all words that two processes may see at once are accessed as lock-free 32- or 64-bit atomics.
 *
 * The life of a request:
 *  1. slot: in.len (first word of `request`) = 0; mount_id; state = RECEIVING; splice /dev/fuse -> the slot's
 * pipe (which the supervisor also holds); read pipe -> request; crc; length; state = EXECUTING.
 *  2. answered at once: reply; state = FREE.
 *  3. must wait for content (READ only): fill a record, state = PENDING (release); then slot state = FREE.
 * Killed in between, both exist; the kernel refuses the second reply with ENOENT, which is normal.
 *  4. when the content is there: reply, record state = FREE.
 * The successor drains each pipe into its slot, then executes slots and records with their original `unique`.
 */
#ifndef HOLDFAST_SCHEMA_LEDGER_H_
#define HOLDFAST_SCHEMA_LEDGER_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HF_LEDGER_MAGIC 0x31524447444c4648ull /* "HFLDGDR1" little-endian */
#define HF_LEDGER_VERSION 1u
#define HF_LEDGER_PAGE 4096u

#define HF_LEDGER_REQUEST_BYTES 32768u /* > the kernel's largest request on a read-only mount (16.5 KiB) */
#define HF_LEDGER_SLOTS 16u /* one a pool thread; the last for requests adopted from older ledgers */
#define HF_LEDGER_RECORDS 65536u

enum hf_slot_state {
  HF_SLOT_FREE = 0,
  HF_SLOT_RECEIVING = 1, /* the pipe or the request bytes may hold a request of mount_id */
  HF_SLOT_EXECUTING = 2, /* request and crc are complete */
};

enum hf_record_state {
  HF_RECORD_FREE = 0,
  HF_RECORD_FILLING = 1, /* being written; a successor frees it: its slot still holds the request */
  HF_RECORD_PENDING = 2, /* a READ that waits for content */
};

enum hf_mark {
  HF_MARK_INTERRUPTED = 1u << 0, /* the kernel sent INTERRUPT: answer EINTR rather than wait */
  HF_MARK_HANG_STRUCK = 1u << 1, /* of a slot: its worker hung in it, and `strikes` counts that already;
                                    readers that do not know it ignore it */
};

enum hf_exit_cause { /* header.exit_cause, written by the worker's own signal handler */
                     HF_EXIT_UNKNOWN = 0,
                     HF_EXIT_FATAL_SIGNAL = 1, /* exit_signal and exit_slot say which signal, and which slot
                                                  that thread was executing */
};

struct hf_ledger_header {
  uint64_t magic;
  uint32_t version;
  uint32_t header_size;
  uint64_t total_size;
  uint64_t generation; /* of the worker it was made for; never reused */
  uint32_t slot_count;
  uint32_t slot_stride; /* bytes from one slot to the next */
  uint64_t slot_offset; /* of the first slot, from the start of the memfd */
  uint32_t record_count;
  uint32_t record_stride;
  uint64_t record_offset;
  uint8_t reserved0[64];
  /* Written by the owning worker; atomics. */
  uint64_t requests_received; /* ever; progress for hang detection */
  uint64_t requests_answered;
  uint64_t loop_heartbeat_ns; /* CLOCK_BOOTTIME of the pool's last turn */
  uint32_t exit_cause;        /* hf_exit_cause */
  uint32_t exit_signal;
  uint32_t exit_slot;         /* slot index + 1; 0 = none */
  uint32_t record_high_water; /* records at and above this index were never used: bounds a walk */
  uint8_t reserved1[88];
};

struct hf_slot {
  uint64_t mount_id; /* the supervisor's, never reused; may change only while state is FREE */
  uint32_t owner_generation;
  uint32_t state;  /* hf_slot_state */
  uint32_t length; /* of request, once EXECUTING */
  uint32_t crc;    /* CRC-32C of request[0..length) */
  uint32_t marks;  /* hf_mark */
  uint32_t strikes;
  uint64_t received_ns; /* CLOCK_BOOTTIME */
  uint8_t reserved[24];
  uint8_t request[HF_LEDGER_REQUEST_BYTES]; /* exactly the kernel's bytes: struct fuse_in_header, then its
                                               arguments */
};

struct hf_record {
  uint32_t state;            /* hf_record_state */
  uint32_t owner_generation; /* low 32 bits of the generation that will answer it */
  uint64_t mount_id;
  uint64_t unique;
  uint64_t nodeid;
  uint64_t offset;
  uint32_t size;
  uint32_t crc;         /* CRC-32C of mount_id, unique, nodeid, offset, size in this order, little-endian */
  uint64_t deadline_ns; /* CLOCK_BOOTTIME; after it the answer is EIO */
  uint32_t marks;       /* hf_mark */
  uint32_t strikes;
};

#ifdef __cplusplus
}
static_assert(sizeof(struct hf_ledger_header) == 256, "frozen");
static_assert(sizeof(struct hf_slot) == 64 + HF_LEDGER_REQUEST_BYTES, "frozen");
static_assert(sizeof(struct hf_record) == 64, "frozen");
#endif

/* Layout of a version 1 ledger: header page, slots, records, each page-aligned. A slot's stride is whole
 * pages. */
enum {
  HF_LEDGER_SLOT_OFFSET = 4096,
  HF_LEDGER_SLOT_STRIDE = 36864,
  HF_LEDGER_RECORD_OFFSET = 593920, /* SLOT_OFFSET + SLOTS * SLOT_STRIDE */
  HF_LEDGER_TOTAL_SIZE = 4788224,   /* RECORD_OFFSET + RECORDS * sizeof(struct hf_record) */
};

#endif
