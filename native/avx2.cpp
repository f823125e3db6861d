// AVX2 with FMA and F16C: every x86-64 server since 2013.
#include <immintrin.h>

#include "activation.h"
#include "attention.h"
#include "rows.h"

namespace greenroom {
namespace {

struct Avx2 {
    using F = __m256;
    static constexpr int kWidth = 8;

    static F zero() { return _mm256_setzero_ps(); }
    static F set1(float value) { return _mm256_set1_ps(value); }
    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, F value) { _mm256_storeu_ps(p, value); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static float reduce(F a) {
        __m128 sum = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
        return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
    }

    static __m256i widen(const std::uint8_t* p) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    }

    // kWidth bytes, zero where not left.
    static F from_bytes(const std::uint8_t* p, std::int64_t left) {
        std::uint8_t some[kWidth] = {};
        if (left < kWidth) {
            std::memcpy(some, p, static_cast<std::size_t>(left));
            p = some;
        }
        return _mm256_cvtepi32_ps(widen(p));
    }

    template <bool FLOAT16>
    static F from_halves(const std::uint8_t* p) {
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        if constexpr (FLOAT16) return _mm256_cvtph_ps(halves);
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    }

    template <int BITS>
    static __m256i codes_at(const std::uint8_t* p, int i) {  // codes 8 i to 8 i + 7 of a block
        if constexpr (BITS == 8) return widen(p + 8 * i);
        constexpr int low = BITS == 3 ? 2 : BITS;            // bits that lie as shifted lanes
        constexpr int lane = low;                            // vectors of 8 in a lane: 2 at 2 bits, 4 at 4 bits
        const __m256i shifted = _mm256_srli_epi32(widen(p + 8 * (i % lane)), low * (i / lane));
        const __m256i codes = _mm256_and_si256(shifted, _mm256_set1_epi32((1 << low) - 1));
        if constexpr (BITS != 3) return codes;
        const __m256i bit = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
        const __m256i high = _mm256_and_si256(_mm256_set1_epi32(p[16 + i]), bit);
        return _mm256_or_si256(codes, _mm256_and_si256(_mm256_cmpeq_epi32(high, bit), _mm256_set1_epi32(4)));
    }

    template <int BITS, int SUB>
    static void unpack(const std::uint8_t* p, const float* scale, const float* offset, F* weights) {
        constexpr int per_group = SUB / kWidth;
        for (int i = 0; i < kBlock / kWidth; ++i)
            weights[i] = fma(_mm256_cvtepi32_ps(codes_at<BITS>(p, i)), set1(scale[i / per_group]),
                             set1(offset[i / per_group]));
    }
};

bool supported() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

Kernel kernel(const Matrix& matrix) { return float_kernel<Avx2>(matrix.bits); }

}  // namespace

const Isa kAvx2 = {"avx2", "AVX2", supported, kernel, activate, attend<Avx2>, mix<Avx2>};

}  // namespace greenroom
