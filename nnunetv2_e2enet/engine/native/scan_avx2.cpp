// Loops over a whole scan for AVX2 and F16C. Without FMA, which would round once where nnU-Net rounds twice.
#include "scan.h"

#if defined(__x86_64__)
#include <cmath>
#include <cstring>
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif
#define E2E_NAMESPACE scan_avx2
#define E2E_F16C
#include "scan_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
const e2e::ScanKernels* e2e::scan_kernels_avx2() { return &E2E_NAMESPACE::kTable; }
#else
const e2e::ScanKernels* e2e::scan_kernels_avx2() { return nullptr; }
#endif
