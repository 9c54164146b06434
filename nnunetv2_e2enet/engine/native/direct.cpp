// Convolutions that are multiplied out: strided ones of the encoder, and the 1 x 1 x 1 heads.
#include <algorithm>
#include <cstring>

#include "driver.h"

namespace e2e {
namespace {

constexpr int kTaps = 9;
constexpr int64_t kWindowFloats = 1 << 18;  // of inputs under a block of output tiles that a thread holds, if it can be

// Tiles of a block that lie in one row of the grid.
struct Segment {
    int64_t lane, count, slice, row, column;
};

std::vector<Segment> cut_rows(const Grid& grid, int64_t first, int64_t tiles) {
    std::vector<Segment> segments;
    const int64_t end = std::min(first + tiles, grid.tiles);
    for (int64_t f = first; f < end;) {
        const int64_t column = f % grid.tiles_x, count = std::min(end - f, grid.tiles_x - column);
        segments.push_back({f - first, count, f / grid.slice, f % grid.slice / grid.tiles_x, column});
        f += count;
    }
    return segments;
}

// All that output tiles need: window[row * columns + column][channel][tile], normalised, zero outside.
struct Window {
    int rows, columns;
    explicit Window(const int32_t* stride) : rows(3 * stride[1] + 3), columns(3 * stride[2] + 3) {}

    void fill(const Kernels& kernels, const StridedJob& job, const std::vector<Segment>& segments, int64_t tiles,
              int64_t first_channel, int64_t last_channel, float* window) const {
        const Grid& fine = job.in.grid;
        for (int64_t c = first_channel; c < last_channel; ++c) {
            if (c + 1 < last_channel) prefetch_channel(job, segments, c + 1);
            for (int w = 0; w < rows * columns; ++w) {
                float* to = window + (w * job.in.channels + c) * tiles;
                for (const Segment& s : segments) fill_row(kernels, job, fine, s, c, w / columns - 1, w % columns - 1, to);
            }
        }
    }

    static inline __attribute__((always_inline)) void prefetch_channel(const StridedJob& job,
                                                                       const std::vector<Segment>& segments, int64_t c) {
        const Grid& fine = job.in.grid;
        for (const Segment& s : segments) {
            const int64_t d = std::min<int64_t>(std::max<int64_t>(s.slice * job.stride[0] - job.shift[c], 0), fine.depth - 1);
            const int64_t tile = d * fine.slice + s.row * job.stride[1] * fine.tiles_x + s.column * job.stride[2];
            const int64_t end = tile + (job.stride[1] - 1) * fine.tiles_x + s.count * job.stride[2];
            for (int64_t t = tile & ~int64_t{kChunk - 1}; t < std::min(end, fine.tiles); t += kChunk)
                prefetch_chunk(channel_of(job.in, c), fine.chunk, t);
        }
    }

    static void fill_row(const Kernels& kernels, const StridedJob& job, const Grid& fine, const Segment& s, int64_t c, int row,
                         int column, float* to) {
        const int sh = job.stride[1], sw = job.stride[2];
        const int64_t d = s.slice * job.stride[0] - job.shift[c], y = kTile * sh * s.row + row;
        to += s.lane;
        // Tile t of the segment needs pixel x = kTile * sw * (s.column + t) + column.
        const int64_t step = kTile * sw, x = step * s.column + column;
        int64_t lo = x < 0 ? 1 : 0, hi = x >= fine.width ? 0 : std::min(s.count, (fine.width - 1 - x) / step + 1);
        if (d < 0 || d >= fine.depth || y < 0 || y >= fine.height || lo >= hi) lo = hi = 0;
        for (int64_t t = 0; t < lo; ++t) to[t] = 0;
        for (int64_t t = hi; t < s.count; ++t) to[t] = 0;
        if (lo == hi) return;
        const int64_t first = x + lo * step;
        const int64_t tile = d * fine.slice + y / kTile * fine.tiles_x + first / kTile;
        const float* from = channel_of(job.in, c) + (y % kTile * kTile + first % kTile) * kChunk;
        for (int64_t t = lo; t < hi;) {
            const int64_t at = tile + sw * (t - lo), n = std::min(hi - t, tiles_in_chunk(at, sw));
            kernels.activate_row(from + place(at, fine.chunk), sw, n, scale_of(job.in, c), offset_of(job.in, c),
                                 slope_of(job.in), to + t);
            t += n;
        }
    }

    void taps(const float* window, int64_t channel_floats, int phase, const int32_t* stride, const float* bases[kTaps]) const {
        for (int t = 0; t < kTaps; ++t) {
            const int row = stride[1] * (phase / kTile) + t / 3, column = stride[2] * (phase % kTile) + t % 3;
            bases[t] = window + (row * columns + column) * channel_floats;
        }
    }
};

}  // namespace

int64_t run_strided(const Kernels& kernels, const StridedJob& job, float* scratch, int threads) {
    const Grid& grid = job.out.grid;
    const Window window(job.stride);
    const int64_t outputs = job.out.channels, inputs = job.in.channels;
    const int groups = static_cast<int>(divide_up(outputs, kDenseRows));
    const int64_t total = divide_up(grid.tiles, kernels.lanes);
    const int64_t per_vector = window.rows * window.columns * inputs * kernels.lanes;
    const int64_t vectors = std::min(total, std::max<int64_t>(2, std::min<int64_t>(4, kWindowFloats / per_vector)));
    const int64_t blocks = divide_up(total, vectors), tiles = vectors * kernels.lanes;
    const bool shared = blocks < 4 * threads;  // then the threads share the phases of each block
    Scratch memory(scratch);
    const int64_t window_floats = round_up(per_vector * vectors, kCacheLine), product_floats = outputs * tiles;
    float* windows = memory.take(window_floats * (shared ? 1 : threads));
    float* products = memory.take(round_up(product_floats, kCacheLine) * threads);
    if (!scratch) return memory.used();
    std::vector<Statistics> statistics(static_cast<size_t>(threads * outputs), Statistics{});
    #pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num(), team = omp_get_num_threads();
        StopWatch watch(job.seconds, thread);
        float* own = windows + (shared ? 0 : thread * window_floats);
        float* m = products + thread * round_up(product_floats, kCacheLine);
        const Share share = shared ? Share(blocks, 0, 1) : Share(blocks, thread, team);
        for (int64_t block = share.first; block < share.last; ++block) {
            const int64_t first = block * tiles;
            const int n = static_cast<int>(std::min(vectors, total - block * vectors));
            const Share channels = shared ? Share(inputs, thread, team) : Share(inputs, 0, 1);
            const Share phases = shared ? Share(kPhases, thread, team) : Share(kPhases, 0, 1);
            window.fill(kernels, job, cut_rows(grid, first, n * kernels.lanes), n * kernels.lanes, channels.first,
                        channels.last, own);
            if (shared) {
                #pragma omp barrier
            }
            for (int64_t q = phases.first; q < phases.last; ++q) {
                const float* bases[kTaps];
                window.taps(own, inputs * n * kernels.lanes, static_cast<int>(q), job.stride, bases);
                kernels.dense_product(bases, kTaps, static_cast<int>(inputs), job.weight, 0, groups, static_cast<int>(outputs),
                                      m, n);
                kernels.store_phase(m, static_cast<int>(outputs), grid, first, n, static_cast<int>(q), job.out.data,
                                    statistics.data() + thread * outputs);
            }
            if (shared) {
                #pragma omp barrier
            }
        }
        watch.lap(kStrided);
    }
    finish_norm(job.norm, statistics, outputs);
    return memory.used();
}

int64_t run_head(const Kernels& kernels, const HeadJob& job, float* logits, float* scratch, int threads) {
    const Grid& grid = job.in.grid;
    const int64_t vectors = std::min<int64_t>(4, divide_up(grid.tiles, kernels.lanes)), tiles = vectors * kernels.lanes;
    const int64_t blocks = divide_up(grid.tiles, tiles), inputs = job.in.channels;
    Scratch memory(scratch);
    const int64_t in_floats = kPhases * inputs * tiles, out_floats = kPhases * job.classes * tiles;
    float* in_rows = memory.take(in_floats * threads);
    float* out_rows = memory.take(out_floats * threads);
    if (!scratch) return memory.used();
    #pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num();
        StopWatch watch(job.seconds, thread);
        float* in = in_rows + thread * in_floats;
        float* out = out_rows + thread * out_floats;
        const Share share(blocks, thread, omp_get_num_threads());
        for (int64_t block = share.first; block < share.last; ++block) {
            const int64_t first = block * tiles, count = std::min(tiles, grid.tiles - first);
            for (int64_t c = 0; c < inputs; ++c) {
                const float* from = channel_of(job.in, c) + place(first, grid.chunk);
                for (int q = 0; q < kPhases; ++q)
                    kernels.activate_row(from + q * kChunk, 1, count, scale_of(job.in, c), offset_of(job.in, c),
                                         slope_of(job.in), in + (q * inputs + c) * tiles);
            }
            for (int q = 0; q < kPhases; ++q) {
                const float* bases[1] = {in + q * inputs * tiles};
                kernels.dense_product(bases, 1, static_cast<int>(inputs), job.weight, 0,
                                      static_cast<int>(divide_up(job.classes, kDenseRows)), job.classes,
                                      out + q * job.classes * tiles, static_cast<int>(vectors));
            }
            for (const Segment& s : cut_rows(grid, first, tiles)) {
                for (int64_t k = 0; k < job.classes; ++k) {
                    for (int row = 0; row < kTile && kTile * s.row + row < grid.height; ++row) {
                        const int64_t x = kTile * s.column, y = kTile * s.row + row;
                        float* to = logits + ((k * grid.depth + s.slice) * grid.height + y) * grid.width + x;
                        const int64_t pixels = std::min(s.count * kTile, grid.width - x);
                        const float* from = out + (row * kTile * job.classes + k) * tiles + s.lane;
                        kernels.pixels_row(from, job.classes * tiles, s.count, pixels, to);
                        if (job.bias)
                            for (int64_t i = 0; i < pixels; ++i) to[i] += job.bias[k];
                    }
                }
            }
        }
        watch.lap(kHead);
    }
    return memory.used();
}

}  // namespace e2e
