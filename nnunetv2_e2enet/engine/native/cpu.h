// Which instructions this CPU has, for code that chooses between kernels, and its cache.
#pragma once

#include <cstdint>
#include <cstdio>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace e2e {

#if defined(__x86_64__)

// AVX2 with conversions of halves; clang's __builtin_cpu_supports does not know the latter.
inline bool has_avx2_and_f16c() {
    unsigned a, b, c, d;
    return __builtin_cpu_supports("avx2") && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

#endif

// The third-level cache that cores share; many megabytes where Linux does not say. (What sysconf gives is that of all cores.)
inline int64_t third_level_bytes() {
    int64_t kilobytes = 0;
    if (std::FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
        long value = 0;
        if (std::fscanf(file, "%ldK", &value) == 1) kilobytes = value;
        std::fclose(file);
    }
    return kilobytes > 0 ? kilobytes << 10 : int64_t{1} << 30;
}

}  // namespace e2e
