// Whole scans: windows summed in half precision, and labels of resampled logits. What nnU-Net would compute, to the bit.
#include "scan.h"

#include <omp.h>

#include <algorithm>
#include <cmath>

#include "cpu.h"
#define E2E_NAMESPACE scan_generic
#include "export.h"
#include "scan_kernels.h"  // from here on, products are not contracted with sums

const e2e::ScanKernels* e2e::scan_kernels_generic() { return &E2E_NAMESPACE::kTable; }

namespace e2e {
namespace {

const ScanKernels& kernels() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (scan_kernels_avx2() && has_avx2_and_f16c()) return *scan_kernels_avx2();
#endif
    return *scan_kernels_generic();
}

// The nearest half, as a double; of two, the even one.
double rounded_to_half(double value) {
    if (!std::isfinite(value)) return value;
    int exponent;
    std::frexp(value, &exponent);
    const int step = std::max(exponent - 11, -24);
    const double rounded = std::ldexp(std::nearbyint(std::ldexp(value, -step)), step);
    return std::fabs(rounded) < 65520 ? rounded : std::copysign(INFINITY, value);
}

// A logit between eight others, with scipy's products and sums in scipy's order.
double interpolated(const LabelJob& job, int64_t c, const int64_t* place) {
    double total = 0;
    for (int corner = 0; corner < 8; ++corner) {
        const bool up[3] = {(corner & 4) != 0, (corner & 2) != 0, (corner & 1) != 0};
        int32_t at[3];
        double weight[3];
        for (int axis = 0; axis < 3; ++axis) {
            const Axis& a = job.axes[axis];
            at[axis] = (up[axis] ? a.upper : a.lower)[place[axis]];
            weight[axis] = (up[axis] ? a.upper_weight : a.lower_weight)[place[axis]];
        }
        double term = widen(job.slices[at[0]][c * job.class_stride + at[1] * job.row_stride + at[2]]);
        for (double w : weight) term *= w;
        total += term;
    }
    return total;
}

int32_t exact_label(const LabelJob& job, const int64_t* place) {
    int32_t label = 0;
    double largest = 0;
    for (int64_t c = 0; c < job.classes; ++c) {
        const double value = rounded_to_half(interpolated(job, c, place));
        if (job.regions) {
            if (value > job.threshold) label = static_cast<int32_t>(c + 1);
            continue;
        }
        if (std::isnan(value)) return static_cast<int32_t>(c);  // NumPy's argmax
        if (c == 0 || value > largest) {
            largest = value;
            label = static_cast<int32_t>(c);
        }
    }
    return label;
}

void label_rows(const ScanKernels& kernels, const LabelJob& job, int64_t z, int64_t y, float* scratch, int32_t* labels,
                uint8_t* uncertain) {
    const int64_t n = job.axes[2].size;
    if (!kernels.label_row(job, z, y, scratch, labels, uncertain)) {
        for (int64_t x = 0; x < n; ++x) {
            const int64_t place[3] = {z, y, x};
            if (uncertain[x]) labels[x] = exact_label(job, place);
        }
    }
    const int64_t first = z * job.out_slice + y * job.out_row;
    if (job.label_bytes == 1) {
        uint8_t* const out = static_cast<uint8_t*>(job.out) + first;
        for (int64_t x = 0; x < n; ++x) out[x] = static_cast<uint8_t>(job.labels[labels[x]]);
    } else {
        uint16_t* const out = static_cast<uint16_t*>(job.out) + first;
        for (int64_t x = 0; x < n; ++x) out[x] = job.labels[labels[x]];
    }
}

}  // namespace
}  // namespace e2e

// Adds a window times weights to the sums of a scan, [classes][depth][height][width] contiguous.
// slices are those of the sums that the window covers: of each, the first voxel of the window in the first class.
E2E_EXPORT void e2e_add_window(e2e::Half* const* slices, int64_t class_stride, int64_t row_stride, const float* values,
                               const e2e::Half* weights, int64_t classes, int64_t depth, int64_t height, int64_t width,
                               int threads) {
    const e2e::ScanKernels& kernels = e2e::kernels();
    #pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (int64_t c = 0; c < classes; ++c) {
        for (int64_t z = 0; z < depth; ++z) {
            for (int64_t y = 0; y < height; ++y) {
                kernels.add(slices[z] + c * class_stride + y * row_stride, values + ((c * depth + z) * height + y) * width,
                            weights + (z * height + y) * width, width);
            }
        }
    }
}

// sums = (sums + values) * scale, [classes][depth][height][width]; values are mirrored along the axes whose bits are set in mirrors
// (1 depth, 2 height, 4 width).
E2E_EXPORT void e2e_add_mirrored(float* sums, const float* values, int mirrors, float scale, int64_t classes, int64_t depth,
                                 int64_t height, int64_t width, int threads) {
    #pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (int64_t c = 0; c < classes; ++c) {
        for (int64_t z = 0; z < depth; ++z) {
            for (int64_t y = 0; y < height; ++y) {
                float* __restrict const to = sums + ((c * depth + z) * height + y) * width;
                const int64_t slice = mirrors & 1 ? depth - 1 - z : z, row = mirrors & 2 ? height - 1 - y : y;
                const float* const from = values + ((c * depth + slice) * height + row) * width;
                if (mirrors & 4) {
                    for (int64_t x = 0; x < width; ++x) to[x] = (to[x] + from[width - 1 - x]) * scale;
                } else {
                    for (int64_t x = 0; x < width; ++x) to[x] = (to[x] + from[x]) * scale;
                }
            }
        }
    }
}

// Divides a slice of sums [classes][n] by its counts [n]; whether a quotient is infinite.
E2E_EXPORT int e2e_divide_slice(e2e::Half* sums, const e2e::Half* counts, int64_t classes, int64_t n, int threads) {
    const e2e::ScanKernels& kernels = e2e::kernels();
    int infinite = 0;
    #pragma omp parallel for num_threads(threads) schedule(static) reduction(| : infinite)
    for (int64_t c = 0; c < classes; ++c) infinite |= kernels.divide(sums + c * n, counts, n);
    return infinite;
}

// Bytes of scratch memory that e2e_label_slices needs.
E2E_EXPORT int64_t e2e_label_scratch(const e2e::LabelJob* job, int threads) {
    return threads * static_cast<int64_t>(sizeof(float)) * e2e::label_scratch(*job);
}

// Labels of the slices first to last - 1 of the result.
E2E_EXPORT void e2e_label_slices(const e2e::LabelJob* job, int64_t first, int64_t last, float* scratch, int threads) {
    const e2e::ScanKernels& kernels = e2e::kernels();
    const int64_t rows = job->axes[1].size, n = job->axes[2].size, floats = e2e::label_scratch(*job);
    #pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
    for (int64_t row = first * rows; row < last * rows; ++row) {
        float* const own = scratch + omp_get_thread_num() * floats;
        int32_t* const labels = reinterpret_cast<int32_t*>(own + floats - 2 * (n + 16));
        uint8_t* const uncertain = reinterpret_cast<uint8_t*>(labels + n + 16);
        e2e::label_rows(kernels, *job, row / rows, row % rows, own, labels, uncertain);
    }
}
