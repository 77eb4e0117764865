#include "common/sha256.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <vector>

namespace holdfast {
namespace {

constexpr std::array<uint32_t, 64> kRound = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

uint32_t LoadBig(const uint8_t* p) {
  return (uint32_t{p[0]} << 24) | (uint32_t{p[1]} << 16) | (uint32_t{p[2]} << 8) | uint32_t{p[3]};
}

using State = std::array<uint32_t, 8>;

void PortableBlock(State* state, const uint8_t* block) {
  std::array<uint32_t, 64> w;
  for (size_t i = 0; i < 16; i++) w[i] = LoadBig(block + 4 * i);
  for (size_t i = 16; i < 64; i++) {
    uint32_t s0 = std::rotr(w[i - 15], 7) ^ std::rotr(w[i - 15], 18) ^ (w[i - 15] >> 3);
    uint32_t s1 = std::rotr(w[i - 2], 17) ^ std::rotr(w[i - 2], 19) ^ (w[i - 2] >> 10);
    w[i] = w[i - 16] + s0 + w[i - 7] + s1;
  }
  auto [a, b, c, d, e, f, g, h] = *state;
  for (size_t i = 0; i < 64; i++) {
    uint32_t s1 = std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25);
    uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + kRound[i] + w[i];
    uint32_t s0 = std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22);
    uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
    h = g;
    g = f;
    f = e;
    e = d + t1;
    d = c;
    c = b;
    b = a;
    a = t1 + t2;
  }
  const std::array<uint32_t, 8> add = {a, b, c, d, e, f, g, h};
  for (size_t i = 0; i < 8; i++) (*state)[i] += add[i];
}

void PortableBlocks(State* state, const uint8_t* data, size_t blocks) {
  for (size_t i = 0; i < blocks; i++) PortableBlock(state, data + 64 * i);
}

#if defined(__x86_64__)
// Leaf 7 of CPUID: SHA is bit 29 of EBX. What the code below needs besides came into processors before it.
bool HasShaInstructions() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (ebx & (1u << 29)) != 0;
}

// Intel SDM, "Intel SHA Extensions": the state lies in two registers as {f, e, b, a} and {h, g, d, c}, lowest
// word first; each step does four rounds, with four words of the message schedule. Unrolled, all of it stays
// in registers, which makes it twice as fast.
__attribute__((target("sha,ssse3,sse4.1"))) void ShaBlocks(State* state, const uint8_t* data, size_t blocks) {
  auto load = [](const void* at) __attribute__((target("sse4.1"))) {
    return _mm_loadu_si128(static_cast<const __m128i*>(at));
  };
  const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  const State& s = *state;
  auto word = [&](size_t i) { return static_cast<int>(s[i]); };
  __m128i abef = _mm_set_epi32(word(0), word(1), word(4), word(5));
  __m128i cdgh = _mm_set_epi32(word(2), word(3), word(6), word(7));
  for (const uint8_t* block = data; block != data + 64 * blocks; block += 64) {
    const __m128i abef_before = abef, cdgh_before = cdgh;
    __m128i w[4];
#pragma GCC unroll 16
    for (size_t step = 0; step < 16; step++) {
      __m128i& now = w[step % 4];  // the words of four steps ago
      if (step < 4) {
        now = _mm_shuffle_epi8(load(block + 16 * step), big_endian);
      } else {
        const __m128i last = w[(step + 3) % 4];
        const __m128i seven_ago = _mm_alignr_epi8(last, w[(step + 2) % 4], 4);
        now = _mm_add_epi32(_mm_sha256msg1_epu32(now, w[(step + 1) % 4]), seven_ago);
        now = _mm_sha256msg2_epu32(now, last);
      }
      const __m128i sum = _mm_add_epi32(now, load(&kRound[4 * step]));
      cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
      abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(sum, 0x0e));
    }
    abef = _mm_add_epi32(abef, abef_before);
    cdgh = _mm_add_epi32(cdgh, cdgh_before);
  }
  alignas(16) std::array<uint32_t, 4> upper, lower;
  _mm_store_si128(reinterpret_cast<__m128i*>(upper.data()), abef);
  _mm_store_si128(reinterpret_cast<__m128i*>(lower.data()), cdgh);
  *state = {upper[3], upper[2], lower[3], lower[2], upper[1], upper[0], lower[1], lower[0]};
}
#else
bool HasShaInstructions() { return false; }
void ShaBlocks(State* state, const uint8_t* data, size_t blocks) { PortableBlocks(state, data, blocks); }
#endif

}  // namespace

Sha256::Sha256(Code code) : fast_(code == Code::kFastest && HasSha()) {}

bool Sha256::HasSha() {
  static const bool has = HasShaInstructions();
  return has;
}

void Sha256::Blocks(const uint8_t* data, size_t blocks) {
  fast_ ? ShaBlocks(&state_, data, blocks) : PortableBlocks(&state_, data, blocks);
}

void Sha256::Update(const void* data, size_t size) {
  const auto* in = static_cast<const uint8_t*>(data);
  while (size > 0) {
    size_t used = total_bytes_ % 64;
    size_t take = std::min(size, 64 - used);
    if (used == 0 && size >= 64) {
      take = size - size % 64;
      Blocks(in, take / 64);
    } else {
      std::memcpy(buffer_.data() + used, in, take);
      if (used + take == 64) Blocks(buffer_.data(), 1);
    }
    total_bytes_ += take;
    in += take;
    size -= take;
  }
}

std::string Sha256::FinishHex() {
  uint64_t bits = total_bytes_ * 8;
  const uint8_t one = 0x80, zero = 0;
  Update(&one, 1);
  while (total_bytes_ % 64 != 56) Update(&zero, 1);
  std::array<uint8_t, 8> length;
  for (size_t i = 0; i < 8; i++) length[i] = static_cast<uint8_t>(bits >> (56 - 8 * i));
  Update(length.data(), length.size());
  static constexpr char kHex[] = "0123456789abcdef";
  std::string hex;
  for (uint32_t word : state_) {
    for (int shift = 28; shift >= 0; shift -= 4) hex += kHex[(word >> shift) & 15];
  }
  return hex;
}

absl::StatusOr<std::string> Sha256OfFile(int fd, Unhurried* unhurried) {
  Sha256 hash;
  std::vector<char> buffer(1 << 16);
  off_t offset = 0;
  while (true) {
    ssize_t n = pread(fd, buffer.data(), buffer.size(), offset);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return ErrnoStatus(errno, "read for digest");
    if (n == 0) return hash.FinishHex();
    hash.Update(buffer.data(), static_cast<size_t>(n));
    offset += n;
    if (unhurried != nullptr) unhurried->Rest();
  }
}

}  // namespace holdfast
