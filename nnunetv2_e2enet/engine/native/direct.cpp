// Convolutions that are multiplied out: strided ones of the encoder, and the 1 x 1 x 1 heads.
#include <algorithm>
#include <cstring>

#include "blocks.h"
#include "driver.h"
#include "window.h"

namespace e2e {
namespace {

constexpr int64_t kWindowFloats = 1 << 18;  // of inputs under a block of output tiles that a thread holds, if it can be

}  // namespace

int64_t run_strided(const Kernels& kernels, const StridedJob& job, float* scratch, int threads) {
    const Grid& grid = job.out.grid;
    const Window shape(kernels, job.in, job.shift, job.stride);
    const int64_t outputs = job.out.channels, inputs = job.in.channels;
    const int64_t total = divide_up(grid.tiles, kernels.lanes);
    const int64_t per_vector = shape.rows * shape.columns * inputs * kernels.lanes;
    const int64_t vectors = std::min(total, std::max<int64_t>(2, std::min<int64_t>(4, kWindowFloats / per_vector)));
    const Blocks blocks(kernels, 0, total, vectors);
    const int64_t tiles = vectors * kernels.lanes;
    const bool shared = blocks.count < 4 * threads;  // then the threads share the phases of each block
    std::vector<int> phases;                         // that lie in the plane, of a tile or more
    for (int q = 0; q < kPhases; ++q)
        if (q / kTile < grid.height && q % kTile < grid.width) phases.push_back(q);
    const int64_t n_phases = static_cast<int64_t>(phases.size());
    Scratch memory(scratch);
    const int64_t window_floats = round_up(shape.floats(tiles), kCacheLine), product_floats = outputs * tiles;
    float* windows = memory.take(window_floats * (shared ? 1 : threads));
    float* products = memory.take(round_up(product_floats, kCacheLine) * threads);
    if (!scratch) return memory.used();
    const Units units(blocks.count);
    Failure failure;
    std::vector<Statistics> statistics(static_cast<size_t>(units.count * kPhases * outputs), Statistics{});
    #pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num(), team = omp_get_num_threads();
        StopWatch watch(job.seconds, thread);
        Window window(kernels, job.in, job.shift, job.stride);
        float* own = windows + (shared ? 0 : thread * window_floats);
        float* m = products + thread * round_up(product_floats, kCacheLine);
        const Share share = shared ? Share(blocks.count, 0, 1) : units.share(thread, team);
        for (int64_t block = share.first; block < share.last; ++block) {
            const Share vectors_of_block = blocks.of(block);
            const int64_t first = vectors_of_block.first * kernels.lanes;
            const int n = static_cast<int>(vectors_of_block.last - vectors_of_block.first);
            const Share channels = shared ? Share(inputs, thread, team) : Share(inputs, 0, 1);
            const Share its = shared ? Share(n_phases, thread, team) : Share(n_phases, 0, 1);
            failure.guard([&] {
                window.fill(cut_rows(grid, first, n * kernels.lanes), n * kernels.lanes, channels.first, channels.last, own);
            });
            if (shared) {
                #pragma omp barrier
            }
            for (int64_t i = its.first; i < its.last; ++i) {
                const int q = phases[static_cast<size_t>(i)];
                const float* bases[kTaps];
                window.taps(own, n * kernels.lanes, q, bases);
                kernels.dense_product(bases, kTaps, static_cast<int>(inputs), job.weight, static_cast<int>(outputs), m, n);
                kernels.store_phase(m, static_cast<int>(outputs), grid, first, n, q, job.out.data,
                                    statistics.data() + (units.of(block) * kPhases + q) * outputs);
            }
            if (shared) {
                #pragma omp barrier
            }
        }
        watch.lap(kStrided);
    }
    failure.rethrow();
    finish_norm(job.norm, statistics, outputs);
    return memory.used();
}

int64_t run_head(const Kernels& kernels, const HeadJob& job, float* scratch, int threads) {
    const Grid& grid = job.in.grid;
    const int64_t vectors = std::min<int64_t>(4, divide_up(grid.tiles, kernels.lanes)), tiles = vectors * kernels.lanes;
    const int64_t blocks = divide_up(grid.tiles, tiles), inputs = job.in.channels;
    Scratch memory(scratch);
    const int64_t in_pitch = odd_lines(inputs * tiles), out_pitch = odd_lines(job.classes * tiles);
    const int64_t in_floats = kPhases * in_pitch, out_floats = kPhases * out_pitch;
    float* in_rows = memory.take(in_floats * threads);
    float* out_rows = memory.take(out_floats * threads);
    if (!scratch || !job.logits) return memory.used();
    Failure failure;
    #pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num();
        StopWatch watch(job.seconds, thread);
        float* in = in_rows + thread * in_floats;
        float* out = out_rows + thread * out_floats;
        const Share share(blocks, thread, omp_get_num_threads());
        failure.guard([&] {
            for (int64_t block = share.first; block < share.last; ++block) {
                const int64_t first = block * tiles, count = std::min(tiles, grid.tiles - first);
                Span spans[kPhases];
                for (int64_t q = 0; q < kPhases; ++q)
                    spans[q] = {place(first, grid.chunk) + q * kChunk, q * in_pitch, static_cast<int32_t>(count)};
                for (int64_t c = 0; c < inputs; ++c) {
                    if (c + 1 < inputs)
                        prefetch_block(kernels, at(kernels, job.in.data, (c + 1) * kChannel + place(first, grid.chunk)), tiles);
                    kernels.gather(channel_of(kernels, job.in, c), spans, kPhases, 1, scale_of(job.in, c), offset_of(job.in, c),
                                   slope_of(job.in), in + c * tiles);
                }
                for (int q = 0; q < kPhases; ++q) {
                    const float* bases[1] = {in + q * in_pitch};
                    kernels.dense_product(bases, 1, static_cast<int>(inputs), job.weight, job.classes, out + q * out_pitch,
                                          static_cast<int>(vectors));
                }
                for (const Segment& s : cut_rows(grid, first, tiles)) {
                    for (int64_t k = 0; k < job.classes; ++k) {
                        for (int row = 0; row < kTile && kTile * s.row + row < grid.height; ++row) {
                            const int64_t x = kTile * s.column, y = kTile * s.row + row;
                            float* to = job.logits + ((k * grid.depth + s.slice) * grid.height + y) * grid.width + x;
                            const int64_t pixels = std::min(s.count * kTile, grid.width - x);
                            const float* from = out + row * kTile * out_pitch + k * tiles + s.lane;
                            kernels.pixels_row(from, out_pitch, s.count, pixels, to);
                            if (job.bias)
                                for (int64_t i = 0; i < pixels; ++i) to[i] += job.bias[k];
                        }
                    }
                }
            }
        });
        watch.lap(kHead);
    }
    failure.rethrow();
    return memory.used();
}

}  // namespace e2e
