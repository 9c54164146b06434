// What a block of tiles needs of one channel: read from where its depth shift has it, with the norm and activation before it.
#pragma once

#include "core.h"
#include "lanes.h"
#include "pixel.h"

namespace E2E_NAMESPACE {

constexpr int kWindowVectors = kBlockVectors + (E2E_ISA == 256 ? 2 : 3);  // rows an odd number of cache lines apart

// What a block of tiles needs of one channel: rows of pixels (the last of the tiles above, the tiles' own four, the first of the
// tiles below), and in each the pixels by their column in the tile, a tile a lane. Activated; zero outside the plane.
using BlockWindow = float[6][e2e::kTile][kWindowVectors * kLanes];

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
    void fetch(const e2e::Channel& channel, BlockWindow& window) const {
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

static inline bool same_reach(const e2e::Channel& a, const e2e::Channel& b) {
    return a.lo == b.lo && a.hi == b.hi && a.move == b.move && a.chunk == b.chunk;
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

}  // namespace E2E_NAMESPACE
