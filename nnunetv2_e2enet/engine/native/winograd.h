// Winograd's F(4 x 4, 3 x 3) in the plane: transforms of input and output tiles, one tile a vector lane.
#pragma once

#include "core.h"
#include "fetch.h"
#include "phase.h"
#include "pixel.h"

namespace E2E_NAMESPACE {

constexpr float kNear2 = e2e::kNear * e2e::kNear, kNear3 = kNear2 * e2e::kNear;
constexpr float kFar2 = e2e::kFar * e2e::kFar, kFar3 = kFar2 * e2e::kFar;

// One column of B^T d: its four rows in the middle, which need no neighbours above and below, and the first and the last.
static inline void transform_in_middle(const Vec d[4], Vec o[4]) {
    const Vec near = splat(e2e::kNear), far = splat(e2e::kFar), near2 = splat(kNear2), far2 = splat(kFar2);
    const Vec even = d[3] - far2 * d[1], odd = d[2] - far2 * d[0];
    const Vec even_far = d[3] - near2 * d[1], odd_far = d[2] - near2 * d[0];
    o[0] = fma(near, odd, even);
    o[1] = even - near * odd;
    o[2] = fma(far, odd_far, even_far);
    o[3] = even_far - far * odd_far;
}

static inline Vec transform_in_end(Vec first, Vec middle, Vec last) {
    return fma(splat(kNear2 * kFar2), first, last - splat(kNear2 + kFar2) * middle);
}

static inline void transform_in(const Vec d[6], Vec o[6]) {
    o[0] = transform_in_end(d[0], d[2], d[4]);
    transform_in_middle(d + 1, o + 1);
    o[5] = transform_in_end(d[1], d[3], d[5]);
}

// One column of A^T m.
static inline void transform_out(const Vec m[6], Vec o[4]) {
    const Vec a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], d = m[3] - m[4];
    o[0] = m[0] + a + c;
    o[1] = fma(splat(e2e::kFar), d, splat(e2e::kNear) * b);
    o[2] = fma(splat(kFar2), c, splat(kNear2) * a);
    o[3] = fma(splat(kFar3), d, fma(splat(kNear3), b, m[5]));
}

// All columns; the rows of A^T m A are left to do.
static inline void columns_out(const float* m, int64_t m_pitch, Vec half[4][6]) {
    for (int j = 0; j < 6; ++j) {
        Vec column[6], o[4];
        for (int k = 0; k < 6; ++k) column[k] = load(m + (k * 6 + j) * m_pitch);
        transform_out(column, o);
        for (int k = 0; k < 4; ++k) half[k][j] = o[k];
    }
}

static inline void load_row(const float (*row)[kWindowVectors * kLanes], int lane, Mask left, Mask right, Vec d[6]) {
    d[0] = load_where(left, row[3] + lane - 1);
    for (int j = 0; j < e2e::kTile; ++j) d[j + 1] = load(row[j] + lane);
    d[5] = load_where(right, row[0] + lane + 1);
}

static inline void load_row(const float (*row)[kWindowVectors * kLanes], int lane, Mask own, Mask left, Mask right, Vec d[6]) {
    d[0] = load_where(left, row[3] + lane - 1);
    for (int j = 0; j < e2e::kTile; ++j) d[j + 1] = load_where(own, row[j] + lane);
    d[5] = load_where(right, row[0] + lane + 1);
}

static inline void store_row(const Vec half[6], float* v, int64_t v_pitch) {
    Vec o[6];
    transform_in(half, o);
    for (int j = 0; j < 6; ++j) store(v + j * v_pitch, o[j]);
}

// In two parts, for the sake of registers: the four rows in the middle, then the first and the last.
static inline void transform_window(const BlockWindow& window, const int skip[3], int lane, const Neighbours& has, float* v,
                                    int64_t v_pitch) {
    Vec d[6][6], half[6][6];
    for (int i = 0; i < e2e::kTile; ++i) load_row(window[i + 1], skip[1] + lane, has.left, has.right, d[i + 1]);
    for (int j = 0; j < 6; ++j) {
        const Vec in[4] = {d[1][j], d[2][j], d[3][j], d[4][j]};
        Vec o[4];
        transform_in_middle(in, o);
        for (int i = 0; i < 4; ++i) half[i + 1][j] = o[i];
    }
    for (int i = 1; i < 5; ++i) store_row(half[i], v + i * 6 * v_pitch, v_pitch);
    load_row(window[0], skip[0] + lane, has.above, has.above_left, has.above_right, d[0]);
    load_row(window[5], skip[2] + lane, has.below, has.below_left, has.below_right, d[5]);
    for (int j = 0; j < 6; ++j) {
        half[0][j] = transform_in_end(d[0][j], d[2][j], d[4][j]);
        half[5][j] = transform_in_end(d[1][j], d[3][j], d[5][j]);
    }
    for (int i = 0; i < 6; i += 5) store_row(half[i], v + i * 6 * v_pitch, v_pitch);
}

// A^T's transpose, column by column: where the gradient of an output tile goes in the Winograd domain.
static inline void transform_back(const Vec d[4], Vec o[6]) {
    const Vec even = fma(splat(kNear2), d[2], d[0]), odd = fma(splat(kNear3), d[3], splat(e2e::kNear) * d[1]);
    const Vec even_far = fma(splat(kFar2), d[2], d[0]), odd_far = fma(splat(kFar3), d[3], splat(e2e::kFar) * d[1]);
    o[0] = d[0];
    o[1] = even + odd;
    o[2] = even - odd;
    o[3] = even_far + odd_far;
    o[4] = even_far - odd_far;
    o[5] = d[3];
}

static inline void transform_gradient(const BlockWindow& window, int lane, float* m, int64_t m_pitch) {
    Vec half[6][4];
    for (int j = 0; j < e2e::kTile; ++j) {
        Vec d[4], o[6];
        for (int i = 0; i < e2e::kTile; ++i) d[i] = load(window[i + 1][j] + lane);
        transform_back(d, o);
        for (int i = 0; i < 6; ++i) half[i][j] = o[i];
    }
    for (int i = 0; i < 6; ++i) {
        Vec o[6];
        transform_back(half[i], o);
        for (int j = 0; j < 6; ++j) store(m + (i * 6 + j) * m_pitch, o[j]);
    }
}

constexpr int kSoon = 4;  // channels between asking for memory and reading it

// Transformed inputs of a block, or with Gradient those of a conv's gradient (unless v is null) and A y A^T besides.
template <bool Gradient>
static inline void transform_block(const e2e::Channel* channels, int n, const e2e::Grid& grid, int64_t first, int vectors,
                                   float* v, int64_t v_pitch, float* m, int64_t m_pitch) {
    const int64_t tiles = static_cast<int64_t>(vectors) * kLanes;
    Neighbours neighbours[kBlockVectors];
    for (int i = 0; i < vectors; ++i) neighbours[i].look(grid, first + i * kLanes);
    // A channel is transformed after the next has been fetched: what was just stored cannot be loaded across its vectors yet.
    Reach reach[2];
    const Reach *its = nullptr, *last = nullptr;
    alignas(64) BlockWindow windows[2];
    for (int c = 0; c <= n; ++c, last = its) {
        if (c < n) {
            const e2e::Channel& channel = channels[c];
            if (c == 0 || !same_reach(channel, channels[c - 1])) {
                Reach& other = its == &reach[0] ? reach[1] : reach[0];
                other.look(grid, first, tiles, channel);
                its = &other;
            }
            if (Gradient) {
                its->fetch<Source::kGradient>(channel, windows[c % 2]);
            } else if (channel.slope == 1.0f && channel.scale == 1.0f && channel.offset == 0.0f) {
                its->fetch<Source::kFinal>(channel, windows[c % 2]);
            } else {
                its->fetch<Source::kRaw>(channel, windows[c % 2]);
            }
        }
        if (c == 0) continue;
        const int soon = c - 1 + kSoon;
        for (int i = 0; i < vectors; ++i) {
            const int64_t at = (c - 1) * tiles + i * kLanes;
            prefetch_ahead<Gradient>(channels[soon % n], grid, first + soon / n * tiles, i);
            if (Gradient) transform_gradient(windows[(c - 1) % 2], last->skip[1] + i * kLanes, m + at, m_pitch);
            if (Gradient && !v) continue;
            if (last->any) {
                transform_window(windows[(c - 1) % 2], last->skip, i * kLanes, neighbours[i], v + at, v_pitch);
            } else {
                for (int p = 0; p < e2e::kPoints; ++p) store(v + at + p * v_pitch, zero());
            }
        }
    }
}

static void input_transform(const e2e::Channel* channels, int n, const e2e::Grid& grid, int64_t first, int vectors, float* v,
                            int64_t v_pitch) {
    transform_block<false>(channels, n, grid, first, vectors, v, v_pitch, nullptr, 0);
}

static inline void store_halved(const Vec y[4][4], bool largest, Pixel* to) {
    for (int q = 0; q < 4; ++q) {
        const Vec *above = y[q / 2 * 2] + q % 2 * 2, *below = y[q / 2 * 2 + 1] + q % 2 * 2;
        const Vec best = better(better(above[0], above[1], largest), better(below[0], below[1], largest), largest);
        store(to + q * e2e::kChunk, best);
    }
}

static void output_transform(const float* m, int64_t m_pitch, int first_output, int last_output, const e2e::Grid& grid,
                             int64_t first, int vectors, e2e::Pixels* out, const e2e::Halved& halved, bool bypass,
                             e2e::Statistics* statistics) {
    const int64_t tiles = static_cast<int64_t>(vectors) * kLanes;
    uint32_t bits[kBlockVectors][e2e::kPhases];
    bool whole[kBlockVectors];
    int64_t count = 0, count_of_first = 0;
    for (int i = 0; i < vectors; ++i) {
        const LaneBits lanes(grid, first + i * kLanes);
        whole[i] = true;
        for (int q = 0; q < e2e::kPhases; ++q) {
            bits[i][q] = lanes.row[q / 4] & lanes.column[q % 4] & bits_between(first + i * kLanes, 0, grid.tiles);
            whole[i] = whole[i] && bits[i][q] == kAllLanes;
            count += __builtin_popcount(bits[i][q]);
        }
        if (i == 0) count_of_first = count;
    }
    alignas(64) Pixel block[e2e::kPhases][(kBlockVectors + 1) * kLanes];
    for (int o = first_output; o < last_output; ++o) {
        e2e::Statistics& s = statistics[o];
        Pixel* channel = static_cast<Pixel*>(out) + o * e2e::kChannel;
        Vec total = zero(), square = zero(), center = zero();
        for (int i = 0; i < vectors; ++i) {
            Vec half[4][6], y[4][4];
            columns_out(m + o * tiles + i * kLanes, m_pitch, half);
            for (int k = 0; k < 4; ++k) transform_out(half[k], y[k]);
            if (i == 0) {
                if (!s.started) {
                    Vec first_pixels = zero();
                    for (int q = 0; q < e2e::kPhases; ++q)
                        first_pixels = first_pixels + keep(mask_of(bits[0][q]), y[q / 4][q % 4]);
                    start_statistics(s, first_pixels, count_of_first);
                }
                center = splat(s.center);
            }
            if (halved.data)
                store_halved(y, halved.gamma[o] >= 0,
                             static_cast<Pixel*>(halved.data) + o * e2e::kHalvedChannel +
                                 e2e::place(first + i * kLanes, halved.chunk));
            Pixel* target = channel + e2e::place(first + i * kLanes, grid.chunk);
            for (int q = 0; q < e2e::kPhases; ++q) {
                const Vec pixel = y[q / 4][q % 4];
                Vec difference = pixel - center;
                if (!whole[i]) difference = keep(mask_of(bits[i][q]), difference);
                total = total + difference;
                square = fma(difference, difference, square);
                if (bypass && kVectorIsLine) {
                    stream(target + q * e2e::kChunk, pixel);
                } else {
                    store(bypass ? block[q] + i * kLanes : target + q * e2e::kChunk, pixel);
                }
            }
        }
        if (bypass && !kVectorIsLine)
            for (int q = 0; q < e2e::kPhases; ++q) stream_phase(block[q], first, vectors, channel + q * e2e::kChunk, grid.chunk);
        s.sum += sum(total);
        s.square += sum(square);
        s.count += count;
    }
}

}  // namespace E2E_NAMESPACE
