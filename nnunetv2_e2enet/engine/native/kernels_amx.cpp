// The kernels for AVX-512 and maps in float16, with dense products in the tile registers of AMX. They are left out where the
// compiler does not know AMX: GCC before 11 has no amxtileintrin.h, clang before 11 no amxintrin.h.
//
// AMX multiplies numbers of 8 significant bits (bfloat16), too few for logits. So each float is split into two of them, the first
// 8 bits and the next, and three products are summed in float: first by first, first by second, second by first. What is left
// out is below 2^-15 of a product.
#include "core.h"

#if defined(__x86_64__) && defined(__linux__) && (__has_include(<amxtileintrin.h>) || __has_include(<amxintrin.h>))
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,amx-tile,amx-bf16")
#endif

namespace e2e {
namespace {

constexpr int kLanes = 16;             // tiles in a vector, and columns of a tile register
constexpr int kRows = 16;              // outputs in a tile register
constexpr int kDepth = 32;             // inputs in a tile register
constexpr int64_t kRegister = 1024;    // bytes
constexpr int kKept = 16;              // of kDepth inputs each, that are split at a time
constexpr int kVectors = 4;

// Weights lie as [group of kRows][kDepth inputs][first, second][row][input]; inputs as [vector][kDepth inputs][first, second][pair
// of inputs][tile][input].
struct alignas(64) Split {
    char parts[kVectors][kKept][2][kRegister];
};

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
    TileShapes() {
        for (int i = 0; i < 8; ++i) {
            bytes[i] = 64;
            rows[i] = 16;
        }
    }
};

// Two inputs of a vector of tiles, side by side in halves of each lane.
inline void split(__m512 even, __m512 odd, char* first) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000)), half = _mm512_set1_epi32(0x8000);
    const __m512i a = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(even), half), upper);  // to the nearest
    const __m512i b = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(odd), half), upper);
    const __m512i rest_a = _mm512_castps_si512(_mm512_sub_ps(even, _mm512_castsi512_ps(a)));
    const __m512i rest_b = _mm512_castps_si512(_mm512_sub_ps(odd, _mm512_castsi512_ps(b)));
    _mm512_store_si512(first, _mm512_or_si512(_mm512_srli_epi32(a, 16), b));
    const __m512i both = _mm512_ternarylogic_epi32(_mm512_srli_epi32(rest_a, 16), rest_b, upper, 0xf8);  // a | (b & c)
    _mm512_store_si512(first + kRegister, both);
}

// Rows of inputs, of all taps one after the other.
class Inputs {
  public:
    Inputs(const float* const* v, int taps, int inputs, int64_t pitch) : v_(v), taps_(taps), inputs_(inputs), pitch_(pitch) {}
    int64_t count() const { return int64_t{taps_} * inputs_; }
    const float* next() {  // null after the last
        if (tap_ == taps_) return nullptr;
        const float* row = v_[tap_] + channel_ * pitch_;
        if (++channel_ == inputs_) {
            channel_ = 0;
            ++tap_;
        }
        return row;
    }

  private:
    const float* const* v_;
    const int taps_, inputs_;
    const int64_t pitch_;
    int tap_ = 0, channel_ = 0;
};

// The next kKept * kDepth inputs, or those that are left and zeros; returns how many times kDepth they are.
int split_inputs(Inputs& inputs, int vectors, int left, Split& to) {
    const int chunks = left < kKept ? left : kKept;
    for (int chunk = 0; chunk < chunks; ++chunk) {
        for (int pair = 0; pair < kDepth / 2; ++pair) {
            const float *even = inputs.next(), *odd = inputs.next();
            for (int i = 0; i < vectors; ++i) {
                const __m512 a = even ? _mm512_loadu_ps(even + i * kLanes) : _mm512_setzero_ps();
                const __m512 b = odd ? _mm512_loadu_ps(odd + i * kLanes) : _mm512_setzero_ps();
                split(a, b, to.parts[i][chunk][0] + pair * 64);
            }
        }
    }
    return chunks;
}

// What was stored before is there for the loads of tiles that follow: compilers are not told what those read.
inline void in_order() { __asm__ volatile("" ::: "memory"); }

template <int Rows, int Columns>
inline __attribute__((always_inline)) void multiply_tiles() {
    _tile_dpbf16ps(0, 4, 6);
    if (Columns > 1) _tile_dpbf16ps(1, 4, 7);
    if (Rows > 1) _tile_dpbf16ps(2, 5, 6);
    if (Rows > 1 && Columns > 1) _tile_dpbf16ps(3, 5, 7);
}

// Sums of Rows * kRows outputs for Columns vectors, written to m or added to what is there.
template <int Rows, int Columns>
void block(const char* weight, int64_t group, const char* split, int chunks, float* m, int64_t pitch, bool add) {
    constexpr int64_t kColumn = sizeof(Split::parts[0]);
    float *below = m + kRows * pitch;
    const int64_t stride = pitch * static_cast<int64_t>(sizeof(float));
    if (add) {
        _tile_loadd(0, m, stride);
        if (Columns > 1) _tile_loadd(1, m + kLanes, stride);
        if (Rows > 1) _tile_loadd(2, below, stride);
        if (Rows > 1 && Columns > 1) _tile_loadd(3, below + kLanes, stride);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int chunk = 0; chunk < chunks; ++chunk, weight += 2 * kRegister, split += 2 * kRegister) {
        _tile_loadd(4, weight, 64);
        if (Rows > 1) _tile_loadd(5, weight + group, 64);
        _tile_loadd(6, split + kRegister, 64);
        if (Columns > 1) _tile_loadd(7, split + kColumn + kRegister, 64);
        multiply_tiles<Rows, Columns>();
        _tile_loadd(6, split, 64);
        if (Columns > 1) _tile_loadd(7, split + kColumn, 64);
        multiply_tiles<Rows, Columns>();
        _tile_loadd(4, weight + kRegister, 64);
        if (Rows > 1) _tile_loadd(5, weight + group + kRegister, 64);
        multiply_tiles<Rows, Columns>();
    }
    _tile_stored(0, m, stride);
    if (Columns > 1) _tile_stored(1, m + kLanes, stride);
    if (Rows > 1) _tile_stored(2, below, stride);
    if (Rows > 1 && Columns > 1) _tile_stored(3, below + kLanes, stride);
}

template <int Rows>
void all_vectors(const char* weight, int64_t group, const Split& split, int chunks, float* m, int64_t pitch, int vectors, bool add) {
    int i = 0;
    for (; i + 2 <= vectors; i += 2) block<Rows, 2>(weight, group, split.parts[i][0][0], chunks, m + i * kLanes, pitch, add);
    if (i < vectors) block<Rows, 1>(weight, group, split.parts[i][0][0], chunks, m + i * kLanes, pitch, add);
}

void dense_product(const float* const* v, int taps, int inputs, const float* weight, int outputs, float* m, int vectors) {
    static const TileShapes shapes;
    const int64_t pitch = int64_t{vectors} * kLanes;
    Inputs rows(v, taps, inputs, pitch);
    const int all = static_cast<int>((rows.count() + kDepth - 1) / kDepth);
    const int64_t group = all * 2 * kRegister;
    Split its;
    alignas(64) float rest[kRows * kVectors * kLanes];  // of the last group, where it is not full
    const int full = outputs / kRows;
    const bool partly = full * kRows < outputs;
    in_order();
    _tile_loadconfig(&shapes);
    for (int done = 0; done < all; done += kKept) {
        const int chunks = split_inputs(rows, vectors, all - done, its);
        in_order();
        const char* at = reinterpret_cast<const char*>(weight) + done * 2 * kRegister;
        int g = 0;
        for (; g + 2 <= full; g += 2) all_vectors<2>(at + g * group, group, its, chunks, m + g * kRows * pitch, pitch, vectors, done > 0);
        if (g < full) all_vectors<1>(at + g * group, group, its, chunks, m + g * kRows * pitch, pitch, vectors, done > 0);
        if (partly) all_vectors<1>(at + full * group, group, its, chunks, rest, pitch, vectors, done > 0);
    }
    _tile_release();
    if (partly)
        std::memcpy(m + full * kRows * pitch, rest, static_cast<size_t>((outputs - full * kRows) * pitch) * sizeof(float));
}

// The system lets a process use tile registers when it asks.
bool allowed() {
    constexpr int kAskForState = 0x1023, kTiles = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool bfloat16 = d >> 22 & 1, tiles = d >> 24 & 1;
    return bfloat16 && tiles && syscall(SYS_arch_prctl, kAskForState, kTiles) == 0;
}

}  // namespace
}  // namespace e2e
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const e2e::Kernels* e2e::kernels_amx() {
    static const Kernels table = [] {
        Kernels kernels = *kernels_avx512_float16();
        kernels.dense_product = dense_product;
        kernels.dense_rows = kRows;
        kernels.dense_depth = kDepth;
        return kernels;
    }();
    static const bool can = allowed();
    return can ? &table : nullptr;
}
#else
const e2e::Kernels* e2e::kernels_amx() { return nullptr; }
#endif
