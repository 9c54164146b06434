// Innermost loops over a whole scan. E2E_NAMESPACE and, where the CPU converts halves, E2E_F16C are defined before.
#include <cmath>
#include <cstring>

#include "scan.h"
#ifdef E2E_F16C
#include <immintrin.h>
#endif

// A product that is contracted with a sum rounds once where nnU-Net rounds twice.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

namespace e2e {
namespace E2E_NAMESPACE {
namespace {

void add(Half* sums, const float* values, const Half* weights, int64_t n) {
    int64_t i = 0;
#ifdef E2E_F16C
    for (; i + 8 <= n; i += 8) {
        const __m256 weight = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weights + i)));
        const __m256 sum = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(sums + i)));
        const __m256 product = _mm256_mul_ps(_mm256_loadu_ps(values + i), weight);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(sums + i),
                         _mm256_cvtps_ph(_mm256_add_ps(sum, product), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
#endif
    for (; i < n; ++i) {
        const volatile float product = values[i] * widen(weights[i]);  // rounded before the sum, on any CPU
        sums[i] = narrow(widen(sums[i]) + product);
    }
}

bool divide(Half* sums, const Half* counts, int64_t n) {
    bool infinite = false;
    int64_t i = 0;
#ifdef E2E_F16C
    __m128i found = _mm_setzero_si128();
    const __m128i infinity = _mm_set1_epi16(0x7c00), magnitude = _mm_set1_epi16(0x7fff);
    for (; i + 8 <= n; i += 8) {
        const __m256 count = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(counts + i)));
        const __m256 sum = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(sums + i)));
        const __m128i result = _mm256_cvtps_ph(_mm256_div_ps(sum, count), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        found = _mm_or_si128(found, _mm_cmpeq_epi16(_mm_and_si128(result, magnitude), infinity));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(sums + i), result);
    }
    infinite = _mm_movemask_epi8(found) != 0;
#endif
    for (; i < n; ++i) {
        sums[i] = narrow(widen(sums[i]) / widen(counts[i]));
        infinite |= (sums[i] & 0x7fff) == 0x7c00;
    }
    return infinite;
}

// Four rows of one class, interpolated between slices and rows; the largest magnitude among them, infinity if one is no number.
float blend_rows(const Half* const* rows, const float* weights, float* __restrict out, int64_t n) {
    float largest = 0;
    bool number = true;
    int64_t i = 0;
#ifdef E2E_F16C
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 most = _mm256_setzero_ps(), unordered = _mm256_setzero_ps();
    for (; i + 8 <= n; i += 8) {
        __m256 sum = _mm256_setzero_ps();
        for (int row = 0; row < 4; ++row) {
            const __m256 value = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + i)));
            most = _mm256_max_ps(_mm256_and_ps(value, magnitude), most);
            sum = _mm256_add_ps(sum, _mm256_mul_ps(value, _mm256_set1_ps(weights[row])));
        }
        unordered = _mm256_or_ps(unordered, _mm256_cmp_ps(sum, sum, _CMP_UNORD_Q));
        _mm256_storeu_ps(out + i, sum);
    }
    number = _mm256_movemask_ps(unordered) == 0;
    float lanes[8];
    _mm256_storeu_ps(lanes, most);
    for (float lane : lanes) largest = lane > largest ? lane : largest;
#endif
    for (; i < n; ++i) {
        float sum = 0;
        for (int row = 0; row < 4; ++row) {
            const float value = widen(rows[row][i]), size = std::fabs(value);
            largest = size > largest ? size : largest;
            sum += value * weights[row];
        }
        number = number && sum == sum;
        out[i] = sum;
    }
    return number ? largest : INFINITY;
}

// Interpolated in floats, which err by less than kRounding times the largest logit that takes part. The order of two results
// that lie further apart than that and the steps of a half is the order of the exact ones.
constexpr float kRounding = 1.0f / (1 << 20), kStep = 1.01f / (1 << 10), kLeastStep = 1.0f / (1 << 23);

bool label_row(const LabelJob& job, int64_t z, int64_t y, float* scratch, int32_t* __restrict labels,
               uint8_t* __restrict uncertain) {
    const int64_t n = job.axes[2].size, width = job.width;
    float* const __restrict lower_weight = scratch;
    float* const __restrict upper_weight = lower_weight + n + 16;
    float* const __restrict best = upper_weight + n + 16;
    float* const __restrict second = best + n + 16;
    float* const blended = second + n + 16;
    const int32_t* const __restrict lower = job.axes[2].lower;
    const int32_t* const __restrict upper = job.axes[2].upper;
    for (int64_t i = 0; i < n; ++i) {
        lower_weight[i] = static_cast<float>(job.axes[2].lower_weight[i]);
        upper_weight[i] = static_cast<float>(job.axes[2].upper_weight[i]);
    }
    float corner[4], largest = 0;
    const Half* corners[4];
    for (int row = 0; row < 4; ++row) {
        const Axis &depth = job.axes[0], &height = job.axes[1];
        corner[row] = static_cast<float>((row & 2 ? depth.upper_weight : depth.lower_weight)[z] *
                                         (row & 1 ? height.upper_weight : height.lower_weight)[y]);
        corners[row] = job.slices[(row & 2 ? depth.upper : depth.lower)[z]] +
                       (row & 1 ? height.upper : height.lower)[y] * job.row_stride;
    }
    for (int64_t c = 0; c < job.classes; ++c) {
        const float most = blend_rows(corners, corner, blended + c * (width + 16), width);
        largest = most > largest ? most : largest;
        for (const Half*& rows : corners) rows += job.class_stride;
    }
    const float error = kRounding * largest + kLeastStep;
    int32_t doubt = 0;
    if (job.regions) {
        for (int64_t i = 0; i < n; ++i) labels[i] = uncertain[i] = 0;
        for (int64_t c = 0; c < job.classes; ++c) {
            const float* const __restrict row = blended + c * (width + 16);
            for (int64_t i = 0; i < n; ++i) {
                const float above = row[lower[i]] * lower_weight[i] + row[upper[i]] * upper_weight[i] - job.threshold;
                labels[i] = above > 0 ? static_cast<int32_t>(c + 1) : labels[i];
                uncertain[i] |= !(std::fabs(above) > error);
            }
        }
        for (int64_t i = 0; i < n; ++i) doubt |= uncertain[i];
        return !doubt;
    }
    for (int64_t i = 0; i < n; ++i) {
        best[i] = blended[lower[i]] * lower_weight[i] + blended[upper[i]] * upper_weight[i];
        second[i] = -INFINITY;
        labels[i] = 0;
    }
    for (int64_t c = 1; c < job.classes; ++c) {
        const float* const __restrict row = blended + c * (width + 16);
        for (int64_t i = 0; i < n; ++i) {
            const float value = row[lower[i]] * lower_weight[i] + row[upper[i]] * upper_weight[i];
            const bool larger = value > best[i];
            const float loser = larger ? best[i] : value;
            second[i] = second[i] > loser ? second[i] : loser;
            labels[i] = larger ? static_cast<int32_t>(c) : labels[i];
            best[i] = larger ? value : best[i];
        }
    }
    for (int64_t i = 0; i < n; ++i) {
        const float gap = best[i] - second[i];
        const float size = std::fabs(best[i]) > std::fabs(second[i]) ? std::fabs(best[i]) : std::fabs(second[i]);
        uncertain[i] = job.classes > 1 && !(gap > kStep * size + 2 * error);
        doubt |= uncertain[i];
    }
    return !doubt;
}

constexpr ScanKernels kTable = {add, divide, label_row};

}  // namespace
}  // namespace E2E_NAMESPACE
}  // namespace e2e
