// Between levels: upsampling by sparse transposed convs, max-pooling, and the way in from an image.
#include <algorithm>

#include "driver.h"

namespace e2e {
namespace {

bool divides_tile(int stride) { return stride == 1 || stride == 2 || stride == 4; }

// Tiles first ... first + count - 1 of a slice, at most a chunk of them.
struct Piece {
    int64_t first, count;
};

std::vector<Piece> cut_slice(int64_t tiles) {
    std::vector<Piece> pieces;
    for (int64_t first = 0; first < tiles; first += kChunk)
        pieces.push_back({first, std::min<int64_t>(kChunk, tiles - first)});
    return pieces;
}

// Output channels that move together.
struct Group {
    int32_t first, last;
    int64_t shift;
};

std::vector<Group> cut_groups(const int32_t* shift, int32_t channels) {
    std::vector<Group> groups;
    for (int32_t c = 0; c < channels; ++c) {
        if (groups.empty() || groups.back().shift != shift[c]) groups.push_back({c, c, shift[c]});
        groups.back().last = c + 1;
    }
    return groups;
}

class Upsampler {
  public:
    Upsampler(const Kernels& kernels, const Upsample& job, const Grid& fine, const UpsampleTarget& target, float* scratch)
        : kernels_(kernels), job_(job), fine_(fine), target_(target), e_(scratch), down_(kTile / job.stride[1]),
          across_(kTile / job.stride[2]) {}

    static int64_t floats(const Upsample& job) {
        return kTile / job.stride[1] * (kTile / job.stride[2]) * job.coarse.channels * kChunk + kCacheLine;
    }

    // The coarse pixels under a piece of fine tiles: e[v * across + u][channel][tile].
    void load(int64_t slice, const Piece& piece) {
        const Map& coarse = job_.coarse;
        const int ways = job_.stride[2];
        const int64_t at_v = across_ * coarse.channels * kChunk, first_tile = slice / job_.stride[0] * coarse.grid.slice;
        rows_.clear();
        for (int64_t done = 0; done < piece.count;) {
            const int64_t row = (piece.first + done) / fine_.tiles_x, column = (piece.first + done) % fine_.tiles_x;
            const int64_t count = std::min(piece.count - done, fine_.tiles_x - column), skip = column % ways;
            for (int v = 0; v < down_; ++v) {
                const int64_t y = down_ * row + v, tile = first_tile + y / kTile * coarse.grid.tiles_x + column / ways;
                push_rows(tile, skip, count, v * at_v + done, static_cast<int>(y % kTile));
            }
            done += count;
        }
        for (int64_t c = 0; c < coarse.channels; ++c) {
            prefetch_part(channel_of(coarse, c), rows_[0].tile + kChunk);
            if (c + kSoon < coarse.channels) prefetch_rows(channel_of(coarse, c + kSoon));
            kernels_.expand(channel_of(coarse, c), coarse.grid.chunk, rows_.data(), static_cast<int64_t>(rows_.size()), ways,
                            scale_of(coarse, c), offset_of(coarse, c), slope_of(coarse), e_ + c * kChunk,
                            coarse.channels * kChunk);
        }
    }

    // Output channels of the piece that was loaded, to slice `to` of the target.
    void multiply(int64_t slice, const Piece& piece, const Group& group, int64_t to) const {
        const int sd = job_.stride[0], sh = job_.stride[1], sw = job_.stride[2], subs = sh * sw;
        const SparseRows rows{job_.start, job_.output, job_.index, job_.outputs};
        const float* weight = job_.weight + slice % sd * job_.connections * subs;
        for (int64_t done = 0; done < piece.count;) {  // as far as the target's chunks go
            const int64_t at = (to - target_.first_slice) * fine_.slice + piece.first + done;
            const int64_t count = std::min(piece.count - done, kChunk - (at & (kChunk - 1)));
            const float* e = e_ + done;
            for (int v = 0; v < down_; ++v) {
                for (int u = 0; u < across_; ++u, e += job_.coarse.channels * kChunk) {
                    float* out[kPhases];
                    for (int s = 0; s < subs; ++s)
                        out[s] = target_.data + place(at, target_.chunk) +
                                 ((v * sh + s / sw) * kTile + u * sw + s % sw) * kChunk;
                    kernels_.upsample_product(e, rows, group.first, group.last, weight, subs, kChunk, static_cast<int>(count),
                                              out);
                }
            }
            done += count;
        }
    }

  private:
    // As many as the chunks that the coarse tiles lie in.
    void push_rows(int64_t tile, int64_t skip, int64_t count, int64_t at, int row) {
        const int ways = job_.stride[2];
        while (count > 0) {
            const int64_t n = std::min(divide_up(skip + count, ways), tiles_in_chunk(tile, 1));
            const int64_t kept = std::min(count, n * ways - skip);
            rows_.push_back({tile, n, skip, kept, at, row});
            tile += n;
            count -= kept;
            at += kept;
            skip = 0;
        }
    }

    // A piece reads a part of a coarse chunk; ask for as large a part of the next one.
    void prefetch_part(const float* channel, int64_t tile) const {
        const int64_t part = kChunk / (job_.stride[1] * job_.stride[2]);
        if (tile >= job_.coarse.grid.tiles) return;
        prefetch(channel + place(tile & ~int64_t{kChunk - 1}, job_.coarse.grid.chunk) + (tile & (kChunk - part)) * kPhases,
                 part * kPhases);
    }

    void prefetch_rows(const float* channel) const {
        for (int64_t t = rows_.front().tile & ~(kCacheLine - 1); t < rows_.back().tile + rows_.back().n; t += kCacheLine)
            for (int q = 0; q < kPhases; ++q) prefetch(channel + place(t, job_.coarse.grid.chunk) + q * kChunk, 1);
    }

    static constexpr int64_t kSoon = 2;  // channels ahead
    const Kernels& kernels_;
    const Upsample& job_;
    const Grid& fine_;
    const UpsampleTarget& target_;
    float* e_;
    const int down_, across_;
    std::vector<RowPiece> rows_;
};

// Strides that do not divide a tile: pixel by pixel.
void upsample_plainly(const Upsample& job, const Grid& fine, int64_t slice, const Piece& piece, const Group& group, int64_t to,
                      const UpsampleTarget& target) {
    const int64_t at = (to - target.first_slice) * fine.slice + piece.first;
    const int sd = job.stride[0], sh = job.stride[1], sw = job.stride[2];
    const Map& coarse = job.coarse;
    const float slope = slope_of(coarse);
    for (int64_t o = group.first; o < group.last; ++o) {
        for (int64_t item = 0; item < piece.count * kPhases; ++item) {
            const int64_t t = piece.first + item / kPhases, phase = item % kPhases;
            const int64_t y = t / fine.tiles_x * kTile + phase / kTile, x = t % fine.tiles_x * kTile + phase % kTile;
            if (y >= fine.height || x >= fine.width) continue;
            const int64_t cy = y / sh, cx = x / sw;
            const int64_t tile = slice / sd * coarse.grid.slice + cy / kTile * coarse.grid.tiles_x + cx / kTile;
            const int64_t from = place(tile, coarse.grid.chunk) + (cy % kTile * kTile + cx % kTile) * kChunk;
            const int64_t sub = (slice % sd * job.connections * sh + y % sh) * sw + x % sw;
            float total = 0;
            for (int32_t k = job.start[o]; k < job.start[o + 1]; ++k) {
                const int64_t c = job.index[k];
                const float value = channel_of(coarse, c)[from] * scale_of(coarse, c) + offset_of(coarse, c);
                total += job.weight[sub + int64_t{k} * sh * sw] * std::max(value, value * slope);
            }
            target.data[o * kChannel + place(at + item / kPhases, target.chunk) + phase * kChunk] = total;
        }
    }
}

}  // namespace

int64_t upsample_scratch(const Upsample& job) {
    return divides_tile(job.stride[1]) && divides_tile(job.stride[2]) ? Upsampler::floats(job) : 0;
}

void upsample_slices(const Kernels& kernels, const Upsample& job, const Grid& fine, const int32_t* shift,
                     const UpsampleTarget& target, float* scratch, int thread, int threads) {
    const bool direct = divides_tile(job.stride[1]) && divides_tile(job.stride[2]);
    const std::vector<Piece> pieces = cut_slice(fine.slice);
    const std::vector<Group> groups = cut_groups(shift, job.outputs);
    const auto less = [](const Group& a, const Group& b) { return a.shift < b.shift; };
    const int64_t lowest = std::min_element(groups.begin(), groups.end(), less)->shift;
    const int64_t highest = std::max_element(groups.begin(), groups.end(), less)->shift;
    const int64_t begin = std::max<int64_t>(0, target.first_slice - highest);
    const int64_t end = std::min<int64_t>(fine.depth, target.last_slice - lowest);
    const int64_t n_pieces = static_cast<int64_t>(pieces.size());
    Upsampler upsampler(kernels, job, fine, target, scratch);
    const Share share(std::max<int64_t>(0, end - begin) * n_pieces, thread, threads);
    for (int64_t item = share.first; item < share.last; ++item) {
        const int64_t slice = begin + item / n_pieces;
        const Piece& piece = pieces[static_cast<size_t>(item % n_pieces)];
        if (direct) upsampler.load(slice, piece);
        for (const Group& group : groups) {
            const int64_t to = slice + group.shift;
            if (to < target.first_slice || to >= target.last_slice) continue;
            if (direct) {
                upsampler.multiply(slice, piece, group, to);
            } else {
                upsample_plainly(job, fine, slice, piece, group, to, target);
            }
        }
    }
}

namespace {

class Pooling {
  public:
    Pooling(const Kernels& kernels, const PoolJob& job)
        : kernels_(kernels), job_(job), sd_(job.stride[0]), sh_(job.stride[1]), sw_(job.stride[2]),
          window_(job.halved ? sd_ : sd_ * sh_ * sw_), channel_(job.halved ? kHalvedChannel : kChannel),
          in_(static_cast<size_t>(window_)) {}

    // All channels of one row of coarse tiles.
    void row(int64_t d, int64_t ty) {
        plan(d, ty);
        for (int64_t c = 0; c < job_.in.channels; ++c) {
            if (c + 2 < job_.in.channels) ask_for(c + 2, d, ty);
            const float* from = job_.in.data + c * channel_;
            float* to = channel_of(job_.out, c);
            for (size_t r = 0; r < runs_.size(); ++r) {
                for (size_t i = 0; i < in_.size(); ++i) in_[i] = from + places_[r * in_.size() + i];
                kernels_.pool_row(in_.data(), window_, sw_, runs_[r].count, job_.gamma[c] >= 0, to + runs_[r].place);
            }
        }
    }

  private:
    struct Run {
        int64_t place, count;  // of coarse tiles in one phase, none of whose pixels leave their chunk
    };

    // The same for every channel: runs, and where the pixels of the window of the first tile lie.
    void plan(int64_t d, int64_t ty) {
        const Grid &fine = job_.in.grid, &coarse = job_.out.grid;
        const int64_t to = d * coarse.slice + ty * coarse.tiles_x;
        runs_.clear();
        places_.clear();
        for (int q = 0; q < kPhases; ++q) {
            const int64_t n = divide_up(coarse.width - q % kTile, kTile);  // the last tile may have less columns
            if (kTile * ty + q / kTile >= coarse.height) continue;
            for (int64_t k = 0, count; k < n; k += count) {
                count = std::min(n - k, tiles_in_chunk(to + k, 1));
                for (int i = 0; i < window_; ++i) {
                    const int a = job_.halved ? i : i / sw_ / sh_, in_plane = job_.halved ? 0 : i % (sw_ * sh_);
                    const int64_t y = sh_ * (kTile * ty + q / kTile) + in_plane / sw_, x = sw_ * (q % kTile) + in_plane % sw_;
                    const int64_t tile = (sd_ * d + a) * fine.slice + y / kTile * fine.tiles_x + x / kTile + sw_ * k;
                    count = std::min(count, tiles_in_chunk(tile, sw_));
                    const int64_t phase = job_.halved ? y % kTile / 2 * 2 + x % kTile / 2 : y % kTile * kTile + x % kTile;
                    places_.push_back(place(tile, fine.chunk) + phase * kChunk);
                }
                runs_.push_back({place(to + k, coarse.chunk) + q * kChunk, count});
            }
        }
    }

    void ask_for(int64_t c, int64_t d, int64_t ty) const {
        const Grid& fine = job_.in.grid;
        for (int a = 0; a < sd_; ++a) {
            const int64_t tile = (sd_ * d + a) * fine.slice + ty * sh_ * fine.tiles_x;
            const int64_t end = std::min(fine.tiles, tile + sh_ * fine.tiles_x);
            for (int64_t t = tile & ~int64_t{kChunk - 1}; t < end; t += kChunk)
                prefetch(job_.in.data + c * channel_ + place(t, fine.chunk), channel_);
        }
    }

    const Kernels& kernels_;
    const PoolJob& job_;
    const int sd_, sh_, sw_, window_;
    const int64_t channel_;
    std::vector<const float*> in_;
    std::vector<Run> runs_;
    std::vector<int64_t> places_;
};

}  // namespace

void run_pool(const Kernels& kernels, const PoolJob& job, int threads) {
    const Grid& coarse = job.out.grid;
    #pragma omp parallel num_threads(threads)
    {
        StopWatch watch(job.seconds, omp_get_thread_num());
        Pooling pooling(kernels, job);
        const Share share(int64_t{coarse.depth} * coarse.tiles_y, omp_get_thread_num(), omp_get_num_threads());
        for (int64_t item = share.first; item < share.last; ++item) pooling.row(item / coarse.tiles_y, item % coarse.tiles_y);
        watch.lap(kPool);
    }
}

void run_import(const float* image, const Map& out, int threads) {
    const Grid& grid = out.grid;
    const int64_t rows = int64_t{grid.depth} * grid.height;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t item = 0; item < out.channels * rows; ++item) {
        const int64_t c = item / rows, d = item % rows / grid.height, y = item % grid.height;
        const float* in = image + item * grid.width;
        float* to = channel_of(out, c) + y % kTile * kTile * kChunk;
        const int64_t tile = d * grid.slice + y / kTile * grid.tiles_x;
        for (int64_t x = 0; x < grid.width; ++x) to[place(tile + x / kTile, grid.chunk) + x % kTile * kChunk] = in[x];
    }
}

}  // namespace e2e
