// The kernels for AVX2 with FMA and F16C; nothing where the compiler does not know it.
#include "core.h"

#if defined(__x86_64__)
#include <cstring>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define E2E_NAMESPACE E2E_VARIANT(e2e_avx2)
#define E2E_FLOATS e2e::kernels_avx2
#define E2E_ISA 256
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
const e2e::Kernels* e2e::E2E_VARIANT(kernels_avx2)() { return &E2E_NAMESPACE::kTable; }
#else
const e2e::Kernels* e2e::E2E_VARIANT(kernels_avx2)() { return nullptr; }
#endif
