// What is done with the logits of a whole scan: windows are summed, and finished slices become labels.
#pragma once

#include <cstdint>

#include "half.h"

namespace e2e {

// Where the voxels of one axis of the result lie on the same axis of the logits.
struct Axis {
    const int32_t* lower;  // the two neighbours
    const int32_t* upper;
    const double* lower_weight;
    const double* upper_weight;
    int64_t size;
};

// Logits of all classes, slice by slice, and the labels that they are resampled to.
struct LabelJob {
    const Half* const* slices;  // [depth]: of each, the first voxel of the first class
    int64_t classes, class_stride, row_stride;
    int32_t width;  // of a row of logits
    int32_t regions;  // a label for each class that exceeds the threshold, the last counts; else for the largest class
    float threshold;
    int32_t label_bytes;  // 1 or 2
    Axis axes[3];
    const uint16_t* labels;  // of the largest class [classes]; of regions [classes + 1], the first where none exceeds
    void* out;
    int64_t out_slice, out_row;  // in labels
};

// Floats that each thread needs for label_slices.
inline int64_t label_scratch(const LabelJob& job) { return job.classes * (job.width + 16) + 6 * (job.axes[2].size + 16); }

// Innermost loops, one set for each instruction set.
struct ScanKernels {
    // sums = half(sums + values * weights), the product rounded to a float
    void (*add)(Half* sums, const float* values, const Half* weights, int64_t n);
    // sums = half(sums / counts); whether one became infinite
    bool (*divide)(Half* sums, const Half* counts, int64_t n);
    // One row of labels of the job: true where all of them are certain, else uncertain says which are not
    bool (*label_row)(const LabelJob& job, int64_t z, int64_t y, float* scratch, int32_t* labels, uint8_t* uncertain);
};

const ScanKernels* scan_kernels_generic();
const ScanKernels* scan_kernels_avx2();  // null where the compiler does not know them

}  // namespace e2e
