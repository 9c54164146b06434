// Which instructions this CPU has, for code that chooses between kernels.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>

namespace e2e {

// AVX2 with conversions of halves; clang's __builtin_cpu_supports does not know the latter.
inline bool has_avx2_and_f16c() {
    unsigned a, b, c, d;
    return __builtin_cpu_supports("avx2") && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

}  // namespace e2e
#endif
