// Rows of tiles on their way from one grid to another: strided, interleaved, pooled, normalised.
#pragma once

#include "core.h"
#include "pixel.h"

namespace E2E_NAMESPACE {

// p[0], p[stride], ...: whole vectors are read, memory around maps allows it.
static inline Vec load_strided(const Pixel* p, int stride) {
    if (stride == 1) return load(p);
    if (stride == 2) return even_lanes(load(p), load(p + kLanes));
    Pixel lanes[kLanes];
    for (int k = 0; k < kLanes; ++k) lanes[k] = p[k * stride];
    return load(lanes);
}

template <int Stride>  // 0: any
static inline void gather_strided(const Pixel* in, const e2e::Span* spans, int64_t n, int stride, float scale, float offset,
                                  float slope, float* out) {
    const Vec a = splat(scale), b = splat(offset), s = splat(slope);
    for (int64_t i = 0; i < n; ++i) {
        const e2e::Span& span = spans[i];
        const int step = Stride ? Stride : stride;
        for (int32_t k = 0; k < span.count; k += kLanes) {
            const Vec v = span.from < 0 ? zero() : activate(load_strided(in + span.from + k * step, step), a, b, s);
            store_up_to(out + span.to + k, v, span.count - k);
        }
    }
}

static void gather(const e2e::Pixels* pixels, const e2e::Span* spans, int64_t n, int stride, float scale, float offset,
                   float slope, float* out) {
    const Pixel* in = static_cast<const Pixel*>(pixels);
    if (stride == 1) return gather_strided<1>(in, spans, n, stride, scale, offset, slope, out);
    if (stride == 2) return gather_strided<2>(in, spans, n, stride, scale, offset, slope, out);
    gather_strided<0>(in, spans, n, stride, scale, offset, slope, out);
}

template <int Stride>  // 0: any
static inline void pool_strided(const Pixel* in, const e2e::Span* spans, int64_t n, const int64_t* further, int n_further,
                                int stride, bool largest, Pixel* out) {
    const int step = Stride ? Stride : stride;
    for (int64_t i = 0; i < n; ++i, further += n_further) {
        const e2e::Span& span = spans[i];
        for (int32_t k = 0; k < span.count; k += kLanes) {
            Vec best = load_strided(in + span.from + k * step, step);
            for (int j = 0; j < n_further; ++j) best = better(best, load_strided(in + further[j] + k * step, step), largest);
            store_up_to(out + span.to + k, best, span.count - k);
        }
    }
}

static void pool(const e2e::Pixels* pixels, const e2e::Span* spans, int64_t n, const int64_t* further, int n_further,
                 int stride, bool largest, e2e::Pixels* pooled) {
    const Pixel* in = static_cast<const Pixel*>(pixels);
    Pixel* out = static_cast<Pixel*>(pooled);
    if (stride == 1) return pool_strided<1>(in, spans, n, further, n_further, stride, largest, out);
    if (stride == 2) return pool_strided<2>(in, spans, n, further, n_further, stride, largest, out);
    pool_strided<0>(in, spans, n, further, n_further, stride, largest, out);
}

static void pixels_row(const float* in, int64_t in_stride, int64_t tiles, int64_t pixels, float* out) {
    const int64_t whole = pixels / e2e::kTile < tiles ? pixels / e2e::kTile : tiles;
    const float *a = in, *b = in + in_stride, *c = in + 2 * in_stride, *d = in + 3 * in_stride;
    for (int64_t k = 0; k < whole; ++k) {
        out[4 * k] = a[k];
        out[4 * k + 1] = b[k];
        out[4 * k + 2] = c[k];
        out[4 * k + 3] = d[k];
    }
    for (int64_t x = 4 * whole; x < pixels; ++x) out[x] = in[(x % 4) * in_stride + x / 4];
}

}  // namespace E2E_NAMESPACE
