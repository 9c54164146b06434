// The backward pass of shift blocks at stride 1: Winograd's F(4 x 4, 3 x 3) for the gradients of flows and weights.
//
// The gradient of the flows is a convolution of the output's gradient, with kernels turned by half a turn and connections from
// outputs to inputs, stored where the depth shift came from. That of a kernel is G^T s G, where s is the sum over all tiles of
// (B^T d B) * (A y A^T), with the tile d of its input map and y of the output's gradient: 36 products a tile.
#include <algorithm>

#include "driver.h"
#include "flows.h"

namespace e2e {
namespace {

constexpr int64_t kPrivateFloats = 3 << 20;  // of transformed tiles up to which each thread works on blocks of its own
constexpr int kTogether = 16;  // kernels that are transformed side by side

// Of F(4 x 4, 3 x 3), as in engine/weights.py: rows of a point, 1, x and x^2 over the product of its distances to the others.
constexpr double kNear2 = double{kNear} * kNear, kFar2 = double{kFar} * kFar;
constexpr double kOfNear = 2 * kNear2 * (kNear2 - kFar2), kOfFar = 2 * kFar2 * (kFar2 - kNear2);
constexpr double kG[6][3] = {{1 / (kNear2 * kFar2), 0, 0},
                             {1 / kOfNear, kNear / kOfNear, kNear2 / kOfNear},
                             {1 / kOfNear, -kNear / kOfNear, kNear2 / kOfNear},
                             {1 / kOfFar, kFar / kOfFar, kFar2 / kOfFar},
                             {1 / kOfFar, -kFar / kOfFar, kFar2 / kOfFar},
                             {0, 0, 1}};

using Together = double[kTogether];

// G^T s of columns of six numbers, `pitch` apart. Rows of G but the first and last come in pairs: x has another sign.
void transform_back(const Together* s, int pitch, Together* to) {
    for (int e = 0; e < kTogether; ++e) {
        const double near = s[pitch][e] + s[2 * pitch][e], far = s[3 * pitch][e] + s[4 * pitch][e];
        to[0][e] = kG[0][0] * s[0][e] + kG[1][0] * near + kG[3][0] * far;
        to[1][e] = kG[1][1] * (s[pitch][e] - s[2 * pitch][e]) + kG[3][1] * (s[3 * pitch][e] - s[4 * pitch][e]);
        to[2][e] = kG[1][2] * near + kG[3][2] * far + kG[5][2] * s[5 * pitch][e];
    }
}

// Sums over tiles of one point: one a connection, or of all connections in the blocks of dense_dots.
int64_t count_sums(const Kernels& kernels, const WinogradWeights& w) {
    const int64_t sums = w.dense ? divide_up(w.outputs, kernels.dot_rows) * divide_up(w.inputs, kernels.dot_columns) * kernels.lanes
                                 : w.connections;
    return round_up(sums, kCacheLine);
}

struct Schedule {
    int vectors;
    bool shared;
    int64_t blocks, wide, narrow;  // floats of one point of the flows or the output, and of the output alone

    Schedule(const Kernels& kernels, const ConvGradientJob& job, int64_t slices, int threads) {
        const WinogradWeights& w = job.forward.weights;
        const int64_t total = divide_up(slices * job.forward.out.grid.slice, kernels.lanes);
        const int64_t per_vector = kPoints * int64_t{kernels.lanes} * (std::max(w.inputs, w.outputs) + w.outputs);
        vectors = kernels.block_vectors;
        shared = per_vector * vectors > kPrivateFloats || total < 4 * int64_t{threads} * vectors;
        if (shared) vectors = static_cast<int>(std::min<int64_t>(vectors, total));
        blocks = 1;
        if (shared) blocks = std::max<int64_t>(1, std::min(divide_up(total, vectors), kSharedFloats / (per_vector * vectors)));
        narrow = odd_lines(int64_t{w.outputs} * vectors * kernels.lanes);
        wide = std::max(narrow, odd_lines(int64_t{w.inputs} * vectors * kernels.lanes));
    }
};

class ConvolutionGradient {
  public:
    ConvolutionGradient(const Kernels& kernels, const ConvGradientJob& job, int threads)
        : kernels_(kernels), job_(job), forward_(job.forward), flows_(kernels, job.forward),
          schedule_(kernels, job, flows_.slices(), threads), threads_(threads), sums_(count_sums(kernels, job.forward.weights)) {
        for (int flow = 0; flow < job.forward.n_flows; ++flow) wanted_ = wanted_ || job.into[flow].data;
    }

    int64_t reserve(float* base) {
        Scratch scratch(base);
        const int64_t copies = schedule_.shared ? schedule_.blocks : threads_;
        flows_input_ = scratch.take(copies * (kPoints + 1) * schedule_.wide);
        output_ = scratch.take(copies * kPoints * schedule_.narrow);
        if (schedule_.shared) turned_ = scratch.take(copies * kPoints * schedule_.narrow);
        totals_ = scratch.take((schedule_.shared ? 1 : threads_) * kPoints * sums_);
        flows_.reserve(scratch, threads_);
        return scratch.used();
    }

    void run() {
        const std::vector<Channel> gradient = describe_gradient();
        const std::vector<Target> targets = describe_targets();
        std::vector<std::vector<Channel>> of_threads(static_cast<size_t>(threads_), flows_.channels());
        bool streams = false;
        for (const Target& target : targets) streams = streams || target.bypass;
        Failure failure;
        #pragma omp parallel num_threads(threads_)
        {
            const int thread = omp_get_thread_num(), team = omp_get_num_threads();
            Channel* channels = of_threads[static_cast<size_t>(thread)].data();
            StopWatch watch(forward_.seconds, thread);
            clear_edges(targets, thread, team);
            clear_totals(thread, team);
            #pragma omp barrier
            for (int64_t first = 0; first < forward_.out.grid.depth; first += flows_.slices()) {
                const int64_t last = std::min<int64_t>(forward_.out.grid.depth, first + flows_.slices());
                if (forward_.upward >= 0) {
                    failure.guard([&] { flows_.upsample(channels, first, last, thread, team); });
                    #pragma omp barrier
                    watch.lap(kUpsample);
                }
                if (schedule_.shared) {
                    together(channels, gradient.data(), targets.data(), first, last, watch, thread, team);
                } else {
                    alone(channels, gradient.data(), targets.data(), first, last, watch, thread, team);
                }
                if (streams) finish_streams();
                #pragma omp barrier
            }
            finish(thread, team);
            watch.lap(kDots);
        }
        failure.rethrow();
    }

  private:
    std::vector<Channel> describe_gradient() const {
        std::vector<Channel> channels;
        const Map& raw = forward_.out;
        for (int64_t c = 0; c < raw.channels; ++c) {
            Channel channel{};
            channel.data = job_.gradient + c * kChannel;
            channel.raw = channel_of(kernels_, raw, c);
            channel.chunk = raw.grid.chunk;
            channel.hi = raw.grid.tiles;
            channel.scale = scale_of(raw, c);
            channel.offset = offset_of(raw, c);
            channel.slope = slope_of(raw);
            channel.mean = job_.mean[c];
            channel.by_raw = job_.by_raw[c];
            channel.constant = job_.constant[c];
            channels.push_back(channel);
        }
        return channels;
    }

    // What moved by some slices on its way in moves back.
    std::vector<Target> describe_targets() const {
        std::vector<Target> targets;
        for (int flow = 0; flow < forward_.n_flows; ++flow) {
            const Map& into = job_.into[flow];
            for (int64_t c = 0; c < forward_.flows[flow].channels; ++c) {
                const int64_t moved = forward_.shift[targets.size()], depth = forward_.out.grid.depth, slice = forward_.out.grid.slice;
                Target target{};
                target.data = into.data ? static_cast<float*>(into.data) + c * kChannel : nullptr;
                target.chunk = into.grid.chunk;
                target.move = -moved * slice;
                target.lo = std::max<int64_t>(0, moved) * slice;
                target.hi = std::min<int64_t>(depth, depth + moved) * slice;
                target.add = job_.add[flow];
                target.bypass = !target.add && into.channels * kPhases * into.grid.tiles * int64_t{sizeof(float)} > stream_bytes();
                targets.push_back(target);
            }
        }
        return targets;
    }

    // Slices of a gradient that nothing comes to.
    void clear_edges(const std::vector<Target>& targets, int thread, int team) const {
        const Share share(static_cast<int64_t>(targets.size()), thread, team);
        for (int64_t c = share.first; c < share.last; ++c) {
            const Target& target = targets[static_cast<size_t>(c)];
            if (!target.data || target.add) continue;
            const int64_t tiles = forward_.out.grid.tiles;
            const bool some = target.lo < target.hi;
            clear_tiles(target, 0, some ? target.lo + target.move : tiles);
            clear_tiles(target, some ? target.hi + target.move : tiles, tiles);
        }
    }

    static void clear_tiles(const Target& target, int64_t first, int64_t last) {
        for (int64_t tile = first, n; tile < last; tile += n) {
            n = std::min(last - tile, kChunk - (tile & (kChunk - 1)));
            for (int q = 0; q < kPhases; ++q) {
                float* at = target.data + place(tile, target.chunk) + q * kChunk;
                std::fill(at, at + n, 0.0f);
            }
        }
    }

    void clear_totals(int thread, int team) {
        const int64_t all = (schedule_.shared ? 1 : team) * kPoints * sums_;
        const Share share(all, thread, team);
        std::fill(totals_ + share.first, totals_ + share.last, 0.0f);
    }

    int vectors_at(int64_t vector, int64_t end) const {
        return static_cast<int>(std::min<int64_t>(schedule_.vectors, end - vector));
    }

    void multiply(const float* v, float* m, int point, int vectors) const {
        const WinogradWeights& w = job_.turned;
        if (w.dense) {
            const int64_t groups = divide_up(w.outputs, kDenseRows);
            const float* weight = w.weight + point * groups * kDenseRows * w.inputs;
            kernels_.dense_product(&v, 1, w.inputs, weight, w.outputs, m, vectors);
            return;
        }
        for (int32_t chunk = 0; chunk < w.chunks; ++chunk) {
            const SparseRows rows{w.start + chunk * (w.outputs + 1), w.output + chunk * w.outputs, w.index, w.outputs};
            const float* part = v + int64_t{w.chunk_first[chunk]} * vectors * kernels_.lanes;
            kernels_.sparse_product(part, m, rows, w.weight + point * w.connections, vectors, chunk > 0);
        }
    }

    void sum_up(const float* v, const float* m, float* sums, int vectors) const {
        const WinogradWeights& w = forward_.weights;
        if (w.dense) return kernels_.dense_dots(&m, w.outputs, &v, w.inputs, 1, sums, vectors);
        for (int32_t chunk = 0; chunk < w.chunks; ++chunk) {
            const SparseRows rows{w.start + chunk * (w.outputs + 1), w.output + chunk * w.outputs, w.index, w.outputs};
            const float* part = v + int64_t{w.chunk_first[chunk]} * vectors * kernels_.lanes;
            kernels_.sparse_dots(&part, &m, 1, rows, sums, vectors);
        }
    }

    // Each thread takes blocks of tiles through all steps. What a point becomes lies where the point before it lay.
    void alone(const Channel* channels, const Channel* gradient, const Target* targets, int64_t first, int64_t last,
               StopWatch& watch, int thread, int team) {
        const Grid& grid = forward_.out.grid;
        const int32_t inputs = forward_.weights.inputs, outputs = forward_.weights.outputs;
        const int64_t wide = schedule_.wide, narrow = schedule_.narrow;
        const int64_t begin = first * grid.slice / kernels_.lanes, end = divide_up(last * grid.slice, kernels_.lanes);
        const Blocks blocks(kernels_, begin, end, schedule_.vectors);
        const Share share(blocks.count, thread, team);
        float* own = flows_input_ + thread * (kPoints + 1) * wide;
        float* output = output_ + thread * kPoints * narrow;
        float* totals = totals_ + thread * kPoints * sums_;
        for (int64_t block = share.first; block < share.last; ++block) {
            const Share its = blocks.of(block);
            const int64_t tile = its.first * kernels_.lanes;
            const int n = static_cast<int>(its.last - its.first);
            kernels_.gradient_transform(gradient, outputs, grid, tile, n, wanted_ ? own + wide : nullptr, wide, output, narrow);
            watch.lap(kGradientInput);
            if (wanted_) {
                for (int p = 0; p < kPoints; ++p) multiply(own + (p + 1) * wide, own + p * wide, p, n);
                watch.lap(kGradientProduct);
                kernels_.gradient_output(own, wide, targets, inputs, tile, n);
                watch.lap(kGradientOutput);
            }
            kernels_.input_transform(channels, inputs, grid, tile, n, own, wide);
            watch.lap(kInput);
            for (int p = 0; p < kPoints; ++p) sum_up(own + p * wide, output + p * narrow, totals + p * sums_, n);
            watch.lap(kDots);
        }
    }

    // All threads work on the same few blocks; each point is one thread's, whose sums nobody else touches.
    void together(const Channel* channels, const Channel* gradient, const Target* targets, int64_t first, int64_t last,
                  StopWatch& watch, int thread, int team) {
        const Grid& grid = forward_.out.grid;
        const int64_t wide = schedule_.wide, narrow = schedule_.narrow, lanes = kernels_.lanes;
        const int64_t begin = first * grid.slice / lanes, end = divide_up(last * grid.slice, lanes);
        const int64_t step = schedule_.blocks * schedule_.vectors;
        const Share inputs(forward_.weights.inputs, thread, team), outputs(forward_.weights.outputs, thread, team);
        const Share points(kPoints, thread, team);
        const int n_in = static_cast<int>(inputs.last - inputs.first), n_out = static_cast<int>(outputs.last - outputs.first);
        for (int64_t vector = begin; vector < end; vector += step) {
            const int64_t blocks = divide_up(std::min(end - vector, step), schedule_.vectors);
            const auto vector_of = [&](int64_t b) { return vector + b * schedule_.vectors; };
            for (int64_t b = 0; b < blocks && n_out; ++b) {
                const int n = vectors_at(vector_of(b), end);
                const int64_t at = outputs.first * n * lanes;
                kernels_.gradient_transform(gradient + outputs.first, n_out, grid, vector_of(b) * lanes, n,
                                            wanted_ ? turned_of(b) + at : nullptr, narrow, output_of(b) + at, narrow);
            }
            #pragma omp barrier
            watch.lap(kGradientInput);
            if (wanted_) {
                for (int64_t p = points.first; p < points.last; ++p)
                    for (int64_t b = 0; b < blocks; ++b)
                        multiply(turned_of(b) + p * narrow, input_of(b) + p * wide, static_cast<int>(p), vectors_at(vector_of(b), end));
                #pragma omp barrier
                watch.lap(kGradientProduct);
                for (int64_t b = 0; b < blocks; ++b) {
                    const int n = vectors_at(vector_of(b), end);
                    kernels_.gradient_output(input_of(b) + inputs.first * n * lanes, wide, targets + inputs.first, n_in,
                                             vector_of(b) * lanes, n);
                }
                #pragma omp barrier
                watch.lap(kGradientOutput);
            }
            for (int64_t b = 0; b < blocks && n_in; ++b) {
                const int n = vectors_at(vector_of(b), end);
                kernels_.input_transform(channels + inputs.first, n_in, grid, vector_of(b) * lanes, n,
                                         input_of(b) + inputs.first * n * lanes, wide);
            }
            #pragma omp barrier
            watch.lap(kInput);
            for (int64_t p = points.first; p < points.last; ++p)
                for (int64_t b = 0; b < blocks; ++b)
                    sum_up(input_of(b) + p * wide, output_of(b) + p * narrow, totals_ + p * sums_, vectors_at(vector_of(b), end));
            #pragma omp barrier
            watch.lap(kDots);
        }
    }

    // Sums of all threads to gradients of kernels: G^T s G, of some kernels side by side.
    void finish(int thread, int team) {
        const int copies = schedule_.shared ? 1 : team;
        const int64_t sums = forward_.weights.dense ? sums_ : forward_.weights.connections;
        const Share blocks(divide_up(sums, kTogether), thread, team);
        for (int64_t block = blocks.first; block < blocks.last; ++block) {
            const int64_t first = block * kTogether;
            Together half[6][3], taps[3][3];
            for (int j = 0; j < 6; ++j) {
                Together column[6];
                for (int i = 0; i < 6; ++i) {
                    const float* from = totals_ + (6 * i + j) * sums_ + first;
                    for (int e = 0; e < kTogether; ++e) column[i][e] = static_cast<double>(from[e]);
                    for (int t = 1; t < copies; ++t)
                        for (int e = 0; e < kTogether; ++e) column[i][e] += from[t * kPoints * sums_ + e];
                }
                transform_back(&column[0], 1, half[j]);
            }
            for (int k = 0; k < 3; ++k) transform_back(&half[0][k], 3, taps[k]);
            const int64_t end = std::min(first + kTogether, sums);
            for (int64_t e = first; e < end; ++e) {
                if (job_.places[e] < 0) continue;
                float* to = job_.weight_gradient + int64_t{job_.places[e]} * kTaps;
                for (int k = 0; k < kTaps; ++k) to[k] += static_cast<float>(taps[k / 3][k % 3][e - first]);
            }
        }
    }

    float* input_of(int64_t block) const { return flows_input_ + block * (kPoints + 1) * schedule_.wide; }
    float* output_of(int64_t block) const { return output_ + block * kPoints * schedule_.narrow; }
    float* turned_of(int64_t block) const { return turned_ + block * kPoints * schedule_.narrow; }

    const Kernels& kernels_;
    const ConvGradientJob& job_;
    const ConvJob& forward_;
    Flows flows_;
    const Schedule schedule_;
    const int threads_;
    const int64_t sums_;
    bool wanted_ = false;
    float *flows_input_ = nullptr, *output_ = nullptr, *turned_ = nullptr, *totals_ = nullptr;
};

}  // namespace

void pack_kernels(const float* weight, const int32_t* places, int64_t n, int turned, float* to, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static) if (n > 1 << 10)
    for (int64_t block = 0; block < divide_up(n, kTogether); ++block) {
        const int64_t first = block * kTogether, count = std::min<int64_t>(kTogether, n - first);
        double kernel[kTaps][kTogether] = {}, half[6][3][kTogether];
        for (int64_t e = 0; e < count; ++e) {
            if (places[first + e] < 0) continue;
            const float* from = weight + int64_t{places[first + e]} * kTaps;
            for (int k = 0; k < kTaps; ++k) kernel[turned ? kTaps - 1 - k : k][e] = static_cast<double>(from[k]);
        }
        for (int i = 0; i < 6; ++i)
            for (int l = 0; l < 3; ++l)
                for (int e = 0; e < kTogether; ++e)
                    half[i][l][e] = kG[i][0] * kernel[l][e] + kG[i][1] * kernel[3 + l][e] + kG[i][2] * kernel[6 + l][e];
        for (int i = 0; i < 6; ++i)
            for (int j = 0; j < 6; ++j) {
                float row[kTogether];
                for (int e = 0; e < kTogether; ++e)
                    row[e] = static_cast<float>(half[i][0][e] * kG[j][0] + half[i][1][e] * kG[j][1] + half[i][2][e] * kG[j][2]);
                std::copy(row, row + count, to + (6 * i + j) * n + first);
            }
    }
}

int64_t run_conv_gradient(const Kernels& kernels, const ConvGradientJob& job, float* scratch, int threads) {
    ConvolutionGradient gradient(kernels, job, threads);
    const int64_t floats = gradient.reserve(scratch);
    if (scratch) gradient.run();
    return floats;
}

}  // namespace e2e
