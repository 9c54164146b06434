// Pixels of one phase on their way into a map, and the statistics of what is written.
#pragma once

#include "core.h"
#include "lanes.h"
#include "pixel.h"

namespace E2E_NAMESPACE {

// Sums are gathered around the mean of the first pixels: a single pixel may be far from all others. `total` is their sum.
static inline void start_statistics(e2e::Statistics& s, Vec total, int64_t count) {
    s.started = 1;
    s.center = sum(total) / static_cast<float>(count);
}

static void store_phase(const float* m, int outputs, const e2e::Grid& grid, int64_t first, int vectors, int phase, e2e::Pixels* out,
                        e2e::Statistics* statistics) {
    const int64_t tiles = static_cast<int64_t>(vectors) * kLanes;
    Mask masks[kBlockVectors];
    int64_t count = 0, count_of_one = 0;
    int one = 0;  // the first vector with lanes in the plane
    for (int i = 0; i < vectors; ++i) {
        const LaneBits lanes(grid, first + i * kLanes);
        const uint32_t bits = lanes.row[phase / 4] & lanes.column[phase % 4] & bits_between(first + i * kLanes, 0, grid.tiles);
        masks[i] = mask_of(bits);
        count += __builtin_popcount(bits);
        if (!count_of_one) {
            one = i;
            count_of_one = count;
        }
    }
    for (int o = 0; o < outputs; ++o) {
        e2e::Statistics& s = statistics[o];
        const float* at = m + o * tiles;
        Pixel* target = static_cast<Pixel*>(out) + o * e2e::kChannel + phase * e2e::kChunk;
        if (!s.started && count) start_statistics(s, keep(masks[one], load(at + one * kLanes)), count_of_one);
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
