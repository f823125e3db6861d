// e^x and what is made of it, written so that compilers turn loops over them into vectors of whatever machine the
// including translation unit is for: internal to it, and without the standard library (see rows.h).
#pragma once

#include <cstdint>
#include <cstring>

namespace greenroom {
namespace {

// e^x for x <= 0 within 2 units in the last place (the polynomial of Cephes' expf); e^-87 below -87.
inline float exp_of_negative(float x) {
    x = x < -87.0f ? -87.0f : x;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits of the sum
    const float shifted = x * 1.44269504088896341f + magic;
    const float n = shifted - magic;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    std::uint32_t bits;
    std::memcpy(&bits, &shifted, 4);
    const std::uint32_t power = (bits + 127u) << 23;
    float scale;
    std::memcpy(&scale, &power, 4);
    return p * scale;
}

inline float sigmoid(float x) {
    const float e = exp_of_negative(x < 0.0f ? x : -x);
    return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

inline float silu(float x) { return x * sigmoid(x); }

}  // namespace
}  // namespace greenroom
