// Between levels: upsampling by sparse transposed convs, max-pooling, and the way in from an image.
#include <algorithm>

#include "blocks.h"
#include "driver.h"

namespace e2e {
namespace {

// Strides of 1 or 2 in the plane: a coarse tile becomes whole fine tiles. Vectors run over coarse tiles, whatever rows and slices
// they lie in; only what is stored is cut into the rows of fine tiles.
class Upsampler {
  public:
    Upsampler(const Kernels& kernels, const Upsample& job, const Grid& fine, const UpsampleTarget& target, float* scratch)
        : kernels_(kernels), job_(job), fine_(fine), target_(target), pixels_(scratch),
          pitch_(pitch(kernels, job)) {}

    static bool takes(const Upsample& job) { return job.stride[1] <= 2 && job.stride[2] <= 2; }
    static int64_t floats(const Kernels& kernels, const Upsample& job) {
        return kPhases * pitch(kernels, job);
    }

    // The block of coarse tiles from `first` on, activated.
    void load(int64_t first) {
        const Map& coarse = job_.coarse;
        const int64_t there = place(first, coarse.grid.chunk);
        for (int64_t c = 0; c < coarse.channels; ++c) {
            const auto block = [&](int64_t channel) { return at(kernels_, coarse.data, channel * kChannel + there); };
            if (c + 1 < coarse.channels) prefetch_block(kernels_, block(c + 1), kernels_.upsample_tiles);
            kernels_.activate_block(block(c), scale_of(coarse, c), offset_of(coarse, c), slope_of(coarse),
                                    pixels_ + c * kernels_.upsample_tiles, pitch_);
        }
        rows_ = cut_rows(coarse.grid, first, kernels_.upsample_tiles);
    }

    // Output channels of the block that was loaded, at one position of the stride in depth.
    void multiply(int position, const Group& group) {
        const int sh = job_.stride[1], sw = job_.stride[2];
        for (int below = 0; below < sh; ++below) {
            pieces_.cut(rows_, fine_, job_.stride, position + group.shift, below, target_.first_slice, target_.last_slice,
                        target_.chunk, kernels_.lanes, kernels_.upsample_tiles);
            if (pieces_.pieces.empty()) continue;
            for (int row = below * kTile / sh; row < (below + 1) * kTile / sh; ++row)
                for (int column = 0; column < kTile / sw; ++column) multiply_pixel(position, group, row, column);
        }
    }

  private:
    static int64_t pitch(const Kernels& kernels, const Upsample& job) {
        return odd_lines(int64_t{job.coarse.channels} * kernels.upsample_tiles);
    }

    void multiply_pixel(int position, const Group& group, int row, int column) const {
        const int sh = job_.stride[1], sw = job_.stride[2];
        UpsampleTask task{};
        task.ways = sw;
        task.subs = sh * sw;
        for (int way = 0; way < sw; ++way) task.pixels[way] = pixels_ + (row * kTile + column + way * kTile / sw) * pitch_;
        task.weight = job_.weight + position * job_.connections * task.subs;
        task.first_row = group.first;
        task.last_row = group.last;
        for (int s = 0; s < task.subs; ++s)
            task.out[s] = at(kernels_, target_.data, ((sh * row + s / sw) % kTile * kTile + sw * column + s % sw) * kChunk);
        task.pieces = pieces_.pieces.data();
        task.first_piece = pieces_.first.data();
        kernels_.upsample_product(task, {job_.start, job_.output, job_.index, job_.outputs});
    }

    const Kernels& kernels_;
    const Upsample& job_;
    const Grid& fine_;
    const UpsampleTarget& target_;
    float* pixels_;
    const int64_t pitch_;
    std::vector<Segment> rows_;
    Pieces pieces_;
};

// Other strides: pixel by pixel.
void upsample_plainly(const Kernels& kernels, const Upsample& job, const Grid& fine, int64_t slice, const Group& group,
                      const UpsampleTarget& target) {
    const int64_t first = (slice + group.shift - target.first_slice) * fine.slice;
    const int sd = job.stride[0], sh = job.stride[1], sw = job.stride[2];
    const Map& coarse = job.coarse;
    const float slope = slope_of(coarse);
    for (int64_t o = group.first; o < group.last; ++o) {
        for (int64_t item = 0; item < fine.slice * kPhases; ++item) {
            const int64_t t = item / kPhases, phase = item % kPhases;
            const int64_t y = t / fine.tiles_x * kTile + phase / kTile, x = t % fine.tiles_x * kTile + phase % kTile;
            if (y >= fine.height || x >= fine.width) continue;
            const int64_t cy = y / sh, cx = x / sw;
            const int64_t tile = slice / sd * coarse.grid.slice + cy / kTile * coarse.grid.tiles_x + cx / kTile;
            const int64_t from = place(tile, coarse.grid.chunk) + (cy % kTile * kTile + cx % kTile) * kChunk;
            const int64_t sub = (slice % sd * job.connections * sh + y % sh) * sw + x % sw;
            float total = 0;
            for (int32_t k = job.start[o]; k < job.start[o + 1]; ++k) {
                const int64_t c = job.index[k];
                const float pixel = load_pixel(kernels, coarse.data, c * kChannel + from);
                const float value = pixel * scale_of(coarse, c) + offset_of(coarse, c);
                total += job.weight[sub + int64_t{k} * sh * sw] * std::max(value, value * slope);
            }
            store_pixel(kernels, target.data, o * kChannel + place(first + t, target.chunk) + phase * kChunk, total);
        }
    }
}

}  // namespace

int64_t upsample_scratch(const Kernels& kernels, const Upsample& job) {
    return Upsampler::takes(job) ? Upsampler::floats(kernels, job) : 0;
}

void upsample_slices(const Kernels& kernels, const Upsample& job, const Grid& fine, const int32_t* shift,
                     const UpsampleTarget& target, float* scratch, int thread, int threads) {
    const std::vector<Group> groups = cut_groups(shift, job.outputs);
    const auto less = [](const Group& a, const Group& b) { return a.shift < b.shift; };
    const int64_t lowest = std::min_element(groups.begin(), groups.end(), less)->shift;
    const int64_t highest = std::max_element(groups.begin(), groups.end(), less)->shift;
    const int64_t begin = std::max<int64_t>(0, target.first_slice - highest);
    const int64_t end = std::min<int64_t>(fine.depth, target.last_slice - lowest);
    if (begin >= end) return;
    if (!Upsampler::takes(job)) {
        const Share share(end - begin, thread, threads);
        for (int64_t slice = begin + share.first; slice < begin + share.last; ++slice)
            for (const Group& group : groups)
                if (slice + group.shift >= target.first_slice && slice + group.shift < target.last_slice)
                    upsample_plainly(kernels, job, fine, slice, group, target);
        return;
    }
    Upsampler upsampler(kernels, job, fine, target, scratch);
    const int sd = job.stride[0], tiles = kernels.upsample_tiles;
    const int64_t first_block = begin / sd * job.coarse.grid.slice / tiles;
    const int64_t last_block = divide_up(divide_up(end, sd) * job.coarse.grid.slice, tiles);
    const Share share(last_block - first_block, thread, threads);
    for (int64_t block = first_block + share.first; block < first_block + share.last; ++block) {
        upsampler.load(block * tiles);
        for (int position = 0; position < sd; ++position)
            for (const Group& group : groups) upsampler.multiply(position, group);
    }
}

namespace {

class Pooling {
  public:
    Pooling(const Kernels& kernels, const PoolJob& job)
        : kernels_(kernels), job_(job), sd_(job.stride[0]), sh_(job.stride[1]), sw_(job.stride[2]),
          further_(job.halved ? sd_ - 1 : sd_ * sh_ * sw_ - 1), channel_(job.halved ? kHalvedChannel : kChannel) {}

    // Some channels of one chunk of coarse tiles.
    void chunk(int64_t index, const Share& channels) {
        plan(index * kChunk);
        for (int64_t c = channels.first; c < channels.last; ++c) {
            if (c + 1 < channels.last) prefetch_channel(c + 1);
            kernels_.pool(at(kernels_, job_.in.data, c * channel_), spans_.data(), static_cast<int64_t>(spans_.size()),
                          places_.data(), further_, sw_, job_.gamma[c] >= 0,
                          at(kernels_, job_.out.data, c * kChannel + index * job_.out.grid.chunk));
        }
    }

  private:
    // All of the chunks that pixels are read from.
    inline __attribute__((always_inline)) void prefetch_channel(int64_t c) const {
        for (const int64_t chunk : chunks_) {
            const int64_t there = chunk * job_.in.grid.chunk + c * channel_;
            const char* first = static_cast<const char*>(at(kernels_, job_.in.data, there));
            for (int64_t i = 0; i < channel_ * kernels_.pixel_bytes; i += 64) __builtin_prefetch(first + i, 0, 3);
        }
    }

    // The same for every channel: runs of coarse tiles in one phase, none of whose pixels leave their chunk, and where the
    // further pixels of the window of the first tile lie.
    void plan(int64_t first) {
        const Grid& coarse = job_.out.grid;
        spans_.clear();
        places_.clear();
        chunks_.clear();
        for (int q = 0; q < kPhases; ++q) {
            const int64_t end = std::min<int64_t>(first + kChunk, coarse.tiles);
            for (int64_t tile = first, count; tile < end; tile += count) {
                const int64_t column = tile % coarse.tiles_x, row = tile % coarse.slice / coarse.tiles_x;
                count = std::min(end - tile, coarse.tiles_x - column);
                const int64_t pixels = divide_up(coarse.width - q % kTile, kTile);  // the last tile may have less columns
                if (kTile * row + q / kTile >= coarse.height || column >= pixels) continue;
                plan_row(tile / coarse.slice, row, column, std::min(count, pixels - column), q, tile - first);
            }
        }
    }

    void plan_row(int64_t slice, int64_t row, int64_t column, int64_t count, int q, int64_t lane) {
        const Grid& fine = job_.in.grid;
        for (int64_t k = 0, n; k < count; k += n) {
            n = count - k;
            int64_t from = 0;
            for (int i = 0; i <= further_; ++i) {
                const int a = job_.halved ? i : i / sw_ / sh_, in_plane = job_.halved ? 0 : i % (sw_ * sh_);
                const int64_t y = sh_ * (kTile * row + q / kTile) + in_plane / sw_;
                const int64_t x = sw_ * (kTile * (column + k) + q % kTile) + in_plane % sw_;
                const int64_t tile = (sd_ * slice + a) * fine.slice + y / kTile * fine.tiles_x + x / kTile;
                const int64_t phase = job_.halved ? y % kTile / 2 * 2 + x % kTile / 2 : y % kTile * kTile + x % kTile;
                const int64_t there = place(tile, fine.chunk) + phase * kChunk;
                n = std::min(n, tiles_in_chunk(tile, sw_));
                const int64_t chunk = there / fine.chunk;
                if (std::find(chunks_.begin(), chunks_.end(), chunk) == chunks_.end()) chunks_.push_back(chunk);
                if (i == 0) from = there;
                if (i > 0) places_.push_back(there);
            }
            spans_.push_back({from, q * kChunk + lane + k, static_cast<int32_t>(n)});
        }
    }

    const Kernels& kernels_;
    const PoolJob& job_;
    const int sd_, sh_, sw_, further_;  // pixels of the window but the first
    const int64_t channel_;
    std::vector<Span> spans_;
    std::vector<int64_t> places_, chunks_;
};

}  // namespace

int64_t run_pool(const Kernels& kernels, const PoolJob& job, float* scratch, int threads) {
    if (!scratch) return 0;
    Failure failure;
    #pragma omp parallel num_threads(threads)
    {
        StopWatch watch(job.seconds, omp_get_thread_num());
        failure.guard([&] {
            Pooling pooling(kernels, job);
            const ChunkShare share(job.out.grid, job.out.channels, omp_get_thread_num(), omp_get_num_threads());
            for (int64_t chunk = share.first; chunk < share.last; ++chunk) pooling.chunk(chunk, share.channels(chunk));
        });
        watch.lap(kPool);
    }
    failure.rethrow();
    return 0;
}

void run_import(const Kernels& kernels, const float* image, float factor, const Map& out, int threads) {
    const Grid& grid = out.grid;
    const int64_t rows = int64_t{grid.depth} * grid.height;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t item = 0; item < out.channels * rows; ++item) {
        const int64_t c = item / rows, d = item % rows / grid.height, y = item % grid.height;
        const float* in = image + item * grid.width;
        const int64_t tile = d * grid.slice + y / kTile * grid.tiles_x, row = c * kChannel + y % kTile * kTile * kChunk;
        for (int64_t x = 0; x < grid.width; ++x)
            store_pixel(kernels, out.data, row + place(tile + x / kTile, grid.chunk) + x % kTile * kChunk, factor * in[x]);
    }
}

}  // namespace e2e
