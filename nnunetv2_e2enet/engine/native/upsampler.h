// The upward flow: sparse transposed convs whose kernel is their stride.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "driver.h"
#include "window.h"

namespace e2e {

// Strides of 1 or 2 in the plane: a coarse tile becomes whole fine tiles. Vectors run over coarse tiles, whatever rows and slices
// they lie in; only what is stored is cut into the rows of fine tiles.
class Upsampler {
  public:
    Upsampler(const Kernels& kernels, const Upsample& job, const Grid& fine, const UpsampleTarget& target, float* scratch)
        : kernels_(kernels), job_(job), fine_(fine), target_(target), pixels_(scratch),
          pitch_(odd_lines(job.coarse.channels * kernels.upsample_tiles)) {}

    static bool takes(const Upsample& job) { return job.stride[1] <= 2 && job.stride[2] <= 2; }
    static int64_t floats(const Kernels& kernels, const Upsample& job) {
        return kPhases * odd_lines(job.coarse.channels * kernels.upsample_tiles);
    }

    // The block of coarse tiles from `first` on, activated.
    void load(int64_t first) {
        const Map& coarse = job_.coarse;
        const int64_t there = place(first, coarse.grid.chunk);
        for (int64_t c = 0; c < coarse.channels; ++c)
            kernels_.activate_block(at(kernels_, coarse.data, c * kChannel + there), scale_of(coarse, c), offset_of(coarse, c),
                                    slope_of(coarse), pixels_ + c * kernels_.upsample_tiles, pitch_);
        rows_ = cut_rows(coarse.grid, first, kernels_.upsample_tiles);
    }

    // Output channels of the block that was loaded, at one position of the stride in depth.
    void multiply(int position, const Group& group) {
        const int sh = job_.stride[1], sw = job_.stride[2];
        for (int below = 0; below < sh; ++below) {
            pieces_.cut(rows_, fine_, job_.stride, position + group.shift, below, target_.first_slice, target_.last_slice,
                        target_.chunk, kernels_.lanes, kernels_.upsample_tiles, target_.ring);
            if (pieces_.pieces.empty()) continue;
            for (int row = below * kTile / sh; row < (below + 1) * kTile / sh; ++row)
                for (int column = 0; column < kTile / sw; ++column) multiply_pixel(position, group, row, column);
        }
    }

  private:
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

// The upward flow under one thread's blocks of tiles: a ring that stays in its second-level cache. Channels that move alike are
// computed a block of coarse tiles at a time, as far as the next block of the convolution reads.
class Band {
  public:
    // Of the ring, if the convolution takes so many at a time.
    static int64_t tiles(const Kernels& kernels, const Upsample& job, const Grid& fine, int64_t block) {
        const int64_t rows = divide_up(kernels.upsample_tiles - 1, job.coarse.grid.tiles_x) + 1;  // that coarse tiles lie in
        return round_up(block + 2 * (fine.tiles_x + 1) + rows * job.stride[1] * fine.tiles_x, kChunk);
    }

    // To be read from tile `first` on, and the row above it.
    Band(const Kernels& kernels, const Upsample& job, const Grid& fine, const int32_t* shift, const UpsampleTarget& ring,
         float* scratch, int64_t first)
        : kernels_(kernels), tiles_(kernels.upsample_tiles), job_(job), fine_(fine), target_(ring), upsampler_(kernels, job, fine, target_, scratch) {
        const int64_t tile = std::max<int64_t>(0, first - fine.tiles_x - 1), row = tile % fine.slice / fine.tiles_x;
        for (const Group& group : cut_groups(shift, job.outputs))
            fronts_.push_back({group, tile / fine.slice, row / job.stride[1] * job.coarse.grid.tiles_x, 0});
    }
    Band(const Band&) = delete;
    Band& operator=(const Band&) = delete;

    // Computes what is missing of all tiles before `end`.
    void reach(int64_t end) {
        for (Front& front : fronts_)
            while (front.done < end) advance(front);
    }

    // Of what computing all tiles before `end` will read, the part a chunk further on.
    void look_ahead(int64_t end, std::vector<const char*>& pieces) const {
        const Map& coarse = job_.coarse;
        for (const Front& front : fronts_) {
            const int64_t source = front.slice - front.group.shift;
            if (front.done >= end || source < 0 || source >= fine_.depth) continue;
            const int64_t tile = (source / job_.stride[0] * coarse.grid.slice + front.coarse) / tiles_ * tiles_ + kChunk;
            if (tile < coarse.grid.tiles) push_pieces(kernels_, coarse.data, coarse.channels, coarse.grid.chunk, tile, tiles_, pieces);
        }
    }

  private:
    struct Front {
        Group group;
        int64_t slice, coarse;  // of the fine map; tiles of the coarse slice under it that are done
        int64_t done;           // fine tiles
    };

    void advance(Front& front) {
        const Grid& coarse = job_.coarse.grid;
        const int64_t source = front.slice - front.group.shift, begin = source / job_.stride[0] * coarse.slice;
        if (source < 0 || source >= fine_.depth) {
            front.coarse = coarse.slice;
        } else {
            const int64_t block = (begin + front.coarse) / tiles_;
            if (block != loaded_) upsampler_.load(block * tiles_);
            loaded_ = block;
            target_.first_slice = front.slice;
            target_.last_slice = front.slice + 1;
            upsampler_.multiply(static_cast<int>(source % job_.stride[0]), front.group);
            front.coarse = std::min(coarse.slice, (block + 1) * tiles_ - begin);
        }
        front.done = front.slice * fine_.slice + front.coarse / coarse.tiles_x * job_.stride[1] * fine_.tiles_x;
        if (front.coarse < coarse.slice) return;
        front.coarse = 0;
        front.done = ++front.slice * fine_.slice;
    }

    const Kernels& kernels_;
    const int64_t tiles_;
    const Upsample& job_;
    const Grid& fine_;
    UpsampleTarget target_;
    Upsampler upsampler_;
    std::vector<Front> fronts_;
    int64_t loaded_ = -1;
};

// Rings for all threads of a convolution.
class Bands {
  public:
    Bands(const Kernels& kernels, const ConvJob& job) : kernels_(kernels), job_(job) {
        for (int flow = 0; flow < job.upward; ++flow) first_channel_ += job.flows[flow].channels;
    }

    static bool takes(const ConvJob& job) { return job.upward >= 0 && Upsampler::takes(job.upsample); }

    void reserve(Scratch& scratch, int threads, int64_t block_tiles) {
        tiles_ = Band::tiles(kernels_, job_.upsample, job_.out.grid, block_tiles);
        ring_floats_ = divide_up(tiles_ * kPhases * job_.upsample.outputs * kernels_.pixel_bytes, sizeof(float));
        rings_ = scratch.take(ring_floats_ * threads);
        coarse_ = scratch.take(Upsampler::floats(kernels_, job_.upsample) * threads);
    }

    // One thread's, to be read from tile `first` on: the channels of the upward flow will lie in it.
    void start(std::optional<Band>& band, Channel* channels, int64_t first, int thread) const {
        const int64_t chunk = int64_t{kChannel} * job_.upsample.outputs;
        const UpsampleTarget ring{rings_ + thread * ring_floats_, chunk, 0, 0, tiles_};
        for (int32_t c = 0; c < job_.upsample.outputs; ++c) {
            Channel& channel = channels[first_channel_ + c];
            channel.data = at(kernels_, ring.data, c * kChannel);
            channel.chunk = chunk;
            channel.ring = tiles_;
        }
        band.emplace(kernels_, job_.upsample, job_.out.grid, job_.shift + first_channel_, ring,
                     coarse_ + thread * Upsampler::floats(kernels_, job_.upsample), first);
    }

  private:
    const Kernels& kernels_;
    const ConvJob& job_;
    int64_t tiles_ = 0;  // of a ring
    int64_t first_channel_ = 0, ring_floats_ = 0;
    float *rings_ = nullptr, *coarse_ = nullptr;
};

}  // namespace e2e
