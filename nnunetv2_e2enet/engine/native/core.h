// Data that the driver and the kernels share. Plain structs; see docs/engine.md for the layout of feature maps.
#pragma once

#include <cstdint>

namespace e2e {

// A plane is cut into tiles of 4 x 4 pixels. A channel is stored as 16 phase planes, one for each position in the tile
// (phase = 4 * row + column); a phase plane holds one float per tile, in the order (slice, tile row, tile column).
constexpr int kTile = 4;
constexpr int kPhases = 16;
constexpr int kPoints = 36;     // of the 6 x 6 transformed tile of Winograd's F(4 x 4, 3 x 3)
constexpr int kMaxVectors = 5;  // vectors of tiles in a block
constexpr int kDenseRows = 6;   // output maps that the dense product computes together

struct Grid {
    int32_t depth, height, width;
    int32_t tiles_y, tiles_x;
    int64_t slice;  // tiles of one slice
    int64_t tiles;  // of all slices
    int64_t pitch;  // floats from one phase plane to the next
};

// One input channel of a convolution, its depth shift applied: tile f of the output's grid finds phase q at
// base[q * pitch + f] for lo <= f < hi, and zeros elsewhere. The producer's norm is value * scale + offset.
struct Channel {
    const float* base;
    int64_t pitch;
    int64_t lo, hi;
    float scale, offset, slope;
};

// Sums around a value of the channel's own, so that nothing cancels when the mean is large.
struct Statistics {
    double sum, square;
    int64_t count;
    float center;
    int32_t started;
};

// Connections by output map: row r feeds output[r] with connections start[r] ... start[r + 1] - 1.
struct SparseRows {
    const int32_t* start;
    const int32_t* output;
    const int32_t* index;  // input map of a connection
    int32_t rows;
};

struct Kernels {
    int lanes;
    // V[point][channel][tile of the block] = transformed input
    void (*input_transform)(const Channel* channels, int n, const Grid& grid, int64_t first, int vectors, float* v,
                            int64_t v_pitch);
    // M[output][tile] = (or +=) sum over connections of weight * V[index][tile]
    void (*sparse_product)(const float* v, float* m, const SparseRows& rows, const float* weight, int vectors, bool add);
    // The same over `taps` inputs with every connection present; weight[group][tap][channel][kDenseRows].
    void (*dense_product)(const float* const* v, int taps, int inputs, const float* weight, int first_group, int last_group,
                          int outputs, float* m, int vectors);
    // Pixels of output maps from M[point][output][tile], and their statistics. `stream`: past the caches.
    void (*output_transform)(const float* m, int64_t m_pitch, int first_output, int last_output, const Grid& grid,
                             int64_t first, int vectors, float* out, bool stream, Statistics* statistics);
    // Pixels of one phase that were computed directly, and their statistics.
    void (*store_phase)(const float* m, int outputs, const Grid& grid, int64_t first, int vectors, int phase, float* out,
                        Statistics* statistics);
    // out[row][sub][tile] = sum over connections of weight[connection][sub] * e[index][tile]; the first `tiles` are written.
    void (*upsample_product)(const float* e, const SparseRows& rows, int first_row, int last_row, const float* weight,
                             int subs, int tiles, float* const* out, int64_t out_stride);
    // out[k] = activated in[k * stride]
    void (*activate_row)(const float* in, int stride, int64_t n, float scale, float offset, float slope, float* out);
    // out[k * ways + w] = activated in[w][k]
    void (*interleave_row)(const float* const* in, int ways, int64_t n, float scale, float offset, float slope, float* out);
    // out[k] = largest (or smallest) of in[i][k * stride]
    void (*pool_row)(const float* const* in, int count, int stride, int64_t n, bool largest, float* out);
    // out[4 * k + i] = in[i][k]
    void (*pixels_row)(const float* in, int64_t in_stride, int64_t tiles, int64_t pixels, float* out);
};

const Kernels* kernels_avx512();
const Kernels* kernels_avx2();
const Kernels* kernels_generic();

}  // namespace e2e
