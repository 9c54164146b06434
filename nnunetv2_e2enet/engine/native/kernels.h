// The kernels, written once over a vector type; each kernels_*.cpp includes this file for one instruction set.
//
// Nothing of the standard library but plain C headers may be used here: an inline function that the linker shares between
// variants would run on a CPU that lacks its instructions.
#pragma once

#include "core.h"
#include "rows.h"
#include "vec.h"
#include "winograd.h"

namespace E2E_NAMESPACE {

using e2e::Channel;
using e2e::Grid;
using e2e::kDenseRows;
using e2e::kMaxVectors;
using e2e::kPhases;
using e2e::kPoints;
using e2e::SparseRows;
using e2e::Statistics;

// ---- products -------------------------------------------------------------------------------------------------------

template <int N>
static inline void multiply_add(const float* row, float weight, Vec* acc) {
    const Vec w = splat(weight);
    for (int i = 0; i < N; ++i) acc[i] = fma(w, load(row + i * kLanes), acc[i]);
}

// Two connections at a time: their accumulators do not wait for each other.
template <int N>
static void sparse_rows(const float* v, float* m, const SparseRows& rows, const float* weight, bool add) {
    constexpr int64_t tiles = N * kLanes;
    for (int32_t r = 0; r < rows.rows; ++r) {
        float* target = m + rows.output[r] * tiles;
        Vec a[N], b[N];
        for (int i = 0; i < N; ++i) {
            a[i] = add ? load(target + i * kLanes) : zero();
            b[i] = zero();
        }
        int32_t e = rows.start[r];
        const int32_t end = rows.start[r + 1];
        for (; e + 1 < end; e += 2) {
            multiply_add<N>(v + rows.index[e] * tiles, weight[e], a);
            multiply_add<N>(v + rows.index[e + 1] * tiles, weight[e + 1], b);
        }
        if (e < end) multiply_add<N>(v + rows.index[e] * tiles, weight[e], a);
        for (int i = 0; i < N; ++i) store(target + i * kLanes, a[i] + b[i]);
    }
}

static void sparse_product(const float* v, float* m, const SparseRows& rows, const float* weight, int vectors, bool add) {
    switch (vectors) {
        case 1: return sparse_rows<1>(v, m, rows, weight, add);
        case 2: return sparse_rows<2>(v, m, rows, weight, add);
        case 3: return sparse_rows<3>(v, m, rows, weight, add);
        case 4: return sparse_rows<4>(v, m, rows, weight, add);
        default: return sparse_rows<5>(v, m, rows, weight, add);
    }
}

template <int N>
static void dense_rows(const float* const* v, int taps, int inputs, const float* weight, float* m, int outputs, int tiles) {
    Vec acc[kDenseRows][N];
    for (auto& row : acc)
        for (auto& a : row) a = zero();
    for (int t = 0; t < taps; ++t) {
        const float* in = v[t];
        for (int c = 0; c < inputs; ++c, in += tiles, weight += kDenseRows) {
            Vec x[N];
            for (int i = 0; i < N; ++i) x[i] = load(in + i * kLanes);
            for (int r = 0; r < kDenseRows; ++r) {
                const Vec w = splat(weight[r]);
                for (int i = 0; i < N; ++i) acc[r][i] = fma(w, x[i], acc[r][i]);
            }
        }
    }
    for (int r = 0; r < kDenseRows; ++r)
        if (r < outputs)
            for (int i = 0; i < N; ++i) store(m + static_cast<int64_t>(r) * tiles + i * kLanes, acc[r][i]);
}

static void dense_product(const float* const* v, int taps, int inputs, const float* weight, int first_group, int last_group,
                          int outputs, float* m, int vectors) {
    constexpr int kWidth = E2E_ISA == 512 ? 4 : 2;  // as many vectors as the registers hold beside kDenseRows weights
    const int tiles = vectors * kLanes;
    const float* shifted[16];
    for (int g = first_group; g < last_group; ++g) {
        const float* w = weight + static_cast<int64_t>(g) * taps * inputs * kDenseRows;
        const int left = outputs - g * kDenseRows;
        float* target = m + static_cast<int64_t>(g) * kDenseRows * tiles;
        for (int i = 0; i < vectors; i += kWidth) {
            for (int t = 0; t < taps; ++t) shifted[t] = v[t] + i * kLanes;
            const int n = vectors - i < kWidth ? vectors - i : kWidth;
            if (n == 1) dense_rows<1>(shifted, taps, inputs, w, target + i * kLanes, left, tiles);
            if (n == 2) dense_rows<2>(shifted, taps, inputs, w, target + i * kLanes, left, tiles);
            if (n == 3) dense_rows<3>(shifted, taps, inputs, w, target + i * kLanes, left, tiles);
            if (n == 4) dense_rows<4>(shifted, taps, inputs, w, target + i * kLanes, left, tiles);
        }
    }
}

template <int S, int N>
static inline void upsample_rows(const float* e, const SparseRows& rows, int first_row, int last_row, const float* weight,
                                 int subs, int64_t e_pitch, int first_tile, int tiles, float* const* out) {
    for (int r = first_row; r < last_row; ++r) {
        Vec acc[S][N];
        for (auto& row : acc)
            for (auto& a : row) a = zero();
        for (int32_t c = rows.start[r]; c < rows.start[r + 1]; ++c) {
            const float* in = e + rows.index[c] * e_pitch + first_tile;
            const float* w = weight + static_cast<int64_t>(c) * subs;
            Vec x[N];
            for (int i = 0; i < N; ++i) x[i] = load(in + i * kLanes);
            for (int s = 0; s < S; ++s)
                for (int i = 0; i < N; ++i) acc[s][i] = fma(splat(w[s]), x[i], acc[s][i]);
        }
        for (int s = 0; s < S; ++s) {
            float* target = out[s] + rows.output[r] * e2e::kChannel + first_tile;
            for (int i = 0; i < N; ++i) {
                const int left = tiles - first_tile - i * kLanes;
                if (left > 0) store_up_to(target + i * kLanes, acc[s][i], left);
            }
        }
    }
}

template <int S>
static inline void upsample_subs(const float* e, const SparseRows& rows, int first_row, int last_row, const float* weight,
                                 int subs, int64_t pitch, int tiles, float* const* out) {
    const int vectors = (tiles + kLanes - 1) / kLanes;
    for (int i = 0; i < vectors;) {
        const int left = vectors - i, at = i * kLanes;
        const int n = E2E_ISA != 512 ? (left < 2 ? left : 2) : left == 5 ? 3 : left < 4 ? left : 4;
        if (n == 1) upsample_rows<S, 1>(e, rows, first_row, last_row, weight, subs, pitch, at, tiles, out);
        if (n == 2) upsample_rows<S, 2>(e, rows, first_row, last_row, weight, subs, pitch, at, tiles, out);
        if (n == 3) upsample_rows<S, 3>(e, rows, first_row, last_row, weight, subs, pitch, at, tiles, out);
        if (n == 4) upsample_rows<S, 4>(e, rows, first_row, last_row, weight, subs, pitch, at, tiles, out);
        i += n;
    }
}

static void upsample_product(const float* e, const SparseRows& rows, int first_row, int last_row, const float* weight,
                             int subs, int64_t pitch, int tiles, float* const* out) {
    for (int s = 0; s < subs;) {
        const int n = subs - s >= 4 ? 4 : subs - s >= 2 ? 2 : 1;
        if (n == 4) upsample_subs<4>(e, rows, first_row, last_row, weight + s, subs, pitch, tiles, out + s);
        if (n == 2) upsample_subs<2>(e, rows, first_row, last_row, weight + s, subs, pitch, tiles, out + s);
        if (n == 1) upsample_subs<1>(e, rows, first_row, last_row, weight + s, subs, pitch, tiles, out + s);
        s += n;
    }
}

static const e2e::Kernels kTable = {
    kLanes,       input_transform,  sparse_product, dense_product,  output_transform, store_phase,
    upsample_product, activate_row, expand, pool_row, pixels_row,
};

}  // namespace E2E_NAMESPACE
