// Gradients that are sums over blocks of tiles.
#pragma once

#include <algorithm>
#include <vector>

#include "driver.h"

namespace e2e {

// Vectors of a block of at most so many tiles, fewer if that gives each block a thread of its own. A block lies in one chunk, and the
// sums of a product stay in registers.
inline int vectors_of_block(const Kernels& kernels, const Grid& grid, int tiles, int threads) {
    int vectors = std::min(4, tiles / kernels.lanes);
    while (vectors > 1 && divide_up(grid.tiles, vectors / 2 * kernels.lanes) <= threads) vectors /= 2;
    return vectors;
}

// Blocks of tiles in turn, each thread's sums in memory of its own.
template <typename Gradient, typename Job>
int64_t run_blocks(const Kernels& kernels, const Job& job, const Grid& grid, Timer timer, float* scratch, int threads) {
    std::vector<Gradient> all;
    all.reserve(static_cast<size_t>(threads));
    int64_t floats = 0;
    for (int t = 0; t < threads; ++t) {
        all.emplace_back(kernels, job, threads);
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
