// What stands between an expert's two products, in plain loops that a compiler turns into vectors. Included by each
// instruction set's translation unit, and internal to it, like rows.h.
#pragma once

#include <cstring>

#include "matrix.h"

namespace greenroom {
namespace {

// a b + c, in one instruction where there is one.
inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

constexpr float kLeastExponent = -80.0f;  // its power, times a value, is no subnormal: those cost up to 150 cycles each

// e to the x: 2^n e^r with |r| <= log(2) / 2, by the Taylor polynomial of degree 7; within 2 units in the last place. 0
// below kLeastExponent, no more than for 88 above.
inline float exponential(float x) {
    const bool is_least = x < kLeastExponent;
    x = is_least ? kLeastExponent : x > 88.0f ? 88.0f : x;
    const float shifted = fused(x, 1.44269504f, 12582912.0f);  // 1.5 * 2^23: the sum's last bit counts ones
    std::uint32_t n;  // unsigned: of what is no number anything may come, but defined
    std::memcpy(&n, &shifted, 4);
    const float whole = shifted - 12582912.0f;
    const float r = fused(whole, 2.12194440e-4f, fused(whole, -0.693359375f, x));  // log(2) in two parts
    float sum = 1.0f / 5040.0f;
    sum = fused(sum, r, 1.0f / 720.0f);
    sum = fused(sum, r, 1.0f / 120.0f);
    sum = fused(sum, r, 1.0f / 24.0f);
    sum = fused(sum, r, 1.0f / 6.0f);
    sum = fused(sum, r, 0.5f);
    sum = fused(sum, r, 1.0f);
    sum = fused(sum, r, 1.0f);
    const std::uint32_t bits = (n - 0x4b400000u + 127u) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return is_least ? 0.0f : sum * power;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

template <Function F>
inline float apply(float x, float alpha) {
    if (F == Function::silu) return x * sigmoid(alpha * x);
    if (F == Function::gelu) return 0.5f * x * (1.0f + __builtin_erff(x * 0.707106781f));
    // tanh(y) = 2 sigmoid(2 y) - 1, and y = sqrt(2 / pi) (x + 0.044715 x^3)
    if (F == Function::gelu_tanh) return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
    const float positive = x <= 0.0f ? 0.0f : x;  // and what is no number stays so
    return F == Function::relu2 ? positive * positive : positive;
}

inline float at_most(float x, float limit) { return x > limit ? limit : x; }
inline float within(float x, float limit) { return at_most(x < -limit ? -limit : x, limit); }

template <Function F>
void activate_by(const Gate& gate, const float* first, const float* up, std::int64_t step, float* to, std::int64_t count) {
    if (up == nullptr)
        for (std::int64_t i = 0; i < count; ++i) to[i] = apply<F>(first[i], gate.alpha);
    else if (step == 1)
        for (std::int64_t i = 0; i < count; ++i)
            to[i] = apply<F>(at_most(first[i], gate.limit), gate.alpha) * (within(up[i], gate.limit) + gate.plus);
    else
        for (std::int64_t i = 0; i < count; ++i)
            to[i] = apply<F>(at_most(first[2 * i], gate.limit), gate.alpha) * (within(up[2 * i], gate.limit) + gate.plus);
}

void activate(const Gate& gate, const float* first, const float* up, std::int64_t step, float* to, std::int64_t count) {
    switch (gate.function) {
        case Function::silu: return activate_by<Function::silu>(gate, first, up, step, to, count);
        case Function::gelu: return activate_by<Function::gelu>(gate, first, up, step, to, count);
        case Function::gelu_tanh: return activate_by<Function::gelu_tanh>(gate, first, up, step, to, count);
        case Function::relu: return activate_by<Function::relu>(gate, first, up, step, to, count);
        default: return activate_by<Function::relu2>(gate, first, up, step, to, count);
    }
}

}  // namespace
}  // namespace greenroom
