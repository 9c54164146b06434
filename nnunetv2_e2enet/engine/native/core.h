// Data that the driver and the kernels share. Plain structs; see docs/engine.md for the layout of feature maps.
#pragma once

#include <cstdint>

// Kernels and their namespace have another name for maps in float16.
#ifdef E2E_FLOAT16
#define E2E_VARIANT(name) name##_float16
#else
#define E2E_VARIANT(name) name
#endif

namespace e2e {

// A plane is cut into tiles of 4 x 4 pixels, numbered in the order (slice, tile row, tile column). A map is stored in chunks
// of 64 tiles; a chunk holds one channel after the other, and of each 64 pixels for each of the 16 positions in the tile
// (phase = 4 * row + column). So a vector of tiles is a vector load, and a block of tiles is one long read for all channels.
// Pixels are stored as floats, or as halves; everything is computed in float.
constexpr int kTile = 4;
constexpr int kPhases = 16;
constexpr int kChunk = 64;
constexpr int kChannel = kPhases * kChunk;  // pixels of a channel in a chunk
constexpr int kHalvedChannel = 4 * kChunk;   // the same of a map whose tiles were pooled to 2 x 2 pixels
constexpr int kPoints = 36;     // of the 6 x 6 transformed tile of Winograd's F(4 x 4, 3 x 3)
constexpr float kNear = 0.75f;  // its interpolation points: 0, +-kNear, +-kFar and infinity, as in engine/weights.py
constexpr float kFar = 1.5f;
constexpr int kDenseRows = 6;   // output maps that the dense product of most kernels computes together

struct Grid {
    int32_t depth, height, width;
    int32_t tiles_y, tiles_x;
    int64_t slice;  // tiles of one slice
    int64_t tiles;  // of all slices
    int64_t chunk;  // pixels from one chunk to the next
};

// Where pixels lie, of whatever type they are stored in; kernels know it, and places are counted in pixels.
using Pixels = void;

// Where phase 0 of a tile of channel 0 lies; also for tiles before the first.
inline __attribute__((always_inline)) int64_t place(int64_t tile, int64_t chunk) {
    return (tile >> 6) * chunk + (tile & (kChunk - 1));
}

// One input channel of a convolution, its depth shift applied: tile f of the output's grid reads tile f + move of `data` for
// lo <= f < hi, and zeros elsewhere. The producer's norm is value * scale + offset.
struct Channel {
    const Pixels* data;
    int64_t chunk;
    int64_t move;
    int64_t lo, hi;
    float scale, offset, slope;
    // Where the input is the gradient of a conv's output: `data` is that of the map after norm and activation, `raw` the output
    // itself. scale * (data past the activation) + by_raw * (raw - mean) + constant.
    const Pixels* raw;
    float mean, by_raw, constant;
};

// One channel of a gradient that is written or added to: tile f goes to f + move of `data` for lo <= f < hi, nowhere else.
struct Target {
    float* data;
    int64_t chunk;
    int64_t move;
    int64_t lo, hi;
    int32_t add;
    int32_t bypass;  // the caches, where it is written
};

// Maps of a coarser level that were pooled from a finer one: the pixels of the window of each tile of a chunk of the finer.
struct Unpooled {
    const Pixels* pooled;    // largest (or smallest) raw values, the first channel
    const float* gradient;   // of the pooled map, the first channel
    const int64_t* places;   // [window of the tile][kChunk]: of each tile in a coarse map
    const int64_t* lines;    // of the cache: a place in each that `places` are in
    int64_t n_lines;
    const uint32_t* later;   // [vector]: tiles in the second slice of their windows
    int height, width;
};

// What the backward pass of norm and activation has to know of a conv's output, one number a channel.
struct NormChannels {
    const float *scale, *offset, *mean;
    float slope;
};

// Sums around the mean of a few pixels of the channel, so that nothing cancels when the mean is large.
struct Statistics {
    double sum, square;
    int64_t count;
    float center;
    int32_t started;
};

// Where to keep each tile pooled to 2 x 2 pixels; nowhere if `data` is null.
struct Halved {
    Pixels* data;
    const float* gamma;  // its sign says whether the largest raw value or the smallest is the largest after the norm
    int64_t chunk;
};

// Connections by output map: row r feeds output[r] with connections start[r] ... start[r + 1] - 1.
struct SparseRows {
    const int32_t* start;
    const int32_t* output;
    const uint16_t* index;  // input map of a connection
    int32_t rows;
};

// Tiles that lie beside each other in a row of a grid and in one chunk, and where they go.
struct Span {
    int64_t from;  // of the first; nowhere if negative: zeros
    int64_t to;
    int32_t count;
};

// Lanes of a vector that go to consecutive tiles of one row and one chunk.
struct Piece {
    int64_t offset;  // where lane 0 would go, phase 0 and channel 0
    uint32_t lanes;
};

// The same pixel of each tile of a coarse block, and of the tiles' other halves if there are two ways: what the transposed conv
// makes of them is a row of fine tiles, pixel by pixel of the stride's window.
struct UpsampleTask {
    const float* pixels[2];  // [channel][tile of the block]
    const float* weight;     // [connection][sub]
    int ways, subs;
    int first_row, last_row;
    Pixels* out[4];  // of each sub
    const Piece* pieces;
    const int* first_piece;  // of each vector of fine tiles, and the number of pieces
};

struct Kernels {
    int lanes;
    int pixel_bytes;
    int block_vectors;  // of tiles in a block of a convolution, at most
    // V[point][channel][tile of the block] = transformed input; memory of the block after is asked for meanwhile
    void (*input_transform)(const Channel* channels, int n, const Grid& grid, int64_t first, int vectors, float* v,
                            int64_t v_pitch);
    // M[output][tile] = (or +=) sum over connections of weight * V[index][tile]
    void (*sparse_product)(const float* v, float* m, const SparseRows& rows, const float* weight, int vectors, bool add);
    // The same of two points, or null: V and M of the second lie `pitch` behind those of the first, its weights weight_pitch
    void (*sparse_pair)(const float* v, float* m, int64_t pitch, const SparseRows& rows, const float* weight,
                        int64_t weight_pitch, int vectors, bool add);
    int dense_rows;   // outputs of a group of dense_product
    int dense_depth;  // its weights are padded to a multiple of so many inputs, of all taps together
    // The same as sparse_product over `taps` inputs with every connection present; weight[group][tap][channel][kDenseRows],
    // or as in kernels_amx.cpp.
    void (*dense_product)(const float* const* v, int taps, int inputs, const float* weight, int outputs, float* m, int vectors);
    // Pixels of output maps from M[point][output][tile], and their statistics. `stream`: past the caches.
    void (*output_transform)(const float* m, int64_t m_pitch, int first_output, int last_output, const Grid& grid,
                             int64_t first, int vectors, Pixels* out, const Halved& halved, bool stream,
                             Statistics* statistics);
    // Pixels of one phase that were computed directly, and their statistics.
    void (*store_phase)(const float* m, int outputs, const Grid& grid, int64_t first, int vectors, int phase, Pixels* out,
                        Statistics* statistics);
    int upsample_tiles;  // in a block of coarse tiles
    // pixels[phase * pitch + tile] = activated pixels of a block of tiles
    void (*activate_block)(const Pixels* tiles, float scale, float offset, float slope, float* pixels, int64_t pitch);
    // out[sub][output * kChannel + tile] = sum over connections of weight[connection][sub] * pixels[index][tile]
    void (*upsample_product)(const UpsampleTask& task, const SparseRows& rows);
    // out[to + k] = activated in[from + k * stride]
    void (*gather)(const Pixels* in, const Span* spans, int64_t n, int stride, float scale, float offset, float slope,
                   float* out);
    // out[to + k] = largest (or smallest) of in[from + k * stride], in[further[...] + k * stride] ...
    void (*pool)(const Pixels* in, const Span* spans, int64_t n, const int64_t* further, int n_further, int stride, bool largest,
                 Pixels* out);
    // Nothing but multiply-adds, as many as the CPU can do; returns how many of one float it did.
    int64_t (*multiply_add_only)(int64_t rounds);
    // out[4 * k + i] = in[i][k]
    void (*pixels_row)(const float* in, int64_t in_stride, int64_t tiles, int64_t pixels, float* out);

    // The backward pass; gradients of maps are floats.
    int dot_rows, dot_columns;  // dense_dots sums so many rows and columns together
    // V[point][channel][tile] of the convolution's gradient as an input, unless v is null, and M[point][channel][tile] = A y A^T
    void (*gradient_transform)(const Channel* channels, int n, const Grid& grid, int64_t first, int vectors, float* v,
                               int64_t v_pitch, float* m, int64_t m_pitch);
    // Pixels of gradients from M[point][channel][tile], written or added
    void (*gradient_output)(const float* m, int64_t m_pitch, const Target* targets, int n, int64_t first, int vectors);
    // sums[connection] += sum over tiles of all segments of m[output][tile] * v[index][tile]
    void (*sparse_dots)(const float* const* v, const float* const* m, int segments, const SparseRows& rows, float* sums,
                        int vectors);
    // sums[row block][column block][row][column] += sum over tiles of all segments of a[row][tile] * b[column][tile]
    void (*dense_dots)(const float* const* a, int rows, const float* const* b, int columns, int segments, float* sums,
                       int vectors);
    // Adds what was pooled, if unpooled is not null, to the gradient of a chunk of these channels; then adds to sums[channel][2] the
    // gradient past the activation, and its product with raw - mean.
    void (*norm_sums)(float* gradient, const Pixels* raw, int channels, const NormChannels& norm, const Grid& grid,
                      int64_t first, const Unpooled* unpooled, double* sums);
    // The gradient of n pixels of the convolution's output, written over that of the activation.
    void (*norm_gradient)(const Channel& channel, int64_t n, float* gradient);
    // to[k] = (or +=) from[k]
    void (*accumulate)(const float* from, int64_t n, float* to, bool add);
    // Pixels of fine tiles, those of `ways` coarse tiles' halves in turn, added where the pieces say.
    void (*add_pieces)(const float* const* m, int ways, int first_channel, int last_channel, int vectors, const Piece* pieces,
                       const int* first_piece, float* out);
    const Kernels* (*floats)();  // the kernels of the same instructions for maps in float, as gradients are
};

const Kernels* kernels_amx();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_float16();
const Kernels* kernels_avx2();
const Kernels* kernels_avx2_float16();
const Kernels* kernels_generic();
const Kernels* kernels_generic_float16();

}  // namespace e2e
