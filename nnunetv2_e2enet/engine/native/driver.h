// What the drivers have in common: threads, scratch memory, time, statistics.
#pragma once

#include <omp.h>

#include <chrono>
#include <cmath>
#include <vector>

#include "jobs.h"

namespace e2e {

constexpr int64_t kCacheLine = 16;  // floats

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int floor_div(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

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

// Adds the time from one call to the next to a timer, in the first thread only.
class StopWatch {
  public:
    StopWatch(double* seconds, int thread) : seconds_(thread == 0 ? seconds : nullptr) {
        if (seconds_) last_ = Clock::now();
    }
    void lap(Timer timer) {
        if (!seconds_) return;
        const auto now = Clock::now();
        seconds_[timer] += std::chrono::duration<double>(now - last_).count();
        last_ = now;
    }

  private:
    using Clock = std::chrono::steady_clock;
    double* seconds_;
    Clock::time_point last_;
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

inline float scale_of(const Map& map, int64_t c) { return map.scale ? map.scale[c] : 1.0f; }
inline float offset_of(const Map& map, int64_t c) { return map.offset ? map.offset[c] : 0.0f; }
inline float slope_of(const Map& map) { return map.scale ? map.slope : 1.0f; }
inline const float* plane(const Map& map, int64_t c, int64_t phase) {
    return map.data + (c * kPhases + phase) * map.grid.pitch;
}

// The upward flow of some output slices, written where the convolution reads it.
struct UpsampleTarget {
    float* data;    // of the first slice; [output][phase][pitch]
    int64_t pitch;
    int64_t first_slice, last_slice;
};
int64_t upsample_scratch(const Kernels& kernels, const Upsample& job, const Grid& fine);
void upsample_slices(const Kernels& kernels, const Upsample& job, const Grid& fine, const int32_t* shift,
                     const UpsampleTarget& target, float* scratch, int thread, int threads);

// Each returns the floats of scratch memory that the job needs, and does the job unless scratch is null.
int64_t run_conv(const Kernels& kernels, const ConvJob& job, float* scratch, int threads);
int64_t run_strided(const Kernels& kernels, const StridedJob& job, float* scratch, int threads);
int64_t run_head(const Kernels& kernels, const HeadJob& job, float* logits, float* scratch, int threads);
void run_pool(const Kernels& kernels, const PoolJob& job, int threads);
void run_import(const float* image, const Map& out, int threads);

}  // namespace e2e
