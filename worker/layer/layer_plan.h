// Which blob ranges to fetch for the chunks that are missing. Pure functions: no locks, no I/O.
//
// A chunk can only be had with its whole gzip member, so all chunks of a member that are still wanted come
// along. Small content also brings what lies in the same aligned window of the blob: a cold start waits for
// round trips, not for bytes (docs/adr). Ranges that touch or nearly touch become one.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "worker/layer/layer_index.h"

namespace holdfast::layer {

inline constexpr uint64_t kMaxFetchBytes = 4u << 20;       // one request, unless one member is larger
inline constexpr uint64_t kPrefetchPieceBytes = 1u << 20;  // smaller, so what is demanded from it waits less
inline constexpr uint64_t kJoinGapBytes = 4096;

struct PlannedFetch {
  uint64_t offset = 0;  // in the blob
  uint64_t length = 0;
  std::vector<uint64_t> chunks;  // ids, sorted by (blob_offset, inner_offset)
};

// Whether a chunk that nobody asked for should come along: absent and not on its way.
using IsWanted = std::function<bool(uint64_t chunk)>;

// Every chunk of `demanded` is in exactly one of the fetches returned, and each fetch has at least one of
// them. `neighbourhood` = 0: no company but the member's own. `chunks` are those of the index: sorted by
// blob_offset.
std::vector<PlannedFetch> PlanDemand(std::span<const ChunkRecord> chunks, std::vector<uint64_t> demanded,
                                     uint64_t neighbourhood, const IsWanted& wanted);

// The next piece of the blob range that ends at `blob_end`, beginning with chunk *cursor, which is moved
// behind it. nullopt: there is nothing left to fetch.
std::optional<PlannedFetch> PlanPrefetch(std::span<const ChunkRecord> chunks, uint64_t* cursor,
                                         uint64_t blob_end, const IsWanted& wanted);

// The lowest chunk of the same gzip member.
uint64_t FirstOfMember(std::span<const ChunkRecord> chunks, uint64_t chunk);

}  // namespace holdfast::layer
