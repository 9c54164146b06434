// Between levels: upsampling by sparse transposed convs, max-pooling, and the way in from an image.
#include <algorithm>

#include "driver.h"

namespace e2e {
namespace {

constexpr int64_t kUpsampleTiles = 80;  // of the fine grid in one product
constexpr int kMaxWays = 4;             // strides 1, 2 and 4 divide a tile; others take the slow road

bool divides_tile(int stride) { return stride == 1 || stride == 2 || stride == 4; }

// A piece of a slice: whole rows of tiles, or a part of one row.
struct Piece {
    int64_t row, rows, column, columns;
};

std::vector<Piece> cut_slice(const Grid& grid) {
    std::vector<Piece> pieces;
    if (grid.tiles_x > kUpsampleTiles) {
        for (int64_t row = 0; row < grid.tiles_y; ++row)
            for (int64_t x = 0; x < grid.tiles_x; x += kUpsampleTiles)
                pieces.push_back({row, 1, x, std::min(kUpsampleTiles, grid.tiles_x - x)});
        return pieces;
    }
    const int64_t rows = kUpsampleTiles / grid.tiles_x;
    for (int64_t row = 0; row < grid.tiles_y; row += rows)
        pieces.push_back({row, std::min(rows, grid.tiles_y - row), 0, grid.tiles_x});
    return pieces;
}

// The coarse pixels under a piece of fine tiles: e[v * across + u][channel][tile].
void expand(const Kernels& kernels, const Upsample& job, int64_t slice, const Piece& piece, int64_t pitch, float* e) {
    const Map& coarse = job.coarse;
    const int down = kTile / job.stride[1], across = kTile / job.stride[2], ways = job.stride[2];
    const int64_t count = divide_up(piece.columns, ways);
    for (int v = 0; v < down; ++v) {
        for (int u = 0; u < across; ++u) {
            for (int64_t c = 0; c < coarse.channels; ++c, e += pitch) {
                for (int64_t r = 0; r < piece.rows; ++r) {
                    const int64_t y = down * (piece.row + r) + v;
                    const int64_t tile = slice * coarse.grid.slice + y / kTile * coarse.grid.tiles_x + piece.column / ways;
                    const float* in[kMaxWays];
                    for (int k = 0; k < ways; ++k) in[k] = plane(coarse, c, y % kTile * kTile + across * k + u) + tile;
                    kernels.interleave_row(in, ways, count, scale_of(coarse, c), offset_of(coarse, c), slope_of(coarse),
                                           e + r * piece.columns);
                }
            }
        }
    }
}

void upsample_piece(const Kernels& kernels, const Upsample& job, const Grid& fine, int64_t slice, int64_t first_output,
                    int64_t last_output, const Piece& piece, float* target, int64_t pitch, float* e) {
    const int sd = job.stride[0], sh = job.stride[1], sw = job.stride[2], subs = sh * sw;
    const int64_t tiles = piece.rows * piece.columns, e_pitch = round_up(tiles, kernels.lanes);
    expand(kernels, job, slice / sd, piece, e_pitch, e);
    const SparseRows rows{job.start, job.output, job.index, job.outputs};
    const float* weight = job.weight + slice % sd * job.connections * subs;
    float* at = target + piece.row * fine.tiles_x + piece.column;
    for (int v = 0; v < kTile / sh; ++v) {
        for (int u = 0; u < kTile / sw; ++u, e += job.coarse.channels * e_pitch) {
            float* out[kPhases];
            for (int s = 0; s < subs; ++s) out[s] = at + ((v * sh + s / sw) * kTile + u * sw + s % sw) * pitch;
            kernels.upsample_product(e, rows, static_cast<int>(first_output), static_cast<int>(last_output), weight, subs,
                                     static_cast<int>(tiles), out, kPhases * pitch);
        }
    }
}

// Strides that do not divide a tile: pixel by pixel.
void upsample_plainly(const Upsample& job, const Grid& fine, int64_t slice, int64_t first_output, int64_t last_output,
                      const Piece& piece, float* target, int64_t pitch) {
    const int sd = job.stride[0], sh = job.stride[1], sw = job.stride[2];
    const Map& coarse = job.coarse;
    const float slope = slope_of(coarse);
    for (int64_t o = first_output; o < last_output; ++o) {
        for (int64_t y = piece.row * kTile; y < std::min<int64_t>(fine.height, (piece.row + piece.rows) * kTile); ++y) {
            const int64_t x_end = std::min<int64_t>(fine.width, (piece.column + piece.columns) * kTile);
            for (int64_t x = piece.column * kTile; x < x_end; ++x) {
                const int64_t cy = y / sh, cx = x / sw, phase = cy % kTile * kTile + cx % kTile;
                const int64_t tile = slice / sd * coarse.grid.slice + cy / kTile * coarse.grid.tiles_x + cx / kTile;
                const int64_t sub = (slice % sd * job.connections * sh + y % sh) * sw + x % sw;
                float total = 0;
                for (int32_t k = job.start[o]; k < job.start[o + 1]; ++k) {
                    const int64_t c = job.index[k];
                    const float value = plane(coarse, c, phase)[tile] * scale_of(coarse, c) + offset_of(coarse, c);
                    total += job.weight[sub + int64_t{k} * sh * sw] * std::max(value, value * slope);
                }
                target[(o * kPhases + y % kTile * kTile + x % kTile) * pitch + y / kTile * fine.tiles_x + x / kTile] = total;
            }
        }
    }
}

}  // namespace

int64_t upsample_scratch(const Kernels& kernels, const Upsample& job, const Grid& fine) {
    if (!divides_tile(job.stride[1]) || !divides_tile(job.stride[2])) return 0;
    const int64_t tiles = std::min(std::max<int64_t>(kUpsampleTiles, 1), std::max<int64_t>(fine.slice, kCacheLine));
    const int64_t phases = kTile / job.stride[1] * (kTile / job.stride[2]);
    return phases * job.coarse.channels * round_up(tiles, kernels.lanes) + 2 * kCacheLine;
}

void upsample_slices(const Kernels& kernels, const Upsample& job, const Grid& fine, const int32_t* shift,
                     const UpsampleTarget& target, float* scratch, int thread, int threads) {
    const std::vector<Piece> pieces = cut_slice(fine);
    const bool direct = divides_tile(job.stride[1]) && divides_tile(job.stride[2]);
    const int64_t slices = target.last_slice - target.first_slice, n_pieces = static_cast<int64_t>(pieces.size());
    for (int32_t first = 0, last; first < job.outputs; first = last) {  // channels that move together
        for (last = first + 1; last < job.outputs && shift[last] == shift[first];) ++last;
        const Share share(slices * n_pieces, thread, threads);
        for (int64_t item = share.first; item < share.last; ++item) {
            const int64_t to = item / n_pieces, slice = target.first_slice + to - shift[first];
            if (slice < 0 || slice >= fine.depth) continue;  // the convolution reads zeros there
            float* at = target.data + to * fine.slice;
            const Piece& piece = pieces[static_cast<size_t>(item % n_pieces)];
            if (direct) {
                upsample_piece(kernels, job, fine, slice, first, last, piece, at, target.pitch, scratch);
            } else {
                upsample_plainly(job, fine, slice, first, last, piece, at, target.pitch);
            }
        }
    }
}

void run_pool(const Kernels& kernels, const PoolJob& job, int threads) {
    const Grid &fine = job.in.grid, &coarse = job.out.grid;
    const int sd = job.stride[0], sh = job.stride[1], sw = job.stride[2];
    const int64_t rows = int64_t{coarse.depth} * coarse.tiles_y;
    #pragma omp parallel num_threads(threads)
    {
        StopWatch watch(job.seconds, omp_get_thread_num());
        std::vector<const float*> in(static_cast<size_t>(sd * sh * sw));
        const Share share(job.in.channels * rows, omp_get_thread_num(), omp_get_num_threads());
        for (int64_t item = share.first; item < share.last; ++item) {
            const int64_t c = item / rows, d = item % rows / coarse.tiles_y, ty = item % coarse.tiles_y;
            for (int q = 0; q < kPhases; ++q) {
                if (kTile * ty + q / kTile >= coarse.height) continue;
                // Of the last tile some columns may lie outside of both planes.
                const int64_t n = divide_up(coarse.width - q % kTile, kTile);
                if (n <= 0) continue;
                size_t count = 0;
                for (int a = 0; a < sd; ++a) {
                    for (int i = 0; i < sh * sw; ++i) {
                        const int64_t y = sh * (kTile * ty + q / kTile) + i / sw, x = sw * (q % kTile) + i % sw;
                        in[count++] = plane(job.in, c, y % kTile * kTile + x % kTile) + (sd * d + a) * fine.slice +
                                      y / kTile * fine.tiles_x + x / kTile;
                    }
                }
                float* out = job.out.data + (c * kPhases + q) * coarse.pitch + d * coarse.slice + ty * coarse.tiles_x;
                kernels.pool_row(in.data(), static_cast<int>(count), sw, n, job.gamma[c] >= 0, out);
            }
        }
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
        float* to = out.data + (c * kPhases + y % kTile * kTile) * grid.pitch + d * grid.slice + y / kTile * grid.tiles_x;
        for (int64_t x = 0; x < grid.width; ++x) to[x % kTile * grid.pitch + x / kTile] = in[x];
    }
}

}  // namespace e2e
