// Winograd's F(4 x 4, 3 x 3) in the plane: transforms of input and output tiles, one tile a vector lane.
#pragma once

#include "core.h"
#include "pixel.h"

namespace E2E_NAMESPACE {

// One column of B^T d: its four rows in the middle, which need no neighbours above and below, and the first and the last.
static inline void transform_in_middle(const Vec d[4], Vec o[4]) {
    const Vec two = splat(2.0f), four = splat(4.0f);
    const Vec even = d[3] - four * d[1], odd = d[2] - four * d[0], even2 = d[3] - d[1], odd2 = d[2] - d[0];
    o[0] = even + odd;
    o[1] = even - odd;
    o[2] = fma(two, odd2, even2);
    o[3] = even2 - two * odd2;
}

static inline Vec transform_in_end(Vec near, Vec middle, Vec far) {
    return fma(splat(4.0f), near, far - splat(5.0f) * middle);
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
    o[1] = fma(splat(2.0f), d, b);
    o[2] = fma(splat(4.0f), c, a);
    o[3] = fma(splat(8.0f), d, b) + m[5];
}

// Bit l of each word: of lane l's tile, which pixels lie in the plane, and which neighbours it has there.
struct LaneBits {
    uint32_t row[e2e::kTile], column[e2e::kTile], left, right, above, below;

    LaneBits(const e2e::Grid& grid, int64_t first) : row(), column(), left(0), right(0), above(0), below(0) {
        const int64_t in_slice = (first % grid.slice + grid.slice) % grid.slice;
        int64_t ty = in_slice / grid.tiles_x, tx = in_slice % grid.tiles_x;
        for (int lane = 0; lane < kLanes; ++lane) {
            const uint32_t bit = 1u << lane;
            for (int i = 0; i < e2e::kTile; ++i) {
                if (e2e::kTile * ty + i < grid.height) row[i] |= bit;
                if (e2e::kTile * tx + i < grid.width) column[i] |= bit;
            }
            if (tx > 0) left |= bit;
            if (ty > 0) above |= bit;
            if (tx + 1 < grid.tiles_x) right |= bit;
            if (ty + 1 < grid.tiles_y) below |= bit;
            if (++tx == grid.tiles_x) {
                tx = 0;
                if (++ty == grid.tiles_y) ty = 0;
            }
        }
    }
};

constexpr uint32_t kAllLanes = (1u << kLanes) - 1;

static inline uint32_t bits_between(int64_t first, int64_t lo, int64_t hi) {
    const int64_t from = lo - first, to = hi - first;
    if (from >= kLanes || to <= 0 || from >= to) return 0;
    const uint32_t below_to = to >= kLanes ? kAllLanes : (1u << to) - 1;
    return from <= 0 ? below_to : below_to & ~((1u << from) - 1);
}

constexpr int kBlockVectors = E2E_ISA == 256 ? 8 : 4;  // of tiles in a block, at most
constexpr int kWindowVectors = kBlockVectors + (E2E_ISA == 256 ? 2 : 3);  // rows an odd number of cache lines apart

// What a block of tiles needs of one channel: rows of pixels (the last of the tiles above, the tiles' own four, the first of the
// tiles below), and in each the pixels by their column in the tile, a tile a lane. Activated; zero outside the plane.
using Window = float[6][e2e::kTile][kWindowVectors * kLanes];

// What is left to do with stored pixels: nothing, norm and activation, or the backward pass of both.
enum class Source { kFinal, kRaw, kGradient };

template <Source>
struct Stored {
    using Type = Pixel;
};
template <>
struct Stored<Source::kGradient> {
    using Type = float;  // in all kernels
};

// The gradient of a conv's output from that of its activation.
struct GradientOf {
    const Vec scale, offset, slope, mean, by_raw, constant;
    explicit GradientOf(const e2e::Channel& c)
        : scale(splat(c.scale)), offset(splat(c.offset)), slope(splat(c.slope)), mean(splat(c.mean)), by_raw(splat(c.by_raw)),
          constant(splat(c.constant)) {}
    Vec operator()(Vec gradient, Vec raw) const {
        const Vec before = select(above(fma(raw, scale, offset), zero()), gradient, gradient * slope);
        return fma(before, scale, fma(raw - mean, by_raw, constant));
    }
};

// Where the pixels of a window lie, and which of them count; the same for all channels that move alike.
class Reach {
  public:
    // Tiles above, themselves, below: lanes in the window that come before the first.
    int skip[3];
    bool any;  // of the tiles themselves exists

    void look(const e2e::Grid& grid, int64_t first, int64_t tiles, const e2e::Channel& channel) {
        any = false;
        for (int g = 0; g < 3; ++g) {
            const int64_t begin = first + channel.move + (g - 1) * grid.tiles_x, end = begin + tiles;
            const int64_t base = (begin - 1) & ~int64_t{kLanes - 1};
            skip[g] = static_cast<int>(begin - base);
            counts_[g] = static_cast<int>((end - base) / kLanes) + 1;
            own_[g] = base + kLanes > begin ? 0 : 1;
            own_end_[g] = counts_[g] - (base + (counts_[g] - 1) * kLanes < end ? 0 : 1);
            whole_[g] = grid.height % e2e::kTile == 0 && grid.width % e2e::kTile == 0;
            const int64_t lo = channel.lo + channel.move, hi = channel.hi + channel.move;
            whole_[g] = whole_[g] && base >= lo && base + counts_[g] * kLanes <= hi;
            any = any || (g == 1 && (begin < hi && end > lo));
            for (int i = 0; i < counts_[g]; ++i) {
                const int64_t tile = base + i * kLanes;
                Vector& s = sources_[g][i];
                s.place = e2e::place(tile, channel.chunk);
                if (whole_[g]) continue;
                const uint32_t lanes = bits_between(tile, lo, hi);
                s.some = lanes != 0;
                const LaneBits bits(grid, tile);
                for (int q = 0; q < e2e::kPhases; ++q)
                    s.valid[q] = mask_of(bits.row[q / e2e::kTile] & bits.column[q % e2e::kTile] & lanes);
            }
        }
    }

    template <Source Kind>
    void fetch(const e2e::Channel& channel, Window& window) const {
        fetch_rows<3, 4, Kind>(channel, 0, window);
        fetch_rows<0, 4, Kind>(channel, 1, window + 1);
        fetch_rows<0, 1, Kind>(channel, 2, window + 5);
    }

  private:
    struct Vector {  // of tiles as they lie in memory
        int64_t place;
        bool some;  // of its tiles exist
        Mask valid[e2e::kPhases];
    };

    template <int First, int Last, Source Kind>
    void fetch_rows(const e2e::Channel& channel, int g, float (*rows)[e2e::kTile][kWindowVectors * kLanes]) const {
        const Vec scale = splat(channel.scale), offset = splat(channel.offset), slope = splat(channel.slope);
        const GradientOf gradient_of(channel);
        for (int i = 0; i < counts_[g]; ++i) {
            const Vector& s = sources_[g][i];
            const auto* from = static_cast<const typename Stored<Kind>::Type*>(channel.data) + s.place;
            const Pixel* other = Kind == Source::kGradient ? static_cast<const Pixel*>(channel.raw) + s.place : nullptr;
            const auto put = [&](int row, int column, Vec pixel) { store(&rows[row - First][column][i * kLanes], pixel); };
            const auto get = [&](int row, int column) {
                const int64_t phase = (row * e2e::kTile + column) * e2e::kChunk;
                const Vec stored = load(from + phase);
                if (Kind == Source::kGradient) return gradient_of(stored, load(other + phase));
                return Kind == Source::kFinal ? stored : activate(stored, scale, offset, slope);
            };
            if (!whole_[g]) {
                for (int row = First; row < Last; ++row)
                    for (int column = 0; column < e2e::kTile; ++column)  // where no tile is, there is not even memory to read
                        put(row, column, s.some ? keep(s.valid[row * e2e::kTile + column], get(row, column)) : zero());
            } else if (i < own_[g]) {
                for (int row = First; row < Last; ++row) put(row, e2e::kTile - 1, get(row, e2e::kTile - 1));
            } else if (i >= own_end_[g]) {
                for (int row = First; row < Last; ++row) put(row, 0, get(row, 0));
            } else {
                for (int row = First; row < Last; ++row)
                    for (int column = 0; column < e2e::kTile; ++column) put(row, column, get(row, column));
            }
        }
    }

    Vector sources_[3][kWindowVectors];
    int counts_[3], own_[3], own_end_[3];  // vectors; of them those with tiles of the block, the others neighbours alone
    bool whole_[3];                        // every pixel of every vector exists
};

// Tiles of a vector that have neighbours.
struct Neighbours {
    Mask above, below, left, right, above_left, above_right, below_left, below_right;

    void look(const e2e::Grid& grid, int64_t first) {
        const LaneBits bits(grid, first);
        above = mask_of(bits.above);
        below = mask_of(bits.below);
        left = mask_of(bits.left);
        right = mask_of(bits.right);
        above_left = mask_of(bits.above & bits.left);
        above_right = mask_of(bits.above & bits.right);
        below_left = mask_of(bits.below & bits.left);
        below_right = mask_of(bits.below & bits.right);
    }
};

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
static inline void transform_window(const Window& window, const int skip[3], int lane, const Neighbours& has, float* v,
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
    const Vec even = d[0] + d[2], odd = d[1] + d[3];
    const Vec even2 = fma(splat(4.0f), d[2], d[0]), odd2 = fma(splat(8.0f), d[3], d[1] + d[1]);
    o[0] = d[0];
    o[1] = even + odd;
    o[2] = even - odd;
    o[3] = even2 + odd2;
    o[4] = even2 - odd2;
    o[5] = d[3];
}

static inline void transform_gradient(const Window& window, int lane, float* m, int64_t m_pitch) {
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

// Memory is far away, and what a block needs of it is read in an order of its own: ask for the chunk after it line by line, a part
// with each vector of tiles.
// (Always inline: GCC takes a function that only prefetches for one without effect, and drops the call.)
template <bool Gradient>
static inline __attribute__((always_inline)) void prefetch_ahead(const e2e::Channel& channel, const e2e::Grid& grid,
                                                                 int64_t first, int part) {
    const int64_t chunks_ahead = (grid.tiles_x + e2e::kChunk - 1) / e2e::kChunk;  // the row of tiles below lies there
    const int64_t tile = first + channel.move + chunks_ahead * e2e::kChunk;
    if (tile - channel.move + e2e::kChunk <= channel.lo || tile - channel.move >= channel.hi) return;
    const int64_t lane = tile & (e2e::kChunk - 1);
    const int64_t from = e2e::place(tile - lane, channel.chunk) + (lane + part * kLanes) * e2e::kPhases;
    using Data = typename Stored<Gradient ? Source::kGradient : Source::kRaw>::Type;
    prefetch(static_cast<const Data*>(channel.data) + from, kLanes * e2e::kPhases);
    if (Gradient) prefetch(static_cast<const Pixel*>(channel.raw) + from, kLanes * e2e::kPhases);
}

constexpr int kSoon = 4;  // channels between asking for memory and reading it

static inline bool same_reach(const e2e::Channel& a, const e2e::Channel& b) {
    return a.lo == b.lo && a.hi == b.hi && a.move == b.move && a.chunk == b.chunk;
}

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
    alignas(64) Window windows[2];
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

static inline void start_statistics(e2e::Statistics& s, const float* pixel) {
    if (s.started) return;
    s.started = 1;
    s.center = *pixel;
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
    int64_t count = 0;
    for (int i = 0; i < vectors; ++i) {
        const LaneBits lanes(grid, first + i * kLanes);
        whole[i] = true;
        for (int q = 0; q < e2e::kPhases; ++q) {
            bits[i][q] = lanes.row[q / 4] & lanes.column[q % 4] & bits_between(first + i * kLanes, 0, grid.tiles);
            whole[i] = whole[i] && bits[i][q] == kAllLanes;
            count += __builtin_popcount(bits[i][q]);
        }
    }
    alignas(64) Pixel block[e2e::kPhases][(kBlockVectors + 1) * kLanes];
    for (int o = first_output; o < last_output; ++o) {
        e2e::Statistics& s = statistics[o];
        Pixel* channel = static_cast<Pixel*>(out) + o * e2e::kChannel;
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

static void store_phase(const float* m, int outputs, const e2e::Grid& grid, int64_t first, int vectors, int phase, e2e::Pixels* out,
                        e2e::Statistics* statistics) {
    const int64_t tiles = static_cast<int64_t>(vectors) * kLanes;
    Mask masks[kBlockVectors];
    int64_t count = 0;
    for (int i = 0; i < vectors; ++i) {
        const LaneBits lanes(grid, first + i * kLanes);
        const uint32_t bits = lanes.row[phase / 4] & lanes.column[phase % 4] & bits_between(first + i * kLanes, 0, grid.tiles);
        masks[i] = mask_of(bits);
        count += __builtin_popcount(bits);
    }
    for (int o = 0; o < outputs; ++o) {
        e2e::Statistics& s = statistics[o];
        const float* at = m + o * tiles;
        Pixel* target = static_cast<Pixel*>(out) + o * e2e::kChannel + phase * e2e::kChunk;
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
