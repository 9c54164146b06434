// What convolutions that are multiplied out read.
#pragma once

#include <algorithm>
#include <vector>

#include "blocks.h"
#include "driver.h"

namespace e2e {

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

}  // namespace e2e
