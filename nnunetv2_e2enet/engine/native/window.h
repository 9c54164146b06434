// What convolutions that are multiplied out read.
#pragma once

#include <algorithm>
#include <vector>

#include "driver.h"

namespace e2e {

constexpr int kTaps = 9;

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

// All that output tiles need: window[row * columns + column][channel][tile], normalised, zero outside. The pitch of positions is
// an odd number of cache lines: what is read together must not all fall into the same sets of a cache.
class Window {
  public:
    const int rows, columns;

    Window(const Kernels& kernels, const Map& in, const int32_t* shift, const int32_t* stride)
        : rows(3 * stride[1] + 3), columns(3 * stride[2] + 3), kernels_(kernels), in_(in), shift_(shift), stride_(stride) {}

    void fill(const std::vector<Segment>& segments, int64_t tiles, int64_t first_channel, int64_t last_channel, float* window) {
        for (int64_t c = first_channel; c < last_channel; ++c) {
            if (c == first_channel || shift_[c] != shift_[c - 1]) plan(segments, shift_[c], pitch(tiles));
            if (c + 1 < last_channel) prefetch_fine(kernels_, in_, c + 1, segments, stride_, -shift_[c + 1]);
            kernels_.gather(channel_of(kernels_, in_, c), spans_.data(), static_cast<int64_t>(spans_.size()), stride_[2],
                            scale_of(in_, c), offset_of(in_, c), slope_of(in_), window + c * tiles);
        }
    }

    int64_t pitch(int64_t tiles) const { return odd_lines(in_.channels * tiles); }
    int64_t floats(int64_t tiles) const { return rows * columns * pitch(tiles); }

    void taps(const float* window, int64_t tiles, int phase, const float* bases[kTaps]) const {
        for (int t = 0; t < kTaps; ++t) {
            const int row = stride_[1] * (phase / kTile) + t / 3, column = stride_[2] * (phase % kTile) + t % 3;
            bases[t] = window + (row * columns + column) * pitch(tiles);
        }
    }

  private:
    // The same for all channels that move alike.
    void plan(const std::vector<Segment>& segments, int64_t shift, int64_t pitch) {
        spans_.clear();
        for (int w = 0; w < rows * columns; ++w)
            for (const Segment& s : segments) plan_row(s, shift, w / columns - 1, w % columns - 1, w * pitch + s.lane);
    }

    void plan_row(const Segment& s, int64_t shift, int row, int column, int64_t to) {
        const Grid& fine = in_.grid;
        const int sh = stride_[1], sw = stride_[2];
        const int64_t d = s.slice * stride_[0] - shift, y = kTile * sh * s.row + row;
        // Tile t of the segment needs pixel x = kTile * sw * (s.column + t) + column.
        const int64_t step = kTile * sw, x = step * s.column + column;
        int64_t lo = x < 0 ? 1 : 0, hi = x >= fine.width ? 0 : std::min(s.count, (fine.width - 1 - x) / step + 1);
        if (d < 0 || d >= fine.depth || y < 0 || y >= fine.height || lo >= hi) lo = hi = 0;
        if (lo > 0) spans_.push_back({-1, to, static_cast<int32_t>(lo)});
        const int64_t first = x + lo * step, phase = y % kTile * kTile + first % kTile;
        const int64_t tile = d * fine.slice + y / kTile * fine.tiles_x + first / kTile;
        for (int64_t t = lo, n; t < hi; t += n) {
            const int64_t at = tile + sw * (t - lo);
            n = std::min(hi - t, tiles_in_chunk(at, sw));
            spans_.push_back({place(at, fine.chunk) + phase * kChunk, to + t, static_cast<int32_t>(n)});
        }
        if (hi < s.count) spans_.push_back({-1, to + hi, static_cast<int32_t>(s.count - hi)});
    }

    const Kernels& kernels_;
    const Map& in_;
    const int32_t *shift_, *stride_;
    std::vector<Span> spans_;
};

// Blocks of tiles in turn, each thread's sums in memory of its own.
template <typename Gradient, typename Job>
int64_t run_blocks(const Kernels& kernels, const Job& job, const Grid& grid, Timer timer, float* scratch, int threads) {
    std::vector<Gradient> all;
    all.reserve(static_cast<size_t>(threads));
    int64_t floats = 0;
    for (int t = 0; t < threads; ++t) {
        all.emplace_back(kernels, job);
        floats += all.back().reserve(scratch ? scratch + floats : nullptr);
    }
    if (!scratch) return floats;
    int team = 1;
    Failure failure;
    #pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num();
        #pragma omp single
        team = omp_get_num_threads();
        StopWatch watch(job.seconds, thread);
        Gradient& own = all[static_cast<size_t>(thread)];
        failure.guard([&] {
            own.clear();
            const Share share(divide_up(grid.tiles, own.tiles()), thread, team);
            for (int64_t block = share.first; block < share.last; ++block) own.block(block * own.tiles());
        });
        #pragma omp barrier
        own.finish(all.data(), thread, team);
        watch.lap(timer);
    }
    failure.rethrow();
    return floats;
}

}  // namespace e2e
