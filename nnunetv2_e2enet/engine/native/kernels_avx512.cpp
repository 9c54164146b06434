// The kernels for AVX-512 (F, DQ, BW, VL); nothing where the compiler does not know it.
#include "core.h"

#if defined(__x86_64__)
#include <cstring>
#if !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,prefer-vector-width=512")
#else
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), apply_to = function)
#endif
#define E2E_NAMESPACE E2E_VARIANT(e2e_avx512)
#define E2E_FLOATS e2e::kernels_avx512
#define E2E_ISA 512
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
const e2e::Kernels* e2e::E2E_VARIANT(kernels_avx512)() { return &E2E_NAMESPACE::kTable; }
#else
const e2e::Kernels* e2e::E2E_VARIANT(kernels_avx512)() { return nullptr; }
#endif
