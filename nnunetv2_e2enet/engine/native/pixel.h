// What a pixel of a stored map is: a float, or with E2E_BFLOAT16 a bfloat16 that is widened on the way in and rounded to the
// nearest (ties to even) on the way out.
#pragma once

#include "core.h"
#include "vec.h"

namespace E2E_NAMESPACE {

#ifndef E2E_BFLOAT16

using Pixel = float;

#else

using Pixel = e2e::BFloat16;

#if E2E_ISA == 512

static inline Vec load(const Pixel* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
static inline __m256i narrow(Vec v) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }
static inline void store(Pixel* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v)); }
static inline void store_lanes(Pixel* p, Vec v, uint32_t lanes) { _mm256_mask_storeu_epi16(p, mask_of(lanes), narrow(v)); }
static inline void store_first(Pixel* p, Vec v, int64_t n) { store_lanes(p, v, (1u << n) - 1); }

#else

#if E2E_ISA == 256

static inline Vec load(const Pixel* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline void store(Pixel* p, Vec v) {
    const __m256i bits = _mm256_castps_si256(v), one = _mm256_set1_epi32(1);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i not_a_number = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, not_a_number), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(upper, upper), 0xD8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

#else

static inline Vec load(const Pixel* p) {
    uint16_t in[kLanes];
    std::memcpy(in, p, sizeof in);
    const uint32_t bits[kLanes] = {uint32_t{in[0]} << 16, uint32_t{in[1]} << 16, uint32_t{in[2]} << 16, uint32_t{in[3]} << 16};
    Vec v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}
static inline void store(Pixel* p, Vec v) {
    typedef uint32_t Bits __attribute__((vector_size(16)));
    Bits bits, not_a_number;
    const Mask unordered = v != v;
    std::memcpy(&bits, &v, sizeof bits);
    std::memcpy(&not_a_number, &unordered, sizeof unordered);
    const Bits rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const Bits upper = ((rounded & ~not_a_number) | ((bits | 0x400000) & not_a_number)) >> 16;
    const uint16_t out[kLanes] = {static_cast<uint16_t>(upper[0]), static_cast<uint16_t>(upper[1]),
                                  static_cast<uint16_t>(upper[2]), static_cast<uint16_t>(upper[3])};
    std::memcpy(p, out, sizeof out);
}

#endif

static inline void store_lanes(Pixel* p, Vec v, uint32_t lanes) {
    Pixel all[kLanes];
    store(all, v);
    for (int i = 0; i < kLanes; ++i)
        if (lanes >> i & 1) p[i] = all[i];
}
static inline void store_first(Pixel* p, Vec v, int64_t n) {
    Pixel all[kLanes];
    store(all, v);
    std::memcpy(p, all, sizeof(Pixel) * static_cast<size_t>(n));
}

#endif

#endif


// Up to a vector; n may be any number of at least 1.
template <typename T>
static inline void store_up_to(T* p, Vec v, int64_t n) {
    if (n >= kLanes) {
        store(p, v);
    } else {
        store_first(p, v, n);
    }
}


constexpr bool kVectorIsLine = kLanes * sizeof(Pixel) == 64;

// The pixels of one phase of a block of tiles, past the caches where they fill whole lines.
static inline void stream_phase(const Pixel* pixels, int64_t first, int vectors, Pixel* to, int64_t chunk) {
    constexpr int line = 64 / sizeof(Pixel);
    const int64_t end = first + int64_t{vectors} * kLanes;
    for (int64_t tile = first; tile < end;) {
        Pixel* target = to + e2e::place(tile, chunk);
        const Pixel* from = pixels + (tile - first);
        if (tile % line == 0 && tile + line <= end) {
            stream_line(target, from);
            tile += line;
        } else {
            std::memcpy(target, from, kLanes * sizeof(Pixel));
            tile += kLanes;
        }
    }
}

}  // namespace E2E_NAMESPACE
