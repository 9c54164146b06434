// One vector type for the kernels. The including file names the variant before it includes this one:
// E2E_ISA 512 (AVX-512), 256 (AVX2 with FMA) or 128 (any CPU: the compiler's own 128-bit vectors, so SSE2 or NEON).
#pragma once

#include <cstdint>
#include <cstring>

#if E2E_ISA != 128
#include <immintrin.h>
#endif

namespace E2E_NAMESPACE {

#if E2E_ISA == 512

constexpr int kLanes = 16;
using Vec = __m512;
using Mask = __mmask16;

static inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
static inline void stream(void* p, Vec v) { _mm512_stream_ps(static_cast<float*>(p), v); }
static inline void stream_line(void* to, const void* from) { stream(to, load(static_cast<const float*>(from))); }
static inline Vec splat(float a) { return _mm512_set1_ps(a); }
static inline Vec load_four(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }  // again and again
template <int K>
static inline Vec splat_of_four(Vec four) {
    return _mm512_permute_ps(four, K * 0x55);
}
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }
static inline Vec smaller(Vec a, Vec b) { return _mm512_min_ps(a, b); }
static inline Mask mask_of(uint32_t bits) { return static_cast<Mask>(bits); }
static inline Vec keep(Mask m, Vec v) { return _mm512_maskz_mov_ps(m, v); }
static inline Vec load_where(Mask m, const float* p) { return _mm512_maskz_loadu_ps(m, p); }
static inline float sum(Vec v) { return _mm512_reduce_add_ps(v); }
static inline void store_first(float* p, Vec v, int64_t n) { _mm512_mask_storeu_ps(p, mask_of((1u << n) - 1), v); }
static inline void store_lanes(float* p, Vec v, uint32_t lanes) { _mm512_mask_storeu_ps(p, mask_of(lanes), v); }
static inline Vec load_lanes(const float* p, uint32_t lanes) { return _mm512_maskz_loadu_ps(mask_of(lanes), p); }
static inline Mask above(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
static inline Mask equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
static inline Vec select(Mask m, Vec yes, Vec no) { return _mm512_mask_blend_ps(m, no, yes); }
static inline Mask either(Mask a, Mask b) { return static_cast<Mask>(a | b); }
static inline Mask both(Mask a, Mask b) { return static_cast<Mask>(a & b); }
static inline Mask without(Mask a, Mask b) { return static_cast<Mask>(a & ~b); }
// a0 b0 a1 b1 ...: of the first half of the lanes, and of the second.
static inline Vec interleave_low(Vec a, Vec b) {
    const __m512i i = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    return _mm512_permutex2var_ps(a, i, b);
}
static inline Vec interleave_high(Vec a, Vec b) {
    const __m512i i = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    return _mm512_permutex2var_ps(a, i, b);
}
// Lanes 0, 2, 4, ... of a followed by b.
static inline Vec even_lanes(Vec a, Vec b) {
    const __m512i i = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_permutex2var_ps(a, i, b);
}

#elif E2E_ISA == 256

constexpr int kLanes = 8;
using Vec = __m256;
using Mask = __m256;

static inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
static inline void stream(void* p, Vec v) { _mm256_stream_ps(static_cast<float*>(p), v); }
static inline void stream_line(void* to, const void* from) {
    const float* in = static_cast<const float*>(from);
    stream(to, load(in));
    stream(static_cast<float*>(to) + kLanes, load(in + kLanes));
}
static inline Vec splat(float a) { return _mm256_set1_ps(a); }
static inline Vec load_four(const float* p) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p)); }
template <int K>
static inline Vec splat_of_four(Vec four) {
    return _mm256_permute_ps(four, K * 0x55);
}
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }
static inline Vec smaller(Vec a, Vec b) { return _mm256_min_ps(a, b); }
static inline Mask mask_of(uint32_t bits) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), bit), bit));
}
static inline Vec keep(Mask m, Vec v) { return _mm256_and_ps(m, v); }
static inline Vec load_where(Mask m, const float* p) { return keep(m, load(p)); }
// Masked stores take tens of cycles on AMD's CPUs, so lanes are stored by fours and one by one.
static inline void store_lanes(float* p, Vec v, uint32_t lanes) {
    if (lanes == 0xff) return store(p, v);
    __m128 half = _mm256_castps256_ps128(v);
    for (int k = 0; k < 2; ++k, lanes >>= 4, p += 4, half = _mm256_extractf128_ps(v, 1)) {
        if ((lanes & 0xf) == 0xf) {
            _mm_storeu_ps(p, half);
        } else if (lanes & 0xf) {
            if (lanes & 1) _mm_store_ss(p, half);
            if (lanes & 2) _mm_store_ss(p + 1, _mm_shuffle_ps(half, half, 0x55));
            if (lanes & 4) _mm_store_ss(p + 2, _mm_unpackhi_ps(half, half));
            if (lanes & 8) _mm_store_ss(p + 3, _mm_shuffle_ps(half, half, 0xff));
        }
    }
}
static inline void store_first(float* p, Vec v, int64_t n) { store_lanes(p, v, (1u << n) - 1); }
static inline Vec load_lanes(const float* p, uint32_t lanes) {
    return _mm256_maskload_ps(p, _mm256_castps_si256(mask_of(lanes)));
}
static inline Mask above(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
static inline Mask equal(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
static inline Vec select(Mask m, Vec yes, Vec no) { return _mm256_blendv_ps(no, yes, m); }
static inline Mask either(Mask a, Mask b) { return _mm256_or_ps(a, b); }
static inline Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
static inline Mask without(Mask a, Mask b) { return _mm256_andnot_ps(b, a); }
static inline Vec interleave_low(Vec a, Vec b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
}
static inline Vec interleave_high(Vec a, Vec b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
}
static inline Vec even_lanes(Vec a, Vec b) {
    const __m256 mixed = _mm256_shuffle_ps(a, b, 0x88);
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xD8));
}
static inline float sum(Vec v) {
    alignas(32) float a[8];
    _mm256_store_ps(a, v);
    return ((a[0] + a[4]) + (a[1] + a[5])) + ((a[2] + a[6]) + (a[3] + a[7]));
}

#else

constexpr int kLanes = 4;
typedef float Vec __attribute__((vector_size(16)));
typedef int32_t Mask __attribute__((vector_size(16)));

static inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
static inline void stream(void* p, Vec v) { std::memcpy(p, &v, sizeof v); }
static inline void stream_line(void* to, const void* from) { std::memcpy(to, from, 64); }
static inline Vec splat(float a) { return Vec{a, a, a, a}; }
static inline Vec load_four(const float* p) { return load(p); }
template <int K>
static inline Vec splat_of_four(Vec four) {
    return splat(four[K]);
}
static inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
static inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
static inline Vec smaller(Vec a, Vec b) { return a < b ? a : b; }
static inline Mask mask_of(uint32_t bits) {
    const Mask bit = {1, 2, 4, 8};
    const int32_t all = static_cast<int32_t>(bits);
    return (Mask{all, all, all, all} & bit) == bit;
}
static inline Vec keep(Mask m, Vec v) {
    Mask raw;
    std::memcpy(&raw, &v, sizeof raw);
    raw &= m;
    std::memcpy(&v, &raw, sizeof v);
    return v;
}
static inline Vec load_where(Mask m, const float* p) { return keep(m, load(p)); }
static inline float sum(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
static inline void store_first(float* p, Vec v, int64_t n) { std::memcpy(p, &v, sizeof(float) * static_cast<size_t>(n)); }
static inline void store_lanes(float* p, Vec v, uint32_t lanes) {
    for (int i = 0; i < kLanes; ++i)
        if (lanes >> i & 1) p[i] = v[i];
}
static inline Vec load_lanes(const float* p, uint32_t lanes) {
    Vec v = {0, 0, 0, 0};
    for (int i = 0; i < kLanes; ++i)
        if (lanes >> i & 1) v[i] = p[i];
    return v;
}
static inline Mask above(Vec a, Vec b) { return a > b; }
static inline Mask equal(Vec a, Vec b) { return a == b; }
static inline Vec select(Mask m, Vec yes, Vec no) { return m ? yes : no; }
static inline Mask either(Mask a, Mask b) { return a | b; }
static inline Mask both(Mask a, Mask b) { return a & b; }
static inline Mask without(Mask a, Mask b) { return a & ~b; }
static inline Vec interleave_low(Vec a, Vec b) { return Vec{a[0], b[0], a[1], b[1]}; }
static inline Vec interleave_high(Vec a, Vec b) { return Vec{a[2], b[2], a[3], b[3]}; }
static inline Vec even_lanes(Vec a, Vec b) { return Vec{a[0], a[2], b[0], b[2]}; }

#endif

template <typename T>
static inline __attribute__((always_inline)) void prefetch(const T* p, int64_t n) {
    constexpr int64_t line = 64 / sizeof(T);
    for (int64_t i = 0; i < n; i += line) __builtin_prefetch(p + i, 0, 3);
}

static inline Vec better(Vec a, Vec b, bool largest) { return largest ? larger(a, b) : smaller(a, b); }

static inline Vec zero() { return splat(0.0f); }

// A number that is known when the kernels are compiled.
template <int N>
struct Count {
    static constexpr int value = N;
};

// body(Count<n>{}) for n = vectors, from 1 to Most.
template <int Most, typename Body>
static inline __attribute__((always_inline)) void with_count(int vectors, const Body& body) {
    if constexpr (Most > 1) {
        if (vectors < Most) return with_count<Most - 1>(vectors, body);
    }
    body(Count<Most>{});
}

// Producer's norm and leaky ReLU on the way in: max(y, slope * y) with y = scale * v + offset, 0 <= slope <= 1.
static inline Vec activate(Vec v, Vec scale, Vec offset, Vec slope) {
    const Vec y = fma(v, scale, offset);
    return larger(y, y * slope);
}

}  // namespace E2E_NAMESPACE
