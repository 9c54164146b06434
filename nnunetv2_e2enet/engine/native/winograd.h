// Winograd's F(4 x 4, 3 x 3) in the plane: transforms of input and output tiles, one tile a vector lane.
#pragma once

#include "core.h"
#include "vec.h"

namespace E2E_NAMESPACE {

// One column of B^T d.
static inline void transform_in(const Vec d[6], Vec o[6]) {
    const Vec four = splat(4.0f), five = splat(5.0f), two = splat(2.0f);
    const Vec even = d[4] - four * d[2], odd = d[3] - four * d[1];
    const Vec even2 = d[4] - d[2], odd2 = two * (d[3] - d[1]);
    o[0] = fma(four, d[0], d[4] - five * d[2]);
    o[1] = even + odd;
    o[2] = even - odd;
    o[3] = even2 + odd2;
    o[4] = even2 - odd2;
    o[5] = fma(four, d[1], d[5] - five * d[3]);
}

// One column of A^T m.
static inline void transform_out(const Vec m[6], Vec o[4]) {
    const Vec a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], d = m[3] - m[4];
    o[0] = m[0] + a + c;
    o[1] = fma(splat(2.0f), d, b);
    o[2] = fma(splat(4.0f), c, a);
    o[3] = fma(splat(8.0f), d, b) + m[5];
}

// Bit l of each word: lane l's pixel lies in the plane, and its tile is one of the grid.
struct LaneBits {
    uint32_t row[6], column[6], tile;

    LaneBits(const e2e::Grid& grid, int64_t first) : row(), column(), tile(0) {
        int64_t f = first;
        int64_t in_slice = f % grid.slice;
        int64_t ty = in_slice / grid.tiles_x, tx = in_slice % grid.tiles_x;
        for (int lane = 0; lane < kLanes && f < grid.tiles; ++lane, ++f) {
            const uint32_t bit = 1u << lane;
            tile |= bit;
            for (int i = 0; i < 6; ++i) {
                const int64_t y = 4 * ty + i - 1, x = 4 * tx + i - 1;
                if (y >= 0 && y < grid.height) row[i] |= bit;
                if (x >= 0 && x < grid.width) column[i] |= bit;
            }
            if (++tx == grid.tiles_x) {
                tx = 0;
                if (++ty == grid.tiles_y) ty = 0;
            }
        }
    }
};

static inline uint32_t bits_between(int64_t first, int64_t lo, int64_t hi) {
    const uint32_t all = kLanes == 32 ? ~0u : (1u << kLanes) - 1;
    const int64_t from = lo - first, to = hi - first;
    if (from >= kLanes || to <= 0 || from >= to) return 0;
    const uint32_t below_to = to >= kLanes ? all : (1u << to) - 1;
    return from <= 0 ? below_to : below_to & ~((1u << from) - 1);
}

// Where a vector of tiles finds itself and its 8 neighbours (3 * row + column, itself in the middle) in a channel, and which
// of their pixels count. A neighbour's lanes may lie in two chunks.
struct Reach {
    int64_t place[9], next[9];  // of the first lane, and of the first lane as seen from the next chunk
    Mask in_next[9];
    Mask valid[e2e::kPoints];
    bool any;    // pixel counts
    bool split;  // a neighbour lies in two chunks
    bool split_center;

    void look(const e2e::Grid& grid, int64_t first, const e2e::Channel& channel) {
        const LaneBits bits(grid, first);
        const uint32_t here = bits.tile & bits_between(first, channel.lo, channel.hi);
        any = here != 0;
        split = split_center = false;
        if (!any) return;
        for (int p = 0; p < e2e::kPoints; ++p) valid[p] = mask_of(bits.row[p / 6] & bits.column[p % 6] & here);
        for (int n = 0; n < 9; ++n) {
            const int64_t tile = first + channel.move + (n / 3 - 1) * grid.tiles_x + n % 3 - 1;
            const int64_t left = e2e::kChunk - (tile & (e2e::kChunk - 1));  // lanes in this chunk
            const bool both = left < kLanes;
            place[n] = e2e::place(tile, channel.chunk);
            next[n] = both ? e2e::place(tile + left, channel.chunk) - left : place[n];
            in_next[n] = mask_of(both ? ~0u << left : 0u);
            split = split || both;
            if (n == 4) split_center = both;
        }
    }
};

// Split 0: no vector lies in two chunks, 1: some of neighbours do, 2: the tiles' own as well.
template <int Split, bool Final>
static inline void transform_tile_vector(const e2e::Channel& channel, const Reach& reach, float* v, int64_t v_pitch) {
    static constexpr int phase_of[6] = {3, 0, 1, 2, 3, 0}, side_of[6] = {0, 1, 1, 1, 1, 2};
    const Vec scale = splat(channel.scale), offset = splat(channel.offset), slope = splat(channel.slope);
    Vec half[6][6];
    for (int j = 0; j < 6; ++j) {
        Vec d[6], o[6];
        for (int i = 0; i < 6; ++i) {
            const int n = side_of[i] * 3 + side_of[j];
            const float* phase = channel.data + (phase_of[i] * e2e::kTile + phase_of[j]) * e2e::kChunk;
            Vec raw = load(phase + reach.place[n]);
            if (Split == 2 || (Split == 1 && n != 4)) raw = merge(reach.in_next[n], load(phase + reach.next[n]), raw);
            d[i] = keep(reach.valid[i * 6 + j], Final ? raw : activate(raw, scale, offset, slope));
        }
        transform_in(d, o);
        for (int i = 0; i < 6; ++i) half[i][j] = o[i];
    }
    for (int i = 0; i < 6; ++i) {
        Vec o[6];
        transform_in(half[i], o);
        for (int j = 0; j < 6; ++j) store(v + (i * 6 + j) * v_pitch, o[j]);
    }
}

// Memory is far away, and what a block needs of it is read in an order of its own: ask for the chunk after it line by line.
// (Always inline: GCC takes a function that only prefetches for one without effect, and drops the call.)
static inline __attribute__((always_inline)) void prefetch_ahead(const e2e::Channel& channel, const e2e::Grid& grid,
                                                                 int64_t first, int64_t tiles) {
    const int64_t chunks_ahead = (grid.tiles_x + e2e::kChunk - 1) / e2e::kChunk;  // the row of tiles below lies there
    const int64_t tile = first + channel.move + chunks_ahead * e2e::kChunk;
    if (tile - channel.move + e2e::kChunk <= channel.lo || tile - channel.move >= channel.hi) return;
    const int64_t lane = tile & (e2e::kChunk - 1);
    prefetch(channel.data + e2e::place(tile - lane, channel.chunk) + lane * e2e::kPhases, tiles * e2e::kPhases);
}

static inline bool same_reach(const e2e::Channel& a, const e2e::Channel& b) {
    return a.lo == b.lo && a.hi == b.hi && a.move == b.move && a.chunk == b.chunk;
}

template <bool Final>  // no norm is left to apply
static inline void transform_channel(const e2e::Channel& channel, const Reach* reach, int vectors, float* target,
                                     int64_t v_pitch) {
    for (int i = 0; i < vectors; ++i, target += kLanes) {
        if (!reach[i].any) {  // nothing of this channel's slice exists, not even memory to read
            for (int p = 0; p < e2e::kPoints; ++p) store(target + p * v_pitch, zero());
        } else if (reach[i].split_center) {
            transform_tile_vector<2, Final>(channel, reach[i], target, v_pitch);
        } else if (reach[i].split) {
            transform_tile_vector<1, Final>(channel, reach[i], target, v_pitch);
        } else {
            transform_tile_vector<0, Final>(channel, reach[i], target, v_pitch);
        }
    }
}

static void input_transform(const e2e::Channel* channels, int n, const e2e::Grid& grid, int64_t first, int vectors, float* v,
                            int64_t v_pitch) {
    Reach reach[e2e::kMaxVectors];
    const int64_t tiles = static_cast<int64_t>(vectors) * kLanes;
    for (int c = 0; c < n; ++c) {
        const e2e::Channel& channel = channels[c];
        prefetch_ahead(channel, grid, first, tiles);
        if (c == 0 || !same_reach(channel, channels[c - 1]))
            for (int i = 0; i < vectors; ++i) reach[i].look(grid, first + i * kLanes, channel);
        float* target = v + static_cast<int64_t>(c) * tiles;
        if (channel.slope == 1.0f && channel.scale == 1.0f && channel.offset == 0.0f) {
            transform_channel<true>(channel, reach, vectors, target, v_pitch);
        } else {
            transform_channel<false>(channel, reach, vectors, target, v_pitch);
        }
    }
}

static inline void start_statistics(e2e::Statistics& s, const float* pixel) {
    if (s.started) return;
    s.started = 1;
    s.center = *pixel;
}

static inline void store_halved(const Vec y[4][4], bool largest, float* to) {
    for (int q = 0; q < 4; ++q) {
        const Vec *above = y[q / 2 * 2] + q % 2 * 2, *below = y[q / 2 * 2 + 1] + q % 2 * 2;
        const Vec best = better(better(above[0], above[1], largest), better(below[0], below[1], largest), largest);
        store(to + q * e2e::kChunk, best);
    }
}

static void output_transform(const float* m, int64_t m_pitch, int first_output, int last_output, const e2e::Grid& grid,
                             int64_t first, int vectors, float* out, const e2e::Halved& halved, bool bypass,
                             e2e::Statistics* statistics) {
    const int64_t tiles = static_cast<int64_t>(vectors) * kLanes;
    const uint32_t all = (1u << kLanes) - 1;
    uint32_t bits[e2e::kMaxVectors][e2e::kPhases];
    bool whole[e2e::kMaxVectors];
    int64_t count = 0;
    for (int i = 0; i < vectors; ++i) {
        const LaneBits lanes(grid, first + i * kLanes);
        whole[i] = true;
        for (int q = 0; q < e2e::kPhases; ++q) {
            bits[i][q] = lanes.row[q / 4 + 1] & lanes.column[q % 4 + 1];
            whole[i] = whole[i] && bits[i][q] == all;
            count += __builtin_popcount(bits[i][q]);
        }
    }
    for (int o = first_output; o < last_output; ++o) {
        e2e::Statistics& s = statistics[o];
        Vec total = zero(), square = zero(), center = zero();
        for (int i = 0; i < vectors; ++i) {
            const float* at = m + o * tiles + i * kLanes;
            Vec half[4][6], y[4][4];
            for (int j = 0; j < 6; ++j) {
                Vec col[6], h[4];
                for (int k = 0; k < 6; ++k) col[k] = load(at + (k * 6 + j) * m_pitch);
                transform_out(col, h);
                for (int k = 0; k < 4; ++k) half[k][j] = h[k];
            }
            for (int k = 0; k < 4; ++k) transform_out(half[k], y[k]);
            if (i == 0) {
                float pixel[kLanes];
                store(pixel, y[0][0]);
                start_statistics(s, pixel);
                center = splat(s.center);
            }
            if (halved.data)
                store_halved(y, halved.gamma[o] >= 0,
                             halved.data + o * e2e::kHalvedChannel + e2e::place(first + i * kLanes, halved.chunk));
            float* target = out + o * e2e::kChannel + e2e::place(first + i * kLanes, grid.chunk);
            for (int q = 0; q < e2e::kPhases; ++q) {
                const Vec pixel = y[q / 4][q % 4];
                Vec difference = pixel - center;
                if (!whole[i]) difference = keep(mask_of(bits[i][q]), difference);
                total = total + difference;
                square = fma(difference, difference, square);
                if (bypass) {
                    stream(target + q * e2e::kChunk, pixel);
                } else {
                    store(target + q * e2e::kChunk, pixel);
                }
            }
        }
        s.sum += sum(total);
        s.square += sum(square);
        s.count += count;
    }
}

static void store_phase(const float* m, int outputs, const e2e::Grid& grid, int64_t first, int vectors, int phase, float* out,
                        e2e::Statistics* statistics) {
    const int64_t tiles = static_cast<int64_t>(vectors) * kLanes;
    Mask masks[e2e::kMaxVectors];
    int64_t count = 0;
    for (int i = 0; i < vectors; ++i) {
        const LaneBits lanes(grid, first + i * kLanes);
        const uint32_t bits = lanes.row[phase / 4 + 1] & lanes.column[phase % 4 + 1];
        masks[i] = mask_of(bits);
        count += __builtin_popcount(bits);
    }
    for (int o = 0; o < outputs; ++o) {
        e2e::Statistics& s = statistics[o];
        const float* at = m + o * tiles;
        float* target = out + o * e2e::kChannel + phase * e2e::kChunk;
        start_statistics(s, at);
        const Vec center = splat(s.center);
        Vec total = zero(), square = zero();
        for (int i = 0; i < vectors; ++i) {
            const Vec pixel = load(at + i * kLanes), difference = keep(masks[i], pixel - center);
            total = total + difference;
            square = fma(difference, difference, square);
            store(target + e2e::place(first + i * kLanes, grid.chunk), pixel);
        }
        s.sum += sum(total);
        s.square += sum(square);
        s.count += count;
    }
}

}  // namespace E2E_NAMESPACE
