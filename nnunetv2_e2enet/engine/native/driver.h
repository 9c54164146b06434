// What the drivers have in common: threads, scratch memory, time, statistics.
#pragma once

#include <omp.h>
#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "jobs.h"

namespace e2e {

constexpr int64_t kCacheLine = 16;  // floats

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int floor_div(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// Chunks around a map: kernels read whole vectors and neighbouring tiles, then mask them.
inline int64_t guard_chunks(const Grid& grid) { return divide_up(grid.tiles_x + 2 * kCacheLine, kChunk); }

// Rows of a block lie in 36 streams; an odd number of cache lines between them keeps them out of each other's cache sets.
inline int64_t odd_lines(int64_t floats) {
    const int64_t lines = divide_up(floats, kCacheLine);
    return (lines | 1) * kCacheLine;
}

// Contiguous share of `n` items for one thread of a team; the same for every run, so results are too.
struct Share {
    int64_t first, last;
    Share(int64_t n, int thread, int threads) : first(n * thread / threads), last(n * (thread + 1) / threads) {}
};

class Scratch {
  public:
    explicit Scratch(float* base) : base_(base) {}
    float* take(int64_t floats) {
        float* at = base_ ? base_ + used_ : nullptr;
        used_ += round_up(floats, kCacheLine);
        return at;
    }
    int64_t used() const { return used_; }

  private:
    float* base_;
    int64_t used_ = 0;
};

// Adds the CPU time from one call to the next to a timer, in the first thread only.
class StopWatch {
  public:
    StopWatch(double* seconds, int thread) : seconds_(thread == 0 ? seconds : nullptr) {
        if (seconds_) last_ = now();
    }
    void lap(Timer timer) {
        if (!seconds_) return;
        const double time = now();
        seconds_[timer] += time - last_;
        last_ = time;
    }

  private:
    static double now() {
        timespec t;
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
        return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
    }

    double* seconds_;
    double last_ = 0;
};

// Merge what the threads gathered (Chan et al.) and turn it into scale and offset. statistics is [threads][channels].
inline void finish_norm(const Norm& norm, const std::vector<Statistics>& statistics, int64_t channels) {
    const int64_t threads = static_cast<int64_t>(statistics.size()) / channels;
    for (int64_t c = 0; c < channels; ++c) {
        double n = 0, mean = 0, squares = 0;
        for (int64_t t = 0; t < threads; ++t) {
            const Statistics& s = statistics[static_cast<size_t>(t * channels + c)];
            if (!s.count) continue;
            const double here = static_cast<double>(s.count), mean_here = s.center + s.sum / here;
            const double difference = mean_here - mean, all = n + here;
            squares += s.square - s.sum * s.sum / here + difference * difference * n * here / all;
            mean += difference * here / all;
            n = all;
        }
        const double variance = squares > 0 ? squares / n : (squares == squares ? 0.0 : squares);
        const double scale = norm.gamma[c] / std::sqrt(variance + norm.eps);
        norm.scale[c] = static_cast<float>(scale);
        norm.offset[c] = static_cast<float>(norm.beta[c] - mean * scale);
    }
}

inline __attribute__((always_inline)) void prefetch(const float* p, int64_t floats) {
    for (int64_t i = 0; i < floats; i += kCacheLine) __builtin_prefetch(p + i, 0, 3);
}

// The chunk that a tile lies in, line by line: scattered reads alone would wait for memory each.
inline __attribute__((always_inline)) void prefetch_chunk(const float* channel, int64_t chunk, int64_t tile) {
    prefetch(channel + place(tile & ~int64_t{kChunk - 1}, chunk), kChannel);
}

inline float scale_of(const Map& map, int64_t c) { return map.scale ? map.scale[c] : 1.0f; }
inline float offset_of(const Map& map, int64_t c) { return map.offset ? map.offset[c] : 0.0f; }
inline float slope_of(const Map& map) { return map.scale ? map.slope : 1.0f; }
inline float* channel_of(const Map& map, int64_t c) { return map.data + c * kChannel; }

// How many of the tiles tile, tile + stride, ... lie in the chunk of the first.
inline int64_t tiles_in_chunk(int64_t tile, int64_t stride) { return (kChunk - 1 - (tile & (kChunk - 1))) / stride + 1; }

// The upward flow of some output slices, written where the convolution reads it.
struct UpsampleTarget {
    float* data;     // tile 0 is the first of first_slice
    int64_t chunk;   // floats from one chunk to the next
    int64_t first_slice, last_slice;
};
int64_t upsample_scratch(const Kernels& kernels, const Upsample& job);
void upsample_slices(const Kernels& kernels, const Upsample& job, const Grid& fine, const int32_t* shift,
                     const UpsampleTarget& target, float* scratch, int thread, int threads);

// Each returns the floats of scratch memory that the job needs, and does the job unless scratch is null.
int64_t run_conv(const Kernels& kernels, const ConvJob& job, float* scratch, int threads);
int64_t run_strided(const Kernels& kernels, const StridedJob& job, float* scratch, int threads);
int64_t run_head(const Kernels& kernels, const HeadJob& job, float* logits, float* scratch, int threads);
void run_pool(const Kernels& kernels, const PoolJob& job, int threads);
void run_import(const float* image, const Map& out, int threads);

}  // namespace e2e
