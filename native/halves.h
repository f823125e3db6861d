// 16-bit floats, one at a time. Internal to each translation unit, like rows.h.
#pragma once

#include <cstdint>
#include <cstring>

namespace greenroom {
namespace {

inline float bfloat16_at(const std::uint8_t* bytes) {
    std::uint16_t half;
    std::memcpy(&half, bytes, 2);
    const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline float float16_at(const std::uint8_t* bytes) {
    std::uint16_t half;
    std::memcpy(&half, bytes, 2);
    // exponent and mantissa moved up are 2^-112 of the value, subnormals included; 2^16 and above: inf and nan
    const std::uint32_t shifted = static_cast<std::uint32_t>(half & 0x7fffu) << 13;
    float value;
    std::memcpy(&value, &shifted, 4);
    value *= 0x1p112f;
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value >= 65536.0f) bits |= 0xffu << 23;
    bits |= static_cast<std::uint32_t>(half & 0x8000u) << 16;
    std::memcpy(&value, &bits, 4);
    return value;
}

}  // namespace
}  // namespace greenroom
