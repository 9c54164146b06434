// Shift blocks at stride 1: Winograd's F(4 x 4, 3 x 3) over flows that stay where they are.
#include <algorithm>

#include "driver.h"
#include "flows.h"

namespace e2e {
namespace {

constexpr int64_t kPrivateFloats = 3 << 19;    // of transformed tiles up to which each thread works on blocks of its own
constexpr int64_t kPairFloats = 6144;          // of one point's inputs up to which those of two stay in the first-level cache

struct Schedule {
    int vectors;        // in a block
    int64_t v_pitch, m_pitch;
    bool shared;        // threads work together on `blocks` blocks at a time
    int64_t blocks;
    int at_once = 1;     // points that are multiplied together

    // What a block is does not depend on the number of threads, so that results do not either.
    Schedule(const Kernels& kernels, const ConvJob& job, int64_t slices, int threads) {
        const WinogradWeights& w = job.weights;
        const int64_t total = divide_up(slices * job.out.grid.slice, kernels.lanes);
        const int64_t per_vector = (kPoints * int64_t{kernels.lanes}) * (w.inputs + w.outputs);
        const int64_t most = std::min<int64_t>(total, kernels.block_vectors);
        const int64_t fit = std::min(most, std::max<int64_t>(2, kPrivateFloats / 4 / per_vector));
        vectors = static_cast<int>(total <= 16 || per_vector * fit > kPrivateFloats ? most : fit);
        shared = per_vector * vectors > kPrivateFloats || total < 4 * int64_t{threads} * vectors;
        blocks = 1;
        if (shared) blocks = std::max<int64_t>(1, std::min(divide_up(total, vectors), kSharedFloats / (per_vector * vectors)));
        v_pitch = odd_lines(int64_t{w.inputs} * vectors * kernels.lanes);
        m_pitch = odd_lines(int64_t{w.outputs} * vectors * kernels.lanes);
        if (shared) return;
        v_pitch = m_pitch = std::max(v_pitch, m_pitch);
        const int64_t widest = w.chunks ? divide_up(w.inputs, w.chunks) : w.inputs;
        // Sums are the same, one point or two at once: both add even and odd connections apart.
        if (!w.dense && kernels.sparse_pair && widest * vectors * kernels.lanes <= kPairFloats) at_once = 2;
    }
};

class Convolution {
  public:
    Convolution(const Kernels& kernels, const ConvJob& job, int threads)
        : kernels_(kernels), job_(job), flows_(kernels, job),
          schedule_(kernels, job, flows_.slices(), threads), threads_(threads) {
        const Grid& grid = job.out.grid;
        halved_ = {job.halved, job.norm.gamma, kHalvedChannel * job.out.channels};
        stream_ = job.out.channels * kPhases * grid.tiles * kernels.pixel_bytes > stream_bytes();
    }

    int64_t reserve(float* base) {
        Scratch scratch(base);
        if (schedule_.shared) {
            v_ = scratch.take(schedule_.blocks * kPoints * schedule_.v_pitch);
            m_ = scratch.take(schedule_.blocks * kPoints * schedule_.m_pitch);
        } else {
            v_ = scratch.take(threads_ * (kPoints + schedule_.at_once) * schedule_.v_pitch);
        }
        flows_.reserve(scratch, threads_);
        return scratch.used();
    }

    void run() {
        const Grid& grid = job_.out.grid;
        const int64_t depth = grid.depth, rounds = divide_up(depth, flows_.slices()), channels_out = job_.out.channels;
        const Units most(blocks_of(0, flows_.slices()));  // in a round
        std::vector<Statistics> statistics(static_cast<size_t>(rounds * most.count * channels_out), Statistics{});
        std::vector<std::vector<Channel>> of_threads(static_cast<size_t>(threads_), flows_.channels());
        Failure failure;
        #pragma omp parallel num_threads(threads_)
        {
            const int thread = omp_get_thread_num(), team = omp_get_num_threads();
            Channel* channels = of_threads[static_cast<size_t>(thread)].data();
            Statistics* of_round = statistics.data();
            StopWatch watch(job_.seconds, thread);
            for (int64_t first = 0; first < depth; first += flows_.slices(), of_round += most.count * channels_out) {
                const int64_t last = std::min(depth, first + flows_.slices());
                if (job_.upward >= 0) {
                    failure.guard([&] { flows_.upsample(channels, first, last, thread, team); });
                    #pragma omp barrier
                    watch.lap(kUpsample);
                }
                if (schedule_.shared) {
                    together(channels, first, last, of_round, watch, thread, team);
                } else {
                    failure.guard([&] { alone(channels, first, last, of_round, watch, thread, team); });
                }
                if (stream_) finish_streams();
                #pragma omp barrier
            }
        }
        failure.rethrow();
        finish_norm(job_.norm, statistics, channels_out);
    }

  private:
    int64_t blocks_of(int64_t first, int64_t last) const {
        const int64_t slice = job_.out.grid.slice;
        return divide_up(divide_up(last * slice, kernels_.lanes) - first * slice / kernels_.lanes, schedule_.vectors);
    }

    int vectors_at(int64_t vector, int64_t end) const {
        return static_cast<int>(std::min<int64_t>(schedule_.vectors, end - vector));
    }

    // Points from `point` on, as many as are multiplied at once.
    void multiply(const float* v, float* m, int point, int vectors) const {
        const WinogradWeights& w = job_.weights;
        v += point * schedule_.v_pitch;
        m += point * schedule_.m_pitch;
        if (w.dense) {
            const int64_t groups = divide_up(w.outputs, kernels_.dense_rows);
            const float* weight = w.weight + point * groups * kernels_.dense_rows * round_up(w.inputs, kernels_.dense_depth);
            kernels_.dense_product(&v, 1, w.inputs, weight, w.outputs, m, vectors);
            return;
        }
        for (int32_t chunk = 0; chunk < w.chunks; ++chunk) {
            const SparseRows rows{w.start + chunk * (w.outputs + 1), w.output + chunk * w.outputs, w.index, w.outputs};
            const float* part = v + int64_t{w.chunk_first[chunk]} * vectors * kernels_.lanes;
            const float* weight = w.weight + point * w.connections;
            if (schedule_.at_once == 2) {
                kernels_.sparse_pair(part, m, schedule_.v_pitch, rows, weight, w.connections, vectors, chunk > 0);
            } else {
                kernels_.sparse_product(part, m, rows, weight, vectors, chunk > 0);
            }
        }
    }

    // Each thread takes blocks of tiles through all three steps. What points become lies where the points before them lay, which
    // are not needed any more: the less memory, the more of it is in the second-level cache.
    void alone(const Channel* channels, int64_t first, int64_t last, Statistics* statistics, StopWatch& watch, int thread, int team) {
        const Grid& grid = job_.out.grid;
        const int64_t begin = first * grid.slice / kernels_.lanes, end = divide_up(last * grid.slice, kernels_.lanes);
        const Units units(blocks_of(first, last));
        const Share share = units.share(thread, team);
        float* m = v_ + thread * (kPoints + schedule_.at_once) * schedule_.v_pitch;
        float* v = m + schedule_.at_once * schedule_.v_pitch;
        for (int64_t block = share.first; block < share.last; ++block) {
            const int64_t vector = begin + block * schedule_.vectors, tile = vector * kernels_.lanes;
            const int n = vectors_at(vector, end);
            kernels_.input_transform(channels, job_.weights.inputs, grid, tile, n, v, schedule_.v_pitch);
            watch.lap(kInput);
            for (int p = 0; p < kPoints; p += schedule_.at_once) multiply(v, m, p, n);
            watch.lap(kProduct);
            kernels_.output_transform(m, schedule_.m_pitch, 0, job_.weights.outputs, grid, tile, n, job_.out.data, halved_,
                                      stream_, statistics + units.of(block) * job_.out.channels);
            watch.lap(kOutput);
        }
    }

    // All threads work on the same few blocks, each step shared out in its own way. Nothing is allocated between its barriers.
    void together(const Channel* channels, int64_t first, int64_t last, Statistics* statistics, StopWatch& watch, int thread,
                  int team) {
        const Grid& grid = job_.out.grid;
        const int64_t begin = first * grid.slice / kernels_.lanes, end = divide_up(last * grid.slice, kernels_.lanes);
        const int64_t step = schedule_.blocks * schedule_.vectors;
        const Units units(blocks_of(first, last));
        for (int64_t vector = begin; vector < end; vector += step) {
            const int64_t blocks = divide_up(std::min(end - vector, step), schedule_.vectors);
            const Share inputs(job_.weights.inputs, thread, team), points(kPoints * blocks, thread, team);
            const Share outputs(job_.weights.outputs, thread, team);
            for (int64_t b = 0; b < blocks; ++b) {
                const int64_t at = vector + b * schedule_.vectors;
                const int n = vectors_at(at, end);
                kernels_.input_transform(channels + inputs.first, static_cast<int>(inputs.last - inputs.first), grid,
                                         at * kernels_.lanes, n, v_of(b) + inputs.first * n * kernels_.lanes,
                                         schedule_.v_pitch);
            }
            #pragma omp barrier
            watch.lap(kInput);
            for (int64_t item = points.first; item < points.last; ++item) {
                const int64_t b = item % blocks;
                multiply(v_of(b), m_of(b), static_cast<int>(item / blocks), vectors_at(vector + b * schedule_.vectors, end));
            }
            #pragma omp barrier
            watch.lap(kProduct);
            for (int64_t b = 0; b < blocks; ++b) {
                const int64_t at = vector + b * schedule_.vectors;
                kernels_.output_transform(m_of(b), schedule_.m_pitch, static_cast<int>(outputs.first),
                                          static_cast<int>(outputs.last), grid, at * kernels_.lanes, vectors_at(at, end),
                                          job_.out.data, halved_, stream_,
                                          statistics + units.of((at - begin) / schedule_.vectors) * job_.out.channels);
            }
            #pragma omp barrier
            watch.lap(kOutput);
        }
    }

    float* v_of(int64_t block) const { return v_ + block * kPoints * schedule_.v_pitch; }
    float* m_of(int64_t block) const { return m_ + block * kPoints * schedule_.m_pitch; }

    const Kernels& kernels_;
    const ConvJob& job_;
    Flows flows_;
    const Schedule schedule_;
    const int threads_;
    bool stream_ = false;
    Halved halved_{};
    float *v_ = nullptr, *m_ = nullptr;
};

}  // namespace

int64_t run_conv(const Kernels& kernels, const ConvJob& job, float* scratch, int threads) {
    Convolution convolution(kernels, job, threads);
    const int64_t floats = convolution.reserve(scratch);
    if (scratch) convolution.run();
    return floats;
}

}  // namespace e2e
