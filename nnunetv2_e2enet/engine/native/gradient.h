// Kernels of the backward pass. Gradients of maps are floats, whatever maps are stored in.
#pragma once

#include "core.h"
#include "fetch.h"
#include "lanes.h"
#include "pixel.h"
#include "winograd.h"

namespace E2E_NAMESPACE {

static void gradient_transform(const e2e::Channel* channels, int n, const e2e::Grid& grid, int64_t first, int vectors, float* v,
                               int64_t v_pitch, float* m, int64_t m_pitch) {
    transform_block<true>(channels, n, grid, first, vectors, v, v_pitch, m, m_pitch);
}

// ---- sums over tiles --------------------------------------------------------------------------------------------------

// sums_of(v): the sum over the lanes of each of kLanes vectors, in their order.

#if E2E_ISA == 128

template <int N>
static inline void halve(Vec* v) {
    for (int i = 0; i < N; ++i) v[i] = interleave_low(v[i], v[i + N]) + interleave_high(v[i], v[i + N]);
    if constexpr (N > 1) halve<N / 2>(v);
}

static inline Vec sums_of(Vec* v) {
    halve<kLanes / 2>(v);
    return v[0];
}

#else  // within each 128 bits first, as crossing them takes longest

#if E2E_ISA == 512
#define E2E_VECTOR(name) _mm512_##name
#else
#define E2E_VECTOR(name) _mm256_##name
#endif

// 128 bits hold a part of the sums of four vectors then.
static inline Vec sums_of_four(const Vec* v) {
    const Vec a = E2E_VECTOR(unpacklo_ps)(v[0], v[1]) + E2E_VECTOR(unpackhi_ps)(v[0], v[1]);
    const Vec b = E2E_VECTOR(unpacklo_ps)(v[2], v[3]) + E2E_VECTOR(unpackhi_ps)(v[2], v[3]);
    return E2E_VECTOR(shuffle_ps)(a, b, 0x44) + E2E_VECTOR(shuffle_ps)(a, b, 0xee);
}

#if E2E_ISA == 512

static inline Vec pairs_of_both(Vec a, Vec b) { return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd); }

static inline Vec sums_of(const Vec* v) {
    const Vec first = pairs_of_both(sums_of_four(v), sums_of_four(v + 4));
    return pairs_of_both(first, pairs_of_both(sums_of_four(v + 8), sums_of_four(v + 12)));
}

#else

static inline Vec sums_of(const Vec* v) {
    const Vec a = sums_of_four(v), b = sums_of_four(v + 4);
    return _mm256_permute2f128_ps(a, b, 0x20) + _mm256_permute2f128_ps(a, b, 0x31);
}

#endif
#endif

constexpr int kHeld = E2E_ISA == 512 ? 8 : 4;  // vectors of an output map that registers hold beside the sums

// Connections e ... e + Count - 1, the last of which may be repeated.
template <int Segments, int N, int Count>
static inline void dots_of(const float* const* v, const Vec held[Segments][N], const uint16_t* index, int32_t n, float* sums) {
    Vec acc[kLanes];
    #pragma GCC unroll 16
    for (int k = 0; k < kLanes; ++k) acc[k] = zero();
    const auto row_of = [&](int k) { return static_cast<int64_t>(index[k < n ? k : n - 1]) * (N * kLanes); };
    if constexpr (Segments * N <= kHeld) {
        #pragma GCC unroll 16
        for (int k = 0; k < Count; ++k) {
            const int64_t row = row_of(k);
            for (int s = 0; s < Segments; ++s)
                for (int i = 0; i < N; ++i) acc[k] = fma(held[s][i], load(v[s] + row + i * kLanes), acc[k]);
        }
    } else {  // from memory, so each of them is loaded once for all sums
        const float* in[Count];
        #pragma GCC unroll 16
        for (int k = 0; k < Count; ++k) in[k] = v[0] + row_of(k);
        #pragma GCC unroll 8
        for (int i = 0; i < N; ++i) {
            #pragma GCC unroll 16
            for (int k = 0; k < Count; ++k) acc[k] = fma(held[0][i], load(in[k] + i * kLanes), acc[k]);
        }
    }
    store_up_to(sums, load_lanes(sums, (1u << n) - 1) + sums_of(acc), n);
}

template <int Segments, int N>
static inline void dots_of_rows(const float* const* v, const float* const* m, const e2e::SparseRows& rows, float* sums) {
    constexpr int kQuarter = kLanes / 4;
    for (int32_t r = 0; r < rows.rows; ++r) {
        int32_t e = rows.start[r];
        const int32_t end = rows.start[r + 1];
        if (e == end) continue;
        Vec held[Segments][N];
        for (int s = 0; s < Segments; ++s)
            for (int i = 0; i < N; ++i) held[s][i] = load(m[s] + static_cast<int64_t>(rows.output[r]) * (N * kLanes) + i * kLanes);
        for (; e + kLanes <= end; e += kLanes) dots_of<Segments, N, kLanes>(v, held, rows.index + e, kLanes, sums + e);
        const int32_t n = end - e;
        if (n > 3 * kQuarter) {
            dots_of<Segments, N, kLanes>(v, held, rows.index + e, n, sums + e);
        } else if (n > 2 * kQuarter) {
            dots_of<Segments, N, 3 * kQuarter>(v, held, rows.index + e, n, sums + e);
        } else if (n > kQuarter) {
            dots_of<Segments, N, 2 * kQuarter>(v, held, rows.index + e, n, sums + e);
        } else if (n > 0) {
            dots_of<Segments, N, kQuarter>(v, held, rows.index + e, n, sums + e);
        }
    }
}

template <int N>
static inline void dots_of_segments(const float* const* v, const float* const* m, int segments, const e2e::SparseRows& rows,
                                    float* sums) {
    constexpr int kTogether = kHeld / N > 0 ? kHeld / N : 1;
    int s = 0;
    for (; s + kTogether <= segments; s += kTogether) dots_of_rows<kTogether, N>(v + s, m + s, rows, sums);
    for (; s < segments; ++s) dots_of_rows<1, N>(v + s, m + s, rows, sums);
}

static void sparse_dots(const float* const* v, const float* const* m, int segments, const e2e::SparseRows& rows, float* sums,
                        int vectors) {
    with_count<kBlockVectors>(vectors, [&](auto n) { dots_of_segments<n.value>(v, m, segments, rows, sums); });
}

constexpr int kDotColumns = E2E_ISA == 512 ? 4 : 2;
constexpr int kDotRows = kLanes / kDotColumns;

static void dense_dots(const float* const* a, int rows, const float* const* b, int columns, int segments, float* sums,
                       int vectors) {
    const int64_t tiles = static_cast<int64_t>(vectors) * kLanes;
    for (int r = 0; r < rows; r += kDotRows) {
        for (int c = 0; c < columns; c += kDotColumns, sums += kLanes) {
            int64_t row[kDotRows], column[kDotColumns];
            for (int i = 0; i < kDotRows; ++i) row[i] = (r + i < rows ? r + i : rows - 1) * tiles;
            for (int j = 0; j < kDotColumns; ++j) column[j] = (c + j < columns ? c + j : columns - 1) * tiles;
            Vec acc[kLanes];
            #pragma GCC unroll 16
            for (int k = 0; k < kLanes; ++k) acc[k] = zero();
            for (int s = 0; s < segments; ++s) {
                for (int64_t t = 0; t < tiles; t += kLanes) {
                    Vec x[kDotRows], y[kDotColumns];
                    #pragma GCC unroll 4
                    for (int i = 0; i < kDotRows; ++i) x[i] = load(a[s] + row[i] + t);
                    #pragma GCC unroll 4
                    for (int j = 0; j < kDotColumns; ++j) y[j] = load(b[s] + column[j] + t);
                    #pragma GCC unroll 4
                    for (int i = 0; i < kDotRows; ++i) {
                        #pragma GCC unroll 4
                        for (int j = 0; j < kDotColumns; ++j) acc[i * kDotColumns + j] = fma(x[i], y[j], acc[i * kDotColumns + j]);
                    }
                }
            }
            store(sums, load(sums) + sums_of(acc));
        }
    }
}

// ---- gradients of maps ------------------------------------------------------------------------------------------------

// Lanes of a vector that go to a chunk, the first of them to `at`, at most two such pieces.
struct Landing {
    int64_t at[2];  // where lane 0 would lie
    uint32_t lanes[2];
    bool whole;

    Landing(int64_t tile, int64_t chunk, uint32_t valid) {
        const int64_t left = e2e::kChunk - (tile & (e2e::kChunk - 1));
        const uint32_t here = left >= kLanes ? kAllLanes : (1u << left) - 1;
        at[0] = e2e::place(tile, chunk);
        at[1] = left >= kLanes ? at[0] : e2e::place(tile + left, chunk) - left;
        lanes[0] = valid & here;
        lanes[1] = valid & ~here;
        whole = lanes[0] == kAllLanes;
    }
};

static inline void put(const Landing& landing, Vec v, float* to, bool add) {
    if (landing.whole) return store(to + landing.at[0], add ? v + load(to + landing.at[0]) : v);
    for (int i = 0; i < 2; ++i) {
        if (!landing.lanes[i]) continue;
        float* there = to + landing.at[i];
        store_lanes(there, add ? v + load_lanes(there, landing.lanes[i]) : v, landing.lanes[i]);
    }
}

constexpr int kLine = 64 / sizeof(float);

// Whether all pixels of the line that a vector goes to come from tiles first ... last - 1, so that it can be written past the
// caches. `there`: the vector's first tile; `moved`: how far it was moved.
static inline bool whole_line(int64_t there, int64_t moved, int64_t first, int64_t last) {
    const int64_t line = there / kLine * kLine - moved;
    return there % kLanes == 0 && line >= first && line + kLine <= last;
}

static void gradient_output(const float* m, int64_t m_pitch, const e2e::Target* targets, int n, int64_t first, int vectors) {
    const int64_t tiles = static_cast<int64_t>(vectors) * kLanes;
    alignas(64) float lines[e2e::kPhases][kLine];  // until they are whole
    for (int c = 0; c < n; ++c) {
        const e2e::Target& target = targets[c];
        float* data = target.data;
        if (!data) continue;
        for (int i = 0; i < vectors; ++i) {
            const int64_t tile = first + i * kLanes, there = tile + target.move;
            const Landing landing(there, target.chunk, bits_between(tile, target.lo, target.hi));
            if (!(landing.lanes[0] | landing.lanes[1])) continue;
            const bool bypass = target.bypass && whole_line(there, target.move, first > target.lo ? first : target.lo,
                                                            first + tiles < target.hi ? first + tiles : target.hi);
            Vec half[4][6], y[4];
            columns_out(m + c * tiles + i * kLanes, m_pitch, half);
            for (int k = 0; k < 4; ++k) {
                transform_out(half[k], y);
                for (int j = 0; j < 4; ++j) {
                    const int q = 4 * k + j;
                    if (!bypass) {
                        put(landing, y[j], data + q * e2e::kChunk, target.add);
                    } else if (kLanes == kLine) {
                        stream(data + q * e2e::kChunk + landing.at[0], y[j]);
                    } else {
                        store(lines[q] + there % kLine, y[j]);
                    }
                }
            }
            if (kLanes < kLine && bypass && there % kLine + kLanes == kLine) {
                float* line = data + landing.at[0] + kLanes - kLine;
                for (int q = 0; q < e2e::kPhases; ++q) stream_line(line + q * e2e::kChunk, lines[q]);
            }
        }
    }
}

static void accumulate(const float* from, int64_t n, float* to, bool add) {
    for (int64_t k = 0; k < n; k += kLanes) {
        const Vec v = load(from + k);
        store_up_to(to + k, add ? v + load(to + k) : v, n - k);
    }
}

static void add_pieces(const float* const* m, int ways, int first_channel, int last_channel, int vectors, const e2e::Piece* pieces,
                       const int* first_piece, float* out) {
    const int64_t tiles = static_cast<int64_t>(vectors) * kLanes;
    const auto add = [&](int vector, Vec fine, float* to) {
        for (const e2e::Piece* p = pieces + first_piece[vector]; p < pieces + first_piece[vector + 1]; ++p)
            store_lanes(to + p->offset, fine + load_lanes(to + p->offset, p->lanes), p->lanes);
    };
    for (int c = first_channel; c < last_channel; ++c) {
        float* to = out + static_cast<int64_t>(c) * e2e::kChannel;
        for (int i = 0; i < vectors; ++i) {
            const Vec a = load(m[0] + c * tiles + i * kLanes);
            if (ways == 1) {
                add(i, a, to);
                continue;
            }
            const Vec b = load(m[1] + c * tiles + i * kLanes);
            add(2 * i, interleave_low(a, b), to);
            add(2 * i + 1, interleave_high(a, b), to);
        }
    }
}

// ---- norm and activation ----------------------------------------------------------------------------------------------

static void norm_gradient(const e2e::Channel& channel, int64_t n, float* g) {
    const Pixel* raw = static_cast<const Pixel*>(channel.raw);
    const GradientOf gradient_of(channel);
    for (int64_t k = 0; k < n; k += kLanes) store(g + k, gradient_of(load(g + k), load(raw + k)));
}

constexpr int kChunkVectors = e2e::kChunk / kLanes;

// The pixels of a slice before, of whatever chunks.
static inline Vec load_tiles(const Pixel* channel, int64_t tile, int64_t chunk, int phase, uint32_t lanes) {
    const Landing from(tile, chunk, lanes);
    Vec v = zero();
    for (int i = 0; i < 2; ++i)
        if (from.lanes[i]) v = v + load_lanes(channel + phase * e2e::kChunk + from.at[i], from.lanes[i]);
    return v;
}

class Unpooling {
  public:
    Unpooling(const e2e::Unpooled& job, const e2e::Grid& grid, int64_t first) : job_(job), grid_(grid), first_(first) {}

    // Of one channel: the largest value and the gradient of each window of the chunk's tiles.
    void load_channel(int channel) {
        const Pixel* pooled = static_cast<const Pixel*>(job_.pooled) + static_cast<int64_t>(channel) * e2e::kChannel;
        const float* gradient = job_.gradient + static_cast<int64_t>(channel) * e2e::kChannel;
        const int windows = e2e::kPhases / (job_.height * job_.width);
        for (int64_t k = 0; k < job_.n_lines; ++k) {  // of the next channel
            __builtin_prefetch(pooled + e2e::kChannel + job_.lines[k], 0, 3);
            __builtin_prefetch(gradient + e2e::kChannel + job_.lines[k], 0, 3);
        }
        for (int64_t k = 0; k < windows * e2e::kChunk; ++k) {
            best_[k] = value_of(pooled[job_.places[k]]);
            gradient_[k] = gradient[job_.places[k]];
        }
    }

    // Adds to the gradients of a vector of tiles. The first of equal values counts, as in PyTorch.
    void add(int vector, const Pixel* raw_channel, const Pixel* raw, float* g) const {
        const int rows = e2e::kTile / job_.height, columns = e2e::kTile / job_.width;
        const uint32_t later = job_.later[vector];
        for (int w = 0; w < rows * columns; ++w) {
            const Vec best = load(best_ + w * e2e::kChunk + vector * kLanes);
            const Vec gradient = load(gradient_ + w * e2e::kChunk + vector * kLanes);
            const int corner = w / columns * job_.height * e2e::kTile + w % columns * job_.width;
            Mask taken = mask_of(0);
            if (later) {
                for (int p = 0; p < job_.height * job_.width; ++p) {
                    const int phase = corner + p / job_.width * e2e::kTile + p % job_.width;
                    const int64_t tile = first_ + vector * kLanes - grid_.slice;
                    const Vec before = load_tiles(raw_channel, tile, grid_.chunk, phase, later);
                    taken = either(taken, both(mask_of(later), equal(before, best)));
                }
            }
            for (int p = 0; p < job_.height * job_.width; ++p) {
                const int at = (corner + p / job_.width * e2e::kTile + p % job_.width) * e2e::kChunk;
                const Mask hit = without(equal(load(raw + at), best), taken);
                taken = either(taken, hit);
                store(g + at, load(g + at) + keep(hit, gradient));
            }
        }
    }

  private:
    const e2e::Unpooled& job_;
    const e2e::Grid& grid_;
    const int64_t first_;
    alignas(64) float best_[e2e::kPhases * e2e::kChunk], gradient_[e2e::kPhases * e2e::kChunk];
};

static void norm_sums(float* gradient, const e2e::Pixels* raw, int channels, const e2e::NormChannels& norm,
                      const e2e::Grid& grid, int64_t first, const e2e::Unpooled* unpooled, double* sums) {
    Mask valid[kChunkVectors][e2e::kPhases];
    bool whole[kChunkVectors];
    int vectors = 0;
    for (; vectors < kChunkVectors && first + vectors * kLanes < grid.tiles; ++vectors) {
        const int64_t tile = first + vectors * kLanes;
        const LaneBits lanes(grid, tile);
        whole[vectors] = true;
        for (int q = 0; q < e2e::kPhases; ++q) {
            const uint32_t bits = lanes.row[q / 4] & lanes.column[q % 4] & bits_between(tile, 0, grid.tiles);
            valid[vectors][q] = mask_of(bits);
            whole[vectors] = whole[vectors] && bits == kAllLanes;
        }
    }
    const e2e::Unpooled none{};
    Unpooling unpooling(unpooled ? *unpooled : none, grid, first);
    const int64_t there = e2e::place(first, grid.chunk);
    for (int c = 0; c < channels; ++c) {
        const Pixel* raw_channel = static_cast<const Pixel*>(raw) + static_cast<int64_t>(c) * e2e::kChannel;
        float* g_channel = gradient + static_cast<int64_t>(c) * e2e::kChannel + there;
        if (unpooled) unpooling.load_channel(c);
        const Vec scale = splat(norm.scale[c]), offset = splat(norm.offset[c]), mean = splat(norm.mean[c]);
        const Vec slope = splat(norm.slope);
        Vec total = zero(), product = zero();
        for (int i = 0; i < vectors; ++i) {
            const Pixel* r = raw_channel + there + i * kLanes;
            float* g = g_channel + i * kLanes;
            // The next channel, or the first of the next chunk, lies behind this one.
            prefetch(raw_channel + there + e2e::kChannel + i * kLanes * e2e::kPhases, kLanes * e2e::kPhases);
            prefetch(g_channel + e2e::kChannel + i * kLanes * e2e::kPhases, kLanes * e2e::kPhases);
            if (unpooled) unpooling.add(i, raw_channel, r, g);
            for (int q = 0; q < e2e::kPhases; ++q) {
                const Vec pixel = load(r + q * e2e::kChunk), own = load(g + q * e2e::kChunk);
                Vec before = select(above(fma(pixel, scale, offset), zero()), own, own * slope), distance = pixel - mean;
                if (!whole[i]) {
                    before = keep(valid[i][q], before);
                    distance = keep(valid[i][q], distance);
                }
                total = total + before;
                product = fma(before, distance, product);
            }
        }
        sums[2 * c] += static_cast<double>(sum(total));
        sums[2 * c + 1] += static_cast<double>(sum(product));
    }
}

}  // namespace E2E_NAMESPACE
