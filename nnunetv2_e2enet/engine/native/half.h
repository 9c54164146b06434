// Numbers in half precision, one at a time and on any CPU. Internal to each file that includes this: see kernels.h.
#pragma once

#include <cstdint>
#include <cstring>

namespace e2e {

using Half = uint16_t;  // IEEE binary16, its bits

static inline float float_of_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t bits_of_float(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float widen(Half half) {
    const uint32_t sign = uint32_t{half & 0x8000u} << 16, magnitude = (half & 0x7fffu) << 13;
    if (magnitude < 0x00800000) {  // below the least normal half: exact as a difference
        return float_of_bits(sign | bits_of_float(float_of_bits(magnitude + 0x38800000) - 0x1p-14f));
    }
    return float_of_bits(sign | (magnitude + (magnitude >= 0x0f800000 ? 0x70000000 : 0x38000000)));
}

// To the nearest, ties to even.
static inline Half narrow(float value) {
    const uint32_t bits = bits_of_float(value), magnitude = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
    uint32_t half = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
    if (magnitude < 0x38800000) half = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000;  // counted in 2^-24
    if (magnitude >= 0x477ff000) half = 0x7c00;  // 65520 and more
    if (magnitude > 0x7f800000) half = 0x7e00;
    return static_cast<Half>(sign | half);
}

}  // namespace e2e
