// What the drivers have in common: threads, scratch memory, time, statistics.
#pragma once

#include <omp.h>
#include <time.h>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <exception>
#include <vector>

#include "cpu.h"
#include "half.h"
#include "jobs.h"

namespace e2e {

constexpr int64_t kCacheLine = 16;  // floats
constexpr int kTaps = 9;  // of a 3 x 3 kernel
constexpr int64_t kSharedFloats = 3 << 20;  // of transformed tiles that threads hold together where they share blocks

// A map of more bytes will not stay in any cache, and is written past them.
inline int64_t stream_bytes() {
    static const int64_t bytes = std::min<int64_t>(32 << 20, std::max<int64_t>(8 << 20, third_level_bytes() / 2));
    return bytes;
}

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// A place in a map, counted in pixels.
inline Pixels* at(const Kernels& kernels, Pixels* pixels, int64_t place) {
    return static_cast<char*>(pixels) + place * kernels.pixel_bytes;
}

// One pixel at a time, where time does not matter.
inline float load_pixel(const Kernels& kernels, Pixels* pixels, int64_t place) {
    if (kernels.pixel_bytes == sizeof(float)) return static_cast<const float*>(pixels)[place];
    return widen(static_cast<const Half*>(pixels)[place]);
}
inline void store_pixel(const Kernels& kernels, Pixels* pixels, int64_t place, float value) {
    if (kernels.pixel_bytes == sizeof(float)) {
        static_cast<float*>(pixels)[place] = value;
    } else {
        static_cast<Half*>(pixels)[place] = narrow(value);
    }
}

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
    Share(int64_t n, int64_t thread, int64_t threads) : first(n * thread / threads), last(n * (thread + 1) / threads) {}
};

// Vectors of tiles in blocks of at most `most`. From eight blocks on, their number is a multiple of four if there are as many
// vectors, so that two or four threads have equally many. Where it is possible, blocks begin where a cache line of pixels does.
class Blocks {
  public:
    const int64_t count;

    Blocks(const Kernels& kernels, int64_t first, int64_t last, int64_t most)
        : count(count_of(divide_up(last - first, unit_of(kernels, most)), most / unit_of(kernels, most))), first_(first),
          last_(last), unit_(unit_of(kernels, most)) {}

    Share of(int64_t block) const {
        Share its(divide_up(last_ - first_, unit_), block, count);
        its.first = first_ + its.first * unit_;
        its.last = std::min(last_, first_ + its.last * unit_);
        return its;
    }

  private:
    static int64_t unit_of(const Kernels& kernels, int64_t most) {
        const int64_t line = kCacheLine / kernels.lanes;
        return most % line ? 1 : line;
    }
    static int64_t count_of(int64_t units, int64_t most) {
        const int64_t least = divide_up(units, most);
        return least < 8 ? least : std::min(units, round_up(least, 4));
    }

    int64_t first_, last_, unit_;
};

// One thread's share of the channels of all chunks of a map: chunks first ... last - 1, and of the outermost of them the channels
// from and up to which they are its own.
class ChunkShare {
  public:
    int64_t first, last;

    ChunkShare(const Grid& grid, int64_t channels, int thread, int team) : channels_(channels) {
        const Share all(divide_up(grid.tiles, kChunk) * channels, thread, team);
        begin_ = all.first;
        end_ = all.last;
        first = begin_ / channels;
        last = divide_up(end_, channels);
    }
    Share channels(int64_t chunk) const {
        Share its(channels_, 0, 1);
        its.first = std::max<int64_t>(0, begin_ - chunk * channels_);
        its.last = std::min(channels_, end_ - chunk * channels_);
        return its;
    }

  private:
    int64_t channels_, begin_, end_;
};

// Blocks in units, each of which is one thread's and has statistics of its own: results are the same for any number of threads.
class Units {
  public:
    const int64_t count;

    explicit Units(int64_t blocks) : count(std::min<int64_t>(blocks, 64)), blocks_(blocks) {}
    int64_t of(int64_t block) const { return ((block + 1) * count - 1) / blocks_; }

    // The blocks of one thread of a team.
    Share share(int thread, int team) const {
        Share its(count, thread, team);
        its.first = its.first * blocks_ / count;
        its.last = its.last * blocks_ / count;
        return its;
    }

  private:
    int64_t blocks_;
};

// An exception must not leave a parallel region: the first of a team is kept until its end. No barrier may lie in guarded work,
// so that threads whose work failed still meet the others.
class Failure {
  public:
    template <typename Work>
    void guard(const Work& work) {
        try {
            work();
        } catch (...) {
            #pragma omp critical(e2e_failure)
            if (!first_) first_ = std::current_exception();
        }
    }
    void rethrow() const {
        if (first_) std::rethrow_exception(first_);
    }

  private:
    std::exception_ptr first_;
};

// Stores past the caches are ordered with others from here on: to be called before other threads are told that they are done.
inline void finish_streams() {
#if defined(__SSE__)
    _mm_sfence();
#endif
}

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

// Merge what was gathered in parts (Chan et al.) and turn it into scale and offset. statistics is [part][channels].
inline void finish_norm(const Norm& norm, const std::vector<Statistics>& statistics, int64_t channels) {
    const int64_t parts = static_cast<int64_t>(statistics.size()) / channels;
    for (int64_t c = 0; c < channels; ++c) {
        double n = 0, mean = 0, squares = 0;
        for (int64_t part = 0; part < parts; ++part) {
            const Statistics& s = statistics[static_cast<size_t>(part * channels + c)];
            if (!s.count) continue;
            const double here = static_cast<double>(s.count), mean_here = s.center + s.sum / here;
            const double difference = mean_here - mean, all = n + here;
            squares += s.square - s.sum * s.sum / here + difference * difference * n * here / all;
            mean += difference * here / all;
            n = all;
        }
        const double variance = squares > 0 ? squares / n : (squares == squares ? 0.0 : squares);
        const double unit = norm.unit ? norm.unit[c] : 1.0, deviation = std::sqrt(variance + norm.eps * unit * unit);
        const double scale = norm.gamma[c] / deviation;
        norm.scale[c] = static_cast<float>(scale);
        norm.offset[c] = static_cast<float>(norm.beta[c] - mean * scale);
        norm.mean[c] = static_cast<float>(mean);
        norm.rstd[c] = static_cast<float>(1 / deviation);
    }
}

// The chunk that a tile lies in, line by line: scattered reads alone would wait for memory each.
inline __attribute__((always_inline)) void prefetch_chunk(const Kernels& kernels, Pixels* channel, int64_t chunk, int64_t tile) {
    const char* first = static_cast<char*>(at(kernels, channel, place(tile & ~int64_t{kChunk - 1}, chunk)));
    for (int64_t i = 0; i < kChannel * kernels.pixel_bytes; i += 64) __builtin_prefetch(first + i, 0, 3);
}

// A block of tiles of a channel, all phases: the block lies in one chunk.
inline __attribute__((always_inline)) void prefetch_block(const Kernels& kernels, const Pixels* block, int64_t tiles) {
    const char* first = static_cast<const char*>(block);
    const int64_t phase = kChunk * kernels.pixel_bytes, bytes = tiles * kernels.pixel_bytes;
    for (int q = 0; q < kPhases; ++q)
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(first + q * phase + i, 0, 3);
}

inline float scale_of(const Map& map, int64_t c) { return map.scale ? map.scale[c] : 1.0f; }
inline float offset_of(const Map& map, int64_t c) { return map.offset ? map.offset[c] : 0.0f; }
inline float slope_of(const Map& map) { return map.scale ? map.slope : 1.0f; }
inline Pixels* channel_of(const Kernels& kernels, const Map& map, int64_t c) { return at(kernels, map.data, c * kChannel); }

// How many of the tiles tile, tile + stride, ... lie in the chunk of the first.
inline int64_t tiles_in_chunk(int64_t tile, int64_t stride) { return (kChunk - 1 - (tile & (kChunk - 1))) / stride + 1; }

// The upward flow of some output slices, written where the convolution reads it.
struct UpsampleTarget {
    Pixels* data;    // tile 0 is the first of first_slice
    int64_t chunk;   // pixels from one chunk to the next
    int64_t first_slice, last_slice;
};
int64_t upsample_scratch(const Kernels& kernels, const Upsample& job);
void upsample_slices(const Kernels& kernels, const Upsample& job, const Grid& fine, const int32_t* shift,
                     const UpsampleTarget& target, float* scratch, int thread, int threads);

// Each returns the floats of scratch memory that the job needs, and does the job unless scratch is null.
int64_t run_conv(const Kernels& kernels, const ConvJob& job, float* scratch, int threads);
int64_t run_strided(const Kernels& kernels, const StridedJob& job, float* scratch, int threads);
int64_t run_head(const Kernels& kernels, const HeadJob& job, float* scratch, int threads);
int64_t run_pool(const Kernels& kernels, const PoolJob& job, float* scratch, int threads);

int64_t run_conv_gradient(const Kernels& kernels, const ConvGradientJob& job, float* scratch, int threads);
int64_t run_strided_gradient(const Kernels& kernels, const StridedGradientJob& job, float* scratch, int threads);
int64_t run_upsample_gradient(const Kernels& kernels, const UpsampleGradientJob& job, float* scratch, int threads);
int64_t run_head_gradient(const Kernels& kernels, const HeadGradientJob& job, float* scratch, int threads);
int64_t run_norm_gradient(const Kernels& kernels, const NormGradientJob& job, float* scratch, int threads);

void pack_kernels(const float* weight, const int32_t* places, int64_t n, int turned, float* to, int threads);
void run_import(const Kernels& kernels, const float* image, float factor, const Map& out, int threads);

}  // namespace e2e
