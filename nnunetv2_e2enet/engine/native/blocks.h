// Blocks of tiles by rows of their grid, channels by their depth shift, and where the tiles of another grid lie.
#pragma once

#include <algorithm>
#include <vector>

#include "driver.h"

namespace e2e {

// Output channels that move together.
struct Group {
    int32_t first, last;
    int64_t shift;
};

inline std::vector<Group> cut_groups(const int32_t* shift, int64_t channels) {
    std::vector<Group> groups;
    for (int32_t c = 0; c < channels; ++c) {
        if (groups.empty() || groups.back().shift != shift[c]) groups.push_back({c, c, shift[c]});
        groups.back().last = c + 1;
    }
    return groups;
}

// Tiles of a block that lie in one row of the grid.
struct Segment {
    int64_t lane, count, slice, row, column;
};

inline std::vector<Segment> cut_rows(const Grid& grid, int64_t first, int64_t tiles) {
    std::vector<Segment> segments;
    const int64_t end = std::min(first + tiles, grid.tiles);
    for (int64_t f = first; f < end;) {
        const int64_t column = f % grid.tiles_x, count = std::min(end - f, grid.tiles_x - column);
        segments.push_back({f - first, count, f / grid.slice, f % grid.slice / grid.tiles_x, column});
        f += count;
    }
    return segments;
}

// Where the fine tiles of a block of coarse ones go, those of the coarse tiles' upper or lower part (`below`).
class Pieces {
  public:
    std::vector<Piece> pieces;
    std::vector<int> first;  // of each vector of fine tiles

    // Coarse slice d is fine slice d * stride[0] + offset, counted from the first of the slices that there are.
    void cut(const std::vector<Segment>& rows, const Grid& fine, const int32_t* stride, int64_t offset, int below,
             int64_t first_slice, int64_t last_slice, int64_t chunk, int lanes, int64_t coarse_tiles) {
        const int sw = stride[2];
        pieces.clear();
        first.clear();
        for (const Segment& r : rows) {
            const int64_t slice = r.slice * stride[0] + offset, row = r.row * stride[1] + below;
            if (slice < first_slice || slice >= last_slice || row >= fine.tiles_y) continue;
            const int64_t tile = (slice - first_slice) * fine.slice + row * fine.tiles_x + r.column * sw;
            const int64_t count = std::min(r.count * sw, fine.tiles_x - r.column * sw);
            for (int64_t done = 0; done < count;) {
                const int64_t lane = r.lane * sw + done, in_vector = lane % lanes;
                const int64_t n = std::min({count - done, lanes - in_vector, tiles_in_chunk(tile + done, 1)});
                first.resize(static_cast<size_t>(lane / lanes + 1), static_cast<int>(pieces.size()));
                pieces.push_back({place(tile + done, chunk) - in_vector, static_cast<uint32_t>(((int64_t{1} << n) - 1) << in_vector)});
                done += n;
            }
        }
        first.resize(static_cast<size_t>(coarse_tiles * sw / lanes + 1), static_cast<int>(pieces.size()));
    }
};

// All that coarse tiles cover of a channel of the finer map, in slices at one position of the stride in depth.
inline __attribute__((always_inline)) void prefetch_fine(const Kernels& kernels, const Map& map, int64_t c,
                                                         const std::vector<Segment>& segments, const int32_t* stride,
                                                         int64_t position) {
    const Grid& fine = map.grid;
    for (const Segment& s : segments) {
        const int64_t d = std::min<int64_t>(std::max<int64_t>(s.slice * stride[0] + position, 0), fine.depth - 1);
        const int64_t tile = d * fine.slice + s.row * stride[1] * fine.tiles_x + s.column * stride[2];
        const int64_t end = tile + (stride[1] - 1) * fine.tiles_x + s.count * stride[2];
        for (int64_t t = tile & ~int64_t{kChunk - 1}; t < std::min(end, fine.tiles); t += kChunk)
            prefetch_chunk(kernels, channel_of(kernels, map, c), fine.chunk, t);
    }
}

}  // namespace e2e
