// The backward pass between levels: norms, max-pooling and transposed convs.
#include <algorithm>

#include "blocks.h"
#include "driver.h"
#include "gradient_blocks.h"

namespace e2e {
namespace {

// Where the windows of a chunk's tiles lie in the coarser map.
class UnpoolingPlan {
  public:
    explicit UnpoolingPlan(const NormGradientJob& job)
        : job_(job), rows_(job.pooled.data ? kTile / job.stride[1] : 0), columns_(job.pooled.data ? kTile / job.stride[2] : 0),
          places_(static_cast<size_t>(rows_ * columns_ * kChunk)), lines_(places_.size()) {}

    // For the maps from a channel on.
    Unpooled chunk(const Kernels& kernels, int64_t first, int64_t channel) {
        const Grid &fine = job_.raw.grid, &coarse = job_.pooled.grid;
        std::fill(later_, later_ + kChunk, 0);
        int64_t* end = lines_.data();
        for (int64_t lane = 0; lane < kChunk; ++lane) {
            const int64_t tile = std::min(first + lane, fine.tiles - 1), slice = tile / fine.slice;
            const int64_t ty = tile % fine.slice / fine.tiles_x, tx = tile % fine.slice % fine.tiles_x;
            if (slice % job_.stride[0]) later_[lane / kernels.lanes] |= 1u << lane % kernels.lanes;
            for (int w = 0; w < rows_ * columns_; ++w) {
                const int64_t y = std::min<int64_t>(ty * rows_ + w / columns_, coarse.height - 1);
                const int64_t x = std::min<int64_t>(tx * columns_ + w % columns_, coarse.width - 1);
                const int64_t there = slice / job_.stride[0] * coarse.slice + y / kTile * coarse.tiles_x + x / kTile;
                const int64_t at = place(there, coarse.chunk) + (y % kTile * kTile + x % kTile) * kChunk;
                places_[static_cast<size_t>(w * kChunk + lane)] = at;
                const int64_t line = at / kCacheLine * kCacheLine;
                if (std::find(lines_.data(), end, line) == end) *end++ = line;
            }
        }
        return {channel_of(kernels, job_.pooled, channel), job_.pooled_gradient + channel * kChannel, places_.data(), lines_.data(),
                end - lines_.data(), later_, job_.stride[1], job_.stride[2]};
    }

  private:
    const NormGradientJob& job_;
    const int rows_, columns_;
    std::vector<int64_t> places_, lines_;
    uint32_t later_[kChunk];
};

// From the sums over all pixels: what the gradient of the convolution's output is made of.
void finish_norm_gradient(const NormGradientJob& job, const std::vector<double>& sums, int threads) {
    const int64_t channels = job.raw.channels;
    const double n = static_cast<double>(job.raw.grid.depth) * job.raw.grid.height * job.raw.grid.width;
    for (int64_t c = 0; c < channels; ++c) {
        double total = 0, product = 0;
        for (int64_t t = 0; t < threads; ++t) {
            total += sums[static_cast<size_t>(2 * (t * channels + c))];
            product += sums[static_cast<size_t>(2 * (t * channels + c) + 1)];
        }
        product *= job.rstd[c];
        job.weight_gradient[c] += static_cast<float>(product);
        job.bias_gradient[c] += static_cast<float>(total);
        job.by_raw[c] = static_cast<float>(-job.raw.scale[c] * job.rstd[c] * product / n);
        job.constant[c] = static_cast<float>(-job.raw.scale[c] * total / n);
    }
}

void apply_norm_gradient(const Kernels& kernels, const NormGradientJob& job, int64_t chunk, const Share& channels) {
    for (int64_t c = channels.first; c < channels.last; ++c) {
        const int64_t there = chunk * job.raw.grid.chunk + c * kChannel;
        Channel channel{};
        channel.raw = at(kernels, job.raw.data, there);
        channel.scale = job.raw.scale[c];
        channel.offset = job.raw.offset[c];
        channel.slope = job.raw.slope;
        channel.mean = job.mean[c];
        channel.by_raw = job.by_raw[c];
        channel.constant = job.constant[c];
        kernels.norm_gradient(channel, kChannel, job.gradient + there);
    }
}

// What norm_sums needs, from a channel on.
NormChannels channels_from(const NormGradientJob& job, int64_t c) {
    return {job.raw.scale + c, job.raw.offset + c, job.mean + c, job.raw.slope};
}

}  // namespace

int64_t run_norm_gradient(const Kernels& kernels, const NormGradientJob& job, float* scratch, int threads) {
    if (!scratch) return 0;
    const Grid& grid = job.raw.grid;
    std::vector<double> sums(static_cast<size_t>(2 * threads * job.raw.channels), 0.0);
    std::vector<UnpoolingPlan> plans(static_cast<size_t>(threads), UnpoolingPlan(job));
    #pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num(), team = omp_get_num_threads();
        StopWatch watch(job.seconds, thread);
        UnpoolingPlan& plan = plans[static_cast<size_t>(thread)];
        const ChunkShare share(grid, job.raw.channels, thread, team);
        double* own = sums.data() + 2 * thread * job.raw.channels;
        for (int64_t chunk = share.first; chunk < share.last; ++chunk) {
            const int64_t first = chunk * kChunk;
            const Share channels = share.channels(chunk);
            Unpooled unpooled{};
            if (job.pooled.data) unpooled = plan.chunk(kernels, first, channels.first);
            kernels.norm_sums(job.gradient + channels.first * kChannel, at(kernels, job.raw.data, channels.first * kChannel),
                              static_cast<int>(channels.last - channels.first), channels_from(job, channels.first), grid, first,
                              job.pooled.data ? &unpooled : nullptr, own + 2 * channels.first);
        }
        #pragma omp barrier
        #pragma omp single
        finish_norm_gradient(job, sums, team);
        for (int64_t chunk = share.first; job.apply && chunk < share.last; ++chunk)
            apply_norm_gradient(kernels, job, chunk, share.channels(chunk));
        watch.lap(kNormGradient);
    }
    return 0;
}

namespace {

// Strides of 1 or 2 in the plane. Vectors run over coarse tiles, as in the forward pass; fine pixels are gathered.
class UpsampleGradient {
  public:
    UpsampleGradient(const Kernels& kernels, const UpsampleGradientJob& job, int threads)
        : kernels_(kernels), job_(job), coarse_(job.upsample.coarse), sh_(job.upsample.stride[1]), sw_(job.upsample.stride[2]),
          subs_(sh_ * sw_), vectors_(vectors_of_block(kernels, coarse_.grid, 32, threads)), tiles_(vectors_ * kernels.lanes),
          inputs_(coarse_.channels), outputs_(job.upsample.outputs), coarse_pitch_(odd_lines(inputs_ * tiles_)),
          fine_pitch_(odd_lines(outputs_ * tiles_)), sums_pitch_(round_up(job.upsample.connections, kCacheLine)) {}

    int64_t tiles() const { return tiles_; }

    int64_t reserve(float* base) {
        Scratch scratch(base);
        pixels_ = scratch.take(kPhases * coarse_pitch_);
        products_ = scratch.take(kPhases * coarse_pitch_);
        fine_ = scratch.take(subs_ * kPhases * fine_pitch_);
        sums_ = scratch.take(total_sums());
        return scratch.used();
    }

    void clear() { std::fill(sums_, sums_ + total_sums(), 0.0f); }

    void block(int64_t first) {
        const std::vector<Segment> rows = cut_rows(coarse_.grid, first, tiles_);
        const bool partial = first + tiles_ > coarse_.grid.tiles;
        const int64_t there = place(first, coarse_.grid.chunk);
        load_pixels(rows, there, partial);
        for (int position = 0; position < job_.upsample.stride[0]; ++position) {
            load_fine(rows, position, partial);
            for (int sub = 0; sub < subs_; ++sub) multiply(position * subs_ + sub, sub);
        }
        for (int64_t c = 0; c < inputs_; ++c) {
            float* into = job_.into + c * kChannel + there;
            if (c + 1 < inputs_) prefetch_block(*kernels_.floats(), into + kChannel, tiles_);
            for (int64_t q = 0; q < kPhases; ++q)
                kernels_.accumulate(products_ + q * coarse_pitch_ + c * tiles_, tiles_, into + q * kChunk, job_.add);
        }
    }

    // A thread's share of the sums of all threads: `all` is of the first.
    void finish(const UpsampleGradient* all, int thread, int team) const {
        const Share share(job_.upsample.connections, thread, team);
        for (int64_t k = 0; k < subs_ * job_.upsample.stride[0]; ++k) {
            for (int64_t e = share.first; e < share.last; ++e) {
                float total = 0;
                for (int t = 0; t < team; ++t) total += all[t].sums_[k * sums_pitch_ + e];
                job_.weight_gradient[job_.places[k * job_.upsample.connections + e]] += total;
            }
        }
    }

  private:
    int64_t total_sums() const { return subs_ * job_.upsample.stride[0] * sums_pitch_; }

    // The coarse pixels, activated; zero outside the plane.
    void load_pixels(const std::vector<Segment>& rows, int64_t there, bool partial) {
        if (partial) std::fill(pixels_, pixels_ + kPhases * coarse_pitch_, 0.0f);
        spans_.clear();
        for (int64_t q = 0; q < kPhases; ++q)
            for (const Segment& s : rows) {
                const int64_t pixels = divide_up(coarse_.grid.width - q % kTile, kTile);  // in each row
                int64_t n = std::max<int64_t>(0, std::min(s.count, pixels - s.column));
                if (kTile * s.row + q / kTile >= coarse_.grid.height) n = 0;
                const int64_t tile = s.slice * coarse_.grid.slice + s.row * coarse_.grid.tiles_x + s.column;
                const int64_t to = q * coarse_pitch_ + s.lane;
                if (n > 0) spans_.push_back({place(tile, coarse_.grid.chunk) + q * kChunk, to, static_cast<int32_t>(n)});
                if (n < s.count) spans_.push_back({-1, to + n, static_cast<int32_t>(s.count - n)});
            }
        for (int64_t c = 0; c < inputs_; ++c) {
            if (c + 1 < inputs_) prefetch_block(kernels_, at(kernels_, coarse_.data, (c + 1) * kChannel + there), tiles_);
            kernels_.gather(channel_of(kernels_, coarse_, c), spans_.data(), static_cast<int64_t>(spans_.size()), 1,
                            scale_of(coarse_, c), offset_of(coarse_, c), slope_of(coarse_), pixels_ + c * tiles_);
        }
    }

    // The gradient of the fine pixels at one position of the stride in depth: fine_[row and column position][phase][output][tile].
    void load_fine(const std::vector<Segment>& rows, int position, bool partial) {
        if (partial) std::fill(fine_, fine_ + subs_ * kPhases * fine_pitch_, 0.0f);
        spans_.clear();
        for (int64_t k = 0; k < subs_ * kPhases; ++k)
            for (const Segment& s : rows) plan_row(s, position, k / kPhases, k % kPhases, k * fine_pitch_ + s.lane);
        const Kernels& floats = *kernels_.floats();
        for (int64_t o = 0; o < outputs_; ++o) {
            if (o + 1 < outputs_) prefetch_fine(floats, job_.gradient, o + 1, rows, job_.upsample.stride, position);
            floats.gather(channel_of(floats, job_.gradient, o), spans_.data(), static_cast<int64_t>(spans_.size()), sw_, 1.0f, 0.0f,
                          1.0f, fine_ + o * tiles_);
        }
    }

    void plan_row(const Segment& s, int position, int64_t sub, int64_t phase, int64_t to) {
        const Grid& fine = job_.gradient.grid;
        const int64_t slice = s.slice * job_.upsample.stride[0] + position;
        const int64_t y = sh_ * (kTile * s.row + phase / kTile) + sub / sw_, x = sw_ * (kTile * s.column + phase % kTile) + sub % sw_;
        // Coarse tile t of the segment is at column x + t * kTile * sw.
        int64_t count = x < fine.width && y < fine.height ? std::min(s.count, (fine.width - 1 - x) / (kTile * sw_) + 1) : 0;
        const int64_t tile = slice * fine.slice + y / kTile * fine.tiles_x + x / kTile;
        for (int64_t t = 0, n; t < count; t += n) {
            const int64_t here = tile + t * sw_;
            n = std::min(count - t, tiles_in_chunk(here, sw_));
            spans_.push_back({place(here, fine.chunk) + (y % kTile * kTile + x % kTile) * kChunk, to + t, static_cast<int32_t>(n)});
        }
        if (count < s.count) spans_.push_back({-1, to + count, static_cast<int32_t>(s.count - count)});
    }

    void multiply(int position, int sub) {
        const Upsample& up = job_.upsample;
        const SparseRows turned{job_.turned_start, job_.turned_output, job_.turned_index, static_cast<int32_t>(inputs_)};
        const SparseRows rows{up.start, up.output, up.index, up.outputs};
        const float *v[kPhases], *m[kPhases];
        for (int64_t q = 0; q < kPhases; ++q) {
            v[q] = pixels_ + q * coarse_pitch_;
            m[q] = fine_ + (sub * kPhases + q) * fine_pitch_;
            kernels_.sparse_product(m[q], products_ + q * coarse_pitch_, turned, job_.turned + position * up.connections, vectors_,
                                    position > 0);
        }
        kernels_.sparse_dots(v, m, kPhases, rows, sums_ + position * sums_pitch_, vectors_);
    }

    const Kernels& kernels_;
    const UpsampleGradientJob& job_;
    const Map& coarse_;
    const int sh_, sw_, subs_;
    const int vectors_;
    const int64_t tiles_, inputs_, outputs_, coarse_pitch_, fine_pitch_, sums_pitch_;
    std::vector<Span> spans_;
    float *pixels_ = nullptr, *products_ = nullptr, *fine_ = nullptr, *sums_ = nullptr;
};

}  // namespace

int64_t run_upsample_gradient(const Kernels& kernels, const UpsampleGradientJob& job, float* scratch, int threads) {
    return run_blocks<UpsampleGradient>(kernels, job, job.upsample.coarse.grid, kUpsampleGradient, scratch, threads);
}

}  // namespace e2e
