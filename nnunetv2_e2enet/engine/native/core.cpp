// The C ABI. Numbers and raw buffers go in, nothing is kept, nothing is thrown.
#include <algorithm>
#include <cstring>
#include <new>

#include "cpu.h"
#include "driver.h"
#include "export.h"
#include "scan.h"

namespace e2e {
namespace {

// A word together with its place, mixed so that each bit of both changes every bit of the result (MurmurHash3's finalizer).
// Sums of such numbers notice changes that sums of the words themselves cancel: connections that trade places, for example.
uint64_t mixed(uint64_t word, int64_t place) {
    uint64_t h = word + static_cast<uint64_t>(place + 1) * 0x9e3779b97f4a7c15;
    h = (h ^ h >> 33) * 0xff51afd7ed558ccd;
    h = (h ^ h >> 33) * 0xc4ceb9fe1a85ec53;
    return h ^ h >> 33;
}

constexpr int64_t kWord = 8, kSampledWords = 32;

uint64_t mixed_bytes(const unsigned char* bytes, int64_t n, int64_t place) {
    uint64_t word = 0;
    std::memcpy(&word, bytes, static_cast<size_t>(n));
    return mixed(word, place);
}

// The sum over a few words, evenly spread over all bytes, of which the first has this place.
uint64_t sum_of_sample(const unsigned char* bytes, int64_t n, int64_t place) {
    const int64_t words = std::min(kSampledWords, (n + kWord - 1) / kWord);
    uint64_t total = 0;
    for (int64_t i = 0; i < words; ++i) {
        const int64_t at = n < kWord ? 0 : (n - kWord) * i / std::max<int64_t>(words - 1, 1);
        total += mixed_bytes(bytes + at, std::min(kWord, n - at), place + i);
    }
    return total;
}

// What the work returns, or one of these: core.py raises an exception of its own then.
constexpr int64_t kOutOfMemory = -1, kFailed = -2;

template <typename Work>
int64_t guarded(const Work& work) noexcept {
    try {
        return work();
    } catch (const std::bad_alloc&) {
        return kOutOfMemory;
    } catch (...) {
        return kFailed;
    }
}

const e2e::Kernels& table(const void* kernels) { return *static_cast<const e2e::Kernels*>(kernels); }

}  // namespace
}  // namespace e2e

E2E_EXPORT int e2e_abi() { return 8; }

// Sizes of the structs that Python mirrors, and constants that both know, to notice when the two differ.
E2E_EXPORT void e2e_layout(int64_t* sizes) {
    sizes[0] = sizeof(e2e::Grid);
    sizes[1] = sizeof(e2e::Map);
    sizes[2] = sizeof(e2e::ConvJob);
    sizes[3] = sizeof(e2e::StridedJob);
    sizes[4] = sizeof(e2e::PoolJob);
    sizes[5] = sizeof(e2e::HeadJob);
    sizes[6] = sizeof(e2e::NormGradientJob);
    sizes[7] = sizeof(e2e::ConvGradientJob);
    sizes[8] = sizeof(e2e::StridedGradientJob);
    sizes[9] = sizeof(e2e::UpsampleGradientJob);
    sizes[10] = sizeof(e2e::HeadGradientJob);
    sizes[11] = sizeof(e2e::LabelJob);
    sizes[12] = e2e::kTimers;
    sizes[13] = e2e::kTile;
    sizes[14] = e2e::kChunk;
    sizes[15] = e2e::kDenseRows;
    sizes[16] = static_cast<int64_t>(e2e::kNear * 1024);
    sizes[17] = static_cast<int64_t>(e2e::kFar * 1024);
}

// The kernels of that name, for maps in float or in half, or null if this CPU or this build does not have them.
E2E_EXPORT const void* e2e_kernels(const char* name, int halves) {
    if (!std::strcmp(name, "generic")) return halves ? e2e::kernels_generic_float16() : e2e::kernels_generic();
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    if (!std::strcmp(name, "amx") && avx512 && halves) return e2e::kernels_amx();
    if (!std::strcmp(name, "avx512") && avx512) return halves ? e2e::kernels_avx512_float16() : e2e::kernels_avx512();
    if (!std::strcmp(name, "avx2") && e2e::has_avx2_and_f16c() && __builtin_cpu_supports("fma"))
        return halves ? e2e::kernels_avx2_float16() : e2e::kernels_avx2();
#endif
    return nullptr;
}

// Each returns the floats of scratch memory that the job needs, and does the job unless scratch is null.
#define E2E_JOB(name, Job)                                                                                              \
    E2E_EXPORT int64_t e2e_##name(const void* kernels, const e2e::Job* job, float* scratch, int threads) {              \
        return e2e::guarded([&] { return e2e::run_##name(e2e::table(kernels), *job, scratch, threads); });              \
    }
E2E_JOB(conv, ConvJob)
E2E_JOB(strided, StridedJob)
E2E_JOB(pool, PoolJob)
E2E_JOB(head, HeadJob)
E2E_JOB(norm_gradient, NormGradientJob)
E2E_JOB(conv_gradient, ConvGradientJob)
E2E_JOB(strided_gradient, StridedGradientJob)
E2E_JOB(upsample_gradient, UpsampleGradientJob)
E2E_JOB(head_gradient, HeadGradientJob)

E2E_EXPORT int64_t e2e_import(const void* kernels, const float* image, float factor, const e2e::Map* out, int threads) {
    return e2e::guarded([&] {
        e2e::run_import(e2e::table(kernels), image, factor, *out, threads);
        return int64_t{0};
    });
}

E2E_EXPORT void e2e_dot_shape(const void* kernels, int32_t* shape) {
    shape[0] = static_cast<const e2e::Kernels*>(kernels)->dot_rows;
    shape[1] = static_cast<const e2e::Kernels*>(kernels)->dot_columns;
}

// 3 x 3 kernels of a weight tensor to the Winograd domain: to[point][k] of kernel places[k], zeros where that is negative.
E2E_EXPORT void e2e_pack_kernels(const float* weight, const int32_t* places, int64_t n, int turned, float* to, int threads) {
    e2e::pack_kernels(weight, places, n, turned, to, threads);
}

// to[k] = weight[places[k]], zeros where that is negative.
E2E_EXPORT void e2e_pack_weights(const float* weight, const int32_t* places, int64_t n, float* to, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static) if (n > 1 << 16)
    for (int64_t k = 0; k < n; ++k) to[k] = places[k] < 0 ? 0.0f : weight[places[k]];
}

// A number that changes when any of the bytes does, but for one chance in 2^64: to notice weights that were written in place.
E2E_EXPORT uint64_t e2e_checksum(const unsigned char* bytes, int64_t n, int threads) {
    const int64_t words = n / e2e::kWord;
    uint64_t total = 0;
    #pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total) if (n > 1 << 18)
    for (int64_t i = 0; i < words; ++i) total += e2e::mixed_bytes(bytes + i * e2e::kWord, e2e::kWord, i);
    return total + e2e::mixed_bytes(bytes + words * e2e::kWord, n % e2e::kWord, words);
}

// A number that changes when any of a few words of each of these arrays does: cheap enough for every patch.
E2E_EXPORT uint64_t e2e_sample(const unsigned char* const* arrays, const int64_t* bytes, int64_t n) {
    uint64_t total = 0;
    for (int64_t i = 0; i < n; ++i) total += e2e::sum_of_sample(arrays[i], bytes[i], i * e2e::kSampledWords);
    return total;
}

// Multiply-adds of floats that all threads do, for the machine's peak.
E2E_EXPORT int64_t e2e_multiply_add_only(const void* kernels, int64_t rounds, int threads) {
    int64_t total = 0;
    #pragma omp parallel num_threads(threads) reduction(+ : total)
    total += static_cast<const e2e::Kernels*>(kernels)->multiply_add_only(rounds);
    return total;
}
