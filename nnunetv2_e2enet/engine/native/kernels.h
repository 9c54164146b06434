// The kernels, written once over a vector type; each kernels_*.cpp includes this file for one instruction set.
//
// Nothing of the standard library but plain C headers may be used here: an inline function that the linker shares between
// variants would run on a CPU that lacks its instructions.
#pragma once

#include "core.h"
#include "gradient.h"
#include "lanes.h"
#include "phase.h"
#include "pixel.h"
#include "rows.h"
#include "winograd.h"

namespace E2E_NAMESPACE {

using e2e::Channel;
using e2e::Grid;
using e2e::kDenseRows;
using e2e::kPhases;
using e2e::kPoints;
using e2e::Pixels;
using e2e::SparseRows;
using e2e::Statistics;

// ---- products -------------------------------------------------------------------------------------------------------

template <int N>
static inline void multiply_add(const float* row, Vec weight, Vec* acc) {
    for (int i = 0; i < N; ++i) acc[i] = fma(weight, load(row + i * kLanes), acc[i]);
}

// Loads are what there is too little of: four weights are loaded at once, and the places of their inputs. Two sets of sums do
// not wait for each other; of many vectors one set is enough, and all that registers hold.
template <int N>
static void sparse_rows(const float* v, float* m, const SparseRows& rows, const float* weight, bool add) {
    constexpr int64_t tiles = N * kLanes;
    constexpr int kOther = N <= 5 ? 1 : 0;
    for (int32_t r = 0; r < rows.rows; ++r) {
        float* target = m + rows.output[r] * tiles;
        Vec sums[kOther + 1][N];
        for (int i = 0; i < N; ++i) {
            sums[kOther][i] = zero();
            sums[0][i] = add ? load(target + i * kLanes) : zero();
        }
        int32_t e = rows.start[r];
        const int32_t end = rows.start[r + 1];
        for (; e + 4 <= end; e += 4) {
            const Vec w = load_four(weight + e);
            uint16_t index[4];
            std::memcpy(index, rows.index + e, sizeof index);
            multiply_add<N>(v + index[0] * tiles, splat_of_four<0>(w), sums[0]);
            multiply_add<N>(v + index[1] * tiles, splat_of_four<1>(w), sums[kOther]);
            multiply_add<N>(v + index[2] * tiles, splat_of_four<2>(w), sums[0]);
            multiply_add<N>(v + index[3] * tiles, splat_of_four<3>(w), sums[kOther]);
        }
        for (; e + 2 <= end; e += 2) {
            multiply_add<N>(v + rows.index[e] * tiles, splat(weight[e]), sums[0]);
            multiply_add<N>(v + rows.index[e + 1] * tiles, splat(weight[e + 1]), sums[kOther]);
        }
        if (e < end) multiply_add<N>(v + rows.index[e] * tiles, splat(weight[e]), sums[0]);
        for (int i = 0; i < N; ++i) store(target + i * kLanes, kOther ? sums[0][i] + sums[kOther][i] : sums[0][i]);
    }
}

static void sparse_product(const float* v, float* m, const SparseRows& rows, const float* weight, int vectors, bool add) {
    with_count<kBlockVectors>(vectors, [&](auto n) { sparse_rows<n.value>(v, m, rows, weight, add); });
}

#if E2E_ISA == 512  // with fewer lanes, or registers, the sums of two points do not fit in them

// The same sums for two points at once, which share the places of inputs and what a row costs besides.
template <int N>
static void sparse_pair_rows(const float* v, float* m, int64_t pitch, const SparseRows& rows, const float* weight,
                             int64_t weight_pitch, bool add) {
    constexpr int64_t tiles = N * kLanes;
    for (int32_t r = 0; r < rows.rows; ++r) {
        float* target = m + rows.output[r] * tiles;
        Vec a[2][N], b[2][N];
        for (int p = 0; p < 2; ++p)
            for (int i = 0; i < N; ++i) {
                a[p][i] = add ? load(target + p * pitch + i * kLanes) : zero();
                b[p][i] = zero();
            }
        int32_t e = rows.start[r];
        const int32_t end = rows.start[r + 1];
        const float* second = weight + weight_pitch;
        for (; e + 2 <= end; e += 2) {
            const float *even = v + rows.index[e] * tiles, *odd = v + rows.index[e + 1] * tiles;
            multiply_add<N>(even, splat(weight[e]), a[0]);
            multiply_add<N>(odd, splat(weight[e + 1]), b[0]);
            multiply_add<N>(even + pitch, splat(second[e]), a[1]);
            multiply_add<N>(odd + pitch, splat(second[e + 1]), b[1]);
        }
        if (e < end) {
            const float* even = v + rows.index[e] * tiles;
            multiply_add<N>(even, splat(weight[e]), a[0]);
            multiply_add<N>(even + pitch, splat(second[e]), a[1]);
        }
        for (int p = 0; p < 2; ++p)
            for (int i = 0; i < N; ++i) store(target + p * pitch + i * kLanes, a[p][i] + b[p][i]);
    }
}

static void sparse_pair(const float* v, float* m, int64_t pitch, const SparseRows& rows, const float* weight,
                        int64_t weight_pitch, int vectors, bool add) {
    with_count<kBlockVectors>(
        vectors, [&](auto n) { sparse_pair_rows<n.value>(v, m, pitch, rows, weight, weight_pitch, add); });
}

#else

constexpr decltype(e2e::Kernels::sparse_pair) sparse_pair = nullptr;

#endif

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

static void dense_product(const float* const* v, int taps, int inputs, const float* weight, int outputs, float* m, int vectors) {
    constexpr int kWidth = E2E_ISA == 512 ? 4 : 2;  // as many vectors as the registers hold beside kDenseRows weights
    const int tiles = vectors * kLanes;
    const float* shifted[16];
    for (int g = 0; g * kDenseRows < outputs; ++g) {
        const float* w = weight + static_cast<int64_t>(g) * taps * inputs * kDenseRows;
        const int left = outputs - g * kDenseRows;
        float* target = m + static_cast<int64_t>(g) * kDenseRows * tiles;
        for (int i = 0; i < vectors; i += kWidth) {
            for (int t = 0; t < taps; ++t) shifted[t] = v[t] + i * kLanes;
            const int n = vectors - i < kWidth ? vectors - i : kWidth;
            with_count<kWidth>(
                n, [&](auto c) { dense_rows<c.value>(shifted, taps, inputs, w, target + i * kLanes, left, tiles); });
        }
    }
}

// ---- upsampling -------------------------------------------------------------------------------------------------------

constexpr int kUpsampleVectors = E2E_ISA == 512 ? 2 : 1;  // of coarse tiles in a block
constexpr int kUpsampleTiles = kUpsampleVectors * kLanes;

static void activate_block(const Pixels* tiles, float scale, float offset, float slope, float* pixels, int64_t pitch) {
    const Pixel* in = static_cast<const Pixel*>(tiles);
    const Vec a = splat(scale), b = splat(offset), s = splat(slope);
    for (int q = 0; q < kPhases; ++q)
        for (int i = 0; i < kUpsampleTiles; i += kLanes)
            store(pixels + q * pitch + i, activate(load(in + q * e2e::kChunk + i), a, b, s));
}

static inline void store_pieces(const e2e::UpsampleTask& task, int vector, Vec fine, Pixel* out) {
    for (const e2e::Piece* p = task.pieces + task.first_piece[vector]; p < task.pieces + task.first_piece[vector + 1]; ++p)
        store_lanes(out + p->offset, fine, p->lanes);
}

template <int Ways, int Subs>
static void upsample_rows(const e2e::UpsampleTask& task, const SparseRows& rows) {
    constexpr int N = kUpsampleVectors;
    for (int r = task.first_row; r < task.last_row; ++r) {
        Vec sums[Subs][Ways][N];
        for (int s = 0; s < Subs; ++s)
            for (int way = 0; way < Ways; ++way)
                for (int i = 0; i < N; ++i) sums[s][way][i] = zero();
        for (int32_t c = rows.start[r]; c < rows.start[r + 1]; ++c) {
            const float* weight = task.weight + static_cast<int64_t>(c) * Subs;
            Vec x[Ways][N];
            for (int way = 0; way < Ways; ++way)
                for (int i = 0; i < N; ++i) x[way][i] = load(task.pixels[way] + rows.index[c] * kUpsampleTiles + i * kLanes);
            for (int s = 0; s < Subs; ++s) {
                const Vec w = splat(weight[s]);
                for (int way = 0; way < Ways; ++way)
                    for (int i = 0; i < N; ++i) sums[s][way][i] = fma(w, x[way][i], sums[s][way][i]);
            }
        }
        // Unrolled, so that the sums stay in registers.
        const int64_t at = rows.output[r] * e2e::kChannel;
        #pragma GCC unroll 4
        for (int s = 0; s < Subs; ++s) {
            #pragma GCC unroll 2
            for (int i = 0; i < N; ++i) {
                const Vec a = sums[s][0][i], b = sums[s][Ways - 1][i];
                Pixel* out = static_cast<Pixel*>(task.out[s]) + at;
                store_pieces(task, Ways * i, Ways == 2 ? interleave_low(a, b) : a, out);
                if (Ways == 2) store_pieces(task, Ways * i + 1, interleave_high(a, b), out);
            }
        }
    }
}

static void upsample_product(const e2e::UpsampleTask& task, const SparseRows& rows) {
    if (task.ways == 2 && task.subs == 4) return upsample_rows<2, 4>(task, rows);
    if (task.ways == 2) return upsample_rows<2, 2>(task, rows);
    if (task.subs == 2) return upsample_rows<1, 2>(task, rows);
    return upsample_rows<1, 1>(task, rows);
}

static int64_t multiply_add_only(int64_t rounds) {
    constexpr int kChains = 12;
    Vec a[kChains];
    const Vec b = splat(0.999f), c = splat(1e-3f);
    #pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) a[i] = splat(static_cast<float>(i));
    for (int64_t k = 0; k < rounds; ++k) {
        #pragma GCC unroll 12
        for (int i = 0; i < kChains; ++i) a[i] = fma(a[i], b, c);
    }
    Vec total = a[0];
    #pragma GCC unroll 12
    for (int i = 1; i < kChains; ++i) total = total + a[i];
    return sum(total) > -1 ? rounds * kChains * kLanes : 0;  // so that nothing of it can be left out
}

static const e2e::Kernels kTable = {
    kLanes,      sizeof(Pixel), kBlockVectors, input_transform, sparse_product, sparse_pair, kDenseRows, 1, dense_product, output_transform,
    store_phase, kUpsampleTiles, activate_block,  upsample_product, gather,        pool,
    multiply_add_only, pixels_row,
    kDotRows, kDotColumns, gradient_transform, gradient_output, sparse_dots, dense_dots, norm_sums, norm_gradient, accumulate, add_pieces,
    E2E_FLOATS,
};

}  // namespace E2E_NAMESPACE
