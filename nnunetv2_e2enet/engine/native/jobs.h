// What Python asks for, over the C ABI: structs of numbers and pointers that engine/jobs.py mirrors field by field.
// All pointers stay the caller's. Every map holds one sample.
#pragma once

#include <cstdint>

#include "core.h"

namespace e2e {

// A feature map in chunks of tiles. scale and offset are the norm still to be applied, one number a channel; null: none is.
struct Map {
    Pixels* data;
    int64_t channels;
    Grid grid;
    const float* scale;
    const float* offset;
    float slope;  // of the leaky ReLU after the norm
};

// Instance norm of a conv's output: read gamma and beta, write the scale and offset that normalise the stored map.
struct Norm {
    const float* gamma;
    const float* beta;
    float* scale;
    float* offset;
    float* mean;  // for the backward pass
    float* rstd;
    const float* unit;  // null, or what each channel was multiplied by, as its variance then was by the square
    double eps;
};

// 3 x 3 kernels in the Winograd domain. Sparse: connections in chunks of input maps, weight[point][connection].
// Dense: weight[point][group of kDenseRows outputs][input][kDenseRows], or as in kernels_amx.cpp.
struct WinogradWeights {
    const float* weight;
    const int32_t* start;        // [chunk][outputs + 1]
    const int32_t* output;       // [chunk][outputs]
    const uint16_t* index;       // counted from the first input of the chunk
    const int32_t* chunk_first;  // [chunks + 1], input maps
    int64_t connections;
    int32_t inputs, outputs, chunks, dense;
};

// Transposed conv whose kernel is its stride; weight[depth position][connection][row position * column position].
struct Upsample {
    Map coarse;
    const float* weight;
    const int32_t* start;
    const int32_t* output;
    const uint16_t* index;
    int64_t connections;
    int32_t outputs;
    int32_t stride[3];
};

// One shift block at stride 1: flows -> shift -> conv -> statistics. Flow `upward` is computed on the way, slice by slice.
struct ConvJob {
    Map flows[3];
    int32_t n_flows;
    int32_t upward;        // which flow, -1: none
    const int32_t* shift;  // slices that each channel of the concatenation moves
    Upsample upsample;
    WinogradWeights weights;
    Norm norm;
    Map out;
    Pixels* halved;   // null, or memory for `out` with its tiles pooled to 2 x 2 pixels
    double* seconds;  // null, or kTimers numbers that time is added to
};

// Any other conv of an encoder: weight[group][tap][input][kDenseRows].
struct StridedJob {
    Map in;
    const int32_t* shift;
    const float* weight;
    int32_t stride[3];
    Norm norm;
    Map out;
    double* seconds;
};

struct PoolJob {
    Map in;         // or, for strides of 2 in the plane, what a ConvJob left in `halved`
    int32_t halved;
    const float* gamma;  // its sign says whether the largest raw value or the smallest is the largest after the norm
    int32_t stride[3];
    Map out;
    double* seconds;
};

struct HeadJob {
    Map in;
    const float* weight;  // [group][input][kDenseRows]
    const float* bias;    // null or one a class
    int32_t classes;
    float* logits;  // (class, depth, height, width); null: not wanted
    double* seconds;
};

// ---- the backward pass; gradients of weights are added to ------------------------------------------------------------

// Norm and activation of a conv's output: what turns the gradient past the activation, `gradient`, into that of the output.
struct NormGradientJob {
    Map raw;
    float* gradient;
    const float* mean;
    const float* rstd;
    Map pooled;  // the downward flow of this map, data null: none; its gradient is added to `gradient`
    const float* pooled_gradient;
    int32_t stride[3];
    int32_t apply;  // write the gradient of the output over `gradient`
    float* by_raw;  // see Channel
    float* constant;
    float* weight_gradient;
    float* bias_gradient;
    double* seconds;
};

// A shift block at stride 1.
struct ConvGradientJob {
    ConvJob forward;         // of whose weights only the connections are read
    WinogradWeights turned;  // by half a turn, from outputs to inputs
    const float* gradient;   // of the output, past its activation
    const float *mean, *by_raw, *constant;
    Map into[3];         // gradients of the flows, of maps like these; data null: not wanted
    int32_t add[3];      // to what is there, instead of writing it
    const int32_t* places;  // of each sum over tiles: kernel in the weights, -1: of no connection
    float* weight_gradient;
};

// Any other conv of an encoder, whose output's gradient is `gradient` itself.
struct StridedGradientJob {
    Map in;
    const int32_t* shift;
    int32_t stride[3];
    Map gradient;
    float* into;  // of a map like `in`, added to; null: not wanted
    const float* turned;    // see direct_gradient.cpp
    const int32_t* places;  // of each sum: weight
    float* weight_gradient;
    double* seconds;
};

struct UpsampleGradientJob {
    Upsample upsample;
    Map gradient;  // of the upward flow, fine
    const float* turned;  // [depth position * row position * column position][connection], from outputs to inputs
    const int32_t* turned_start;
    const int32_t* turned_output;
    const uint16_t* turned_index;
    float* into;  // of the coarse map
    int32_t add;
    const int32_t* places;  // [depth, row and column position][connection]
    float* weight_gradient;
    double* seconds;
};

struct HeadGradientJob {
    Map in;
    float* into;
    int32_t add, classes;
    const float* turned;  // [group of inputs][class][kDenseRows]
    const int32_t* places;
    const float* logits;  // their gradient, (class, depth, height, width)
    float* weight_gradient;
    float* bias_gradient;  // or null
    double* seconds;
};

enum Timer {
    kInput, kProduct, kOutput, kUpsample, kStrided, kPool, kHead,
    kNormGradient, kGradientInput, kGradientProduct, kGradientOutput, kDots, kUpsampleGradient, kStridedGradient, kHeadGradient,
    kTimers
};

}  // namespace e2e
