// What a pixel of a stored map is: a float, or with E2E_FLOAT16 a half that is widened on the way in and rounded to the nearest
// (ties to even) on the way out.
#pragma once

#include "core.h"
#include "half.h"
#include "vec.h"

namespace E2E_NAMESPACE {

#ifndef E2E_FLOAT16

using Pixel = float;
static inline float value_of(Pixel pixel) { return pixel; }

#else

using Pixel = e2e::Half;

#if E2E_ISA == 512

static inline Vec load(const Pixel* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
static inline __m256i narrow(Vec v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline void store(Pixel* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v)); }
static inline void store_lanes(Pixel* p, Vec v, uint32_t lanes) { _mm256_mask_storeu_epi16(p, mask_of(lanes), narrow(v)); }
static inline void store_first(Pixel* p, Vec v, int64_t n) { store_lanes(p, v, (1u << n) - 1); }
static inline Vec load_lanes(const Pixel* p, uint32_t lanes) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask_of(lanes), p)); }

#else

#if E2E_ISA == 256

static inline Vec load(const Pixel* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
static inline void store(Pixel* p, Vec v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#else

static inline Vec load(const Pixel* p) {
    return Vec{e2e::widen(p[0]), e2e::widen(p[1]), e2e::widen(p[2]), e2e::widen(p[3])};
}
static inline void store(Pixel* p, Vec v) {
    for (int i = 0; i < kLanes; ++i) p[i] = e2e::narrow(v[i]);
}

#endif

static inline void store_lanes(Pixel* p, Vec v, uint32_t lanes) {
    if (lanes == (1u << kLanes) - 1) return store(p, v);
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
static inline Vec load_lanes(const Pixel* p, uint32_t lanes) {
    Pixel all[kLanes] = {};
    for (int i = 0; i < kLanes; ++i)
        if (lanes >> i & 1) all[i] = p[i];
    return load(all);
}

#endif

static inline float value_of(Pixel pixel) { return e2e::widen(pixel); }

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
