// Cached keys and values as numbers, over the operations V of one instruction set; included once by each instruction
// set's translation unit, like rows.h and under the same rules. matrix.h says how they lie.
#pragma once

#include "halves.h"
#include "matrix.h"

namespace greenroom {
namespace {

inline float byte_at(const std::uint8_t* p) { return static_cast<float>(static_cast<std::int8_t>(*p)); }

template <class V>
void widen_keys(const std::uint8_t* block, int dim, int bits, int first, int last, float* to, std::int64_t stride) {
    for (int d = first; d < last; ++d, to += stride)
        for (int p = 0; p < kPositions; p += V::kWidth) {
            if (bits == 16) {
                V::store(to + p, V::template from_halves<true>(block + 2 * (d * kPositions + p)));
                continue;
            }
            const auto scale = V::template from_halves<false>(cached_scales(block, dim, d) + 2 * p);
            const auto both = V::words(block + (d / 2 * kPositions + p) * 2);
            V::store(to + p, V::mul(d % 2 == 0 ? V::even(both) : V::odd(both), scale));
        }
}

// Two positions' values in 8 bits.
template <class V>
void widen_two(const std::uint8_t* block, int dim, int position, float* even, float* odd) {
    const std::uint8_t* from = block + position * dim;
    int i = 0;
    for (; i + V::kWidth <= dim; i += V::kWidth) {
        const std::uint8_t* scales = cached_scales(block, dim, i) + 2 * position;
        const auto both = V::words(from + 2 * i);
        V::store(even + i, V::mul(V::even(both), V::set1(bfloat16_at(scales))));
        V::store(odd + i, V::mul(V::odd(both), V::set1(bfloat16_at(scales + 2))));
    }
    for (; i < dim; ++i) {
        const std::uint8_t* scales = cached_scales(block, dim, i) + 2 * position;
        even[i] = byte_at(from + 2 * i) * bfloat16_at(scales);
        odd[i] = byte_at(from + 2 * i + 1) * bfloat16_at(scales + 2);
    }
}

template <class V>
void widen_halves(const std::uint8_t* halves, int count, float* to) {
    int i = 0;
    for (; i + V::kWidth <= count; i += V::kWidth) V::store(to + i, V::template from_halves<true>(halves + 2 * i));
    for (; i < count; ++i) to[i] = float16_at(halves + 2 * i);
}

template <class V>
void widen_values(const std::uint8_t* block, int dim, int bits, int positions, float* to) {
    if (bits == 16) return widen_halves<V>(block, positions * dim, to);
    int p = 0;
    for (; p + 2 <= positions; p += 2) widen_two<V>(block, dim, p, to + p * dim, to + (p + 1) * dim);
    for (int i = 0; p < positions && i < dim; ++i)  // the last of an odd number
        to[p * dim + i] = byte_at(block + p * dim + 2 * i) * bfloat16_at(cached_scales(block, dim, i) + 2 * p);
}

}  // namespace
}  // namespace greenroom
