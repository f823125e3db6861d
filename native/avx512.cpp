// AVX-512 (F, BW, DQ, VL). A code of up to 4 bits is an index into a table of 16 weights, made once per group.
#include <immintrin.h>

#include "attention.h"
#include "rows.h"

namespace greenroom {
namespace {

struct Avx512 {
    using F = __m512;
    static constexpr int kWidth = 16;

    static F zero() { return _mm512_setzero_ps(); }
    static F set1(float value) { return _mm512_set1_ps(value); }
    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, F value) { _mm512_storeu_ps(p, value); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static float reduce(F a) { return _mm512_reduce_add_ps(a); }

    static __m512i widen(const std::uint8_t* p) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static F from_bytes(const std::uint8_t* p) { return _mm512_cvtepi32_ps(widen(p)); }

    template <bool FLOAT16>
    static F from_halves(const std::uint8_t* p) {
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        if constexpr (FLOAT16) return _mm512_cvtph_ps(halves);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }

    // Index bits above a code's own are its neighbours': tables repeat, so that they need not be masked away.
    static F ladder(int top) {
        const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        return _mm512_cvtepi32_ps(_mm512_and_si512(lanes, _mm512_set1_epi32(top)));
    }

    template <int BITS, int SUB>
    static void unpack(const std::uint8_t* p, const float* scale, const float* offset, F* weights) {
        constexpr int groups = kBlock / SUB, per_group = SUB / kWidth;
        if constexpr (BITS == 8) {
            for (int i = 0; i < 4; ++i)
                weights[i] = fma(from_bytes(p + 16 * i), set1(scale[i / per_group]), set1(offset[i / per_group]));
            return;
        }
        F table[groups];
        for (int g = 0; g < groups; ++g) table[g] = fma(ladder(BITS == 4 ? 15 : 3), set1(scale[g]), set1(offset[g]));
        if constexpr (BITS == 4) {
            const __m512i low = widen(p), high = widen(p + 16);
            weights[0] = _mm512_permutexvar_ps(low, table[0 / per_group]);
            weights[1] = _mm512_permutexvar_ps(high, table[1 / per_group]);
            weights[2] = _mm512_permutexvar_ps(_mm512_srli_epi32(low, 4), table[2 / per_group]);
            weights[3] = _mm512_permutexvar_ps(_mm512_srli_epi32(high, 4), table[3 / per_group]);
        } else {
            const __m512i codes = widen(p);
            weights[0] = _mm512_permutexvar_ps(codes, table[0 / per_group]);
            weights[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 2), table[1 / per_group]);
            weights[2] = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), table[2 / per_group]);
            weights[3] = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 6), table[3 / per_group]);
        }
        if constexpr (BITS == 3) {
            for (int i = 0; i < 4; ++i) {
                std::uint16_t mask;
                std::memcpy(&mask, p + 16 + 2 * i, 2);
                weights[i] = _mm512_mask3_fmadd_ps(set1(4.0f), set1(scale[i / per_group]), weights[i], mask);
            }
        }
    }
};

bool supported() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

}  // namespace

const Isa kAvx512 = {"avx512", "AVX-512", supported, rows<Avx512>, attend<Avx512>, mix<Avx512>};

}  // namespace greenroom
