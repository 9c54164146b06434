// Rows of tiles on their way from one grid to another: strided, interleaved, pooled, normalised.
#pragma once

#include "core.h"
#include "vec.h"

namespace E2E_NAMESPACE {

// Every second float of p, kLanes of them or the first n, without reading past the last.
static inline Vec load_even(const float* p, int64_t n) {
    if (2 * n > 2 * kLanes) n = kLanes;
    const int64_t floats = 2 * n - 1;
    const Vec low = load_up_to(p, floats);
    return even_lanes(low, floats > kLanes ? load_up_to(p + kLanes, floats - kLanes) : low);
}

static inline float activate(float v, float scale, float offset, float slope) {
    const float y = v * scale + offset;
    return y > y * slope ? y : y * slope;
}

static void activate_row(const float* in, int stride, int64_t n, float scale, float offset, float slope, float* out) {
    if (stride > 2) {
        for (int64_t k = 0; k < n; ++k) out[k] = activate(in[k * stride], scale, offset, slope);
        return;
    }
    const Vec a = splat(scale), b = splat(offset), s = splat(slope);
    for (int64_t k = 0; k < n; k += kLanes) {
        const Vec v = stride == 2 ? load_even(in + 2 * k, n - k) : load_up_to(in + k, n - k);
        store_up_to(out + k, activate(v, a, b, s), n - k);
    }
}

// out[ways * k + w] = activated in[w][k]
static inline void interleave_row(const float* const* in, int ways, int64_t n, float scale, float offset, float slope,
                                  float* out) {
    if (ways != 2) {
        for (int w = 0; w < ways; ++w)
            for (int64_t k = 0; k < n; ++k) out[k * ways + w] = activate(in[w][k], scale, offset, slope);
        return;
    }
    const Vec a = splat(scale), b = splat(offset), s = splat(slope);
    for (int64_t k = 0; k < n; k += kLanes) {
        const int64_t left = n - k;
        const Vec x = activate(load_up_to(in[0] + k, left), a, b, s), y = activate(load_up_to(in[1] + k, left), a, b, s);
        store_up_to(out + 2 * k, interleave_low(x, y), 2 * left);
        if (2 * left > kLanes) store_up_to(out + 2 * k + kLanes, interleave_high(x, y), 2 * left - kLanes);
    }
}

static void expand(const float* channel, int64_t chunk, const e2e::RowPiece* pieces, int64_t n, int ways, float scale,
                   float offset, float slope, float* out, int64_t pitch) {
    constexpr int kMaxWays = 4;
    const int across = e2e::kTile / ways;
    float row[e2e::kChunk + 2 * kMaxWays];
    for (int64_t i = 0; i < n; ++i) {
        const e2e::RowPiece& p = pieces[i];
        const bool fits = p.skip == 0 && p.n * ways == p.count;
        for (int u = 0; u < across; ++u) {
            const float* in[kMaxWays];
            for (int w = 0; w < ways; ++w)
                in[w] = channel + (p.row * e2e::kTile + across * w + u) * e2e::kChunk + e2e::place(p.tile, chunk);
            float* to = out + u * pitch + p.at;
            interleave_row(in, ways, p.n, scale, offset, slope, fits ? to : row);
            if (!fits) std::memcpy(to, row + p.skip, sizeof(float) * static_cast<size_t>(p.count));
        }
    }
}

static void pool_row(const float* const* in, int count, int stride, int64_t n, bool largest, float* out) {
    if (stride > 2) {
        for (int64_t k = 0; k < n; ++k) {
            float best = in[0][k * stride];
            for (int i = 1; i < count; ++i) {
                const float v = in[i][k * stride];
                if (largest ? v > best : v < best) best = v;
            }
            out[k] = best;
        }
        return;
    }
    for (int64_t k = 0; k < n; k += kLanes) {
        const int64_t left = n - k;
        Vec best = stride == 2 ? load_even(in[0] + 2 * k, left) : load_up_to(in[0] + k, left);
        for (int i = 1; i < count; ++i) {
            const Vec v = stride == 2 ? load_even(in[i] + 2 * k, left) : load_up_to(in[i] + k, left);
            best = better(best, v, largest);
        }
        store_up_to(out + k, best, left);
    }
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
