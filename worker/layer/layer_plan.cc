#include "worker/layer/layer_plan.h"

#include <algorithm>
#include <tuple>

namespace holdfast::layer {
namespace {

// Bounds the work and memory for a blob made of absurdly many chunks in one place.
constexpr size_t kMaxCompany = 1024;

using Chunks = std::span<const ChunkRecord>;

uint64_t FirstAt(Chunks chunks, uint64_t blob_offset) {
  auto it =
      std::lower_bound(chunks.begin(), chunks.end(), blob_offset,
                       [](const ChunkRecord& chunk, uint64_t offset) { return chunk.blob_offset < offset; });
  return static_cast<uint64_t>(it - chunks.begin());
}

struct Member {
  uint64_t offset;
  uint64_t end;
  bool demanded;
  std::vector<uint64_t> chunks;
};

// Chunks that nobody asked for are taken only where they overlap no other, so a hostile table of contents
// cannot make one member yield more bytes than it holds.
void DropOverlapping(Chunks all, const std::vector<uint64_t>& demanded, std::vector<uint64_t>* ids) {
  uint64_t end = 0;
  std::erase_if(*ids, [&](uint64_t id) {
    const ChunkRecord& chunk = all[id];
    bool asked = std::binary_search(demanded.begin(), demanded.end(), id);
    if (!asked && chunk.inner_offset < end) return true;
    end = std::max(end, chunk.inner_offset + chunk.size);
    return false;
  });
}

// More compressed bytes than any sane compressor makes of `bytes`: a member's end in the table of contents is
// only where the next one begins, and may be far away.
uint64_t CompressedBound(uint64_t bytes) { return bytes + bytes / 8 + 64 * 1024; }

// Sorts ids into members, in blob order.
std::vector<Member> Members(Chunks all, const std::vector<uint64_t>& demanded, std::vector<uint64_t> ids) {
  std::sort(ids.begin(), ids.end(), [&](uint64_t a, uint64_t b) {
    return std::tie(all[a].blob_offset, all[a].inner_offset, a) <
           std::tie(all[b].blob_offset, all[b].inner_offset, b);
  });
  std::vector<Member> members;
  for (uint64_t id : ids) {
    const ChunkRecord& chunk = all[id];
    if (members.empty() || members.back().offset != chunk.blob_offset) {
      members.push_back({chunk.blob_offset, chunk.blob_end, false, {}});
    }
    Member& member = members.back();
    member.end = std::max(member.end, chunk.blob_end);
    member.demanded = member.demanded || std::binary_search(demanded.begin(), demanded.end(), id);
    member.chunks.push_back(id);
  }
  for (Member& member : members) {
    DropOverlapping(all, demanded, &member.chunks);
    uint64_t inflated = 0;
    for (uint64_t id : member.chunks) inflated = std::max(inflated, all[id].inner_offset + all[id].size);
    member.end = std::min(member.end, member.offset + CompressedBound(inflated));
  }
  return members;
}

struct Join {
  PlannedFetch fetch;
  bool demanded = false;
};

std::vector<Join> JoinMembers(const std::vector<Member>& members, uint64_t max_bytes) {
  std::vector<Join> joins;
  for (const Member& member : members) {
    bool join = false;
    if (!joins.empty()) {
      const PlannedFetch& last = joins.back().fetch;
      uint64_t last_end = last.offset + last.length;
      join = member.offset <= last_end + kJoinGapBytes &&
             std::max(member.end, last_end) - last.offset <= max_bytes;
    }
    if (!join) joins.push_back({{member.offset, 0, {}}, false});
    Join& into = joins.back();
    into.fetch.length = std::max(into.fetch.offset + into.fetch.length, member.end) - into.fetch.offset;
    into.fetch.chunks.insert(into.fetch.chunks.end(), member.chunks.begin(), member.chunks.end());
    into.demanded = into.demanded || member.demanded;
  }
  return joins;
}

// Adds the company of one demanded chunk: the rest of its member, and of its window if it is small.
void AddCompany(Chunks all, uint64_t id, uint64_t neighbourhood, const IsWanted& wanted,
                std::vector<uint64_t>* ids) {
  const ChunkRecord& chunk = all[id];
  uint64_t from = chunk.blob_offset;
  uint64_t to = chunk.blob_offset + 1;
  bool small = neighbourhood != 0 && chunk.size <= neighbourhood;
  if (small) {
    from = chunk.blob_offset / neighbourhood * neighbourhood;
    to = from + neighbourhood;
  }
  size_t taken = 0;
  for (uint64_t i = FirstAt(all, from); i < all.size() && all[i].blob_offset < to && taken < kMaxCompany;
       i++) {
    if (i == id || all[i].blob_offset < from) continue;
    bool same_member = all[i].blob_offset == chunk.blob_offset;
    bool neighbour = small && all[i].size <= neighbourhood && all[i].blob_end <= to;
    if ((!same_member && !neighbour) || !wanted(i)) continue;
    ids->push_back(i);
    taken++;
  }
}

void SortUnique(std::vector<uint64_t>* ids) {
  std::sort(ids->begin(), ids->end());
  ids->erase(std::unique(ids->begin(), ids->end()), ids->end());
}

}  // namespace

uint64_t FirstOfMember(Chunks chunks, uint64_t chunk) {
  uint64_t first = FirstAt(chunks, chunks[chunk].blob_offset);
  // Chunks of a hostile file may not be sorted.
  return first < chunks.size() && chunks[first].blob_offset == chunks[chunk].blob_offset ? first : chunk;
}

std::vector<PlannedFetch> PlanDemand(Chunks chunks, std::vector<uint64_t> demanded, uint64_t neighbourhood,
                                     const IsWanted& wanted) {
  SortUnique(&demanded);
  std::vector<uint64_t> ids = demanded;
  for (uint64_t id : demanded) AddCompany(chunks, id, neighbourhood, wanted, &ids);
  SortUnique(&ids);
  std::vector<PlannedFetch> fetches;
  for (Join& join : JoinMembers(Members(chunks, demanded, ids), kMaxFetchBytes)) {
    // Neighbours that a gap keeps apart from what was asked for are not worth a request of their own.
    if (join.demanded) fetches.push_back(std::move(join.fetch));
  }
  return fetches;
}

std::optional<PlannedFetch> PlanPrefetch(Chunks chunks, uint64_t* cursor, uint64_t blob_end,
                                         const IsWanted& wanted) {
  std::vector<uint64_t> ids;
  uint64_t start = 0;
  uint64_t end = 0;
  for (; *cursor < chunks.size() && chunks[*cursor].blob_offset < blob_end; ++*cursor) {
    const ChunkRecord& chunk = chunks[*cursor];
    if (!wanted(*cursor)) continue;
    if (ids.empty()) {
      start = chunk.blob_offset;
    } else if (chunk.blob_offset != chunks[ids.back()].blob_offset &&
               (chunk.blob_offset < start || chunk.blob_offset > end + kJoinGapBytes ||
                chunk.blob_end - start > kPrefetchPieceBytes)) {
      break;
    }
    ids.push_back(*cursor);
    end = std::max(end, chunk.blob_end);
  }
  if (ids.empty()) return std::nullopt;
  // Overlapping chunks of a hostile member are left to be demanded one by one.
  std::vector<Join> joins = JoinMembers(Members(chunks, {}, ids), UINT64_MAX);
  return std::move(joins.front().fetch);
}

}  // namespace holdfast::layer
